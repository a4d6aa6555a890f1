import json
from dataclasses import replace

import pytest
import torch
from plain_edges import plain_edges, plain_filling, plain_run

from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.instrument.trace import FromTrace, Patch
from workbench.models.config import ModelConfig
from workbench.models.high_level import FIXTURES, PROGRAMS, TWO_HOP, XOR, differing_pairs, trained
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import load_tensors
from workbench.training.interchange import PLANS, Plan, measure, save_planted, train_planted
from workbench.training.wires import Wires, contributions, cut_logits, filling


def small(**changes):
    """A plan that a few seconds can train."""
    config = {
        "n_layers": 1, "d_model": 16, "n_heads": 3, "d_head": 4, "d_mlp": 16, "n_ctx": 5, "d_vocab": 3,
        "d_vocab_out": 2,
    } | changes  # fmt: skip
    return Plan(
        program=XOR,
        alignment={"a0.h0": "x", "a0.h1": "y", "m0": "differ"},
        edges=frozenset({"embed->a0.h0<v>", "embed->a0.h1<v>", "a0.h0->m0", "a0.h1->m0", "m0->logits"}),
        constants=frozenset(f"pos->a0.h{head}<{part}>" for head in (0, 1) for part in "qk"),
        model=ModelConfig(**config),
        steps=100,
        batch=32,
        learning_rate=1e-2,
    )


def pairs(program, n=40):
    return differing_pairs(program.prompts, n, generator(0, "test"))


def random_model(**changes):
    config = {
        "n_layers": 2, "d_model": 12, "n_heads": 2, "d_head": 5, "d_mlp": 7, "n_ctx": 5, "d_vocab": 3,
        "d_vocab_out": 2, "biases": ("mlp", "unembed"),
    } | changes  # fmt: skip
    model = Transformer(ModelConfig(**config), generator=generator(0, "test"))
    for name, parameter in model.named_parameters():
        if ".b_" in name:
            torch.nn.init.normal_(parameter, generator=generator(0, name))
    return model


@pytest.mark.parametrize("changes", [{}, {"d_mlp": 0}, {"schedule": (0, 1, 0)}, {"n_layers": 1}])
def test_wires_are_all_edges(changes):
    config = random_model(**changes).config
    wires = Wires.of(config)
    assert wires.names(wires.edges) == set(plain_edges(config))
    some = frozenset(plain_edges(config)[3:9])
    assert wires.names(wires.select(some)) == some


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("changes", [{}, {"d_mlp": 0}, {"schedule": (0, 1, 0)}])
def test_cuts_equal_the_plain_pass(ablation, changes):
    model, batch = random_model(**changes), pairs(XOR)
    clean, logits = contributions(model, batch.tokens)
    source, _ = contributions(model, batch.corrupt)
    torch.testing.assert_close(logits, model(batch.tokens))
    values, other = filling(ablation, clean, source), plain_filling(model, batch, ablation)
    wires, edges = Wires.of(model.config), plain_edges(model.config)
    for cut in [[edge] for edge in edges] + [edges[::3], edges]:
        found = cut_logits(model, batch.tokens, wires.select(cut), values)
        wanted, _ = plain_run(model, batch.tokens, cut, other)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_cutting_all_that_leaves_a_node_is_interchanging_it():
    model, batch = random_model(), pairs(XOR)
    source, _ = contributions(model, batch.corrupt)
    wires = Wires.of(model.config)
    for node, site in {"a0.h1": "L0.z.h1", "m0": "L0.mlp_out", "a1.h0": "L1.z.h0", "m1": "L1.mlp_out"}.items():
        other = run(model, batch.corrupt, record=[site])
        patch = Patch(site=Site.parse(site), source=FromTrace(other))
        wanted = run(model, batch.tokens, patches=[patch]).logits
        found = cut_logits(model, batch.tokens, wires.leaving(node), source)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_weights_through_both_runs():
    model, batch = random_model(), pairs(XOR)
    source, _ = contributions(model, batch.corrupt)
    wires = Wires.of(model.config)
    cut_logits(model, batch.tokens, wires.leaving("a0.h1"), source).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    grown = model.embed.W_E.grad.clone()
    model.zero_grad()
    cut_logits(model, batch.tokens, wires.leaving("a0.h1"), source.detach()).square().sum().backward()
    assert not torch.allclose(model.embed.W_E.grad, grown)


@pytest.fixture(scope="module")
def short_training():
    losses = []
    model = train_planted(small(), seed=0, on_step=losses.append)
    return model, losses


def test_a_short_training_lets_the_losses_fall(short_training):
    model, losses = short_training
    assert [loss.step for loss in losses] == list(range(100))
    for name in ("behaviour", "interchange", "strict"):
        values = torch.tensor([getattr(loss, name) for loss in losses])
        assert values[:3].mean() > 0.6, name
        assert values[-20:].mean() < 0.25, name


def test_a_short_training_is_measured(short_training):
    model, _ = short_training
    report = measure(model, small(), n=400)
    untrained = measure(train_planted(replace(small(), steps=1), seed=0), small(), n=400)
    assert report.accuracy > 0.95
    assert min(report.interchange.values()) > 0.9 > max(untrained.interchange.values())
    assert min(report.isolation.values()) > 0.9
    assert set(report.strictness) == {"a0.h2"}
    assert set(report.isolation) == {"resample", "mean", "zero"}


def test_training_repeats_by_seed():
    plan = replace(small(), steps=3)
    first, again, other = (train_planted(plan, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.W_E"], other["embed.W_E"])


def test_behaviour_alone_plants_nothing():
    """A head that is told nothing carries no variable: the measure must see it."""
    plan, model = PLANS["xor"], trained("xor").model
    weights = model.weights[0].attn
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        matrix = getattr(weights, name).data
        matrix[[1, 3]] = matrix[[3, 1]]
    # The same function, its heads in another order.
    report = measure(model, plan, n=400)
    assert report.accuracy == 1
    assert report.interchange["a0.h1"] < 0.8
    assert report.interchange["a0.h2"] == 1
    assert report.strictness["a0.h3"] < 0.8
    assert report.isolation["resample"] < 0.8


def test_strictness_sees_a_head_that_meddles():
    plan, model = PLANS["xor"], trained("xor").model
    before = measure(model, plan, n=400)
    model.weights[1].attn.W_V.data[3] *= 30
    model.weights[1].attn.W_O.data[3] *= 30
    after = measure(model, plan, n=400)
    assert min(before.strictness.values()) == 1
    assert after.strictness["a1.h3"] < 1
    assert after.isolation["resample"] < 1


@pytest.mark.parametrize("name", PLANS)
def test_shipped_models_hold_what_their_cards_say(name):
    _, card = load_tensors(FIXTURES / f"{name}.safetensors")
    plan = json.loads(json.dumps(PLANS[name].to_json()))
    # A card from before an option of models was there lacks it.
    since = {"embedding": "learned"}
    assert {**card["plan"], "model": {**since, **card["plan"]["model"]}} == plan
    known = trained(name)
    report = measure(known.model, PLANS[name], n=500, seed=7)
    assert report.accuracy == 1
    for found in (report.interchange, report.strictness, report.isolation):
        assert found
        assert min(found.values()) >= 0.995
    assert min(report.need.values()) > 0.2
    assert card["measured"]["interchange"].keys() == report.interchange.keys()
    assert (FIXTURES / f"{name}.safetensors").stat().st_size < 200_000


def test_every_program_has_its_plan():
    assert {name: plan.program for name, plan in PLANS.items()} == dict(PROGRAMS)


def test_report_is_a_table():
    report = measure(random_model(n_layers=2, n_heads=4, d_model=32, d_head=8, d_mlp=32), PLANS["xor"], n=20)
    (table,) = report.tables()
    assert set(table.frame["measure"]) == {"interchange", "strictness", "isolation", "need"}
    assert report.summary()["program"] == "xor"
    assert report.provenance.recipe == "planted:xor"


def test_saved_plans_load_again(tmp_path, monkeypatch):
    hasty = {"xor": replace(PLANS["xor"], steps=1, batch=8)}
    monkeypatch.setattr("workbench.training.interchange.PLANS", hasty)
    monkeypatch.setattr("workbench.models.high_level.FIXTURES", tmp_path)
    report = save_planted("xor", seed=3, folder=tmp_path)
    known = trained("xor")
    assert known.structural == PLANS["xor"].edges
    assert known.constants == PLANS["xor"].constants
    assert known.model.provenance.seed == 3
    assert measure(known.model, PLANS["xor"], seed=3).summary() == report.summary()


def test_programs_answer_under_interventions():
    tokens = torch.tensor([[1, 0, 1, 0, 2], [0, 1, 1, 1, 2]])
    assert XOR.answer(tokens).tolist() == [0, 1]
    assert XOR.answer(tokens, {"x": torch.tensor([0, 0])}).tolist() == [1, 1]
    # Entity 2 has bridge 3; relation 0 makes 2 of it. With bridge 0 it makes 1.
    question = torch.tensor([[2, 5, 8]])
    assert TWO_HOP.answer(question).tolist() == [2]
    assert TWO_HOP.answer(question, {"bridge": torch.tensor([0])}).tolist() == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: PLANS["xor"].program.run(torch.zeros(1, 5).long(), {"z": torch.tensor([1])}), "no variable 'z'"),
        (lambda: replace(PLANS["xor"], alignment={"a0.h9": "x"}), "no node 'a0.h9'"),
        (lambda: replace(PLANS["xor"], alignment={"embed": "x"}), "no node 'embed'"),
        (lambda: replace(PLANS["xor"], alignment={"a0.h1": "w"}), "no variable 'w'"),
        (lambda: replace(PLANS["xor"], edges=frozenset({"m1->m0"})), "no edge 'm1->m0'"),
        (lambda: small(normalization="LN"), "without LayerNorm"),
        (lambda: filling("noise", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), "Unknown ablation 'noise'"),
        (lambda: pairs(replace(XOR, variables={"x": lambda tokens, _: tokens[:, 4]})), "same answer"),
        (lambda: save_planted("xro"), "Unknown plan 'xro'. Did you mean 'xor'"),
    ],
)
def test_mistakes_are_named(wrong, message):
    with pytest.raises(WorkbenchError, match=message):
        wrong()
