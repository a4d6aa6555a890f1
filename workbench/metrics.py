"""Metrics of a forward pass, one value an example, each with its direction.

A metric looks at the positions that the batch marks as read and averages over them. `higher` says which way is better
for the answer, and `unit` what a difference of one means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, nearest

PerRead = Callable[
    [Float[Tensor, "reads vocab"], Int[Tensor, " reads"], Int[Tensor, " reads"] | None], Float[Tensor, " reads"]
]


@runtime_checkable
class Answers(Protocol):
    """What a metric reads of a batch."""

    @property
    def targets(self) -> Int[Tensor, "batch pos"]:
        """Right next tokens, valid where read."""
        ...

    @property
    def distractor(self) -> Int[Tensor, "batch pos"] | None:
        """Answers to the counterfactual prompts."""
        ...

    @property
    def read(self) -> Bool[Tensor, "batch pos"]:
        """Where to look."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A number for each example, computed from the logits at the positions that are read."""

    name: str
    unit: str
    higher: str
    """What a higher value means, in words: results print it as their direction."""
    needs_distractor: bool
    per_read: PerRead

    def __call__(self, logits: Float[Tensor, "reads vocab"], batch: Answers) -> Float[Tensor, " batch"]:
        """The metric of each example.

        Args:
            logits: the logits at the read positions, in the order of `batch.read.nonzero()`.
            batch: where the answer (and the distractor) stand.

        Raises:
            WorkbenchError: the metric compares with a distractor and the batch has none.
        """
        if self.needs_distractor and batch.distractor is None:
            raise WorkbenchError(
                f"Metric {self.name!r} needs counterfactual pairs, and this batch has none. "
                "Draw it with task.contrast(batch), or use 'loss' or 'accuracy'."
            )
        read = batch.read
        distractor = None if batch.distractor is None else batch.distractor[read]
        values = self.per_read(logits, batch.targets[read], distractor)
        return mean_over_reads(values, read)


def mean_over_reads(values: Float[Tensor, " reads"], read: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """Average of the values that belong to each example."""
    example = read.nonzero()[:, 0]
    total = values.new_zeros(len(read)).index_add(0, example, values)
    return total / read.sum(1).clamp(min=1)


def _picked(logits: Tensor, answer: Tensor) -> Tensor:
    return logits.gather(1, answer[:, None])[:, 0]


def _logit_difference(logits: Tensor, answer: Tensor, distractor: Tensor | None) -> Tensor:
    assert distractor is not None
    return _picked(logits, answer) - _picked(logits, distractor)


def _probability_difference(logits: Tensor, answer: Tensor, distractor: Tensor | None) -> Tensor:
    assert distractor is not None
    probabilities = logits.softmax(1)
    return _picked(probabilities, answer) - _picked(probabilities, distractor)


def _log_probability(logits: Tensor, answer: Tensor, distractor: Tensor | None) -> Tensor:
    return _picked(logits.log_softmax(1), answer)


def _loss(logits: Tensor, answer: Tensor, distractor: Tensor | None) -> Tensor:
    return -_log_probability(logits, answer, distractor)


def _accuracy(logits: Tensor, answer: Tensor, distractor: Tensor | None) -> Tensor:
    return (logits.argmax(1) == answer).to(logits.dtype)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="logit_difference",
            unit="logits",
            higher="the answer beats the distractor by more",
            needs_distractor=True,
            per_read=_logit_difference,
        ),
        Metric(
            name="probability_difference",
            unit="probability",
            higher="the answer is more probable than the distractor",
            needs_distractor=True,
            per_read=_probability_difference,
        ),
        Metric(
            name="log_probability",
            unit="nats",
            higher="the answer is more probable",
            needs_distractor=False,
            per_read=_log_probability,
        ),
        Metric(name="loss", unit="nats", higher="the answer is less probable", needs_distractor=False, per_read=_loss),
        Metric(
            name="accuracy",
            unit="fraction",
            higher="the answer is the top token more often",
            needs_distractor=False,
            per_read=_accuracy,
        ),
    )
}


def metric(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        WorkbenchError: there is none of that name.
    """
    if name not in METRICS:
        raise WorkbenchError(f"Unknown metric {name!r}. {nearest(name, METRICS)}")
    return METRICS[name]
