"""Intervenes: changes an activation or a weight to learn a cause."""

from circuits.amnesic import AmnesicMap as AmnesicMap
from circuits.amnesic import amnesic as amnesic
from circuits.circuit import Circuit as Circuit
from circuits.discovery import extract as extract
from circuits.faithfulness import Evaluation as Evaluation
from circuits.faithfulness import evaluate as evaluate
from circuits.nodes import NodeScores as NodeScores
from circuits.nodes import score_nodes as score_nodes
from circuits.patching import PatchMap as PatchMap
from circuits.patching import patch_each as patch_each
from circuits.paths import PathMap as PathMap
from circuits.paths import path_patch as path_patch

__dist__ = "interp-workbench"
