"""What one model of a run on facts is measured by: one row for each number (Wang et al. 2024, section 3.3).

Every checkpoint is asked the same prompts, drawn once. A row says of what it is: `measure`, `split`, `site` (None where
a measure has none), `cause` (what was changed or looked at, where there is a choice), `value` with its 95 % interval
`low` and `high`, `n` prompts that count, and `skipped` that do not: `n + skipped` is what was drawn. Where nothing
counts (no prompt is answered rightly yet, say), the value is None and n is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from circuits.causal_tracing import SHARES, causal_tracing
from circuits.redirection import Redirected, redirection
from probes.reasoning import Marginal, label_recall, latent_ranks, leads, marginal, two_calls
from workbench.instrument.passes import run
from workbench.instrument.sites import Site, SiteKind
from workbench.intervals import Estimate, mean_of, share_of
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch
from workbench.tasks.comparison import Comparison
from workbench.tasks.complex_comparison import ComplexComparison
from workbench.tasks.composition import Composition

Row = dict[str, Any]
Reasoner = Composition | Comparison | ComplexComparison
SEED = 0
DIGITS = 7
"""Significant digits of a number in a row: a log of many checkpoints stays small."""
LENS_SPLITS = ("train_inferred", "test", "ood", "hard")
"""Where latents, label space and efficiency are looked at, as far as the task has these splits."""
TRACED = {"composition": ("test", "ood"), "comparison": LENS_SPLITS, "complex-comparison": LENS_SPLITS}
TWO_CALLS = ("test", "ood", "id_ood", "ood_id")
REDIRECTED = ("train_inferred", "test")
TRANSPLANTED = ("id_ood", "ood_id", "ood")
MARGINALS = {
    "composition": ((2,), (1, 2), (0,), ()),
    **dict.fromkeys(("comparison", "complex-comparison"), ((0,), (0, 2), (0, 4))),
}
"""The tokens that a reference line looks at."""
BRIDGE_AT = 1
"""Where a chain's first hop ends: the first relation."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompts:
    """What every checkpoint of a run is asked."""

    task: Reasoner
    splits: Mapping[str, Batch]
    """Some prompts of each split of inferred facts."""
    pairs: Mapping[tuple[str, str], Batch]
    """The same with counterfactuals: by split and contrast."""

    def of(self, names: Sequence[str]) -> Iterator[tuple[str, Batch]]:
        """Those of these splits that the task has."""
        return ((name, self.splits[name]) for name in names if name in self.splits)


def draw_prompts(task: Reasoner, n: int, *, seed: int = SEED) -> Prompts:
    """At most `n` prompts of each split of inferred facts, and their counterfactuals.

    Raises:
        WorkbenchError: `n` is not positive.
    """
    if n < 1:
        raise WorkbenchError(f"Measuring needs at least 1 prompt of each split, got n = {n}.")
    inferred = [split for split in task.splits if split != "train" and not split.startswith("atomic")]
    splits = {split: _drawn(task.examples(split), n, split, seed) for split in inferred}
    wanted: list[tuple[str, str]] = []
    if isinstance(task, Composition):
        wanted = [(split, contrast) for split in REDIRECTED for contrast in ("bridge", "same_bridge")]
        wanted += [(split, "same_bridge") for split in TRANSPLANTED]
    pairs = {(split, contrast): task.contrast(splits[split], contrast, seed=seed) for split, contrast in wanted}
    return Prompts(task=task, splits=splits, pairs=pairs)


def find_middle(model: Transformer, prompts: Prompts) -> tuple[Site | None, list[Row]]:
    """Where the bridge decides the answer: the stream after the layer (but the last) with the highest redirect rate.

    It is chosen on chains of training, and with it come the rates of all that it was chosen from. None where there is
    no such place: a task without a bridge, a model of one layer, or one that answers no pair rightly.
    """
    sites = _between_hops(model)
    if not isinstance(prompts.task, Composition) or not sites:
        return None, []
    batch = prompts.pairs["train_inferred", "bridge"]
    found = redirection(model, batch, split="train_inferred", contrast="bridge", position=BRIDGE_AT, sites=sites)
    skipped = found.skipped_wrong + found.skipped_missing
    rows = [
        _row("redirect_candidate", "train_inferred", place.redirected, found.n, skipped, site=place.site)
        for place in found.places
    ]
    return found.best and found.best.site, rows


def rows_of(model: Transformer, prompts: Prompts, middle: Site | None) -> list[Row]:
    """Every measure of one model; `middle` is where chains are redirected."""
    rows = [*_accuracies(model, prompts), *_lens_rows(model, prompts), *_efficiency(model, prompts)]
    rows += _traced(model, prompts)
    if isinstance(prompts.task, Composition):
        rows += [*_two_calls(model, prompts), *_redirected(model, prompts, middle), *_transplanted(model, prompts)]
    return rows


def marginals_of(task: Reasoner) -> tuple[Marginal, ...]:
    """The reference lines: how well the test split is answered from some of the tokens alone."""
    train, test = task.examples("train_inferred"), task.examples("test")
    return tuple(marginal(train, test, positions) for positions in MARGINALS[task.name])


def marginal_rows(task: Reasoner) -> list[Row]:
    """The reference lines as rows; `cause` is what is looked at."""
    rows = []
    for each in marginals_of(task):
        cause = each.label(task.position_labels)
        for measure, found in (("marginal_accuracy", each.accuracy), ("marginal_loss", each.loss)):
            rows.append(_row(measure, "test", found, each.n, cause=cause))
    return rows


def answered(model: Transformer, batch: Batch) -> Estimate:
    """The share of prompts that are answered rightly."""
    return share_of(run(model, batch.tokens).logits[batch.read].argmax(1) == batch.targets[batch.read])


def _accuracies(model: Transformer, prompts: Prompts) -> list[Row]:
    return [_row("accuracy", split, answered(model, batch), len(batch)) for split, batch in prompts.splits.items()]


def _lens_rows(model: Transformer, prompts: Prompts) -> Iterator[Row]:
    """Latents in the logit lens at their own places, and the label space of a comparison."""
    latents = ("bridge", "relation") if isinstance(prompts.task, Composition) else ("v1", "v2")
    sites = [site for site in model.sites if site.kind is SiteKind.resid_post or str(site) == "L0.resid_pre"]
    for split, batch in prompts.of(LENS_SPLITS):
        for latent in latents:
            for among, end in ((False, ""), (True, "_among")):
                ranks = latent_ranks(model, batch, latent, sites=sites, among=among)
                yield from _by_site(f"mrr_{latent}{end}", split, sites, ranks)
        if not isinstance(prompts.task, Composition):
            recall = label_recall(model, prompts.task, batch, sites=sites)
            yield from _by_site("label_recall", split, sites, recall)


def _by_site(measure: str, split: str, sites: Sequence[Site], values: torch.Tensor) -> Iterator[Row]:
    for column, site in enumerate(sites):
        yield _row(measure, split, mean_of(values[:, column]), len(values), site=site)


def _efficiency(model: Transformer, prompts: Prompts) -> Iterator[Row]:
    norm = sum(parameter.detach().double().square().sum() for parameter in model.parameters()) ** 0.5
    for split, batch in prompts.of(LENS_SPLITS):
        yield _row("efficiency", split, mean_of(leads(model, batch).double() / norm), len(batch))


def _traced(model: Transformer, prompts: Prompts) -> Iterator[Row]:
    for split, batch in prompts.of(TRACED[prompts.task.name]):
        for cause in causal_tracing(model, prompts.task, batch, split=split, seed=SEED).causes:
            for measure, n in zip(SHARES, (cause.n, cause.n_right, cause.n_both), strict=True):
                skipped = len(batch) - n
                share = getattr(cause, measure)
                yield _row(measure, split, share, n, skipped, site=cause.site, cause=cause.name)


def _two_calls(model: Transformer, prompts: Prompts) -> Iterator[Row]:
    assert isinstance(prompts.task, Composition)
    for split, batch in prompts.of(TWO_CALLS):
        yield _row("two_calls", split, share_of(two_calls(model, prompts.task, batch)), len(batch))


def _redirected(model: Transformer, prompts: Prompts, middle: Site | None) -> Iterator[Row]:
    """How often another bridge's state redirects the answer, and how often the same bridge's changes it."""
    measures: Mapping[str, tuple[str, Callable[[Redirected], Estimate | None]]] = {
        "redirect": ("bridge", lambda place: place.redirected),
        "control": ("same_bridge", lambda place: place.changed),
    }
    for split in REDIRECTED:
        for measure, (contrast, share) in measures.items():
            batch = prompts.pairs[split, contrast]
            drawn = len(batch) + batch.dropped
            if middle is None:
                yield _row(measure, split, None, 0, drawn)
                continue
            found = redirection(model, batch, split=split, contrast=contrast, position=BRIDGE_AT, sites=[middle])
            yield _row(measure, split, share(found.places[0]), found.n, drawn - found.n, site=middle)


def _transplanted(model: Transformer, prompts: Prompts) -> Iterator[Row]:
    """Accuracy before and after a state comes from an ID fact with the same bridge: does that mend the answer?"""
    sites = _between_hops(model)
    for split in TRANSPLANTED if sites else ():
        batch = prompts.pairs[split, "same_bridge"]
        found = redirection(
            model,
            batch,
            split=split,
            contrast="same_bridge",
            position=BRIDGE_AT,
            sites=sites,
            both_right=False,
        )
        yield _row("transplant_before", split, found.right_before, found.n, found.skipped_missing)
        for place in found.places:
            yield _row("transplant", split, place.right, found.n, found.skipped_missing, site=place.site)


def _between_hops(model: Transformer) -> list[Site]:
    """The stream after every layer but the last, behind which nothing at an earlier position is read any more."""
    return [Site(kind=SiteKind.resid_post, layer=layer) for layer in range(model.config.n_steps - 1)]


def _drawn(examples: Batch, n: int, split: str, seed: int) -> Batch:
    order = torch.randperm(len(examples), generator=generator(seed, "reasoning", split))
    return examples.select(order[:n])


def _row(
    measure: str,
    split: str,
    found: Estimate | None,
    n: int,
    skipped: int = 0,
    *,
    site: Site | None = None,
    cause: str | None = None,
) -> Row:
    ends = (None, None, None) if found is None else (found.mean, found.low, found.high)
    value, low, high = (end if end is None else float(f"{end:.{DIGITS}g}") for end in ends)
    return {
        "measure": measure,
        "split": split,
        "site": None if site is None else str(site),
        "cause": cause,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "skipped": skipped,
    }
