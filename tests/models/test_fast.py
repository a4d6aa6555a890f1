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
from workbench.models.fast import ReadPlan, Rows, read_logits, read_neurons
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
    quick = read_logits(model, ReadPlan.of(model.config, tokens, read))
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
        # Wide enough for 5 tokens, a dimension between, and 4 positions.
        **draw(st.sampled_from([{}, {"embedding": "one_hot", "d_model": 10}])),
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
    logits, neurons = read_neurons(model, ReadPlan.of(model.config, tokens, read))
    trace = run(model, tokens, record=[f"L{steps - 1}.post"])
    assert relative(logits, trace.logits[read]) < TOLERANCE
    assert relative(neurons, trace[f"L{steps - 1}.post"][read]) < TOLERANCE


def test_prompts_that_end_alike_share_their_query() -> None:
    # As in modular arithmetic: many prompts, one token at the end, fewer distinct rows than places.
    tokens = prompts(0, batch=40, length=3)
    tokens[:, -1] = 0
    check(build(replace(SMALL, biases=BIASES)), tokens, READS["last"](tokens))


FACTS = torch.tensor([[1, 2, 0], [1, 2, 4], [1, 2, 3], [1, 3, 0], [3, 2, 4], [1, 2, 0]])
"""Two-hop prompts `head relation relation`, and atomic ones that are padded and read a position earlier."""


@pytest.mark.parametrize("schedule", [None, (0, 1, 0, 1), (0, 1, 1, 0, 1)])
@pytest.mark.parametrize("read_all", [False, True])
def test_a_gpt2_like_reasoner_of_facts_of_unequal_length(schedule: tuple[int, ...] | None, read_all: bool) -> None:
    config = replace(
        SMALL, n_layers=2, d_vocab_out=5, normalization="LN", activation="gelu_new", tied=True, biases=BIASES,
        pad_token=0, schedule=schedule,
    )  # fmt: skip
    last = (FACTS != 0).sum(1, keepdim=True) - 1
    read = torch.arange(3) == last
    check(build(config), FACTS, read | read_all)


def places(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.example.tolist(), rows.position.tolist(), strict=True))


def test_a_plan_knows_what_is_distinct_and_what_is_read() -> None:
    tokens, read = torch.tensor([[1, 2, 1], [1, 2, 3]]), torch.tensor([[False, False, True], [False, True, True]])
    plan = ReadPlan.of(SMALL, tokens, read)
    # (1, at 0), (1, at 2), (2, at 1), (3, at 2): four of six.
    assert places(plan.at_first) == [(0, 0), (0, 2), (0, 1), (1, 2)]
    assert plan.at_first.index.tolist() == [[0, 2, 1], [0, 2, 3]]
    assert plan.example.tolist() == [0, 1, 1]
    assert plan.position.tolist() == [2, 1, 2]


def test_prompts_share_the_rows_of_what_they_begin_with() -> None:
    plan = ReadPlan.of(replace(SMALL, pad_token=0), FACTS, torch.arange(3) == (FACTS != 0).sum(1, keepdim=True) - 1)
    # 1, 3; then 1 2, 1 3, 3 2; then 1 2 3, 1 2 4, 3 2 4. Padding is not among them.
    assert sorted(FACTS[e, : p + 1].tolist() for e, p in places(plan.later)) == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 3], [3], [3, 2], [3, 2, 4],
    ]  # fmt: skip
    assert plan.later.index[1, 1] == plan.later.index[0, 1]
    # The token 2 at position 1 is one row before the first step, whatever stands before it.
    assert plan.at_first.index[4, 1] == plan.at_first.index[0, 1]
    assert plan.later.index[4, 1] != plan.later.index[0, 1]


def test_a_model_that_looks_both_ways_shares_only_whole_prompts() -> None:
    config = replace(SMALL, causal=False, pad_token=0)
    plan = ReadPlan.of(config, FACTS, torch.arange(3) == (FACTS != 0).sum(1, keepdim=True) - 1)
    # Five prompts are distinct; two of them are padded.
    assert len(places(plan.later)) == 3 * 3 + 2 * 2
    assert torch.equal(plan.later.index[0], plan.later.index[5])


@pytest.mark.parametrize(("causal", "rows"), [(True, 2), (False, 4)])
def test_what_no_read_depends_on_is_left_out(causal: bool, rows: int) -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    read = torch.tensor([[False, True, False, False], [False] * 4])
    plan = ReadPlan.of(replace(SMALL, causal=causal), tokens, read)
    assert sorted(places(plan.later)) == sorted(places(plan.at_first)) == [(0, position) for position in range(rows)]


def test_the_check_sees_a_fast_path_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    # Mutants: attention that forgets its mask, a plan that takes every prompt with this token here for the same, and a
    # value that is right with a gradient that is lost.
    tokens = prompts(0)
    model, read = build(replace(SMALL, n_layers=2)), READS["several"](tokens)
    check(model, tokens, read)
    attend, add = fast._attend, fast._add_mlp
    everywhere = torch.ones(1, 4, 4, dtype=torch.bool)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "_attend", lambda *given: attend(*given[:-1], everywhere))
        with pytest.raises(AssertionError):
            check(model, tokens, read)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "_seen", lambda config, tokens: tokens)
        with pytest.raises(AssertionError):
            check(model, tokens, read)
    monkeypatch.setattr(fast, "_add_mlp", lambda weights, x, normed: x + (add(weights, x, normed) - x).detach())
    with pytest.raises(AssertionError, match="W_in|W_out|W_E"):
        check(model, tokens, read)
