"""Intervenes: changes an activation or a weight to learn a cause."""

from circuits.patching import PatchMap as PatchMap
from circuits.patching import patch_each as patch_each

__dist__ = "interp-workbench"
