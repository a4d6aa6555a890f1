"""What a reasoner knows fact by fact: asked hop by hop, and what can be guessed without reasoning.

*Two calls*: the model is asked for the bridge (`h r1`), its own answer is put in as the head of the second fact
(`b r2`), and it is asked again. Where this is right and the chain in one call is wrong, the facts are there and their
composition is not. *Marginal predictors* answer from the training set's distribution given some of the tokens alone:
lines that an answer must pass before it says anything of reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented
from workbench.intervals import Estimate, share_of
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.composition import Composition

SMOOTHING = 1.0
"""Counts added to every answer of the training set, so that what was never seen has a finite loss."""


def two_calls(model: Instrumented, task: Composition, batch: Batch) -> Bool[Tensor, " batch"]:
    """Whether each chain is right when the model is asked hop by hop, its own first answer put into the second."""
    head, first, second = batch.tokens.unbind(1)
    bridge = _asked(model, task, head, first)
    # What is no entity cannot be the head of a fact: the prompt is asked all the same, and is wrong.
    return _asked(model, task, bridge, second) == batch.targets[batch.read]


def _asked(
    model: Instrumented, task: Composition, head: Int[Tensor, " batch"], relation: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    tokens = torch.stack([head, relation, torch.full_like(head, task.pad_token)], 1)
    return run(model, tokens).logits[:, 1].argmax(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Marginal:
    """How well one answers from some of the tokens alone."""

    positions: tuple[int, ...]
    accuracy: Estimate
    loss: float
    """Mean cross-entropy in nats."""
    n: int


def marginal(train: Batch, batch: Batch, positions: Sequence[int]) -> Marginal:
    """Answer each prompt by the training answers to prompts with the same tokens at these positions.

    Args:
        train: training examples, each read at one place.
        batch: what is answered, likewise.
        positions: the tokens that are looked at; none is the most common answer.
    """
    columns = list(positions)
    keys = torch.cat([train.tokens[:, columns], batch.tokens[:, columns]])
    group = keys.unique(dim=0, return_inverse=True)[1] if columns else keys.new_zeros(len(keys))
    answers = train.targets[train.read]
    known = answers.unique()
    counts = torch.zeros(int(group.max()) + 1, int(known.max()) + 1, dtype=torch.float64)
    counts[:, known] = SMOOTHING
    counts.index_put_((group[: len(train)], answers), torch.ones(len(answers), dtype=torch.float64), accumulate=True)
    share = (counts / counts.sum(1, keepdim=True))[group[len(train) :]]
    targets = batch.targets[batch.read]
    right, loss = _graded(share, targets)
    return Marginal(positions=tuple(positions), accuracy=share_of(right), loss=loss, n=len(batch))


def _graded(share: Float[Tensor, "batch answer"], targets: Int[Tensor, " batch"]) -> tuple[Tensor, float]:
    inside = targets < share.shape[1]
    picked = share.gather(1, targets.clamp(max=share.shape[1] - 1)[:, None])[:, 0] * inside
    return share.argmax(1) == targets, float(-picked.log().mean())


def marginals_table(marginals: Sequence[Marginal], labels: Sequence[str], split: str) -> Table:
    """The marginal predictors of a split, by the tokens they look at."""
    rows = [
        {
            "looks_at": " ".join(labels[position] for position in each.positions) or "nothing",
            "accuracy": each.accuracy.mean,
            "low": each.accuracy.low,
            "high": each.accuracy.high,
            "loss": each.loss,
            "n": each.n,
        }
        for each in marginals
    ]
    return Table(
        name=f"marginals_{split}",
        frame=pd.DataFrame(rows),
        kind="bar",
        axes={"x": "looks_at", "y": "accuracy", "low": "low", "high": "high"},
        unit="accuracy",
        caption=f"Answers to split {split!r} from the training answers of prompts with the same tokens at these places "
        "alone; 95 % score intervals.",
    )
