"""Two forwards, one meaning: the fast path's values and every gradient are the specification's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.instrument.passes import run
from workbench.models import fast
from workbench.models.config import BIASES, ModelConfig
from workbench.models.fast import ReadPlan, read_logits, read_neurons
from workbench.models.transformer import Transformer

SMALL = ModelConfig(n_layers=1, d_model=6, n_heads=2, d_head=3, d_mlp=5, n_ctx=4, d_vocab=5, d_vocab_out=4)
TOLERANCE = 1e-12


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator=generator).double()
    # Small, so that four steps without a norm do not magnify rounding; uneven, so that no bias is zero.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.6).add_(0.1 * torch.randn(parameter.shape, generator=generator).double())
    return model


def prompts(seed: int, batch: int = 6, length: int = 4) -> Tensor:
    return torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    if not wanted.numel():
        return 0.0
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max().clamp_min(1e-3))


def gradients(model: Transformer, logits: Tensor) -> dict[str, Tensor]:
    # An uneven, nonlinear loss: no gradient cancels.
    weights = torch.linspace(0.5, 1.5, logits.numel()).double().view(logits.shape)
    loss = (weights * logits.tanh()).sum()
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dict(zip(names, found, strict=True))


def check(model: Transformer, tokens: Tensor, read: Tensor) -> None:
    quick = read_logits(model, ReadPlan.of(tokens, read))
    slow = model(tokens)[read]
    assert relative(quick, slow) < TOLERANCE
    found, wanted = gradients(model, quick), gradients(model, slow)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # A key's bias moves no softmax: its gradient is zero but for rounding, which others' size has to measure.
        size = max(float(gradient.abs().max()), 1e-3 * scale)
        assert float((found[name] - gradient).abs().max()) <= TOLERANCE * size, name


READS = {
    "last": lambda tokens: torch.arange(tokens.shape[1]).expand_as(tokens) == tokens.shape[1] - 1,
    "one each, anywhere": lambda tokens: torch.arange(tokens.shape[1]) == tokens[:, :1] % tokens.shape[1],
    "every": lambda tokens: torch.ones_like(tokens, dtype=torch.bool),
    "several": lambda tokens: torch.arange(tokens.shape[1]).expand_as(tokens) >= 2,
    "unequal": lambda tokens: (tokens % 2 == 0) | (torch.arange(len(tokens)) == 0)[:, None],
}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a config; the test builds it, because type checks draw random numbers and strategies must not."""
    layers = draw(st.integers(1, 3))
    tied = draw(st.booleans())
    shared = st.permutations(range(layers)).map(lambda order: (*order, order[0]))
    return {
        "n_layers": layers,
        "n_heads": draw(st.integers(1, 3)),
        "d_mlp": draw(st.sampled_from([0, 5])),
        "d_vocab_out": 5 if tied else 4,
        "normalization": draw(st.sampled_from(["LN", None])),
        "activation": draw(st.sampled_from(["relu", "gelu", "gelu_new"])),
        "tied": tied,
        "biases": tuple(draw(st.sets(st.sampled_from(BIASES)))),
        "causal": draw(st.booleans()),
        "pad_token": draw(st.sampled_from([None, 0])),
        "schedule": draw(st.none() | shared),
    }


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("pad_token", [None, 0])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_every_gradient(read: str, steps: int, pad_token: int | None, causal: bool) -> None:
    config = replace(SMALL, n_layers=steps, normalization="LN", biases=BIASES, pad_token=pad_token, causal=causal)
    tokens = prompts(steps)
    check(build(config), tokens, READS[read](tokens))


@given(fields=options(), read=st.sampled_from(list(READS)), seed=st.integers(0, 99), length=st.integers(1, 4))
def test_values_and_every_gradient_of_any_config(fields: dict[str, Any], read: str, seed: int, length: int) -> None:
    tokens = prompts(seed, batch=1 + seed % 5, length=length)
    check(build(replace(SMALL, **fields), seed), tokens, READS[read](tokens))


@settings(max_examples=40)
@given(seed=st.integers(0, 99), data=st.data())
def test_any_pattern_of_reads(seed: int, data: st.DataObject) -> None:
    tokens = prompts(seed, batch=3)
    flags = data.draw(st.lists(st.booleans(), min_size=12, max_size=12).filter(any))
    config = replace(SMALL, n_layers=1 + seed % 2, pad_token=(None, 0)[seed // 2 % 2])
    check(build(config, seed), tokens, torch.tensor(flags).view(3, 4))


@pytest.mark.parametrize("schedule", [(0, 0), (0, 1, 0), (1, 0, 1, 1)])
def test_shared_blocks(schedule: tuple[int, ...]) -> None:
    tokens = prompts(0)
    config = replace(SMALL, n_layers=max(schedule) + 1, schedule=schedule)
    check(build(config), tokens, READS["unequal"](tokens))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("normalization", ["LN", None])
def test_neurons_are_those_of_the_site(steps: int, normalization: str | None) -> None:
    tokens = prompts(0)
    model, read = build(replace(SMALL, n_layers=steps, normalization=normalization)), READS["several"](tokens)
    logits, neurons = read_neurons(model, ReadPlan.of(tokens, read))
    trace = run(model, tokens, record=[f"L{steps - 1}.post"])
    assert relative(logits, trace.logits[read]) < TOLERANCE
    assert relative(neurons, trace[f"L{steps - 1}.post"][read]) < TOLERANCE


def test_a_plan_knows_what_is_distinct_and_what_is_read() -> None:
    tokens = torch.tensor([[1, 2, 1], [1, 2, 3]])
    plan = ReadPlan.of(tokens, torch.tensor([[False, False, True], [False, True, True]]))
    # (1, at 0), (1, at 2), (2, at 1), (3, at 2): four of six.
    assert list(zip(plan.distinct_token.tolist(), plan.distinct_position.tolist(), strict=True)) == [
        (1, 0),
        (1, 2),
        (2, 1),
        (3, 2),
    ]
    assert plan.index.tolist() == [[0, 2, 1], [0, 2, 3]]
    assert plan.example.tolist() == [0, 1, 1]
    assert plan.position.tolist() == [2, 1, 2]
    assert not plan.one_read_each
    assert ReadPlan.of(tokens, tokens == torch.tensor([[2], [3]])).one_read_each
    # As many reads as prompts, but two of the same prompt.
    assert not ReadPlan.of(tokens, torch.tensor([[True, True, False], [False] * 3])).one_read_each


def test_the_check_sees_a_fast_path_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    # Mutants: attention that forgets its mask, and a value that is right with a gradient that is lost.
    tokens = prompts(0)
    model, read = build(replace(SMALL, n_layers=2)), READS["several"](tokens)
    check(model, tokens, read)
    attend, add = fast._attend, fast._add_mlp
    everywhere = torch.ones(1, 4, 4, dtype=torch.bool)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "_attend", lambda weights, x, index, allowed: attend(weights, x, index, everywhere))
        with pytest.raises(AssertionError):
            check(model, tokens, read)
    monkeypatch.setattr(fast, "_add_mlp", lambda weights, x: x + (add(weights, x) - x).detach())
    with pytest.raises(AssertionError, match="W_in|W_out|W_E"):
        check(model, tokens, read)
