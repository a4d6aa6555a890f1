"""Does a transformer search a graph by merging paths? The tracer of Saparov et al. (2025, section 4 and appendix).

The hypothesis: each row of the prompt holds a set of rows that its vertex reaches or is reached from. An attention
operation copies one set into another because the two have something in common (the same edge, by position; the same
vertex, by token), so that the paths that are held may double in length in each layer. At the end the last row copies
from a row that holds both start and goal.

    1. Every entry of every attention pattern is edited; those that the answer hangs on are operations.
    2. Perturbed prompts say on what each operation's score depends: its causes.
    3. Backward from the last row, operations and residual stream are a graph of places (layer, row).
    4. Forward through it, sets are merged where a cause says so.
    5. The input is explained where the last row's set then holds a path from start to goal.

The published merge asks for a cause only of the first edge that arrives at a place; the strict one asks every operation
for one, and keeps no set that came without. Both are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from circuits.attention_causes import Cause, Perturbed
from circuits.attention_effects import CleanPass
from circuits.attention_ops import SHARE, EditedPass, Operation, Thresholds, important_operations
from circuits.reachable_sets import Hypothesis, Merge, merge_paths, rows_of_graph
from circuits.search_prompts import SearchPrompt
from workbench.models.transformer import Transformer
from workbench.store import Provenance
from workbench.tables import Table

OPERATION_COLUMNS = [
    *("layer", "dest", "src", "dest_token", "src_token", "sign", "strength", "causes"),
    *("merged_published", "merged_strict"),
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PathTrace:
    """One input, traced."""

    prompt: SearchPrompt
    operations: tuple[Operation, ...]
    """All that count, with causes where they are part of the graph."""
    published: Merge
    strict: Merge
    predicted: int
    correct: bool
    thresholds: Thresholds

    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row an operation that counts, at the positions of the padded prompt."""
        merged = {
            name: {(each.layer, each.dest, each.src) for each in merge.operations}
            for name, merge in (("published", self.published), ("strict", self.strict))
        }
        position, tokens = self.prompt.position.tolist(), self.prompt.tokens.tolist()
        names = self.prompt.layout.vocab
        rows = [
            {
                "layer": each.layer,
                "dest": position[each.dest],
                "src": position[each.src],
                "dest_token": names[tokens[each.dest]],
                "src_token": names[tokens[each.src]],
                "sign": each.sign,
                "strength": each.strength,
                "causes": ", ".join(map(str, each.causes)),
                **{f"merged_{name}": (each.layer, each.dest, each.src) in places for name, places in merged.items()},
            }
            for each in self.operations
        ]
        return pd.DataFrame(rows, columns=OPERATION_COLUMNS)

    @property
    def sets(self) -> pd.DataFrame:
        """One row a place that flows into the answer: the vertices that its row holds, by the strict merge."""
        vertices = [
            (layer, row, sorted({vertex for each in held if (vertex := self.prompt.vertex(each)) is not None}))
            for layer, places in enumerate(self.strict.held)
            for row, held in places.items()
        ]
        rows = [
            {"layer": layer, "position": int(self.prompt.position[row]), "holds": " ".join(map(str, held))}
            for layer, row, held in vertices
        ]
        return pd.DataFrame(rows, columns=["layer", "position", "holds"])

    def tables(self) -> Sequence[Table]:
        """Operations, and reachable sets by layer."""
        says = (
            f"One input, answered {'rightly' if self.correct else 'wrongly'}; explained by the published merge: "
            f"{self.explained}, by the strict one: {self.explained_strict}. An operation counts from {self._rule}."
        )
        named = {"operations": (self.frame, "multiples of the threshold"), "reachable_sets": (self.sets, "vertices")}
        return [
            Table(name=name, frame=frame, kind="table", axes={}, unit=unit, caption=says)
            for name, (frame, unit) in named.items()
        ]

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {
            "explained": self.explained,
            "explained_strict": self.explained_strict,
            "predicted": self.predicted,
            "correct": self.correct,
            "operations": self.frame.to_dict("records"),
            "sets": self.sets.to_dict("records"),
        }

    @property
    def _rule(self) -> str:
        effect = self.thresholds.effect
        return (
            f"{effect:.0%} of the answer's lead on" if self.thresholds.unit == "margin" else f"a fall of {effect:g} on"
        )

    @property
    def explained(self) -> bool:
        """By the published merge."""
        return self.published.explained

    @property
    def explained_strict(self) -> bool:
        """By the merge that asks every operation for a cause."""
        return self.strict.explained


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tracer:
    """What is computed once for a prompt, whatever operations are then asked about."""

    edited: EditedPass
    perturbed: Perturbed

    @classmethod
    def of(cls, model: Transformer, prompt: SearchPrompt, *, unit: Literal["margin", "logit"] = "margin") -> Tracer:
        """Edit every entry, run every perturbed prompt.

        Raises:
            WorkbenchError: several heads a layer, a prompt of another task, or no vertex to stand for another.
        """
        clean = CleanPass.of(model, prompt)
        perturbed = Perturbed.of(clean)
        return cls(edited=EditedPass.of(clean, unit), perturbed=perturbed)

    def trace(
        self,
        operations: Sequence[Operation],
        thresholds: Thresholds = SHARE,
        *,
        prompt: SearchPrompt | None = None,
        hypothesis: Hypothesis = "paths",
    ) -> PathTrace:
        """Explain operations and merge along them.

        Args:
            operations: which.
            thresholds: from what change on a feature is a cause.
            prompt: judges by another graph than the prompt's own.
            hypothesis: what is merged.
        """
        clean = self.edited.clean
        judged = clean.prompt if prompt is None else prompt
        rows = rows_of_graph(operations, n_layers=clean.last + 1, last=len(judged) - 1)
        explained = [
            replace(each, causes=self._causes(each, thresholds)) if each.dest in rows[each.layer + 1] else each
            for each in operations
        ]
        predicted = int(clean.logits.argmax())
        return PathTrace(
            prompt=judged,
            operations=tuple(explained),
            published=merge_paths(judged, explained, rows, strict=False, hypothesis=hypothesis),
            strict=merge_paths(judged, explained, rows, strict=True, hypothesis=hypothesis),
            predicted=predicted,
            correct=predicted in clean.prompt.answers,
            thresholds=thresholds,
            provenance=clean.model.provenance,
        )

    def _causes(self, operation: Operation, thresholds: Thresholds) -> tuple[Cause, ...]:
        return self.perturbed.causes(
            operation.layer, operation.dest, operation.src, sign=operation.sign, threshold=thresholds.cause
        )


def trace_paths(model: Transformer, prompt: SearchPrompt, thresholds: Thresholds = SHARE) -> PathTrace:
    """Trace one input.

    Raises:
        WorkbenchError: several heads a layer, a prompt of another task, or no vertex to stand for another.
    """
    tracer = Tracer.of(model, prompt, unit=thresholds.unit)
    return tracer.trace(important_operations(tracer.edited, thresholds), thresholds)
