"""Small finished runs that ship with the package."""
