"""Metrics of other tools against ours on numbers that one can do in the head, and what they would get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from circuits.components import inputs_of, run_parts, weighted
from circuits.experiment import Experiment, experiment
from circuits.memoised import circuit_values
from workbench.foreign_metrics import from_acdc, from_eap, from_transformer_lens
from workbench.metrics import Metric, metric
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch


def prompts(n: int = 3, *, reads: Literal["last", "varied", "two"] = "last") -> Batch:
    draw = generator(0, "prompts")
    tokens, corrupt = torch.randint(0, 7, (2, n, 4), generator=draw)
    targets = torch.stack([torch.randperm(7, generator=draw)[:n] for _ in range(4)], 1)
    read = torch.zeros(n, 4, dtype=torch.bool)
    read[:, 3] = reads != "varied"
    if reads == "varied":
        read[torch.arange(n), torch.arange(n) % 4] = True
    if reads == "two":
        read[0, 1] = True
    return Batch(tokens=tokens, corrupt=corrupt, targets=targets, distractor=(targets + 1) % 7, read=read)


def logits_of(batch: Batch) -> Tensor:
    return torch.randn(int(batch.read.sum()), 7, generator=generator(1, "logits"))


def at_last(batch: Batch) -> Callable[[Tensor], Tensor]:
    """What a user of TransformerLens writes: the answers are built in."""
    answer, distractor = batch.targets[:, -1], batch.pairs()[1][:, -1]

    def logit_difference(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return last.gather(1, answer[:, None])[:, 0] - last.gather(1, distractor[:, None])[:, 0]

    return logit_difference


def of_eap(
    logits: Tensor, clean_logits: Tensor, input_lengths: Tensor, labels: Tensor, mean: bool = True, loss: bool = False
) -> Tensor:
    """What a user of EAP-IG writes."""
    rows = torch.arange(len(logits))
    good_bad = logits[rows, input_lengths - 1].gather(-1, labels.to(logits.device))
    result = good_bad[:, 0] - good_bad[:, 1]
    result = -result if loss else result
    return result.mean() if mean else result


def lens(
    function: Callable[[Tensor], Any], batch: Batch | None, better: Literal["higher", "lower"] = "higher"
) -> Metric:
    return from_transformer_lens(function, name="mine", unit="logits", better=better, batch=batch)


def test_one_number_an_example_is_taken_as_it_is() -> None:
    batch = prompts()
    logits = logits_of(batch)
    torch.testing.assert_close(lens(at_last(batch), batch)(logits, batch), metric("logit_difference")(logits, batch))


@pytest.mark.parametrize("reduced", [Tensor.mean, Tensor.sum])
def test_one_number_for_all_is_asked_for_example_by_example(reduced: Callable[[Tensor], Tensor]) -> None:
    batch = prompts()
    logits = torch.tensor([[1.0, 0, 0, 5, 0, 0, 0], [2, 0, 0, 4, 0, 0, 0], [7, 0, 0, 1, 0, 0, 0]])
    for known in (batch, None):
        found = lens(lambda logits: reduced(logits[:, -1, 3] - logits[:, -1, 0]), known)
        assert found(logits, batch).tolist() == [4, 2, -6]


def test_one_number_with_a_batch_of_answers_built_in_is_refused() -> None:
    batch = prompts()
    with pytest.raises(WorkbenchError, match=r"fails on logits of shape \[1, 4, 7\].*return one number an example"):
        lens(lambda logits: at_last(batch)(logits).mean(), batch)(logits_of(batch), batch)
    answer = batch.targets[:, -1]

    def broadcasts(logits: Tensor) -> Tensor:
        """Fits one example as well as three: each is then asked for the answers of all."""
        return logits[torch.arange(len(logits)), -1, answer].mean()

    with pytest.raises(WorkbenchError, match="neither mean nor sum of what it gives for each alone"):
        lens(broadcasts, batch)(logits_of(batch), batch)
    one = prompts(1)
    logits = logits_of(one)
    found = lens(lambda logits: at_last(one)(logits).mean(), one)(logits, one)
    torch.testing.assert_close(found, metric("logit_difference")(logits, one))


def test_the_batch_that_is_built_in_may_come_in_any_order_and_many_times() -> None:
    batch = prompts(5, reads="last")
    mine = lens(at_last(batch), batch)
    for rows in ([0, 1, 2, 3, 4] * 3, [1, 2, 1, 2], [4, 0], [3, 3, 3], []):
        asked = batch.select(torch.tensor(rows, dtype=torch.long))
        logits = logits_of(asked)
        torch.testing.assert_close(mine(logits, asked), metric("logit_difference")(logits, asked))


def test_one_number_for_all_is_also_taken_of_a_part() -> None:
    batch = prompts(5)
    mine = lens(lambda logits: (logits[:, -1, 3] - logits[:, -1, 0]).mean(), batch)
    asked = batch.select(torch.tensor([4, 2]))
    logits = logits_of(asked)
    torch.testing.assert_close(mine(logits, asked), logits[:, 3] - logits[:, 0])


def test_examples_that_are_not_built_in_are_refused() -> None:
    batch = prompts()
    mine = lens(at_last(batch), batch)
    other = Batch(tokens=batch.tokens.flip(0), targets=batch.targets, read=batch.read)
    with pytest.raises(WorkbenchError, match="answers of 3 examples built in and is asked about 3 others"):
        mine(logits_of(other), other)
    changed = batch.tokens.clone()
    changed[0] = 6
    other = Batch(
        tokens=changed, corrupt=batch.corrupt, targets=batch.targets, distractor=batch.distractor, read=batch.read
    )
    with pytest.raises(WorkbenchError, match="is asked about 1 others"):
        mine(logits_of(other), other)


def test_a_metric_that_looks_elsewhere_is_caught() -> None:
    batch = prompts()
    everywhere = lens(lambda logits: logits.mean((1, 2)), batch)
    with pytest.raises(WorkbenchError, match="looks at positions that the batch does not read"):
        everywhere(logits_of(batch), batch)
    first = from_eap(lambda logits, clean, lengths, labels, mean, loss: logits[:, 0, 0], name="mine", unit="logits")
    with pytest.raises(WorkbenchError, match="looks at positions that the batch does not read"):
        first(logits_of(batch), batch, logits_of(batch))
    scalar = lens(lambda logits: logits.mean(), batch)
    with pytest.raises(WorkbenchError, match="looks at positions that the batch does not read"):
        scalar(logits_of(batch), batch)


def test_a_models_own_nan_is_not_blamed_on_the_metric() -> None:
    batch = prompts()
    logits = logits_of(batch)
    logits[1] = torch.nan
    assert lens(at_last(batch), batch)(logits, batch).isnan().tolist() == [False, True, False]


def test_what_is_no_number_an_example_is_refused() -> None:
    batch = prompts()
    with pytest.raises(WorkbenchError, match="returned a float; a tensor is wanted"):
        lens(lambda logits: 1.0, batch)(logits_of(batch), batch)
    with pytest.raises(WorkbenchError, match=r"returned shape \[3, 7\]"):
        lens(lambda logits: logits[:, -1], batch)(logits_of(batch), batch)
    with pytest.raises(WorkbenchError, match=r"returned shape \[3, 7\]"):
        lens(lambda logits: logits[:, -1], None)(logits_of(batch), batch)
    mean = from_eap(lambda logits, clean, lengths, labels, mean, loss: logits[:, -1].mean(), name="mine", unit="1")
    with pytest.raises(WorkbenchError, match=r"returned shape \[\]"):
        mean(logits_of(batch), batch, logits_of(batch))


def test_counts_are_taken_as_numbers() -> None:
    batch = prompts()
    logits = logits_of(batch)
    mine = lens(lambda logits: logits[:, -1].argmax(-1) == batch.targets[:, -1], batch)
    torch.testing.assert_close(mine(logits, batch), metric("accuracy")(logits, batch))


@pytest.mark.parametrize("reads", ["last", "varied"])
def test_eaps_signature_is_given_lengths_labels_and_the_clean_run(reads: Literal["last", "varied"]) -> None:
    batch = prompts(reads=reads)
    logits, clean = logits_of(batch), logits_of(batch).flip(0)
    seen: dict[str, Any] = {}

    def spied(logits: Tensor, clean_logits: Tensor, input_lengths: Tensor, labels: Tensor, **flags: bool) -> Tensor:
        seen.update(clean=clean_logits, lengths=input_lengths, labels=labels, **flags)
        return of_eap(logits, clean_logits, input_lengths, labels, **flags)

    found = from_eap(spied, name="mine", unit="logits")(logits, batch, clean)
    torch.testing.assert_close(found, metric("logit_difference")(logits, batch))
    assert (seen["mean"], seen["loss"]) == (False, False)
    assert seen["lengths"].tolist() == ([4, 4, 4] if reads == "last" else [1, 2, 3])
    assert seen["labels"].tolist() == torch.stack([batch.targets, batch.pairs()[1]], 2)[batch.read].tolist()
    assert torch.equal(seen["clean"][batch.read], clean)
    assert seen["clean"][~batch.read].isnan().all()


def test_eaps_signature_needs_pairs_a_clean_run_and_one_read() -> None:
    batch = prompts()
    mine = from_eap(of_eap, name="mine", unit="logits")
    with pytest.raises(WorkbenchError, match="compares with the clean run"):
        mine(logits_of(batch), batch)
    alone = Batch(tokens=batch.tokens, targets=batch.targets, read=batch.read)
    with pytest.raises(WorkbenchError, match="needs counterfactual pairs"):
        mine(logits_of(batch), alone, logits_of(batch))
    two = prompts(reads="two")
    with pytest.raises(WorkbenchError, match="judges one position of each prompt"):
        mine(logits_of(two), two, logits_of(two))


def test_directions_are_said() -> None:
    batch = prompts()
    acdc = from_acdc(lambda logits: -at_last(batch)(logits), name="mine", unit="logits", batch=batch)
    assert (acdc.better, acdc.higher) == ("lower", "the model does its task worse")
    logits = logits_of(batch)
    torch.testing.assert_close(acdc(logits, batch), -metric("logit_difference")(logits, batch))
    assert lens(at_last(batch), batch, "lower").better == "lower"
    assert lens(at_last(batch), batch).higher == "the model does its task better"
    assert from_eap(of_eap, name="mine", unit="logits").better == "higher"
    assert from_eap(of_eap, name="kl", unit="nats", better="lower").higher == "the model does its task worse"


ADAPTED: dict[str, Callable[[Batch], Metric]] = {
    "transformer-lens": lambda batch: lens(at_last(batch), batch),
    "example by example": lambda batch: lens(lambda logits: (logits[:, -1, 3] - logits[:, -1, 0]).mean(), batch),
    "eap": lambda batch: from_eap(of_eap, name="mine", unit="logits"),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_gradients_are_those_of_our_own(kind: str) -> None:
    batch = prompts()
    given = logits_of(batch).requires_grad_()
    (found,) = torch.autograd.grad(ADAPTED[kind](batch)(given, batch, given.detach()).sum(), given)
    expected = torch.zeros(3, 7)
    good, bad = batch.targets[:, -1], batch.pairs()[1][:, -1]
    if kind == "example by example":
        good, bad = torch.full((3,), 3), torch.full((3,), 0)
    expected[torch.arange(3), good], expected[torch.arange(3), bad] = 1.0, -1.0
    torch.testing.assert_close(found, expected)


def mask_gradient(plan: Experiment) -> Tensor:
    """Gradient of the summed metric by the share of each edge that is kept, of two points at once."""
    keep = torch.ones(8, len(plan.graph.edges), dtype=torch.float64).requires_grad_()
    batch = plan.batch.select(torch.arange(4).repeat(2))
    inputs = inputs_of(plan.model, plan.graph, batch.tokens)
    stream = run_parts(
        plan.model, plan.graph, batch.tokens, inputs, weighted(plan.graph, keep, plan.ablated.repeat(2, 1, 1, 1))
    )
    logits = plan.model.finish(stream[1][batch.read], {})
    values = plan.metric(logits, batch, plan.reference.repeat(2, 1))
    return torch.autograd.grad(values.sum(), keep)[0]


@pytest.mark.parametrize("kind", ["transformer-lens", "eap"])
def test_circuits_are_scored_as_with_our_own(kind: str) -> None:
    """The engine asks for many circuits at once, with the examples repeated."""
    shape = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 8, "n_ctx": 4, "d_vocab": 7}
    model = Transformer(ModelConfig(**shape, d_vocab_out=7), generator=generator(0, "model")).double()  # pyright: ignore[reportArgumentType]
    batch = prompts(4)
    ours, theirs = (experiment(model, batch, metric=each) for each in ("logit_difference", ADAPTED[kind](batch)))
    keep = torch.rand(9, len(ours.graph.edges), generator=generator(2, "keep")) < 0.7
    torch.testing.assert_close(circuit_values(theirs, keep), circuit_values(ours, keep))
    gradient = mask_gradient(ours)
    assert int((gradient != 0).sum()) > 10
    torch.testing.assert_close(mask_gradient(theirs), gradient)
