"""Intervenes: changes an activation or a weight to learn a cause."""

from circuits.circuit import Circuit as Circuit
from circuits.discovery import extract as extract
from circuits.faithfulness import Evaluation as Evaluation
from circuits.faithfulness import evaluate as evaluate
from circuits.patching import PatchMap as PatchMap
from circuits.patching import patch_each as patch_each

__dist__ = "interp-workbench"
