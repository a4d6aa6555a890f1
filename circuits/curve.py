"""Faithfulness over sizes: one ranking, cut at many sizes, all of them measured in one call.

CPR and CMD are the areas of the MIB benchmark (Mueller et al. 2025, §3): under faithfulness, which rewards finding the
edges that help, and between it and 1, which asks for the model's own behaviour, both over the share of all edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attribution import terms_of
from circuits.circuit import Circuit, EdgeScores
from circuits.controls import controls_of_size
from circuits.discovery import top_n
from circuits.experiment import Experiment
from circuits.memoised import circuit_values
from workbench.intervals import ratio_bootstrap
from workbench.runtime import WorkbenchError
from workbench.tables import Table

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which MIB measures."""
MOST_SIZES = 30
"""Further sizes, evenly spread over the live edges."""
MOST_TRIED = 200
"""Sizes that are tried to find the smallest circuit."""
ENOUGH = 0.9
"""Faithfulness, and share of the model's accuracy, from which a circuit counts as found."""
MOST_CONTROLLED = 8
"""Sizes at which random circuits are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FaithfulnessCurve:
    """What the best edges of a ranking restore, at each size."""

    requested: tuple[int, ...]
    """Edges taken from the top of the ranking."""
    keep: Bool[Tensor, "size edge"]
    """What was left of them after pruning, and run."""
    faithfulness: Float[Tensor, " size"]
    low: Float[Tensor, " size"]
    high: Float[Tensor, " size"]
    accuracy: Float[Tensor, " size"]
    """Share of answers right, over the whole vocabulary."""
    random_95: Float[Tensor, " size"]
    """95th percentile of random connected circuits as large as what was left; NaN where none were drawn."""
    cpr: float
    """Area under faithfulness over the share of all edges."""
    cmd: float
    """Area between faithfulness and 1."""
    n: int
    controls: int
    title: str
    """Method, metric and ablation."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edges that were run at each size."""
        return tuple(self.keep.sum(1).tolist())

    @property
    def frame(self) -> pd.DataFrame:
        """One row a size."""
        return pd.DataFrame(
            {
                "requested": self.requested,
                "edges": self.sizes,
                "faithfulness": self.faithfulness.tolist(),
                "low": self.low.tolist(),
                "high": self.high.tolist(),
                "accuracy": self.accuracy.tolist(),
                "random_95": self.random_95.tolist(),
            }
        )

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        frame = self.frame
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        return {"cpr": self.cpr, "cmd": self.cmd, "curve": rows}

    def tables(self) -> Sequence[Table]:
        """Faithfulness and the random band as curves over the edges that were run."""
        frame = self.frame
        own = frame.assign(series="circuit").drop(columns="random_95")
        drawn = frame[frame["random_95"].notna()]
        band = pd.DataFrame(
            {"edges": drawn["edges"], "faithfulness": drawn["random_95"], "series": "random, 95th percentile"}
        )
        accuracy = pd.DataFrame({"edges": frame["edges"], "faithfulness": frame["accuracy"], "series": "accuracy"})
        joined = pd.concat([own, band, accuracy], ignore_index=True).sort_values(["series", "edges"], kind="stable")
        return [
            Table(
                name="circuit_curve",
                frame=joined.reset_index(drop=True),
                kind="curve",
                axes={"x": "edges", "y": "faithfulness", "series": "series", "low": "low", "high": "high"},
                unit="share",
                caption=(
                    f"Faithfulness and accuracy of the best edges by {self.title}, over the edges that were run; "
                    f"n = {self.n} examples, 95 % paired bootstrap intervals; {self.controls} random connected "
                    f"circuits a size. CPR {self.cpr:.3f}, CMD {self.cmd:.3f}."
                ),
            )
        ]


def faithfulness_curve(
    plan: Experiment, scores: EdgeScores, *, absolute: bool = True, controls: int = 0, seed: int = 0
) -> FaithfulnessCurve:
    """Cut a ranking at many sizes and run what is left of each, all sizes together.

    Args:
        plan: the experiment.
        scores: of the same graph, under the same ablation and metric.
        absolute: whether an edge that hurts counts as much as one that helps.
        controls: random connected circuits to draw at up to eight sizes.
        seed: of the controls and the bootstrap.

    Raises:
        WorkbenchError: the scores are of another graph, or under another ablation or metric.
    """
    plan.graph.check_same(scores.graph)
    terms_of(plan).check_comparable(scores.terms)
    n_live = int(scores.live.sum())
    mib = [round(share * len(plan.graph.edges)) for share in MIB_SHARES]
    even = torch.linspace(0, n_live, min(n_live, MOST_SIZES) + 1).round().int().tolist()
    requested = sorted({0, *mib, *even})
    ranked = scores.ranking(absolute=absolute)
    ranked = torch.cat([ranked[scores.live[ranked]], ranked[~scores.live[ranked]]])
    keep = torch.zeros(len(requested), len(ranked), dtype=torch.bool)
    for place, size in enumerate(requested):
        keep[place, ranked[:size]] = True
        keep[place] = plan.graph.pruned(keep[place], plan.ablation) if size < len(ranked) else True
    values = circuit_values(plan, keep)
    restored = (values - plan.empty).T
    low, high = ratio_bootstrap(restored, plan.full - plan.empty, seed=seed)
    faithfulness = restored.mean(0) / plan.headroom
    at_mib = faithfulness[[requested.index(size) for size in mib]].double()
    shares = torch.tensor(MIB_SHARES, dtype=torch.float64)
    return FaithfulnessCurve(
        requested=tuple(requested),
        keep=keep,
        faithfulness=faithfulness,
        low=low,
        high=high,
        accuracy=circuit_values(plan.measured_by("accuracy"), keep).mean(1),
        random_95=_random_band(plan, keep.sum(1).tolist(), controls, seed).to(faithfulness),
        cpr=float(torch.trapezoid(at_mib, shares)),
        cmd=float(torch.trapezoid((1 - at_mib).abs(), shares)),
        n=len(plan.batch),
        controls=controls,
        title=f"{scores.method}: {plan.metric.name}, {plan.ablation} ablation",
    )


def smallest_circuit(
    plan: Experiment,
    scores: EdgeScores,
    *,
    faithfulness: float = ENOUGH,
    accuracy: float = ENOUGH,
    absolute: bool = True,
) -> Circuit:
    """The smallest circuit from the top of a ranking that is faithful and answers right.

    Every size is tried up to two hundred live edges, evenly spread ones beyond. Accuracy is over the whole vocabulary:
    it must reach the given share of the model's own.

    Raises:
        WorkbenchError: no size reaches both; says what the best one reaches. Or the scores are of another graph, or
            under other terms.
    """
    plan.graph.check_same(scores.graph)
    terms_of(plan).check_comparable(scores.terms)
    n_live = int(scores.live.sum())
    sizes = torch.linspace(0, n_live, min(n_live, MOST_TRIED) + 1).round().int().tolist()[1:]
    circuits = [top_n(scores, size, absolute=absolute) for size in sizes]
    keep = torch.stack([circuit.keep for circuit in circuits])
    accuracies = plan.measured_by("accuracy")
    restored = (circuit_values(plan, keep) - plan.empty).mean(1) / plan.headroom
    right = circuit_values(accuracies, keep).mean(1) / accuracies.full.mean().clamp(min=1e-9)
    good = ((restored >= faithfulness) & (right >= accuracy)).nonzero()[:, 0].tolist()
    if not good:
        raise WorkbenchError(
            f"No circuit of up to {n_live} edges by {scores.method} reaches faithfulness {faithfulness:g} and "
            f"{accuracy:g} of the model's accuracy; the best reach {float(restored.max()):.3f} and "
            f"{float(right.max()):.3f}. Ask for a size instead."
        )
    best = min((circuits[place] for place in good), key=lambda circuit: circuit.size)
    return replace(best, rule=f"smallest with faithfulness {faithfulness:g}, accuracy {accuracy:g}; {best.rule}")


def _random_band(plan: Experiment, sizes: Sequence[int], controls: int, seed: int) -> Float[Tensor, " size"]:
    """The 95th percentile of random circuits' faithfulness at some of the sizes."""
    band = torch.full((len(sizes),), torch.nan)
    most = int(plan.graph.connected(plan.live).sum())
    possible = sorted({size for size in sizes if 2 <= size <= most})
    if not controls or not possible:
        return band
    chosen = {possible[round(float(place))] for place in torch.linspace(0, len(possible) - 1, MOST_CONTROLLED)}
    drawn = [controls_of_size(plan.graph, plan.live, edges=size, n=controls, seed=seed) for size in sorted(chosen)]
    restored = (circuit_values(plan, torch.cat(drawn)) - plan.empty).mean(1) / plan.headroom
    for size, values in zip(sorted(chosen), restored.split([len(circuits) for circuits in drawn]), strict=True):
        if len(values):
            band[torch.tensor(sizes) == size] = values.quantile(0.95).float()
    return band
