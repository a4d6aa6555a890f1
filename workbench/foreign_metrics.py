"""Metrics written for other tools, as metrics of the workbench.

Three signatures are in use. TransformerLens patches with `metric(logits) -> scalar or [batch]`; EAP-IG and MIB
attribute with `metric(logits, clean_logits, input_lengths, labels, mean=True, loss=False)`; ACDC minimises
`metric(logits)`. All of them take the logits of every position, `[batch, pos, vocab]`. The workbench computes only
those that are read: the others are given as NaN, so that a metric that looks elsewhere ends in an error and not in a
wrong number.

NaN does not reach the result of an argmax. A metric that counts top answers must look where the batch is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.metrics import Answers, Metric
from workbench.runtime import WorkbenchError

OnLogits = Callable[[Float[Tensor, "batch pos vocab"]], Tensor]
OnRuns = Callable[..., Tensor]


def from_transformer_lens(
    function: OnLogits, *, name: str, unit: str, better: Literal["higher", "lower"], batch: Answers | None
) -> Metric:
    """A metric that TransformerLens would patch with.

    A function that gives one number for all examples is called with one example at a time. It must then be the mean (or
    the sum) of these calls, which is checked: one with the answers of a whole batch built in is not.

    Args:
        function: logits -> a number for each example, or one number.
        name: what results call it.
        unit: what a difference of one means.
        better: which way a value says that the model does its task; the signature does not say.
        batch: examples whose answers the function has built in: it is asked about these alone, in their order. None for
            a function that treats any example alike.
    """
    return Metric(
        name=name,
        unit=unit,
        higher=_direction(better),
        better=better,
        values=_OnLogits(name=name, function=function, batch=batch),
    )


def from_acdc(function: OnLogits, *, name: str, unit: str, batch: Answers | None) -> Metric:
    """A metric that ACDC would minimise: as TransformerLens', and lower is better."""
    return from_transformer_lens(function, name=name, unit=unit, better="lower", batch=batch)


def from_eap(function: OnRuns, *, name: str, unit: str, better: Literal["higher", "lower"] = "higher") -> Metric:
    """A metric that EAP-IG or MIB would attribute with, called with `mean=False, loss=False`.

    `labels` are the answer and the distractor, `input_lengths` ends each prompt at the position that is read, and
    `clean_logits` are the clean run's, NaN where they are not read either.

    Args:
        function: of the four arguments and the two flags.
        name: what results call it.
        unit: what a difference of one means.
        better: the signature promises that higher is better without `loss`; MIB's divergences do not keep it.
    """
    return Metric(
        name=name,
        unit=unit,
        higher=_direction(better),
        better=better,
        needs_distractor=True,
        needs_reference=True,
        values=_OnRuns(name=name, function=function),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _OnLogits:
    """Calls a function of logits alone."""

    name: str
    function: OnLogits
    batch: Answers | None

    def __call__(self, logits: Tensor, batch: Answers, reference: Tensor | None) -> Tensor:
        if self.batch is None:
            return self._of(_everywhere(logits, batch.read), logits)
        rows = _built_in_rows(self.name, self.batch, batch)
        example = batch.read.nonzero()[:, 0]
        values = logits.new_zeros(len(rows))
        # No example twice in one call: the function knows each of its rows once.
        for chosen in _rounds(rows):
            some = logits[torch.isin(example, chosen)]
            everywhere = logits.new_full((*self.batch.read.shape, logits.shape[1]), torch.nan)
            everywhere[rows[chosen]] = _everywhere(some, batch.read[chosen])
            found = self._of(everywhere, some, rows[chosen])
            values = values.index_put((chosen,), found.to(values.dtype))
        return values

    def _of(
        self, everywhere: Float[Tensor, "batch pos vocab"], given: Tensor, rows: Int[Tensor, " some"] | None = None
    ) -> Tensor:
        """The values of some rows, or of all."""
        present = everywhere if rows is None else everywhere[rows]
        found = self._called(everywhere)
        if found.ndim:
            if rows is not None and found.shape != (len(everywhere),):
                raise WorkbenchError(
                    f"Metric {self.name!r} returned shape {list(found.shape)}; one number an example, "
                    f"[{len(everywhere)}], is wanted."
                )
            values = found if rows is None else found[rows]
            _check_told(self.name, values, given)
            return values
        whole = self._called(present)
        _check_told(self.name, whole, given)
        values = torch.stack([self._called(row) for row in present.split(1)]).flatten()
        close = [torch.allclose(whole, total, rtol=1e-4, atol=1e-6) for total in (values.mean(), values.sum())]
        if len(values) != len(present) or not any(close):
            raise WorkbenchError(
                f"Metric {self.name!r} gives one number for {len(present)} examples, {float(whole):.4g}, which is "
                "neither mean nor sum of what it gives for each alone. Leave the mean out: return one for each."
            )
        return values

    def _called(self, everywhere: Float[Tensor, "batch pos vocab"]) -> Tensor:
        try:
            value = self.function(everywhere)
        except (IndexError, RuntimeError) as error:
            raise WorkbenchError(
                f"Metric {self.name!r} fails on logits of shape {list(everywhere.shape)}: {error}. If the answers of a "
                "batch are built into it, return one number an example and give this batch as batch=."
            ) from error
        return _checked_tensor(self.name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OnRuns:
    """Calls a function of two runs' logits, lengths and labels."""

    name: str
    function: OnRuns

    def __call__(self, logits: Tensor, batch: Answers, reference: Tensor | None) -> Tensor:
        assert batch.distractor is not None
        assert reference is not None
        if not bool((batch.read.sum(1) == 1).all()):
            raise WorkbenchError(
                f"Metric {self.name!r} has EAP's signature, which judges one position of each prompt; some prompts of "
                "this batch are read at none or at several. Use a metric of the workbench, or read one position."
            )
        at = batch.read.nonzero()[:, 1]
        labels = torch.stack([batch.targets[batch.read], batch.distractor[batch.read]], 1)
        runs = [_everywhere(each, batch.read) for each in (logits, reference)]
        value = _checked_tensor(self.name, self.function(*runs, at + 1, labels, mean=False, loss=False))
        _check_told(self.name, value, logits)
        return value


def _direction(better: Literal["higher", "lower"]) -> str:
    return "the model does its task better" if better == "higher" else "the model does its task worse"


def _everywhere(
    logits: Float[Tensor, "reads vocab"], read: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos vocab"]:
    """Logits of all positions: NaN where they are not read."""
    everywhere = logits.new_full((*read.shape, logits.shape[1]), torch.nan)
    everywhere[read] = logits
    return everywhere


def _checked_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise WorkbenchError(f"Metric {name!r} returned a {type(value).__name__}; a tensor is wanted, without .item().")
    return value if value.is_floating_point() else value.float()


def _check_told(name: str, value: Tensor, given: Tensor) -> None:
    """Raise a WorkbenchError if the metric made a NaN of finite logits."""
    if bool(value.isnan().any()) and bool(given.isfinite().all()):
        raise WorkbenchError(
            f"Metric {name!r} gave NaN: it looks at positions that the batch does not read, where there are no logits. "
            "Read these too (batch.read), or look only where the batch is read."
        )


def _built_in_rows(name: str, built_in: Answers, asked: Answers) -> Int[Tensor, " asked"]:
    """Which of the examples that are built in each example is that is asked about.

    Raises:
        WorkbenchError: some are none of them.
    """
    mine, theirs = _content(built_in), _content(asked)
    n = len(mine)
    times = len(theirs) // n if n else 0
    if torch.equal(mine.repeat(times, 1), theirs):
        return torch.arange(n).repeat(times)
    rows = torch.full((len(theirs),), -1)
    # Examples with the same answers need not be the same; those with the same prompts are.
    if mine.shape[1] == theirs.shape[1] and hasattr(built_in, "tokens") and hasattr(asked, "tokens"):
        distinct, which = torch.unique(torch.cat([mine, theirs]), dim=0, return_inverse=True)
        row_of = torch.full((len(distinct),), -1)
        row_of[which[:n]] = torch.arange(n)
        rows = row_of[which[n:]]
    if bool((rows < 0).any()):
        raise WorkbenchError(
            f"Metric {name!r} has the answers of {n} examples built in and is asked about {int((rows < 0).sum())} "
            "others. Adapt it to the batch that it is used with."
        )
    return rows


def _content(batch: Answers) -> Int[Tensor, "batch column"]:
    """All that tells examples apart, side by side."""
    found = [getattr(batch, field, None) for field in ("tokens", "corrupt", "targets", "distractor", "read")]
    return torch.cat([tensor.long().cpu() for tensor in found if tensor is not None], 1)


def _rounds(rows: Int[Tensor, " asked"]) -> list[Int[Tensor, " some"]]:
    """Places in `rows`, parted so that none of the parts holds a row twice."""
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows)
    earlier = torch.empty_like(rows)
    earlier[order] = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows[order]]
    return [(earlier == number).nonzero()[:, 0] for number in range(int(counts.max()) if len(rows) else 0)]
