"""Information flow against sums worked by hand, and what is handed on against what arrives."""

from __future__ import annotations

import math

import pytest
import torch

from circuits import flow
from circuits.experiment import Experiment, experiment
from circuits.flow import information_flow
from circuits.graph import circuit_graph
from tests.circuits.test_memoised import KINDS, planned
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.tasks.base import Batch


def two_tokens(*, bias: float = 0.0, position: float = 0.0, d_mlp: int = 0, odds: float = 1.0) -> Experiment:
    """One head that averages the tokens (2, 0) and (0, 4), read at the second; columns a and b are the positions.

    The odds are those of the second token's attention to itself against the first.
    """
    config = ModelConfig(
        n_layers=1,
        d_model=2,
        n_heads=1,
        d_head=2,
        d_mlp=d_mlp,
        n_ctx=2,
        d_vocab=3,
        d_vocab_out=2,
        biases=("attn",),
    )
    model = Transformer(config, generator=generator(0, "flow"))
    state = model.state_dict()
    for tensor in state.values():
        tensor.zero_()
    state["embed.W_E"].copy_(torch.tensor([[2.0, 0.0], [0.0, 4.0], [1.0, 1.0]]))
    state["pos_embed.W_pos"][1, 1] = position
    for name in ("W_V", "W_O"):
        state[f"weights.0.attn.{name}"][0] = torch.eye(2)
    state["weights.0.attn.W_Q"][0, 1, 0] = 1 / 4
    state["weights.0.attn.W_K"][0, 1, 0] = math.log(odds) * math.sqrt(2) / 4
    state["weights.0.attn.b_O"][1] = bias
    state["unembed.W_U"].copy_(torch.eye(2))
    if d_mlp:
        state["weights.0.mlp.W_in"].copy_(torch.eye(2))
        state["weights.0.mlp.W_out"].copy_(torch.eye(2))
    tokens = torch.tensor([[0, 1]])
    batch = Batch(
        tokens=tokens,
        targets=torch.ones_like(tokens),
        read=torch.tensor([[False, True]]),
        corrupt=torch.tensor([[2, 2]]),
        distractor=torch.zeros_like(tokens),
    )
    graph = circuit_graph(model, columns=("a", "b"), split_inputs=bool(position))
    return experiment(model, batch, graph=graph)


def shares(plan: Experiment) -> dict[str, float]:
    """The edges along which anything flows."""
    scores = information_flow(plan).score
    return {
        name: float(score)
        for name, score in zip(plan.graph.index, scores, strict=True)
        if not torch.isclose(score, -score)
    }


def test_a_sum_of_two_parts() -> None:
    # The head writes (1, 2): the sum with (0, 4) is (1, 6). Without the input it is 3 away, without the head 4, of 7.
    # Of the head's own sum, (1, 0) comes from the first token and (0, 2) from the second.
    assert shares(two_tokens()) == pytest.approx(
        {
            "input@b->logits@b": 4 / 7,
            "a0.h0@b->logits@b": 3 / 7,
            "input@b->a0.h0<q>@b": 3 / 7,
            "input@a->a0.h0<k>@a": 1 / 7,
            "input@b->a0.h0<k>@b": 2 / 7,
            "input@a->a0.h0<v>@a": 1 / 7,
            "input@b->a0.h0<v>@b": 2 / 7,
        }
    )


def test_a_head_hands_on_by_what_each_place_adds() -> None:
    # Attention 1/4 and 3/4 writes (0.5, 3): 0.5 comes from the first token and 3 from the second. Of (0.5, 7), of size
    # 7.5, the input makes 4 and the head 3.5.
    found = shares(two_tokens(odds=3.0))
    assert found["a0.h0@b->logits@b"] == pytest.approx(3.5 / 7.5)
    for slot in ("k", "v"):
        assert found[f"input@a->a0.h0<{slot}>@a"] == pytest.approx(3.5 / 7.5 / 7)
        assert found[f"input@b->a0.h0<{slot}>@b"] == pytest.approx(3.5 / 7.5 * 6 / 7)


def test_a_bias_is_in_the_sum_and_takes_no_share() -> None:
    # (1, 6) and the bias (0, -3) are (1, 3), of size 4: without the input 2 are left, without the head 1.
    found = shares(two_tokens(bias=-3))
    assert found["input@b->logits@b"] == pytest.approx(2 / 5)
    assert found["a0.h0@b->logits@b"] == pytest.approx(3 / 5)


def test_parts_that_cancel_take_nothing() -> None:
    # Token (0, 4) and position (0, -3) at the second place: the sum (1, 1.5) is nearer to 0 than it is to either rest.
    found = shares(two_tokens(position=-3))
    assert found["a0.h0@b->logits@b"] == pytest.approx(1)
    assert not {"embed@b->logits@b", "pos@b->logits@b"} & set(found)


def test_an_mlp_hands_on_what_it_gets() -> None:
    # The MLP writes what it reads, (1, 6). All is (2, 12), of size 14: 7 for the MLP, 4 the input, 3 the head.
    found = shares(two_tokens(d_mlp=2))
    assert found["m0@b->logits@b"] == pytest.approx(7 / 14)
    assert found["input@b->m0@b"] == pytest.approx(7 / 14 * 4 / 7)
    assert found["a0.h0@b->m0@b"] == pytest.approx(7 / 14 * 3 / 7)
    assert found["input@b->a0.h0<q>@b"] == pytest.approx(3 / 14 + 3 / 14)


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_a_node_is_what_arrives(kind: str) -> None:
    plan = planned(kind)
    found = information_flow(plan).examples
    assert found is not None
    graph = plan.graph
    torch.testing.assert_close(
        found[:, graph.of_port(len(graph.ports) - 1)].sum(1),
        plan.full.new_ones(len(plan.batch)),
        rtol=1e-10,
        atol=1e-10,
    )
    writer_of = torch.tensor([edge.writer for edge in graph.edges])
    for writer, ports in enumerate(graph.ports_of):
        handed_on = found[:, writer_of == writer].sum(1)
        for port in ports:
            arrives = found[:, graph.of_port(port)].sum(1)
            if kind in ("plain", "no norm", "columns", "attention only", "shared"):
                torch.testing.assert_close(arrives, handed_on, rtol=1e-10, atol=1e-10)
            # In the other kinds some sums are nearer to nothing than to what any part leaves: there the flow ends.
            assert bool((arrives <= handed_on + 1e-10).all())
    assert float(found.min()) >= 0


def test_the_scores_say_what_they_are() -> None:
    plan = planned("plain")
    scores = information_flow(plan)
    assert (scores.method, scores.scale, scores.reference) == ("ifr", "share of the flow", "clean run")
    assert torch.equal(scores.importance, scores.score)
    assert scores.examples is not None
    torch.testing.assert_close(scores.score, scores.examples.mean(0))


@pytest.mark.parametrize("kind", ["padded", "columns"])
def test_passes_of_any_size_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(kind)
    whole = information_flow(plan).score
    monkeypatch.setattr(flow, "ROWS", 1)
    torch.testing.assert_close(information_flow(plan).score, whole, rtol=1e-12, atol=1e-12)
