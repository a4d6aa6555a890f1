"""Intervenes: changes an activation or a weight to learn a cause."""

__dist__ = "interp-workbench"
