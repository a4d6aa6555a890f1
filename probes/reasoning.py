"""What a reasoner knows, read off without touching it (Wang et al. 2024, section 3.3).

*Latents through layers*: the logit lens at a latent's own place (the bridge at r1, the value of an entity at that
entity): the reciprocal rank of its token, among all tokens and among those that could stand there. *Two calls*: the
model is asked for the bridge (`h r1`), its own answer is put in as the head of the second fact (`b r2`), and it is
asked again: where this is right and the chain in one call is wrong, the facts are there and their composition is not.
*Marginal predictors* answer from the training set's distribution given some of the tokens alone: lines that an answer
must pass before it says anything of reasoning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.logit_lens import lens_logits
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.intervals import Estimate, columns_of, mean_of, share_of
from workbench.runtime import WorkbenchError
from workbench.tables import Table
from workbench.tasks.base import Batch, check_choice
from workbench.tasks.comparing import Comparing
from workbench.tasks.composition import Composition

SMOOTHING = 1.0
"""Counts added to every answer, so that what training never saw has a finite loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marginal:
    """How well one answers from some of the tokens alone."""

    positions: tuple[int, ...]
    accuracy: Estimate
    loss: Estimate
    """Cross-entropy in nats."""
    n: int

    def label(self, position_labels: Sequence[str]) -> str:
        """The tokens that are looked at, as a person names them."""
        return " ".join(position_labels[position] for position in self.positions) or "nothing"


def latent_ranks(
    model: Instrumented, batch: Batch, latent: str, *, sites: str | Iterable[str | Site], among: bool = False
) -> Float[Tensor, "batch site"]:
    """Reciprocal rank of a latent's token in the logit lens at the latent's own position; 1 is the top.

    Args:
        model: a model that can finish from any residual stream.
        batch: prompts with this latent.
        latent: its name.
        sites: places of the residual stream.
        among: rank it among the tokens that could stand there, not among the whole vocabulary.

    Raises:
        WorkbenchError: no such latent, or one that does not say which tokens could stand there.
    """
    check_choice("latent", latent, tuple(batch.latents))
    found, chosen = batch.latents[latent], select_sites(sites, model)
    logits = _lens_at(model, batch, chosen, found.position)
    first = 0
    if among:
        if found.among is None:
            raise WorkbenchError(f"Latent {latent!r} does not say which tokens could stand in its place.")
        first = found.among.start
        logits = logits[..., first : found.among.stop]
    own = logits.gather(-1, (found.value - first)[:, None, None].expand(-1, len(chosen), 1))
    return 1 / ((logits > own).sum(-1) + 1).to(logits.dtype)


def label_recall(
    model: Instrumented, task: Comparing, batch: Batch, *, sites: str | Iterable[str | Site]
) -> Float[Tensor, "batch site"]:
    """Share of the attribute's three labels that the lens at the attribute ranks third or better: the label space."""
    attribute = list(task.position_labels).index("attr")
    logits = _lens_at(model, batch, select_sites(sites, model), attribute)
    labels = task.labels_of(batch)[:, None].expand(-1, logits.shape[1], -1)
    beaten_by = (logits[..., None, :] > logits.gather(-1, labels)[..., None]).sum(-1)
    return (beaten_by < labels.shape[-1]).to(logits.dtype).mean(-1)


def leads(model: Instrumented, batch: Batch) -> Float[Tensor, " batch"]:
    """By how much the answer's logit leads every other; below 0 where the answer is wrong.

    Divided by the norm of the weights it is a circuit's efficiency: what weight decay favours (Varma et al. 2023).
    """
    logits = run(model, batch.tokens).logits[batch.read]
    answer = batch.targets[batch.read][:, None]
    return logits.gather(1, answer)[:, 0] - logits.scatter(1, answer, -torch.inf).amax(1)


def two_calls(model: Instrumented, task: Composition, batch: Batch) -> Bool[Tensor, " batch"]:
    """Whether each chain is right when the model is asked hop by hop, its own first answer put into the second.

    Raises:
        WorkbenchError: a prompt that is no chain.
    """
    head, first, second = batch.tokens.unbind(1)
    if n := int((second == task.pad_token).sum()):
        raise WorkbenchError(
            f"Only a chain can be asked hop by hop; {n} of {len(batch)} prompts are single facts. "
            "Choose a split of chains, such as 'test'."
        )
    bridge = _asked(model, task, head, first)
    # What is no entity cannot be the head of a fact: the prompt is asked all the same, and is wrong.
    return _asked(model, task, bridge, second) == batch.targets[batch.read]


def marginal(train: Batch, batch: Batch, positions: Sequence[int]) -> Marginal:
    """Answer each prompt by the training answers to prompts with the same tokens at these positions.

    Args:
        train: training examples, each read at one place.
        batch: what is answered, likewise.
        positions: the tokens that are looked at; none is the most common answer.
    """
    seen, wanted = train.targets[train.read], batch.targets[batch.read]
    known, answer = torch.cat([seen, wanted]).unique(return_inverse=True)
    tokens = torch.cat([train.tokens, batch.tokens])[:, list(positions)]
    group = tokens.unique(dim=0, return_inverse=True)[1] if len(positions) else torch.zeros_like(answer)
    counts = torch.full((int(group.max()) + 1, len(known)), SMOOTHING, dtype=torch.float64)
    ones = torch.ones(len(seen), dtype=torch.float64)
    counts.index_put_((group[: len(seen)], answer[: len(seen)]), ones, accumulate=True)
    share = (counts / counts.sum(1, keepdim=True))[group[len(seen) :]]
    given = answer[len(seen) :]
    return Marginal(
        positions=tuple(positions),
        accuracy=share_of(share.argmax(1) == given),
        loss=mean_of(-share.gather(1, given[:, None])[:, 0].log()),
        n=len(batch),
    )


def marginals_table(marginals: Sequence[Marginal], labels: Sequence[str], split: str) -> Table:
    """The marginal predictors of a split, by the tokens they look at."""
    rows = [
        {
            "looks_at": each.label(labels),
            **columns_of("accuracy", each.accuracy),
            **columns_of("loss", each.loss),
            "n": each.n,
        }
        for each in marginals
    ]
    return Table(
        name=f"marginals_{split}",
        frame=pd.DataFrame(rows),
        kind="bar",
        axes={"x": "looks_at", "y": "accuracy", "low": "accuracy_low", "high": "accuracy_high"},
        unit="accuracy",
        caption=f"Answers to split {split!r} from the training answers of prompts with the same tokens at these places "
        "alone; 95 % score intervals.",
    )


def _lens_at(
    model: Instrumented, batch: Batch, sites: Sequence[Site], position: int
) -> Float[Tensor, "batch site vocab"]:
    trace = run(model, batch.tokens, record=sites)
    here = replace(trace, activations={site: states[:, [position]] for site, states in trace.activations.items()})
    return lens_logits(model, here, sites)[:, :, 0]


def _asked(
    model: Instrumented, task: Composition, head: Int[Tensor, " batch"], relation: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    tokens = torch.stack([head, relation, torch.full_like(head, task.pad_token)], 1)
    return run(model, tokens).logits[:, 1].argmax(1)
