"""Metrics on logits whose softmax one can do in the head."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.metrics import METRICS, Answers, Metric, is_right, mean_over_reads, metric
from workbench.runtime import WorkbenchError


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """Just what a metric reads."""

    targets: Int[Tensor, "batch pos"]
    distractor: Int[Tensor, "batch pos"] | None
    read: Bool[Tensor, "batch pos"]
    right: Bool[Tensor, "batch vocab"] | None = None


def one_read() -> tuple[Tensor, Prompts]:
    """Two prompts read at their last place: probabilities 1/2, 1/4, 1/4 and 1/8, 1/8, 3/4."""
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 6.0]]).log()
    prompts = Prompts(
        targets=torch.tensor([[9, 0], [9, 1]]),
        distractor=torch.tensor([[9, 1], [9, 2]]),
        read=torch.tensor([[False, True], [False, True]]),
    )
    return logits, prompts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logit_difference", [math.log(2), -math.log(6)]),
        ("probability_difference", [1 / 4, 1 / 8 - 3 / 4]),
        ("log_probability", [-math.log(2), -math.log(8)]),
        ("loss", [math.log(2), math.log(8)]),
        ("accuracy", [1.0, 0.0]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    logits, prompts = one_read()
    torch.testing.assert_close(metric(name)(logits, prompts), torch.tensor(expected))


def test_every_metric_is_tested_by_hand() -> None:
    assert set(METRICS) == {
        "logit_difference",
        "probability_difference",
        "log_probability",
        "loss",
        "accuracy",
        "kl",
        "squared_error",
        "disagreement",
    }


ALONE = [name for name, each in METRICS.items() if not each.needs_reference]
AGAINST = [name for name, each in METRICS.items() if each.needs_reference]


@pytest.mark.parametrize("name", ALONE)
def test_direction(name: str) -> None:
    """A push of the answer's logit moves each metric the way that `higher` says."""
    logits, prompts = one_read()
    pushed = logits.clone()
    pushed[[0, 1], [0, 1]] += 5
    change = metric(name)(pushed, prompts).mean() - metric(name)(logits, prompts).mean()
    worse = "less probable" in metric(name).higher
    assert change < 0 if worse else change > 0
    assert worse == (metric(name).better == "lower") == (name == "loss")


@pytest.mark.parametrize("name", AGAINST)
def test_metrics_against_a_run_are_zero_there_and_grow_away_from_it(name: str) -> None:
    logits, prompts = one_read()
    pushed = logits.clone()
    pushed[[0, 1], logits.argmin(1)] += 20
    assert metric(name).better == "lower"
    torch.testing.assert_close(metric(name)(logits, prompts, logits), torch.zeros(2), rtol=0, atol=1e-6)
    assert (metric(name)(pushed, prompts, logits) > 0.5).all()
    with pytest.raises(WorkbenchError, match="compares with the clean run's logits"):
        metric(name)(logits, prompts)


def test_a_metric_of_the_wrong_shape_is_refused() -> None:
    logits, prompts = one_read()
    wrong = replace(metric("loss"), values=lambda logits, batch, reference: logits)
    with pytest.raises(WorkbenchError, match="one number an example"):
        wrong(logits, prompts)


@pytest.mark.parametrize("name", ["logit_difference", "probability_difference"])
def test_a_push_of_the_distractor_lowers_a_difference(name: str) -> None:
    logits, prompts = one_read()
    pushed = logits.clone()
    pushed[[0, 1], [1, 2]] += 1
    assert (metric(name)(pushed, prompts) < metric(name)(logits, prompts)).all()


@pytest.mark.parametrize("name", ALONE)
def test_a_shift_of_all_logits_changes_nothing(name: str) -> None:
    logits, prompts = one_read()
    torch.testing.assert_close(metric(name)(logits + 7, prompts), metric(name)(logits, prompts))


def test_several_reads_are_averaged_within_their_example() -> None:
    """The first prompt is read twice (losses ln 2 and ln 8), the second once (ln 4), the third nowhere."""
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 6.0], [2.0, 1.0, 1.0]]).clamp(min=1e-30).log()
    prompts = Prompts(
        targets=torch.tensor([[0, 1], [9, 1], [9, 9]]),
        distractor=None,
        read=torch.tensor([[True, True], [False, True], [False, False]]),
    )
    expected = torch.tensor([(math.log(2) + math.log(8)) / 2, math.log(4), 0.0])
    torch.testing.assert_close(metric("loss")(logits, prompts), expected)


def test_reads_go_to_the_example_that_they_belong_to() -> None:
    read = torch.tensor([[True, False, True], [False, True, False]])
    assert mean_over_reads(torch.tensor([1.0, 3.0, 10.0]), read).tolist() == [2.0, 10.0]


@pytest.mark.parametrize("name", ["logit_difference", "probability_difference"])
def test_a_difference_needs_a_distractor(name: str) -> None:
    logits, prompts = one_read()
    alone = Prompts(targets=prompts.targets, distractor=None, read=prompts.read)
    with pytest.raises(WorkbenchError, match=rf"{name!r} needs counterfactual pairs.*task\.contrast\(batch\)"):
        metric(name)(logits, alone)


def test_gradients_flow() -> None:
    logits, prompts = one_read()
    logits.requires_grad_()
    metric("logit_difference")(logits, prompts).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1, -1, 0], [0, 1, -1]]


def test_unknown_metric() -> None:
    with pytest.raises(WorkbenchError, match="Unknown metric 'logit_diff'. Did you mean 'logit_difference'"):
        metric("logit_diff")


def test_any_right_token_is_right_where_there_are_several() -> None:
    logits, prompts = one_read()
    # The top tokens are 0 and 2; the targets 0 and 1.
    assert metric("accuracy")(logits, prompts).tolist() == [1, 0]
    assert is_right(torch.tensor([0, 2]), prompts).tolist() == [True, False]
    several = replace(prompts, right=torch.tensor([[True, False, False], [False, True, True]]))
    assert metric("accuracy")(logits, several).tolist() == [1, 1]
    none = replace(prompts, right=torch.tensor([[False, True, False], [False, True, True]]))
    assert is_right(torch.tensor([0, 2]), none).tolist() == [False, True]


def test_right_tokens_hold_at_every_read_of_their_example() -> None:
    prompts = Prompts(
        targets=torch.tensor([[0, 1], [2, 2]]),
        distractor=None,
        read=torch.tensor([[True, True], [False, True]]),
        right=torch.tensor([[True, True, False], [False, False, True]]),
    )
    assert is_right(torch.tensor([1, 2, 2]), prompts).tolist() == [True, False, True]


def test_a_batch_has_what_a_metric_reads() -> None:
    assert isinstance(one_read()[1], Answers)
    assert not isinstance(object(), Answers)


def test_what_is_no_number_an_example_is_refused() -> None:
    logits, prompts = one_read()
    cases = [
        (lambda logits, batch, reference: 1.0, "returned a float; a tensor is wanted"),
        (lambda logits, batch, reference: logits.mean(), r"returned shape \[\]; one number an example, \[2\]"),
        (lambda logits, batch, reference: logits.argmax(1), r"numbers of type torch.int64; .* End it with .float\(\)"),
    ]
    for values, message in cases:
        mine = Metric(name="mine", unit="1", higher="more", values=values)
        with pytest.raises(WorkbenchError, match=message):
            mine(logits, prompts)
