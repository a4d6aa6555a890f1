"""The score card: every circuit finder on every model whose circuit is known.

A finder ranks the edges of a model (`circuits.finders`); the ranking is judged by each of two truths apart
(`circuits.truths`) and set beside random rankings (`circuits.ranking`). A learned mask is given the structural truth's
size as its budget. Time is process CPU time in units of one hooked forward pass of the same examples; it counts all
that the ranking took, for ACDC ten searches.

What saturation does shows in EAP: where attention and thresholds are sharp, a gradient at one run is zero along edges
without which the answer breaks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.discovery import METHODS
from circuits.experiment import Experiment
from circuits.finders import THRESHOLDS, OnProgress, Ranking, forward_seconds, part_of, rank_edges
from circuits.ranking import RANKINGS, Band, Chance, Quality, chance, judge
from circuits.truths import (
    CHANGE,
    SET,
    SET_DIGEST,
    SET_N,
    SET_SEED,
    SET_VERSION,
    Truth,
    ablations_of,
    experiment_on,
    fingerprint,
    load_known,
    set_digest,
    truths,
)
from workbench.intervals import t_interval
from workbench.models.known import ABLATIONS, Ablation, KnownCircuit
from workbench.runtime import WorkbenchError, code_version, nearest, one_thread
from workbench.store import Provenance
from workbench.tables import Table

FOR_NOTHING = (
    "0.5 is chance over all edges; live_auroc is what a finder has for nothing, by setting only live edges before the "
    "others."
)
"""What an AUROC is read against."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One finder on one circuit under one ablation, judged by one truth."""

    circuit: str
    ablation: Ablation
    truth: Truth
    finder: str
    reference: str
    """Run at which the finder looks: the clean one, the ablated one, a path between them."""
    metric: str
    edges: int
    live: int
    """Edges that lie in a circuit of carrying edges; every finder is told which."""
    true: int
    quality: Quality | None
    """None where the finder could not run, or where all edges are true or none is."""
    chance: Chance | None
    live_auroc: float | None
    """Of the ranking that only sets live edges before the others: what a finder has for nothing."""
    cpu_seconds: float | None
    forwards: float | None
    """The same in forward passes."""
    reason: str
    """Why there is no quality; empty where there is one."""

    def flat(self) -> dict[str, object]:
        """One value a column."""
        found: dict[str, object] = {
            name: getattr(self, name) for name in ("circuit", "ablation", "truth", "finder", "reference", "metric")
        }
        for measure in Quality.__slots__:
            found[measure] = getattr(self.quality, measure, None)
        found |= {"forwards": self.forwards, "cpu_seconds": self.cpu_seconds}
        found |= {"edges": self.edges, "live": self.live, "true": self.true, "density": self.true / self.edges}
        for measure in Chance.__slots__:
            band = getattr(self.chance, measure, None)
            for end, suffix in (("mean", ""), ("low", "_low"), ("high", "_high")):
                found[f"random_{measure}{suffix}"] = getattr(band, end, None)
        return found | {"live_auroc": self.live_auroc, "reason": self.reason}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreCard:
    """How well each finder found each known circuit."""

    rows: tuple[Row, ...]
    version: str | None
    """Version of the frozen set, if the digest is that of all of it; None otherwise."""
    digest: str
    """Of the weights, prompts and truths that were scored against."""
    n: int
    """Pairs of each circuit."""
    seconds: float
    gradients: Mapping[str, str]
    """What gradient methods see, by circuit whose model has no gradient itself."""
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a circuit, ablation, finder and truth."""
        return pd.DataFrame([row.flat() for row in self.rows])

    @property
    def means(self) -> pd.DataFrame:
        """Mean AUROC of each finder over circuits, with Student's 95 % interval over circuits, cut at 0 and 1.

        One circuit alone has no interval. Finders are compared on the same circuits: a circuit that one of them could
        not score is left out for all, and a finder that scored none is left out.
        """
        found: list[dict[str, object]] = []
        for _, rows in self.frame.groupby(["ablation", "truth"], sort=False):
            wide = rows.pivot(index="circuit", columns="finder", values="auroc").astype(float)
            wide = wide.dropna(axis=1, how="all").dropna(axis=0)
            if wide.empty:
                continue
            values = torch.tensor(wide.to_numpy())
            low, high = (end.clamp(0, 1) for end in t_interval(values))
            free = rows.drop_duplicates("circuit").set_index("circuit").loc[wide.index, ["live_auroc"]].to_numpy(float)
            found += [
                {
                    "finder": finder,
                    "ablation": rows["ablation"].iloc[0],
                    "truth": rows["truth"].iloc[0],
                    "auroc": float(values[:, place].mean()),
                    "low": float(low[place]),
                    "high": float(high[place]),
                    "live_auroc": float(free.mean()),
                    "circuits": len(wide),
                }
                for place, finder in enumerate(wide.columns)
            ]
        columns = ["finder", "ablation", "truth", "auroc", "low", "high", "live_auroc", "circuits"]
        return pd.DataFrame(found, columns=columns)

    def tables(self) -> Sequence[Table]:
        """All numbers, a map of the causal AUROC, and means over circuits."""
        frame = self.frame
        caption = (
            f"Circuit finders on known circuits ({self._set()}), n = {self.n} pairs each. Causal: edges whose ablation "
            f"alone moves some example's metric by more than {CHANGE:g} of the headroom. AUROC and AUPRC are over all "
            "edges, precision and recall at the true size among live edges. Random: mean and 95 % band of "
            f"{RANKINGS} random rankings of the same edges. AUROC: {FOR_NOTHING} Time in forward passes of the same "
            "pairs. EAP takes the ablated run's gradient where the metric compares with the clean run, and the clean "
            "run's elsewhere." + "".join(f" {circuit}: {said}" for circuit, said in self.gradients.items())
        )
        causal = frame.query("truth == 'causal'").dropna(subset=["auroc"]).reset_index(drop=True)
        means = self.means
        counts = means.drop_duplicates(["ablation", "truth"])
        counted = counts[["circuits", "ablation", "truth"]].to_numpy().tolist()
        n = ", ".join(f"{circuits} ({ablation}, {truth})" for circuits, ablation, truth in counted) or "none"
        over = (
            f"Mean AUROC over the circuits ({self._set()}) that all finders could score, n = {n}, with Student's 95 % "
            f"intervals over circuits, cut at 0 and 1. {FOR_NOTHING}"
        )
        return [
            Table(name="scorecard", frame=frame, kind="table", axes={}, unit="", caption=caption),
            Table(
                name="scorecard_causal",
                frame=causal,
                kind="heatmap",
                axes={"x": "circuit", "y": "finder", "value": "auroc", "facet": "ablation"},
                unit="AUROC",
                caption=f"AUROC of each finder against the causal truth ({self._set()}), n = {self.n}. {FOR_NOTHING}",
            ),
            Table(
                name="scorecard_means",
                frame=means,
                kind="bar",
                axes={
                    "x": "finder",
                    "y": "auroc",
                    "series": "truth",
                    "facet": "ablation",
                    "low": "low",
                    "high": "high",
                },
                unit="mean AUROC",
                caption=over,
            ),
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "version": self.version,
            "digest": self.digest,
            "n": self.n,
            "seed": self.provenance.seed,
            "circuits": list(dict.fromkeys(row.circuit for row in self.rows)),
            "finders": list(dict.fromkeys(row.finder for row in self.rows)),
            "causal_change": CHANGE,
            "random_rankings": RANKINGS,
            "acdc_thresholds": list(THRESHOLDS),
            "rows": [row.flat() for row in self.rows],
            "means": self.means.to_dict("records"),
            "gradients": dict(self.gradients),
            "seconds": self.seconds,
            "provenance": self.provenance.to_json(),
        }

    def _set(self) -> str:
        name = "own choice" if self.version is None else f"version {self.version}"
        return f"{name}, digest {self.digest[:12]}"


def card_from_json(content: Mapping[str, Any]) -> ScoreCard:
    """The score card whose `summary` this is.

    Raises:
        WorkbenchError: it is none.
    """
    try:
        origin = content["provenance"]
        return ScoreCard(
            rows=tuple(_row_from_json(row) for row in content["rows"]),
            version=content["version"],
            digest=content["digest"],
            n=content["n"],
            seconds=content["seconds"],
            gradients=content.get("gradients", {}),
            provenance=Provenance(**{**origin, "parents": tuple(origin["parents"])}),
        )
    except (KeyError, TypeError) as error:
        raise WorkbenchError(f"This is not a score card of the workbench: {error!r}.") from error


def _row_from_json(row: Mapping[str, Any]) -> Row:
    plain = [each.name for each in fields(Row) if each.name not in ("quality", "chance")]
    ends = {"mean": "", "low": "_low", "high": "_high"}
    by_chance = {
        measure: {name: row[f"random_{measure}{end}"] for name, end in ends.items()} for measure in Chance.__slots__
    }
    known = by_chance["auroc"]["mean"] is not None
    return Row(
        **{name: row[name] for name in plain},
        quality=None if row["auroc"] is None else Quality(**{name: row[name] for name in Quality.__slots__}),
        chance=Chance(**{measure: Band(**band) for measure, band in by_chance.items()}) if known else None,
    )


def scorecard(
    finders: Sequence[str] | None = None,
    circuits: Sequence[str | KnownCircuit] | None = None,
    ablations: Sequence[str] | None = None,
    *,
    n: int = SET_N,
    seed: int = SET_SEED,
    on_progress: OnProgress | None = None,
) -> ScoreCard:
    """Run finders on known circuits, under each ablation that their truth is meant for, and judge the rankings.

    Args:
        finders: names of `METHODS`; all unless given.
        circuits: names of the frozen set, or known circuits of your own; the whole set unless given.
        ablations: which of those that the circuits name; all unless given.
        n: pairs of each circuit.
        seed: of the pairs, the random rankings and the learned masks.
        on_progress: told the share of the work that is done, circuits counting alike.

    Raises:
        WorkbenchError: an unknown name, two circuits of one name, nothing to run, or what `experiment` refuses.
    """
    begun = time.perf_counter()
    names = _checked("finder", finders, METHODS)
    wanted = _checked("ablation", ablations, ABLATIONS)
    chosen = [load_known(item) if isinstance(item, str) else item for item in (SET if circuits is None else circuits)]
    meant = _meant(names, chosen, wanted, n)
    rows: list[Row] = []
    fingerprints: dict[str, str] = {}
    with one_thread():
        for place, known in enumerate(meant):
            batch = known.pairs(n, seed)
            plans = [experiment_on(known, batch, ablation) for ablation in ablations_of(known) if ablation in wanted]
            found: dict[Ablation, dict[Truth, Tensor]] = {plan.ablation: truths(known, plan) for plan in plans}
            if not place:
                # What a process does for the first time is slow, and no finder's cost.
                rank_edges(plans[0], "eap", size=1)
            told = part_of(on_progress, place, len(meant))
            rows += _rows(known, plans, found, names, seed, told)
            fingerprints[known.name] = fingerprint(known, batch, found)
    digest = set_digest(fingerprints)
    return ScoreCard(
        rows=tuple(rows),
        version=SET_VERSION if digest == SET_DIGEST else None,
        digest=digest,
        n=n,
        seconds=time.perf_counter() - begun,
        gradients={known.name: known.gradients for known in meant if known.gradients},
        provenance=Provenance(code_version=code_version(), seed=seed, parents=tuple(fingerprints.values())),
    )


def _rows(
    known: KnownCircuit,
    plans: Sequence[Experiment],
    found: Mapping[Ablation, Mapping[Truth, Bool[Tensor, " edge"]]],
    finders: Sequence[str],
    seed: int,
    on_progress: OnProgress | None,
) -> Iterator[Row]:
    """Every finder's ranking in every experiment on a circuit, judged by each truth."""
    unit = forward_seconds(known.model, plans[0].batch)
    for done, plan in enumerate(plans):
        told = part_of(on_progress, done, len(plans))
        size = int(found[plan.ablation]["structural"].sum())
        rankings = {
            finder: rank_edges(plan, finder, size=size, seed=seed, on_progress=part_of(told, place, len(finders)))
            for place, finder in enumerate(finders)
        }
        for truth, true in found[plan.ablation].items():
            blank = _blank(known.name, plan, truth, true, seed)
            yield from (_judged(blank, finder, ranking, true, plan, unit) for finder, ranking in rankings.items())


def _blank(circuit: str, plan: Experiment, truth: Truth, true: Bool[Tensor, " edge"], seed: int) -> Row:
    """What a row says before any finder comes: chance, and what is had for nothing."""
    edges, n_true = len(true), int(true.sum())
    of_live = judge(plan.live.float(), true, plan.live)
    return Row(
        circuit=circuit,
        ablation=plan.ablation,
        truth=truth,
        finder="",
        reference="",
        metric=plan.metric.name,
        edges=edges,
        live=int(plan.live.sum()),
        true=n_true,
        quality=None,
        chance=chance(true, plan.live, seed=seed),
        live_auroc=None if of_live is None else of_live.auroc,
        cpu_seconds=None,
        forwards=None,
        reason="" if of_live else f"{n_true} of {edges} edges are true: there is nothing to tell apart",
    )


def _judged(
    blank: Row, finder: str, ranking: Ranking, true: Bool[Tensor, " edge"], plan: Experiment, unit: float
) -> Row:
    """The row of a finder."""
    if ranking.score is None or ranking.cpu_seconds is None:
        return replace(blank, finder=finder, reason=ranking.reason)
    return replace(
        blank,
        finder=finder,
        reference=ranking.reference,
        quality=judge(ranking.score, true, plan.live),
        cpu_seconds=ranking.cpu_seconds,
        forwards=ranking.cpu_seconds / unit,
    )


def _checked(kind: str, given: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The names that were given, each once; all that are known if none were.

    Raises:
        WorkbenchError: one of them is not known.
    """
    for name in given or ():
        if name not in known:
            raise WorkbenchError(f"Unknown {kind} {name!r}. {nearest(name, known)}")
    return list(dict.fromkeys(known if given is None else given))


def _meant(
    finders: Sequence[str], circuits: Sequence[KnownCircuit], ablations: Sequence[str], n: int
) -> list[KnownCircuit]:
    """The circuits whose truth is meant for one of the ablations.

    Raises:
        WorkbenchError: there is nothing to score, or two circuits have one name.
    """
    names = [known.name for known in circuits]
    if len(set(names)) < len(names):
        raise WorkbenchError(f"Circuits need names of their own, got {', '.join(names)}. Give each circuit once.")
    found = [known for known in circuits if set(ablations_of(known)) & set(ablations)]
    if not found or not finders or n < 1:
        meant = "; ".join(f"{known.name} is meant for {', '.join(known.ablations)}" for known in circuits)
        raise WorkbenchError(
            f"Nothing to score: {len(finders)} finders, n = {n} pairs, ablations {', '.join(ablations) or 'none'}, "
            f"{len(circuits)} circuits ({meant or 'none'}). Ask for at least one of each that go together."
        )
    return found
