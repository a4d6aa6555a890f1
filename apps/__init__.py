"""Shows: the command line, the pages, the report."""

__dist__ = "interp-workbench"
