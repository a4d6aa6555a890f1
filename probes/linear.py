"""Linear probes: what a line through the activations can tell of a latent (Alain & Bengio 2016).

A probe is a logistic regression from the activations at one site and position to the value of a latent. Its accuracy
says little alone, so each comes with what it must be held against: prompts whose group (an entity, say) was in no
prompt that the probe was fitted on; the most common class; the same probe on an untrained model; and a control task
(Hewitt & Liang 2019, section 2), in which every group has a label drawn at random from the latent's own distribution.

The control asks how much the probe can learn by heart, which needs groups that come again: as in the paper it is
fitted and scored on a split by prompt, of the same sizes. On groups never seen a random label is anyone's guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.instrument.sites import Instrumented, Site
from workbench.instrument.states import Cell, fit_line, read_cells, told_by_line
from workbench.intervals import Estimate, columns_of, share_of
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.groups import split_by_group


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
        groups: which prompts belong together and must not be split; None takes those that the task names for the
            latent, or the token at the latent's own position.
        untrained: a model of the same sites whose weights are random.
        seed: of the splits and the control task.

    Raises:
        WorkbenchError: no such latent, a place without this position, or no split by group has all classes in training.
    """
    task = probe_task(batch, latent, groups=groups, seed=seed)
    activations = read_cells(model, batch.tokens, sites=sites, positions=positions)
    control = {} if untrained is None else read_cells(untrained, batch.tokens, sites=sites, positions=positions)
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
    split = split_by_group(batch, latent, groups=groups, seed=seed)
    n, n_train = len(split.labels), len(split.train)
    rng = generator(seed, "probe control", latent)
    order = torch.randperm(n, generator=rng)
    drawn = torch.randint(0, n, (split.n_groups,), generator=rng)
    return ProbeTask(
        labels=split.labels,
        control=split.labels[drawn][split.group],
        train=split.train,
        test=split.test,
        control_train=order[:n_train],
        control_test=order[n_train:],
        n_classes=len(split.values),
        n_groups=split.n_groups,
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
    return told_by_line(fit_line(features[train], labels[train]), features[test], labels[test])
