"""How many bits a latent takes to send to someone who has the activations (Voita & Titov 2020).

The labels of the training part are sent block by block, each by the probe fitted on all blocks before it (the online or
prequential code); the first block is sent at log2 of the number of classes a label. A probe that
needs many examples, or learns by heart, pays for it in bits, where accuracy alone does not show it. Compression is the
length of sending every label at that first price, over the length of the code: 1 is no gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.linear import probe_task
from workbench.instrument.sites import Instrumented, Site
from workbench.instrument.states import fit_line, read_cells
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

BLOCKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Where blocks end, as shares of the training part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """Length of the code at one site and position, in bits."""

    site: Site
    position: int
    codelength: float
    control: float
    """Length of the control task's labels, sent with the same activations."""
    last_block: float
    """Length of the last block alone: what the labels cost once half of them are known."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DescriptionLengths:
    """A latent's code lengths at every site and position."""

    latent: str
    codes: tuple[Coded, ...]
    uniform: float
    """Length of the code that knows nothing but the number of classes."""
    n: int
    n_classes: int
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a code."""
        rows = [
            {
                "site": str(code.site),
                "position": code.position,
                "codelength": code.codelength,
                "compression": self.uniform / code.codelength,
                "control_codelength": code.control,
                "control_compression": self.uniform / code.control,
                "last_block": code.last_block,
                "uniform": self.uniform,
            }
            for code in self.codes
        ]
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {
            "latent": self.latent,
            "cells": self.frame.to_dict("records"),
            "uniform": self.uniform,
            "n": self.n,
            "n_classes": self.n_classes,
        }

    def tables(self) -> Sequence[Table]:
        """A heat map of compression over site and position, and everything in one table."""
        about = (
            f"Online code of {self.latent}: {self.n} labels of {self.n_classes} classes, {self.uniform:.4g} bits when "
            "nothing is known."
        )
        return [
            Table(
                name=f"compression_{self.latent}",
                frame=self.frame.filter(["site", "position", "compression"]),
                kind="heatmap",
                axes={"x": "position", "y": "site", "value": "compression"},
                unit="uniform code / online code",
                caption=f"{about} Compression of 1 is no gain.",
            ),
            Table(
                name=f"codelength_{self.latent}",
                frame=self.frame,
                kind="table",
                axes={},
                unit="bits",
                caption=f"{about} The control task gives each group a random label.",
            ),
        ]


def description_length(
    model: Instrumented,
    batch: Batch,
    latent: str,
    *,
    sites: str | Iterable[str | Site],
    positions: Sequence[int] | None = None,
    groups: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> DescriptionLengths:
    """Bits that the probes of `linear_probe` need to send a latent, at every site and position.

    What is sent is the training part of `linear_probe` with the same groups and seed, in random order.

    Args:
        model: any instrumented model.
        batch: prompts with this latent.
        latent: its name.
        sites: where to read.
        positions: at which positions; None is all.
        groups: which prompts belong together, as in `linear_probe`.
        seed: of the training part, the order of its prompts and the control task.

    Raises:
        WorkbenchError: what `linear_probe` raises, or fewer prompts than make a first block.
    """
    task = probe_task(batch, latent, groups=groups, seed=seed)
    if len(task.train) < 1 / BLOCKS[0]:
        raise WorkbenchError(
            f"The training part has {len(task.train)} prompts; blocks of 1/16 need {1 / BLOCKS[0]:.0f} or more. "
            "Give a larger batch."
        )
    order = task.train[torch.randperm(len(task.train), generator=generator(seed, "online code", latent))]
    labels, control = task.labels[order], task.control[order]
    codes = []
    for (site, position), states in read_cells(model, batch.tokens, sites=sites, positions=positions).items():
        blocks = code_blocks(states[order], labels, task.n_classes)
        codes.append(
            Coded(
                site=site,
                position=position,
                codelength=sum(blocks),
                control=sum(code_blocks(states[order], control, task.n_classes)),
                last_block=blocks[-1],
            )
        )
    return DescriptionLengths(
        latent=latent,
        codes=tuple(codes),
        uniform=len(order) * math.log2(task.n_classes),
        n=len(order),
        n_classes=task.n_classes,
        provenance=model.provenance,
    )


def code_blocks(
    features: Float[Tensor, "example feature"], labels: Int[Tensor, " example"], n_classes: int
) -> list[float]:
    """Bits of each block of labels, sent by the probe that was fitted on the blocks before it."""
    ends = [round(share * len(labels)) for share in BLOCKS]
    sent = [ends[0] * math.log2(n_classes)]
    for start, stop in zip(ends, ends[1:], strict=False):
        share = _predict(features[:start], labels[:start], features[start:stop], n_classes)
        sent.append(-float(share.gather(1, labels[start:stop, None]).log2().sum()))
    return sent


def _predict(
    features: Float[Tensor, "past feature"],
    labels: Int[Tensor, " past"],
    coming: Float[Tensor, "coming feature"],
    n_classes: int,
) -> Float[Tensor, "coming class"]:
    """The probe's probabilities, counted as the past's examples, and one example more that is equally of every class.

    Without that one a class that the past lacks would take infinitely many bits.
    """
    seen, share = labels.unique(), torch.zeros(len(coming), n_classes, dtype=torch.float64)
    if len(seen) == 1:
        share[:, seen] = 1.0
    else:
        share[:, seen] = torch.from_numpy(fit_line(features, labels).predict_proba(coming.double().numpy()))
    n = len(labels)
    return (n * share + 1 / n_classes) / (n + 1)
