"""The tuned lens: the logit lens after an affine map, one a site, fitted to what the model says in the end.

An early residual stream may hold the answer in another basis than the unembedding reads, and the logit lens then sees
nothing. The tuned lens (Belrose et al. 2023) puts a translator `x W + b` before the final norm, which starts as the
identity and learns by distillation: it lowers the KL divergence from the model's own final distribution to the lens'.
It is never told the right answers; but an affine map can compute, too, so that what it shows is what a line can read
from the stream. At the last layer's `resid_post` there is nothing to learn.

Distributions are compared where the batch is read: elsewhere a task asks nothing of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.logit_lens import STREAM, Finishing
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.intervals import Estimate, columns_of, mean_of
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

HELD_OUT = 0.25
"""Share of the prompts that the lenses are compared on."""
LEARNING_RATE = 1e-2
ROUNDING = 1e-6
"""Nats by which a translator must be better than the one before: where nothing can be learnt, Adam follows rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """How close a lens comes at one site, on prompts held out."""

    kl: Estimate
    """KL divergence from the final distribution to the lens', in nats."""
    reciprocal_rank: Estimate
    """Of the right answer; 1 is the top."""
    train_kl: float
    """The divergence on the prompts that the tuned lens was fitted on."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TunedLens:
    """Translators, and what they gain over the logit lens."""

    sites: tuple[Site, ...]
    weight: Float[Tensor, "site d_model d_model"]
    bias: Float[Tensor, "site d_model"]
    lenses: Mapping[str, tuple[Read, ...]]
    """`logit` and `tuned`, each at every site."""
    n_train: int
    n_test: int
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each lens and site."""
        rows = [
            {
                "site": str(site),
                "lens": lens,
                **columns_of("kl", read.kl),
                **columns_of("reciprocal_rank", read.reciprocal_rank),
                "train_kl": read.train_kl,
            }
            for lens, reads in self.lenses.items()
            for site, read in zip(self.sites, reads, strict=True)
        ]
        return pd.DataFrame(rows)

    def translate(self, site: Site, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """A residual stream of this site in the basis that the final norm reads.

        Raises:
            WorkbenchError: no translator was fitted at this site.
        """
        if site not in self.sites:
            raise WorkbenchError(f"No translator at {site}. Fitted: {', '.join(map(str, self.sites))}.")
        index = self.sites.index(site)
        return x @ self.weight[index] + self.bias[index]

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {"cells": self.frame.to_dict("records"), "n_train": self.n_train, "n_test": self.n_test}

    def tables(self) -> Sequence[Table]:
        """Divergence and reciprocal rank of both lenses through the sites."""
        words = {
            "kl": ("KL to the final distribution", "nats"),
            "reciprocal_rank": ("reciprocal rank", "1 / (rank + 1)"),
        }
        return [
            Table(
                name=f"tuned_lens_{measure}",
                frame=self.frame,
                kind="curve",
                axes={"x": "site", "y": measure, "series": "lens", "low": f"{measure}_low", "high": f"{measure}_high"},
                unit=unit,
                caption=f"Logit lens and tuned lens: mean {name} on {self.n_test} prompts held out from the "
                f"{self.n_train} that the translators were fitted on; 95 % bootstrap intervals.",
            )
            for measure, (name, unit) in words.items()
        ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """Prompts taken apart into the places where they are read."""

    states: Float[Tensor, "site place d_model"]
    final: Float[Tensor, "place vocab"]
    """Log-probabilities that the model ends with."""
    answer: Int[Tensor, " place"]
    prompt: Int[Tensor, " place"]
    """Which prompt a place is of."""

    def by_prompt(self, values: Float[Tensor, "site place"]) -> Float[Tensor, "prompt site"]:
        """Means over the places of each prompt."""
        count = self.prompt.bincount()
        summed = values.new_zeros(len(count), len(values)).index_add(0, self.prompt, values.T)
        return summed / count[:, None]


def tuned_lens(
    model: Instrumented, batch: Batch, *, sites: str | Iterable[str | Site], steps: int = 300, seed: int = 0
) -> TunedLens:
    """Translators fitted on three quarters of the prompts, and both lenses on the others.

    Args:
        model: a model that can finish from any residual stream.
        batch: prompts, each read somewhere.
        sites: places of the residual stream.
        steps: of Adam, on all training prompts at once, at a learning rate that falls to 0.
        seed: of the split.

    Raises:
        WorkbenchError: the model cannot finish, a site is not of the residual stream, a prompt is read nowhere, or
            there are too few.
    """
    chosen = _check(model, batch, sites, steps)
    assert isinstance(model, Finishing)
    order = torch.randperm(len(batch), generator=generator(seed, "tuned lens"))
    n_test = round(HELD_OUT * len(batch))
    train, test = (_part(model, batch.select(rows), chosen) for rows in (order[n_test:], order[:n_test]))
    weight, bias = _fit(model, train, steps)
    identity = torch.eye(weight.shape[-1]).to(weight).expand_as(weight), torch.zeros_like(bias)
    lenses = {
        name: _compare(model, train, test, *translators)
        for name, translators in {"logit": identity, "tuned": (weight, bias)}.items()
    }
    return TunedLens(
        sites=chosen,
        weight=weight,
        bias=bias,
        lenses=lenses,
        n_train=len(batch) - n_test,
        n_test=n_test,
        provenance=model.provenance,
    )


def _check(model: Instrumented, batch: Batch, sites: str | Iterable[str | Site], steps: int) -> tuple[Site, ...]:
    chosen = select_sites(sites, model)
    if other := [str(site) for site in chosen if site.kind not in STREAM]:
        raise WorkbenchError(
            f"The tuned lens reads the residual stream; {', '.join(other)} is not it. "
            f"Use {', '.join(kind.name for kind in STREAM)}."
        )
    if not isinstance(model, Finishing):
        raise WorkbenchError(
            "The tuned lens needs a model with `finish` (final norm and unembedding of a residual stream), and "
            f"{type(model).__name__} has none. Import the model as one of the workbench's own."
        )
    if len(batch) < 4 or not batch.read.any(1).all():
        raise WorkbenchError(
            f"The tuned lens needs four prompts or more, each read somewhere; got {len(batch)}, of which "
            f"{int((~batch.read.any(1)).sum())} are read nowhere."
        )
    if steps < 1:
        raise WorkbenchError(f"The tuned lens needs one step or more, got {steps}. The logit lens needs none.")
    return chosen


def _part(model: Instrumented, batch: Batch, sites: Sequence[Site]) -> _Part:
    trace = run(model, batch.tokens, record=sites)
    return _Part(
        states=torch.stack([trace[site][batch.read] for site in sites]),
        final=trace.logits[batch.read].log_softmax(-1),
        answer=batch.targets[batch.read],
        prompt=batch.read.nonzero()[:, 0],
    )


def _fit(
    model: Finishing, part: _Part, steps: int
) -> tuple[Float[Tensor, "site d_model d_model"], Float[Tensor, "site d_model"]]:
    """The translators of all sites at once: their losses add up, and none has a parameter of another.

    Each site keeps its best on the training prompts, the identity among them: none is worse there than the logit lens.
    """
    n_sites, _, d_model = part.states.shape
    weight = torch.eye(d_model).to(part.states).repeat(n_sites, 1, 1).requires_grad_()
    bias = part.states.new_zeros(n_sites, d_model).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    best = part.states.new_full((n_sites,), torch.inf)
    kept_weight, kept_bias = weight.detach().clone(), bias.detach().clone()
    for step in range(steps + 1):
        losses = _divergence(part, _logits(model, part, weight, bias)).mean(1)
        better = losses.detach() < best - ROUNDING
        best[better] = losses.detach()[better]
        kept_weight[better], kept_bias[better] = weight.detach()[better], bias.detach()[better]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        # Not backward(), which would leave gradients in the model.
        weight.grad, bias.grad = torch.autograd.grad(losses.sum(), [weight, bias])
        optimizer.step()
    return kept_weight, kept_bias


@torch.no_grad()
def _compare(
    model: Finishing,
    train: _Part,
    test: _Part,
    weight: Float[Tensor, "site d_model d_model"],
    bias: Float[Tensor, "site d_model"],
) -> tuple[Read, ...]:
    logits = _logits(model, test, weight, bias)
    own = logits.gather(-1, test.answer.expand(len(logits), -1)[..., None])
    rank = 1 / ((logits > own).sum(-1) + 1).to(logits.dtype)
    kl, rank = (test.by_prompt(values).cpu() for values in (_divergence(test, logits), rank))
    train_kl = train.by_prompt(_divergence(train, _logits(model, train, weight, bias))).mean(0).tolist()
    return tuple(
        Read(kl=mean_of(kl[:, site]), reciprocal_rank=mean_of(rank[:, site]), train_kl=train_kl[site])
        for site in range(len(weight))
    )


def _logits(
    model: Finishing, part: _Part, weight: Float[Tensor, "site d_model d_model"], bias: Float[Tensor, "site d_model"]
) -> Float[Tensor, "site place vocab"]:
    return model.finish(part.states @ weight + bias[:, None], {})


def _divergence(part: _Part, logits: Float[Tensor, "site place vocab"]) -> Float[Tensor, "site place"]:
    return (part.final.exp() * (part.final - logits.log_softmax(-1))).sum(-1)
