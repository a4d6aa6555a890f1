"""Amnesic projection: what a model still does once a place no longer tells a latent (Elazar et al. 2021).

That a probe reads a latent from a state does not mean that the model does. Here the directions that tell it are taken
out of the state, the rest of the pass runs on what is left, and the answers are counted. The directions come from LEACE
(Belrose et al. 2023, theorem 4.2) instead of the paper's iterated classifiers: in closed form, the smallest change of
the states, in the metric of their own covariance, after which no linear classifier of the states that it was fitted on
beats one that knows nothing. They are ordered by how much of the latent they tell, so that fewer can be taken.

Taking anything out hurts. The control takes as many random directions out in the same way, of the whitened state, where
every direction has the same variance: only what the latent's directions cost above that speaks of the latent. What was
fitted is judged on prompts of other groups; a line fitted anew on the changed states must then not tell the latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from circuits.interchange import answered
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site
from workbench.instrument.states import Cell, Line, fit_line, read_cells, told_by_line
from workbench.instrument.trace import Patch, Value
from workbench.intervals import Estimate, columns_of, mean_of, share_of
from workbench.metrics import Metric
from workbench.metrics import metric as find_metric
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.groups import GroupSplit, split_by_group

HELD_OUT = "held out"
"""The prompts of the groups that nothing was fitted on, in the column `prompts`."""
DRAWS = 5
SMALLEST = 1e-6
"""Standard deviation, relative to the size of the states, below which a direction is rounding; and likewise for what a
direction tells of the latent, relative to the strongest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """What a model does on some prompts once one place tells a latent no longer."""

    site: Site
    position: int
    prompts: str
    """`held out`, or the name of other prompts."""
    directions: int
    """That were taken out."""
    width: int
    """Directions of the state in all."""
    told: Estimate
    """Share of prompts whose value a line tells from the state."""
    told_after: Estimate
    """The same for a line that was fitted on the changed states."""
    accuracy: Estimate
    """Share of prompts answered rightly."""
    accuracy_after: Estimate
    accuracy_random: Estimate
    """With as many random directions taken out, the mean over the draws."""
    accuracy_lost: Estimate
    """How much more the latent's directions cost than random ones: `accuracy_random` less `accuracy_after`, paired."""
    metric: Estimate
    metric_after: Estimate
    metric_random: Estimate
    metric_lost: Estimate
    """The same for the metric."""
    n: int

    @property
    def row(self) -> dict[str, object]:
        """As columns."""
        plain = ("position", "prompts", "directions", "width", "n")
        return {
            "site": str(self.site),
            **{name: getattr(self, name) for name in plain},
            **{key: value for name in ESTIMATES for key, value in columns_of(name, getattr(self, name)).items()},
        }


ESTIMATES = (
    "told",
    "told_after",
    *(f"{what}{when}" for what in ("accuracy", "metric") for when in ("", "_after", "_random", "_lost")),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AmnesicMap:
    """A latent forgotten at every site and position, one at a time."""

    latent: str
    places: tuple[Forgotten, ...]
    metric: str
    n_train: int
    """Prompts that the directions were fitted on."""
    draws: int
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a place and set of prompts."""
        return pd.DataFrame([place.row for place in self.places])

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        plain = {name: getattr(self, name) for name in ("latent", "metric", "n_train", "draws")}
        return {**plain, "cells": self.frame.to_dict("records")}

    def tables(self) -> Sequence[Table]:
        """A heat map of the accuracy lost beyond random for each set of prompts, and everything in one table."""
        frame, found = self.frame, self.places
        widest = max(found, key=lambda place: place.directions)
        about = (
            f"States that no longer tell {self.latent}: up to {widest.directions} of {widest.width} directions taken "
            f"out, fitted on {self.n_train} prompts; n = {min(each.n for each in found)} to "
            f"{max(each.n for each in found)} other prompts; control: as many random directions, {self.draws} draws."
        )
        axes = {"x": "position", "y": "site", "value": "accuracy_lost", "facet": "prompts"}
        ends = {"low": "accuracy_lost_low", "high": "accuracy_lost_high"}
        says = "Accuracy lost beyond the control, 95 % paired bootstrap interval over prompts."
        everything = f"{about} Metric: {self.metric}. 95 % intervals: score intervals for shares, else bootstrap."
        return [
            Table(
                name=f"amnesic_{self.latent}",
                frame=frame.filter(["site", "position", "prompts", "accuracy_lost", *ends.values(), "n"]),
                kind="heatmap",
                axes={**axes, **ends},
                unit="accuracy",
                caption=f"{about} {says}",
            ),
            Table(
                name=f"amnesic_all_{self.latent}", frame=frame, kind="table", axes={}, unit="", caption=everything
            ),
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Projection:
    """Takes directions out of a state: what is left has the mean there."""

    mean: Float[Tensor, " feature"]
    removed: Float[Tensor, "feature feature"]
    """The part of a centred state that goes, as `state @ removed`."""
    directions: int

    def __call__(self, states: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch feature"]:
        """The states without it."""
        exact = states.double()
        # As precise as what came: a finer difference is rounding, which a line would find.
        return (exact - (exact - self.mean) @ self.removed).to(states.dtype)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Whitened:
    """States turned into coordinates of mean 0 and covariance 1; directions of no variance are none of them."""

    mean: Float[Tensor, " feature"]
    whiten: Float[Tensor, "feature direction"]
    colour: Float[Tensor, "direction feature"]
    """Back again."""

    @classmethod
    def of(cls, states: Float[Tensor, "batch feature"]) -> Whitened:
        """Of the states' own mean and covariance."""
        states = states.double()
        mean = states.mean(0)
        centred = states - mean
        variance, axes = torch.linalg.eigh(centred.T @ centred / len(states))
        live = variance > SMALLEST**2 * states.square().sum(1).mean()
        deviation, axes = variance[live].sqrt(), axes[:, live]
        return cls(mean=mean, whiten=axes / deviation, colour=deviation[:, None] * axes.T)

    def coordinates(self, states: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch direction"]:
        """States in these coordinates."""
        return (states.double() - self.mean) @ self.whiten

    def without(self, basis: Float[Tensor, "direction removed"]) -> Projection:
        """What takes an orthonormal basis of these coordinates out."""
        return Projection(
            mean=self.mean, removed=self.whiten @ basis @ basis.T @ self.colour, directions=basis.shape[1]
        )


def erase(
    states: Float[Tensor, "batch feature"], labels: Int[Tensor, " batch"], *, directions: int | None = None
) -> Projection:
    """The projection after which these states tell their labels no line: LEACE, theorem 4.2.

    Args:
        states: what it is fitted on.
        labels: class of each, counted from 0.
        directions: how many to take out, those first that tell most; None takes all that tell anything.

    Raises:
        WorkbenchError: fewer than one direction.
    """
    return _erase(Whitened.of(states), states, labels, directions)


def amnesic(
    model: Instrumented,
    batch: Batch,
    latent: str,
    *,
    sites: str | Iterable[str | Site],
    positions: Sequence[int] | None = None,
    groups: Int[Tensor, " batch"] | None = None,
    others: Mapping[str, Batch] | None = None,
    directions: int | None = None,
    metric: str | Metric = "logit_difference",
    draws: int = DRAWS,
    seed: int = 0,
) -> AmnesicMap:
    """Take what tells a latent out of each place, one at a time, and see what the model then answers.

    Args:
        model: any instrumented model.
        batch: prompts with this latent, in pairs if the metric compares answers: three quarters of their groups fit
            the directions, the others judge them.
        latent: its name.
        sites: where.
        positions: at which positions; None is all.
        groups: as in `split_by_group`.
        others: further prompts with this latent to judge on, by name.
        directions: at most so many; None takes all that tell anything.
        metric: what is read of the logits beside accuracy.
        draws: of the random directions.
        seed: of the split and the draws.

    Raises:
        WorkbenchError: what `split_by_group` and `read_cells` raise, others that were fitted on, or no draws.
    """
    split = split_by_group(batch, latent, groups=groups, seed=seed)
    fitted, others = batch.select(split.train), {} if others is None else others
    _check(fitted, others, draws)
    judges = [
        _Judge.of(model, part, name, find_metric(metric), labels=_labels(split, part, latent))
        for name, part in {HELD_OUT: batch.select(split.test), **others}.items()
    ]
    places: list[Forgotten] = []
    for cell, states in read_cells(model, fitted.tokens, sites=sites, positions=positions).items():
        removal = _Removal.of(states, split.labels[split.train], directions, draws, seed)
        places += [judge.forgotten(cell, removal) for judge in judges]
    return AmnesicMap(
        latent=latent,
        places=tuple(places),
        metric=find_metric(metric).name,
        n_train=len(split.train),
        draws=draws,
        provenance=model.provenance,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Removal:
    """What is fitted at one place."""

    latent: Projection
    random: tuple[Projection, ...]
    line: Line
    line_after: Line
    """Fitted on the states without the latent's directions."""

    @classmethod
    def of(
        cls, states: Float[Tensor, "batch feature"], labels: Int[Tensor, " batch"], most: int | None, n: int, seed: int
    ) -> _Removal:
        whitened = Whitened.of(states)
        latent = _erase(whitened, states, labels, most)
        rng = generator(seed, "amnesic control")
        shape = (whitened.whiten.shape[1], latent.directions)
        drawn = [torch.linalg.qr(torch.randn(shape, generator=rng, dtype=torch.float64)).Q for _ in range(n)]
        return cls(
            latent=latent,
            random=tuple(map(whitened.without, drawn)),
            line=fit_line(states, labels),
            line_after=fit_line(latent(states), labels),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Judge:
    """Prompts that nothing was fitted on, and what the model does on them left alone."""

    model: Instrumented
    batch: Batch
    name: str
    measure: Metric
    labels: Int[Tensor, " batch"]
    """Class of each prompt; -1 where no prompt that was fitted on has it."""
    right: Bool[Tensor, " batch"]
    values: Float[Tensor, " batch"]

    @classmethod
    def of(
        cls, model: Instrumented, batch: Batch, name: str, measure: Metric, *, labels: Int[Tensor, " batch"]
    ) -> _Judge:
        right, values = _outcome(batch, measure, run(model, batch.tokens).logits)
        return cls(model=model, batch=batch, name=name, measure=measure, labels=labels, right=right, values=values)

    def forgotten(self, cell: Cell, removal: _Removal) -> Forgotten:
        site, position = cell
        states = read_cells(self.model, self.batch.tokens, sites=[site], positions=[position])[cell]
        right, values = self._without(cell, removal.latent(states))
        random = [self._without(cell, projection(states)) for projection in removal.random]
        random_right = torch.stack([each.double() for each, _ in random]).mean(0)
        random_values = torch.stack([each for _, each in random]).mean(0)
        return Forgotten(
            site=site,
            position=position,
            prompts=self.name,
            directions=removal.latent.directions,
            width=states.shape[1],
            told=share_of(told_by_line(removal.line, states, self.labels)),
            told_after=share_of(told_by_line(removal.line_after, removal.latent(states), self.labels)),
            accuracy=share_of(self.right),
            accuracy_after=share_of(right),
            accuracy_random=mean_of(random_right),
            accuracy_lost=mean_of(random_right - right.double()),
            metric=mean_of(self.values),
            metric_after=mean_of(values),
            metric_random=mean_of(random_values),
            metric_lost=mean_of(random_values - values),
            n=len(self.batch),
        )

    def _without(
        self, cell: Cell, states: Float[Tensor, "batch feature"]
    ) -> tuple[Bool[Tensor, " batch"], Float[Tensor, " batch"]]:
        """What the model does when the place holds these states."""
        site, position = cell
        # One position, and of heads one: only the last dimension is left.
        whole = states.reshape(len(states), *[1] * (len(site.kind.dims) - 2), -1)
        patch = Patch(site=site, source=Value(whole), positions=[position])
        return _outcome(self.batch, self.measure, run(self.model, self.batch.tokens, patches=[patch]).logits)


def _erase(
    whitened: Whitened, states: Float[Tensor, "batch feature"], labels: Int[Tensor, " batch"], most: int | None
) -> Projection:
    if most is not None and most < 1:
        raise WorkbenchError(f"Nothing is forgotten with {most} directions taken out. Ask for 1 or more, or for all.")
    classes = one_hot(labels).double()
    together = whitened.coordinates(states).T @ (classes - classes.mean(0)) / len(states)
    basis, told, _ = torch.linalg.svd(together, full_matrices=False)
    # Together is a covariance with whitened coordinates, so that what a direction tells is at most 1.
    telling = int((told > SMALLEST).sum())
    return whitened.without(basis[:, : telling if most is None else min(most, telling)])


def _outcome(
    batch: Batch, measure: Metric, logits: Float[Tensor, "batch pos vocab"]
) -> tuple[Bool[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Which prompts are answered rightly, and the metric of each."""
    return answered(logits, batch.targets, batch).cpu(), measure(logits[batch.read], batch).double().cpu()


def _labels(split: GroupSplit, part: Batch, latent: str) -> Int[Tensor, " batch"]:
    """Classes of other prompts, as the split counts them; -1 for a value that it does not have."""
    value = part.latents[latent].value.cpu()
    place = torch.searchsorted(split.values, value).clamp(max=len(split.values) - 1)
    return torch.where(split.values[place] == value, place, -1)


def _check(fitted: Batch, others: Mapping[str, Batch], draws: int) -> None:
    if draws < 1:
        raise WorkbenchError(f"The control needs one draw of random directions or more, got {draws}.")
    known = {tuple(prompt) for prompt in fitted.tokens.tolist()}
    for name, part in others.items():
        if shared := sum(tuple(prompt) in known for prompt in part.tokens.tolist()):
            raise WorkbenchError(
                f"{shared} of {len(part)} prompts of {name!r} are among those that the directions are fitted on. "
                "Judge on prompts of another split."
            )
