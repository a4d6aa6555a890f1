"""ACDC: from the logits backwards, drop every edge whose loss is below a threshold (Conmy et al. 2023, algorithm 1).

Each decision depends on those before it, so the algorithm is written one edge at a time. Here a window of candidates is
measured at once under a guess of the decisions, and the guess is right up to the first decision that it got wrong; from
there the window is measured again under the decisions found. The edges that are kept, and the order in which the others
go, are those of the algorithm one at a time. Edges that cannot matter are dropped unmeasured: those that carry the same
in both runs, and those into a node that nobody listens to any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.experiment import Experiment
from circuits.memoised import circuit_values
from workbench.runtime import WorkbenchError

WINDOW = 16
"""Candidates that are first measured at once; the window doubles while guesses are right."""
BISECTIONS = 14
OnProgress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AcdcRun:
    """What ACDC kept at one threshold."""

    threshold: float
    keep: Bool[Tensor, " edge"]
    removed: tuple[int, ...]
    """Edges in the order in which they went."""
    lost: Float[Tensor, " edge"]
    """Mean metric that each edge cost when it was tried, before minus after; 0 where nothing was measured."""
    measured: int
    """Circuits that were measured; one at a time it is every edge."""


def acdc(plan: Experiment, threshold: float, *, on_progress: OnProgress | None = None) -> AcdcRun:
    """Drop each edge, from the logits backwards, whose ablation makes the mean metric worse by less than a threshold.

    Args:
        plan: the experiment; its metric's direction says what worse means.
        threshold: in the metric's unit.
        on_progress: told the share of edges that are decided.

    Raises:
        WorkbenchError: the threshold is not positive: with 0 even edges that carry nothing would stay by rounding.
    """
    if not threshold > 0:
        raise WorkbenchError(f"ACDC needs a threshold above 0 in the metric's unit, got {threshold}.")
    search = _Search(plan=plan, threshold=threshold)
    groups = _groups(plan)
    for done, group in enumerate(groups):
        search.decide(group)
        if on_progress:
            on_progress((done + 1) / len(groups))
    return AcdcRun(
        threshold=threshold,
        keep=search.keep,
        removed=tuple(search.removed),
        lost=search.lost,
        measured=search.measured,
    )


def acdc_of_size(plan: Experiment, edges: int, *, on_progress: OnProgress | None = None) -> AcdcRun:
    """ACDC at a threshold, found by bisection, that keeps no more edges than asked for.

    Sizes jump, so that fewer may be kept; and since each decision depends on those before it, a lower threshold can
    keep fewer edges than a higher one. What is found is the lowest threshold of those tried that keeps no more than
    asked for, which need not be the lowest that there is.
    """
    low, high = 1e-6 * abs(plan.headroom), 2 * float((plan.full - plan.empty).abs().max())
    best = acdc(plan, high)
    # Edges that work against each other can cost more than all of them together.
    while int(best.keep.sum()) > edges:
        low, high = high, 4 * high
        best = acdc(plan, high)
    for done in range(BISECTIONS):
        middle = (low * high) ** 0.5
        found = acdc(plan, middle, on_progress=_part(on_progress, done))
        if int(found.keep.sum()) <= edges:
            best, high = found, middle
        else:
            low = middle
        if int(best.keep.sum()) == edges:
            break
    return best


def _part(on_progress: OnProgress | None, done: int) -> OnProgress | None:
    """What one of the bisections tells its share to."""
    return None if on_progress is None else lambda share: on_progress((done + share) / BISECTIONS)


def _groups(plan: Experiment) -> list[list[int]]:
    """All edges in the order of the algorithm, grouped by readers that do not read each other."""
    graph = plan.graph
    groups: dict[tuple[int, str], list[int]] = {}
    for port in reversed(range(len(graph.ports))):
        reader = graph.ports[port].node
        edges = graph.of_port(port)
        groups.setdefault((reader.step, reader.part), []).extend(reversed(range(edges.start, edges.stop)))
    return list(groups.values())


class _Search:
    """The state of one run: what is still kept, and the metric there."""

    def __init__(self, *, plan: Experiment, threshold: float) -> None:
        self.plan = plan
        self.threshold = threshold
        self.keep = torch.ones(len(plan.graph.edges), dtype=torch.bool)
        self.value = float(plan.full.mean())
        self.removed: list[int] = []
        self.lost = torch.zeros(len(plan.graph.edges))
        self.measured = 0

    def decide(self, edges: Sequence[int]) -> None:
        """Decide on edges whose readers do not read each other, in this order."""
        matter = self.plan.live & self.plan.graph.reaching(self.keep)
        candidates = [edge for edge in edges if matter[edge]]
        decided: dict[int, bool] = {}
        guess = [True] * len(candidates)
        first, window = 0, WINDOW
        while first < len(candidates):
            some = candidates[first : first + window]
            values = self._measure(some, guess[first : first + window])
            found = self._decisions(values, guess[first : first + window])
            right = next((n for n, drop in enumerate(found) if drop != guess[first + n]), None)
            valid = len(some) if right is None else right + 1
            for edge, drop, value in zip(some[:valid], found, values, strict=False):
                decided[edge] = drop
                self.lost[edge] = self.value - value
                if drop:
                    self.keep[edge], self.value = False, value
            guess[first : first + len(some)] = found
            first += valid
            window = 2 * window if right is None else window
        for edge in edges:
            if decided.get(edge, True):
                self.removed.append(edge)
                self.keep[edge] = False

    def _measure(self, candidates: Sequence[int], guess: Sequence[bool]) -> list[float]:
        """The mean metric without each candidate, if those before it went as guessed."""
        keep = self.keep.repeat(len(candidates), 1)
        for place, (edge, drop) in enumerate(zip(candidates, guess, strict=True)):
            keep[place, edge] = False
            if drop:
                keep[place + 1 :, edge] = False
        self.measured += len(candidates)
        return circuit_values(self.plan, keep).mean(1).tolist()

    def _decisions(self, values: Sequence[float], guess: Sequence[bool]) -> list[bool]:
        """Whether each candidate goes, if those before it went as guessed."""
        worse = 1.0 if self.plan.metric.better == "higher" else -1.0
        found, before = [], self.value
        for value, drop in zip(values, guess, strict=True):
            found.append(worse * (before - value) < self.threshold)
            before = value if drop else before
        return found
