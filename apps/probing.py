"""Probes of a run's latents: what each place tells, what the untrained model's does, and what the answer loses with it.

For every latent of the run's task, site and position: accuracy of a linear probe on groups held out, with its control
task; compression; and the amnesic effect, on the prompts held out and on OOD ones where the task has any. Each stands
beside the same of the model as it was before training.

A search has one latent more, which has no place of its own: which vertices can be reached from each edge, and which
reach it. It is asked by `probes.reachability`, after every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pandas as pd
import torch

from apps.analyses import SEED
from apps.searching import search_task
from circuits.amnesic import HELD_OUT, AmnesicMap, amnesic
from probes.description_length import DescriptionLengths, description_length
from probes.linear import ProbeMap, linear_probe
from probes.reachability import ReachabilityMap, reachability, reachability_tables
from workbench.instrument.sites import Site, select_sites
from workbench.intervals import columns_of
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, Task, check_choice
from workbench.tasks.graph_search import GraphSearch
from workbench.tasks.groups import in_several_groups
from workbench.training.checkpoints import Run

PROBE_SITES = "resid_post"
PROMPTS = 1000
WIDTH_SHARE = 4
"""At most one direction in so many is taken out: of a state that lost nearly all, the control says nothing."""
OOD = "ood"
REACHABILITY = "reachability"
"""What a search is asked for beside the latents of its prompts."""
TRAINED, UNTRAINED = "trained", "untrained"
MEASURES = {
    "accuracy": ("accuracy", "Accuracy of a linear probe on prompts of groups held out."),
    "selectivity": ("accuracy", "Accuracy less that of the control task, in which each group has a random label."),
    "compression": ("uniform code / online code", "Bits of the uniform code by bits of the online code; 1 is no gain."),
    "amnesic": (
        "accuracy",
        "Answers lost when the latent's directions are taken out, beyond what as many random directions cost.",
    ),
}
"""What can be shown of each place: unit and meaning. The untrained model's stands in `MEASURE_untrained`."""

Places = tuple[tuple[Site, ...], tuple[int, ...] | None]
"""Sites, and positions or all."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Looked:
    """What one model's places tell of a latent, and what it does without."""

    probes: ProbeMap
    lengths: DescriptionLengths
    forgotten: AmnesicMap

    def columns(self, suffix: str = "") -> list[dict[str, Any]]:
        """The measures of each place, under names that end so."""
        held_out = [place for place in self.forgotten.places if place.prompts == HELD_OUT]
        rows = [
            {
                **columns_of("accuracy", probe.accuracy),
                "control": probe.control.mean,
                "selectivity": probe.selectivity,
                "compression": self.lengths.uniform / code.codelength,
                **columns_of("amnesic", lost.accuracy_lost),
            }
            for probe, code, lost in zip(self.probes.probes, self.lengths.codes, held_out, strict=True)
        ]
        return [{f"{name}{suffix}": value for name, value in row.items()} for row in rows]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probing:
    """The latents of a run at one checkpoint, at every site and position."""

    cells: tuple[Mapping[str, Any], ...]
    """One row a latent and place."""
    forgotten: tuple[Mapping[str, Any], ...]
    """One row a latent, place and set of prompts: answers before and after, control, directions."""
    sizes: tuple[Mapping[str, Any], ...]
    """One row a latent: classes, groups, prompts."""
    split: str
    left_out: Mapping[str, str]
    """Why a latent is not there, by its name."""
    reached: ReachabilityMap | None
    """What a search's stream knows of reachability; None of another task."""
    provenance: Provenance

    @property
    def latents(self) -> tuple[str, ...]:
        """Those that were probed."""
        return tuple(str(row["latent"]) for row in self.sizes)

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {
            "split": self.split,
            "cells": list(self.cells),
            "amnesic": list(self.forgotten),
            "latents": list(self.sizes),
            "left_out": dict(self.left_out),
            **({} if self.reached is None else {REACHABILITY: self.reached.summary()}),
        }

    def tables(self) -> Sequence[Table]:
        """A heat map for each latent and measure, everything in tables, and the curves of reachability."""
        return probing_tables(self.summary())


def probing_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a summary, which may have been kept."""
    cells = pd.DataFrame(summary["cells"])
    maps = [
        _heatmap(cells.loc[cells["latent"] == row["latent"]], row, measure, summary["split"])
        for row in summary["latents"]
        for measure in MEASURES
    ]
    about = f"Prompts of split {summary['split']!r}; 95 % intervals."
    plain = {
        "probes": (summary["cells"], f"Every latent at every place. {about}"),
        "amnesic": (summary["amnesic"], f"Answers with a latent's directions taken out, and with random ones. {about}"),
        "probe_sizes": (summary["latents"], f"Classes, groups and prompts of each latent. {about}"),
    }
    rest = [
        Table(name=name, frame=pd.DataFrame(rows), kind="table", axes={}, unit="", caption=caption)
        for name, (rows, caption) in plain.items()
        if rows
    ]
    return [*maps, *rest, *(reachability_tables(summary[REACHABILITY]) if REACHABILITY in summary else ())]


def _heatmap(cells: pd.DataFrame, sizes: Mapping[str, Any], measure: str, split: str) -> Table:
    """A measure of one latent, trained and untrained side by side."""
    unit, says = MEASURES[measure]
    sides = {TRAINED: measure, UNTRAINED: f"{measure}_untrained"}
    shown = pd.concat(
        [cells[["site", "at"]].assign(model=side, value=cells[column]) for side, column in sides.items()],
        ignore_index=True,
    )
    return Table(
        name=f"probes_{sizes['latent']}_{measure}",
        frame=shown,
        kind="heatmap",
        axes={"x": "at", "y": "site", "value": "value", "facet": "model"},
        unit=unit,
        caption=f"Latent {sizes['latent']!r}. {says} Split {split!r}, {sizes['n_train']} prompts to fit, n = "
        f"{sizes['n_test']} of other groups to judge; {sizes['n_classes']} classes, the most common of which gets "
        f"{sizes['majority']:.3g}.",
    )


def probes_of(
    run: Run,
    step: int | None = None,
    *,
    latent: str | None = None,
    sites: str = PROBE_SITES,
    positions: tuple[int, ...] | None = None,
    n: int = PROMPTS,
    split: str = "test",
    on_progress: Callable[[float], None] = lambda share: None,
) -> Probing:
    """Every latent of the run's task, or one, at each site and position, beside the untrained model.

    Args:
        run: whose model and task.
        step: its checkpoint; None is the last.
        latent: its name, of a search also `reachability`; None takes all.
        sites: as `select_sites` takes them; reachability is read at every edge, after every layer, whatever they are.
        positions: None is all; likewise.
        n: prompts, or all that the split has.
        split: where they are drawn from.
        on_progress: told the share that is done.

    Raises:
        WorkbenchError: prompts without latents, an unknown latent, or none that can be split by group.
    """
    batch = draw_prompts(run.task, n, split)
    others = _ood_prompts(run.task, n, split)
    if not batch.latents:
        with_latents = [name for name in run.task.splits if run.task.examples(name).latents]
        remedy = (
            f"Choose another split: {', '.join(with_latents)}." if with_latents else "No split of the task has any."
        )
        raise WorkbenchError(f"Prompts of split {split!r} of task {run.task.name!r} have no latents to probe. {remedy}")
    offered = (*batch.latents, *((REACHABILITY,) if isinstance(run.task, GraphSearch) else ()))
    if latent is not None:
        check_choice("latent", latent, offered)
    wanted = offered if latent is None else (latent,)
    model = run.model(step)
    places: Places = (select_sites(sites, model), positions)
    found: dict[str, dict[str, Looked]] = {}
    left_out: dict[str, str] = {}
    reached = None
    for done, name in enumerate(wanted):
        try:
            if name == REACHABILITY:
                reached = reachability_of(run, step, n=n, split=split)
            else:
                trained = _look(model, _usable(batch, name), others, name, places)
                on_progress((done + 0.5) / len(wanted))
                found[name] = {TRAINED: trained, UNTRAINED: _look_before(run, name, places, n, split)}
        except WorkbenchError as error:
            left_out[name] = str(error)
        on_progress((done + 1) / len(wanted))
    if not found and reached is None:
        raise WorkbenchError(left_out[wanted[0]])
    return Probing(
        cells=tuple(row for name, looked in found.items() for row in _cells(name, looked, run.task.position_labels)),
        forgotten=tuple(
            {"model": which, "latent": name, **place.row}
            for name, looked in found.items()
            for which, each in looked.items()
            for place in each.forgotten.places
        ),
        sizes=tuple(_sizes(looked[TRAINED], len(batch)) for looked in found.values()),
        split=split,
        left_out=left_out,
        reached=reached,
        provenance=model.provenance,
    )


def reachability_of(run: Run, step: int | None = None, *, n: int = PROMPTS, split: str = "test") -> ReachabilityMap:
    """What a search's stream knows of reachability at a checkpoint, beside the untrained model.

    Args:
        run: on graph search.
        step: checkpoint; None is the last.
        n: prompts that are drawn, of which those without a counterfactual drop out: those with one way to go.
        split: where they are drawn from.

    Raises:
        WorkbenchError: the run learnt something else, or too few different graphs.
    """
    task = search_task(run, "Reachability is asked of")
    batch = draw_prompts(task, n, split)
    return reachability(run.model(step), task, batch, untrained=untrained_model(run), seed=SEED)


def untrained_model(run: Run) -> Transformer:
    """The run's model as it was before training: its checkpoint at step 0, or new weights from the recipe's seed."""
    if any(checkpoint.step == 0 for checkpoint in run.checkpoints) and run.recipe.train is not None:
        return run.model(0)
    seed = SEED if run.recipe.train is None else run.recipe.train.init_seed
    return Transformer(run.recipe.transformer, generator=generator(seed, "init")).eval()


def draw_prompts(task: Task, n: int, split: str) -> Batch:
    """`n` prompts of a split with counterfactuals, or as many as it has.

    Raises:
        WorkbenchError: fewer than one, or an unknown split.
    """
    if n < 1:
        raise WorkbenchError(f"Asked for {n} prompts. Ask for some hundreds: three quarters fit the probes.")
    pool = task.examples(split)
    order = torch.randperm(len(pool), generator=generator(SEED, "probed prompts", split))
    return task.contrast(pool.select(order[:n]), seed=SEED)


def hidden_latents(batch: Batch) -> tuple[str, ...]:
    """Latents that no token of the prompt names: the answer only where there is no other."""
    hidden = [
        name
        for name, latent in batch.latents.items()
        if (batch.tokens[:, latent.position] != latent.value).any() and name != "answer"
    ]
    return tuple(hidden or [name for name in batch.latents if name == "answer"])


# The same for every checkpoint of a run that is opened once; as many as a task has latents.
@lru_cache(maxsize=8)
def _look_before(run: Run, latent: str, places: Places, n: int, split: str) -> Looked:
    """The untrained model's places, with the same prompts."""
    batch = draw_prompts(run.task, n, split)
    return _look(untrained_model(run), _usable(batch, latent), _ood_prompts(run.task, n, split), latent, places)


def _usable(batch: Batch, latent: str) -> Batch:
    """The prompts whose value stands in several groups; all, where none does, of which the split then tells."""
    kept = in_several_groups(batch, latent)
    return batch.select(kept) if kept.any() else batch


def _look(model: Transformer, batch: Batch, others: Mapping[str, Batch], latent: str, places: Places) -> Looked:
    sites, positions = places
    return Looked(
        probes=linear_probe(model, batch, latent, sites=sites, positions=positions, seed=SEED),
        lengths=description_length(model, batch, latent, sites=sites, positions=positions, seed=SEED),
        forgotten=amnesic(
            model,
            batch,
            latent,
            sites=sites,
            positions=positions,
            others=others,
            directions=max(1, model.config.d_model // WIDTH_SHARE),
            seed=SEED,
        ),
    )


def _cells(latent: str, looked: Mapping[str, Looked], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row a place: the trained model's measures, then the untrained one's."""
    probes = looked[TRAINED].probes
    columns = (looked[TRAINED].columns(), looked[UNTRAINED].columns("_untrained"))
    for probe, trained, untrained in zip(probes.probes, *columns, strict=True):
        at = f"{probe.position}: {labels[probe.position]}"
        yield {"latent": latent, "site": str(probe.site), "position": probe.position, "at": at, **trained, **untrained}


def _sizes(looked: Looked, drawn: int) -> dict[str, Any]:
    probes = looked.probes
    return {
        "latent": probes.latent,
        "majority": probes.majority.mean,
        **{name: getattr(probes, name) for name in ("n_classes", "n_groups", "n_train", "n_test")},
        "dropped": drawn - probes.n_train - probes.n_test,
    }


def _ood_prompts(task: Task, n: int, split: str) -> dict[str, Batch]:
    """Prompts over OOD facts where the task has any and is not asked for them anyway: about as many as are held out."""
    return {OOD: draw_prompts(task, max(1, n // 4), OOD)} if OOD in task.splits and split != OOD else {}
