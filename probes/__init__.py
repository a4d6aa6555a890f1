"""Looks: reads activations and weights and changes nothing."""

__dist__ = "interp-workbench"
