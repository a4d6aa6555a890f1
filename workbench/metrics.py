"""Metrics of a forward pass, one value an example, each with its direction.

A metric looks at the positions that the batch marks as read and averages over them. `higher` says which way is better
for the answer, and `unit` what a difference of one means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, nearest

Logits = Float[Tensor, "reads vocab"]
PerRead = Callable[
    [Logits, Int[Tensor, " reads"], Int[Tensor, " reads"] | None, Logits | None], Float[Tensor, " reads"]
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

    @property
    def right(self) -> Bool[Tensor, "batch vocab"] | None:
        """All tokens that are right where read, if there are more than the targets."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A number for each example, computed from the logits at the positions that are read."""

    name: str
    unit: str
    higher: str
    """What a higher value means, in words: results print it as their direction."""
    better: Literal["higher", "lower"] = "higher"
    """Which way a value says that the model does its task, or is still itself."""
    needs_distractor: bool = False
    needs_reference: bool = False
    """Whether it compares with another run's logits: the clean run of the whole model."""
    picks: bool = False
    """Whether it looks only at the logits of the answer and the distractor, so that no others need be computed."""
    values: Callable[[Logits, Answers, Logits | None], Float[Tensor, " batch"]]

    def __call__(
        self,
        logits: Float[Tensor, "reads vocab"],
        batch: Answers,
        reference: Float[Tensor, "reads vocab"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The metric of each example.

        Args:
            logits: the logits at the read positions, in the order of `batch.read.nonzero()`.
            batch: where the answer (and the distractor) stand.
            reference: the same positions' logits in the clean run of the whole model.

        Raises:
            WorkbenchError: the metric compares with a distractor or a reference run and there is none, or it gave
                something else than one number an example.
        """
        if self.needs_distractor and batch.distractor is None:
            raise WorkbenchError(
                f"Metric {self.name!r} needs counterfactual pairs, and this batch has none. "
                "Draw it with task.contrast(batch), or use 'loss' or 'accuracy'."
            )
        if self.needs_reference and reference is None:
            raise WorkbenchError(
                f"Metric {self.name!r} compares with the clean run's logits, and none were given. "
                "Use 'logit_difference', 'loss' or 'accuracy' here."
            )
        values = self.values(logits, batch, reference)
        if not isinstance(values, Tensor):
            raise WorkbenchError(f"Metric {self.name!r} returned a {type(values).__name__}; a tensor is wanted.")
        if values.shape != (len(batch.read),):
            raise WorkbenchError(
                f"Metric {self.name!r} returned shape {list(values.shape)}; one number an example, "
                f"[{len(batch.read)}], is wanted."
            )
        if not values.is_floating_point():
            raise WorkbenchError(
                f"Metric {self.name!r} returned numbers of type {values.dtype}; floating-point numbers are wanted. "
                "End it with .float()."
            )
        return values


def is_right(predicted: Int[Tensor, " reads"], batch: Answers) -> Bool[Tensor, " reads"]:
    """Whether each predicted token is right: the target, or any of the right ones where a batch names several."""
    if batch.right is None:
        return predicted == batch.targets[batch.read]
    return batch.right[batch.read.nonzero()[:, 0], predicted]


def mean_over_reads(values: Float[Tensor, " reads"], read: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """Average of the values that belong to each example."""
    example = read.nonzero()[:, 0]
    total = values.new_zeros(len(read)).index_add(0, example, values)
    return total / read.sum(1).clamp(min=1)


def _picked(logits: Tensor, answer: Tensor) -> Tensor:
    return logits.gather(1, answer[:, None])[:, 0]


def _logit_difference(logits: Tensor, answer: Tensor, distractor: Tensor | None, reference: Tensor | None) -> Tensor:
    assert distractor is not None
    return _picked(logits, answer) - _picked(logits, distractor)


def _probability_difference(
    logits: Tensor, answer: Tensor, distractor: Tensor | None, reference: Tensor | None
) -> Tensor:
    assert distractor is not None
    probabilities = logits.softmax(1)
    return _picked(probabilities, answer) - _picked(probabilities, distractor)


def _log_probability(logits: Tensor, answer: Tensor, distractor: Tensor | None, reference: Tensor | None) -> Tensor:
    return _picked(logits.log_softmax(1), answer)


def _loss(logits: Tensor, answer: Tensor, distractor: Tensor | None, reference: Tensor | None) -> Tensor:
    return -_picked(logits.log_softmax(1), answer)


def _accuracy(logits: Tensor, batch: Answers, reference: Tensor | None) -> Tensor:
    return mean_over_reads(is_right(logits.argmax(1), batch).to(logits.dtype), batch.read)


def _kl(logits: Tensor, answer: Tensor, distractor: Tensor | None, reference: Tensor | None) -> Tensor:
    assert reference is not None
    expected, found = reference.log_softmax(1), logits.log_softmax(1)
    return (expected.exp() * (expected - found)).sum(1)


def _squared_error(logits: Tensor, answer: Tensor, distractor: Tensor | None, reference: Tensor | None) -> Tensor:
    assert reference is not None
    return (logits - reference).square().sum(1)


def _disagreement(logits: Tensor, answer: Tensor, distractor: Tensor | None, reference: Tensor | None) -> Tensor:
    assert reference is not None
    return (logits.argmax(1) != reference.argmax(1)).to(logits.dtype)


@dataclass(frozen=True, slots=True)
class _AtReads:
    """The average over an example's reads."""

    per_read: PerRead

    def __call__(self, logits: Tensor, batch: Answers, reference: Tensor | None) -> Tensor:
        distractor = None if batch.distractor is None else batch.distractor[batch.read]
        values = self.per_read(logits, batch.targets[batch.read], distractor, reference)
        return mean_over_reads(values, batch.read)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="logit_difference",
            unit="logits",
            higher="the answer beats the distractor by more",
            needs_distractor=True,
            picks=True,
            values=_AtReads(_logit_difference),
        ),
        Metric(
            name="probability_difference",
            unit="probability",
            higher="the answer is more probable than the distractor",
            needs_distractor=True,
            values=_AtReads(_probability_difference),
        ),
        Metric(
            name="log_probability",
            unit="nats",
            higher="the answer is more probable",
            values=_AtReads(_log_probability),
        ),
        Metric(name="loss", unit="nats", higher="the answer is less probable", better="lower", values=_AtReads(_loss)),
        Metric(
            name="accuracy",
            unit="fraction",
            higher="the answer is the top token more often",
            values=_accuracy,
        ),
        Metric(
            name="kl",
            unit="nats",
            higher="the prediction is further from the clean run's",
            better="lower",
            needs_reference=True,
            values=_AtReads(_kl),
        ),
        Metric(
            name="squared_error",
            unit="squared logits",
            higher="the logits are further from the clean run's",
            better="lower",
            needs_reference=True,
            values=_AtReads(_squared_error),
        ),
        Metric(
            name="disagreement",
            unit="fraction",
            higher="the top token differs from the clean run's more often",
            better="lower",
            needs_reference=True,
            values=_AtReads(_disagreement),
        ),
    )
}


def metric(name: str | Metric) -> Metric:
    """The metric called `name`; a Metric is itself.

    Raises:
        WorkbenchError: there is none of that name.
    """
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise WorkbenchError(f"Unknown metric {name!r}. {nearest(name, METRICS)}")
    return METRICS[name]
