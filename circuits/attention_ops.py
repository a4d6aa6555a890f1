"""Attention operations: the entries of attention patterns that an answer hangs on, and from what effect on they count.

An entry counts where an edit of it lowers the answer's measure, or in the last layer the last row's score for a row
that it copies from, by more than a threshold. It counts as a copy if zeroing it does so, as an inhibited copy if
raising it does; of the two encodings of each effect the one with fewer entries is kept, unless it has none (Saparov et
al. 2025, appendix).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attention_causes import Cause
from circuits.attention_effects import CleanPass, Effects, Measure, edit_effects
from workbench.runtime import WorkbenchError

SIGNS = (1, -1)
"""What an entry is that counts when it is zeroed, and when it is raised."""
TIED = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """From what change on something counts. The same rule holds for a model and its controls."""

    effect: float
    """Fall of the answer's measure."""
    unit: Literal["margin", "logit"]
    """Shares of the answer's lead over the runner-up in the logits; or absolute, of the answer's coordinate of the
    residual stream before the last LayerNorm, which is the published rule and depends on a model's scale."""
    score: float = 0.05
    """Fall of an attention score in the last layer (published: 1/20)."""
    cause: float = 0.1
    """Change of an attention score that makes a feature a cause (published: 1/10)."""

    def __post_init__(self) -> None:
        if min(self.effect, self.score, self.cause) <= 0:
            raise WorkbenchError(
                f"Thresholds are above 0, got {self.effect}, {self.score} and {self.cause} for effect, score and cause."
            )

    def times(self, factor: float) -> Thresholds:
        """All of them multiplied."""
        return replace(self, effect=factor * self.effect, score=factor * self.score, cause=factor * self.cause)


SHARE = Thresholds(effect=0.1, unit="margin")
"""A tenth of the answer's lead."""
PUBLISHED = Thresholds(effect=0.4, unit="logit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One entry of an attention pattern that counts."""

    layer: int
    dest: int
    src: int
    """Rows of the prompt without padding."""
    sign: Literal[1, -1]
    """1: row `dest` copies from `src`; -1: it would go wrong if it did."""
    strength: float
    """Largest change that an edit makes, as a multiple of its threshold."""
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EditedPass:
    """One prompt's pass and what every edit of every layer does to it."""

    clean: CleanPass
    effects: tuple[Effects, ...]
    value: float
    """The measure, unedited."""
    unit: Literal["margin", "logit"]

    @classmethod
    @torch.no_grad()
    def of(cls, clean: CleanPass, unit: Literal["margin", "logit"]) -> EditedPass:
        """Edit every entry once each way."""
        measure = measure_of(clean, unit)
        effects = tuple(edit_effects(clean, step, measure) for step in range(clean.last + 1))
        return cls(clean=clean, effects=effects, value=float(measure(clean.resid[-1][-1:])[0]), unit=unit)

    def read_rows(self, thresholds: Thresholds) -> list[int]:
        """Rows that the last row copies from in the last layer; where no copy counts, the one that counts most."""
        zeroed = self.effects[-1].measure[0, -1]
        counted = zeroed < self.value - self._cut(thresholds)
        if not counted.any() and zeroed.min() < self.value:
            counted = zeroed <= zeroed.min() + TIED
        return counted.nonzero()[:, 0].tolist()

    def strengths(
        self, step: int, read_rows: Sequence[int], thresholds: Thresholds
    ) -> Float[Tensor, "criterion mode dest src"]:
        """Falls of the measure and of the scores of the rows read, as multiples of their thresholds."""
        effects, scores = self.effects[step], self.clean.read_scores
        falls = [(self.value - effects.measure) / self._cut(thresholds)]
        if step < self.clean.last:
            for row in read_rows:
                for edited in (effects.key_score, effects.query_score):
                    falls.append((scores[row] - edited[..., row]) / thresholds.score)
        return torch.stack(falls)

    def _cut(self, thresholds: Thresholds) -> float:
        assert thresholds.unit == self.unit, "effects were measured in another unit"
        # A lead of nothing leaves no share of it.
        return thresholds.effect * max(self.value, TIED) if self.unit == "margin" else thresholds.effect


def measure_of(clean: CleanPass, unit: Literal["margin", "logit"]) -> Measure:
    """The answer's lead over the runner-up, or its coordinate before the last LayerNorm."""
    model = clean.model
    best, rival = clean.logits.topk(2).indices.tolist()
    if unit == "logit":
        return lambda x: x @ model.W_U[:, best]

    def lead(x: Float[Tensor, "edit d_model"]) -> Float[Tensor, " edit"]:
        logits = model.finish(x, {})
        return logits[:, best] - logits[:, rival]

    return lead


def important_operations(edited: EditedPass, thresholds: Thresholds) -> tuple[Operation, ...]:
    """Every entry that counts, by layer."""
    read_rows = edited.read_rows(thresholds)
    found: list[Operation] = []
    for step in range(len(edited.effects)):
        strengths = edited.strengths(step, read_rows, thresholds)
        chosen = torch.zeros_like(strengths[0], dtype=torch.bool)
        for counted in strengths > 1:
            zeroed, raised = counted.flatten(1).sum(1).tolist()
            mode = 1 if zeroed == 0 or zeroed > raised > 0 else 0
            chosen[mode] |= counted[mode]
        if step == edited.clean.last:
            chosen[0, -1, read_rows] = True
        chosen[1] &= ~chosen[0]
        found += _operations(step, chosen.nonzero().tolist(), strengths)
    return tuple(found)


def strongest_operations(
    edited: EditedPass, counts: Mapping[int, int], thresholds: Thresholds
) -> tuple[Operation, ...]:
    """So many entries of each layer, the strongest ones, whether or not they reach the thresholds."""
    last = edited.clean.last
    zeroed = edited.effects[-1].measure[0, -1]
    read_rows = zeroed.argsort()[: counts.get(last, 0)].tolist()
    found: list[Operation] = []
    for step in range(last):
        strengths = edited.strengths(step, read_rows, thresholds)
        of_entry, mode = strengths.amax(0).max(0)
        best = of_entry.flatten().topk(min(counts.get(step, 0), of_entry.numel())).indices
        dest, src = best // len(of_entry), best % len(of_entry)
        places = torch.stack([mode[dest, src], dest, src], 1).tolist()
        found += _operations(step, places, strengths)
    strengths = edited.strengths(last, read_rows, thresholds)
    return (*found, *_operations(last, [[0, len(zeroed) - 1, row] for row in read_rows], strengths))


def count_by_layer(operations: Sequence[Operation]) -> Mapping[int, int]:
    """Operations of each layer."""
    return Counter(operation.layer for operation in operations)


def _operations(step: int, places: Sequence[Sequence[int]], strengths: Tensor) -> list[Operation]:
    largest = strengths.amax(0)
    return [
        Operation(layer=step, dest=dest, src=src, sign=SIGNS[mode], strength=float(largest[mode, dest, src]))
        for mode, dest, src in places
    ]
