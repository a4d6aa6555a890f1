"""A model whose circuit is known: what a planted model and a compiled program have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from workbench.models.program_parts import ProgramParts
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch

Ablation = Literal["resample", "mean", "zero"]
"""What an edge carries that is not kept: the counterfactual run's value, the mean over examples, or nothing."""
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KnownCircuit:
    """A model with the edges through which it computes.

    Edges are named `writer->reader` in the graph whose input is split into `embed` and `pos`: `embed->a0.h1<k>`,
    `a0.h0->m1`, `m0->logits`.
    """

    name: str
    model: Transformer | ProgramParts
    pairs: Callable[[int, int], Batch]
    """(n, seed) -> n prompts with counterfactuals of the same length; shorter prompts are padded."""
    structural: frozenset[str]
    """Edges that carry a variable of the computation."""
    constants: frozenset[str] = frozenset()
    """Further edges, which carry only constants such as a bias direction. Zero ablation needs these too."""
    metric: str
    """Name of the metric that judges this model, as in `workbench.metrics`."""
    ablations: tuple[str, ...] = ABLATIONS
    """For which ablations the truth is meant."""
    about: str
    """What the model computes, in one sentence."""
    vocab: tuple[str, ...] = ()
    """What each token reads as; empty where tokens are but numbers."""
    clusters: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    """Step -> clusters of its MLP's neurons that the edges tell apart; other MLPs are whole."""
    gradients: str = ""
    """What gradient methods see of a model that has no gradient itself; empty where they see the model."""

    def __post_init__(self) -> None:
        if unknown := set(self.ablations) - set(ABLATIONS):
            raise WorkbenchError(f"Unknown ablations {sorted(unknown)}. Known: {', '.join(ABLATIONS)}.")
        if malformed := sorted(edge for edge in self.structural | self.constants if edge.count("->") != 1):
            raise WorkbenchError(f"Edges are written writer->reader, got {malformed}.")
        if both := sorted(self.structural & self.constants):
            raise WorkbenchError(f"An edge carries variables or only constants, not both: {both}.")
