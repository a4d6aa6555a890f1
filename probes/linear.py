"""Linear probes: what a line through the activations can tell of a latent (Alain & Bengio 2016).

A probe is a logistic regression from the activations at one site and position to the value of a latent. Its accuracy
says little alone, so each comes with what it must be held against: prompts whose group (an entity, say) was in no
prompt that the probe was fitted on; the most common class; the same probe on an untrained model; and a control task
(Hewitt & Liang 2019, section 2), in which every group has a label drawn at random from the latent's own distribution.

The control asks how much the probe can learn by heart, which needs groups that come again: as in the paper it is
fitted and scored on a split by prompt, of the same sizes. On groups never seen a random label is anyone's guess.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.intervals import Estimate, columns_of, share_of
from workbench.runtime import WorkbenchError, derive_seed, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, check_choice

TEST_GROUPS = 0.25
"""Share of the groups that the probe is scored on."""
TRIES = 100
"""Splits that are drawn until one leaves every class in training."""
MAX_ITERATIONS = 1000
SHOWN = 5
"""Values of a latent that an error lists."""

Cell = tuple[Site, int]
"""A site and a position."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeTask:
    """What is asked of every probe, whatever it reads: labels, control labels, and which prompts are in which part."""

    labels: Int[Tensor, " batch"]
    """Class of each prompt, counted from 0."""
    control: Int[Tensor, " batch"]
    """Class of each prompt in the control task, the same throughout a group."""
    train: Int[Tensor, " train"]
    test: Int[Tensor, " test"]
    """Prompts of groups that are not in `train`."""
    control_train: Int[Tensor, " train"]
    control_test: Int[Tensor, " test"]
    """Prompts of the split by prompt, on which groups come again."""
    n_classes: int
    n_groups: int

    def __post_init__(self) -> None:
        for train, test in ((self.train, self.test), (self.control_train, self.control_test)):
            if torch.isin(test, train).any():
                raise WorkbenchError(
                    "A prompt cannot be in the training part and in the test part: the probe knows it."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What the probe of one site and position found."""

    site: Site
    position: int
    accuracy: Estimate
    """On groups that the probe never saw."""
    control: Estimate
    """Accuracy on the control task."""
    untrained: Estimate | None
    """Accuracy of the probe on the untrained model; None where none was given."""

    @property
    def selectivity(self) -> float:
        """Accuracy above that of the control task."""
        return self.accuracy.mean - self.control.mean


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeMap:
    """A latent's probes at every site and position."""

    latent: str
    probes: tuple[Probed, ...]
    majority: Estimate
    """Accuracy of the most common class of the training part."""
    n_train: int
    n_test: int
    n_classes: int
    n_groups: int
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a probe."""
        rows = [
            {
                "site": str(probe.site),
                "position": probe.position,
                **columns_of("accuracy", probe.accuracy),
                **columns_of("control", probe.control),
                "selectivity": probe.selectivity,
                **columns_of("untrained", probe.untrained),
                "majority": self.majority.mean,
            }
            for probe in self.probes
        ]
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        sizes = {name: getattr(self, name) for name in ("n_train", "n_test", "n_classes", "n_groups")}
        frame = self.frame.astype(object)
        return {
            "latent": self.latent,
            "cells": frame.where(frame.notna(), None).to_dict("records"),
            "majority": self.majority.mean,
            **sizes,
        }

    def tables(self) -> Sequence[Table]:
        """A heat map of accuracy over site and position, and everything in one table."""
        about = (
            f"Linear probes for {self.latent}, {self.n_classes} classes, fitted on {self.n_train} prompts and scored "
            f"on {self.n_test} of other groups ({self.n_groups} in all); the most common class gets "
            f"{self.majority.mean:.3g}. Columns low and high hold the 95 % score interval over prompts."
        )
        heat = self.frame.filter(["site", "position", "accuracy", "accuracy_low", "accuracy_high"])
        axes = {"x": "position", "y": "site", "value": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
        return [
            Table(name=f"probe_{self.latent}", frame=heat, kind="heatmap", axes=axes, unit="accuracy", caption=about),
            Table(
                name=f"probes_{self.latent}",
                frame=self.frame,
                kind="table",
                axes={},
                unit="",
                caption=f"{about} Selectivity is accuracy less that of the control task, in which each group has a "
                "random label.",
            ),
        ]


def linear_probe(
    model: Instrumented,
    batch: Batch,
    latent: str,
    *,
    sites: str | Iterable[str | Site],
    positions: Sequence[int] | None = None,
    groups: Int[Tensor, " batch"] | None = None,
    untrained: Instrumented | None = None,
    seed: int = 0,
) -> ProbeMap:
    """How well a line through the activations tells a latent's value, at every site and position.

    Intervals are over prompts, as if each were drawn alone: where few groups are held out, another draw of groups may
    differ by more.

    Args:
        model: any instrumented model.
        batch: prompts with this latent.
        latent: its name.
        sites: where to read.
        positions: at which positions; None is all.
        groups: which prompts belong together and must not be split; None takes the token at the latent's own position.
        untrained: a model of the same sites whose weights are random.
        seed: of the splits and the control task.

    Raises:
        WorkbenchError: no such latent, a place without this position, or no split by group has all classes in training.
    """
    task = probe_task(batch, latent, groups=groups, seed=seed)
    activations = read_cells(model, batch, sites=sites, positions=positions)
    control = {} if untrained is None else read_cells(untrained, batch, sites=sites, positions=positions)
    return ProbeMap(
        latent=latent,
        probes=tuple(_probe(task, cell, states, control.get(cell)) for cell, states in activations.items()),
        majority=share_of(task.labels[task.test] == task.labels[task.train].bincount().argmax()),
        n_train=len(task.train),
        n_test=len(task.test),
        n_classes=task.n_classes,
        n_groups=task.n_groups,
        provenance=model.provenance,
    )


def probe_task(batch: Batch, latent: str, *, groups: Int[Tensor, " batch"] | None, seed: int) -> ProbeTask:
    """A latent's labels, the control task's, and a split of each.

    Raises:
        WorkbenchError: no such latent, or no split by group has all classes in training.
    """
    check_choice("latent", latent, tuple(batch.latents))
    found = batch.latents[latent]
    groups = batch.tokens[:, found.position] if groups is None else groups
    values, labels = found.value.cpu().unique(return_inverse=True)
    known, group = groups.cpu().unique(return_inverse=True)
    train, test = _split_by_group(latent, values, labels, group, seed)
    rng = generator(seed, "probe control", latent)
    order = torch.randperm(len(labels), generator=rng)
    drawn = torch.randint(0, len(labels), (len(known),), generator=rng)
    return ProbeTask(
        labels=labels,
        control=labels[drawn][group],
        train=train,
        test=test,
        control_train=order[: len(train)],
        control_test=order[len(train) :],
        n_classes=len(values),
        n_groups=len(known),
    )


def read_cells(
    model: Instrumented, batch: Batch, *, sites: str | Iterable[str | Site], positions: Sequence[int] | None
) -> Mapping[Cell, Float[Tensor, "batch feature"]]:
    """Activations of each site and position, flat.

    Raises:
        WorkbenchError: a site that has no positions, or a position that the prompts do not have.
    """
    chosen, n_positions = select_sites(sites, model), batch.tokens.shape[1]
    if without := [str(site) for site in chosen if "pos" not in site.kind.dims]:
        raise WorkbenchError(
            f"A probe reads one position, and {', '.join(without)} has source and destination. Probe z or attn_out."
        )
    wanted = range(n_positions) if positions is None else positions
    if wrong := [position for position in wanted if not 0 <= position < n_positions]:
        raise WorkbenchError(f"No position {wrong[0]}: prompts have positions 0 to {n_positions - 1}.")
    trace = run(model, batch.tokens, record=chosen)
    return {
        (site, position): trace[site][:, position].reshape(len(batch), -1).cpu()
        for site in chosen
        for position in wanted
    }


def fit_probe(features: Float[Tensor, "batch feature"], labels: Int[Tensor, " batch"]) -> Pipeline:
    """A logistic regression on features of mean 0 and variance 1; labels of at least two classes."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        # A probe that is not done after so many steps is still a probe, and is scored on what it never saw.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(features.double().numpy(), labels.numpy())


def _split_by_group(
    latent: str, values: Int[Tensor, " value"], labels: Int[Tensor, " batch"], group: Int[Tensor, " batch"], seed: int
) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """The first random split of groups in which no class is in the test part alone."""
    mend = "Give `groups` of which each class has several, or leave those prompts out with batch.select(…)."
    if len(values) < 2:
        raise WorkbenchError(
            f"Latent {latent!r} has one value in all {len(labels)} prompts; a probe needs two or more."
        )
    per_class = torch.stack([labels, group], 1).unique(dim=0)[:, 0].bincount(minlength=len(values))
    if (single := (per_class < 2)).any():
        listed = ", ".join(map(str, values[single][:SHOWN].tolist())) + (", …" if int(single.sum()) > SHOWN else "")
        raise WorkbenchError(
            f"Latent {latent!r} cannot be split by group: {int(single.sum())} of its {len(values)} values ({listed}) "
            f"are in one group only, and lack examples in training or in the test. {mend}"
        )
    state = derive_seed(seed, "probe split", latent) % 2**32
    splits = GroupShuffleSplit(n_splits=TRIES, test_size=TEST_GROUPS, random_state=state)
    for train, test in splits.split(np.zeros(len(labels)), groups=group.numpy()):
        if np.isin(np.arange(len(values)), labels.numpy()[train]).all():
            return torch.from_numpy(train), torch.from_numpy(test)
    raise WorkbenchError(
        f"Latent {latent!r} cannot be split by group: in each of {TRIES} random splits some of its {len(values)} "
        f"values lacks examples in training. {mend}"
    )


def _probe(
    task: ProbeTask,
    cell: Cell,
    states: Float[Tensor, "batch feature"],
    untrained: Float[Tensor, "batch other_feature"] | None,
) -> Probed:
    def score(features: Tensor) -> Estimate:
        return share_of(_hits(features, task.labels, task.train, task.test))

    return Probed(
        site=cell[0],
        position=cell[1],
        accuracy=score(states),
        control=share_of(_hits(states, task.control, task.control_train, task.control_test)),
        untrained=None if untrained is None else score(untrained),
    )


def _hits(
    features: Float[Tensor, "batch feature"],
    labels: Int[Tensor, " batch"],
    train: Int[Tensor, " train"],
    test: Int[Tensor, " test"],
) -> Bool[Tensor, " test"]:
    if len(labels[train].unique()) == 1:
        # Few groups may all have drawn one label for the control task.
        return labels[test] == labels[train][0]
    predicted: NDArray[np.int64] = fit_probe(features[train], labels[train]).predict(features[test].double().numpy())
    return torch.from_numpy(predicted) == labels[test]
