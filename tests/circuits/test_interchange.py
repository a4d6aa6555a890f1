from dataclasses import dataclass

import pytest
import torch

from circuits import interchange as module
from circuits.alignment import das, das_map, exchange_coordinates, exchanged_logits
from circuits.interchange import draw_exchange, interchange
from circuits.patching import Cell
from workbench import load
from workbench.figures import figure
from workbench.instrument.adapters import BridgeModel
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.instrument.trace import FromTrace
from workbench.models.bridges import to_bridge
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.modular import Modular
from workbench.tasks.pairs import Pairs

P = 7
TASK = Modular(p=P, train_fraction=0.5)
MARK, A, B, ANSWER = P, slice(P + 3, 2 * P + 3), slice(2 * P + 3, 3 * P + 3), slice(3 * P + 3, 4 * P + 3)
"""Coordinates of the planted stream: the token's residue comes first, then which position it is."""
STREAM = "resid_pre,resid_mid,resid_post"


def planted():
    """Adds modulo 7: head 0 fetches a into A, head 1 fetches b into B, one neuron for each pair writes the answer."""
    config = ModelConfig(
        n_layers=1, d_model=4 * P + 3, n_heads=2, d_head=P, d_mlp=P * P, n_ctx=3, d_vocab=P + 1, d_vocab_out=P
    )
    model = Transformer(config, generator=None).eval()
    one = torch.eye(P)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:P, :P] = one
        model.pos_embed.W_pos[:, MARK : MARK + 3] = torch.eye(3)
        attention, mlp = model.block(0).attn, model.block(0).mlp
        for head, fetched in enumerate((A, B)):
            attention.W_Q[head, MARK + 2, 0] = 30.0
            attention.W_K[head, MARK + head, 0] = 30.0
            attention.W_V[head, :P] = one
            attention.W_O[head, :, fetched] = one
        for neuron in range(P * P):
            a, b = divmod(neuron, P)
            mlp.W_in[A.start + a, neuron] = mlp.W_in[B.start + b, neuron] = 1.0
            mlp.b_in[neuron] = -1.0
            mlp.W_out[neuron, ANSWER.start + (a + b) % P] = 1.0
        model.unembed.W_U[ANSWER] = 4 * one
    return model


def span(model, coordinates):
    """Directions in which one-hot vectors of these coordinates differ."""
    full = torch.zeros(model.config.d_model, P)
    full[coordinates] = torch.eye(P) - 1 / P
    return torch.linalg.svd(full, full_matrices=False).U[:, : P - 1]


def cosines(basis, other):
    """Of the principal angles between two subspaces."""
    return torch.linalg.svdvals(basis.T @ other)


def by_place(result, column="accuracy"):
    frame = result.frame
    return {(row["site"], row["position"]): row[column] for _, row in frame.iterrows()}


@pytest.mark.parametrize(
    ("latent", "carrying"),
    [
        ("a", {("L0.resid_pre", 0)}),
        ("b", {("L0.resid_pre", 1)}),
        ("answer", {("L0.resid_mid", 2), ("L0.resid_post", 2)}),
    ],
)
def test_finds_where_a_latent_is_planted_and_nowhere_else(latent, carrying):
    found = interchange(planted(), TASK, latent=latent, sites=STREAM, n=25, split="all")
    accuracy = by_place(found)
    assert {place for place, share in accuracy.items() if share == 1} == carrying
    assert max(share for place, share in accuracy.items() if place not in carrying) < 0.4
    assert found.ceiling == found.base_accuracy == found.source_accuracy == 1
    # The control: where the latent is carried, another source's answer never comes.
    assert all(by_place(found, "chance")[place] == 0 for place in carrying)


def test_a_place_that_carries_every_latent_gives_the_source_answer():
    found = interchange(planted(), TASK, latent="b", sites=STREAM, n=25, split="all")
    assert by_place(found, "source")["L0.resid_mid", 2] == 1
    assert by_place(found)["L0.resid_mid", 2] == 0
    assert by_place(found, "kept")["L0.resid_mid", 0] == 1


def test_one_head_carries_one_operand():
    model = planted()
    for latent, head in (("a", 0), ("b", 1)):
        accuracy = by_place(interchange(model, TASK, latent=latent, sites="z", n=12))
        assert accuracy[f"L0.z.h{head}", 2] == 1
        assert accuracy[f"L0.z.h{1 - head}", 2] < 0.5


def noisy(seed=0):
    """A model that answers only some prompts rightly, so that shares lie between 0 and 1."""
    model = planted()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


def test_shares_equal_those_of_one_prompt_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)
    model, n = noisy(), 20
    found = interchange(model, TASK, latent="a", sites="resid_pre,resid_mid,z", n=n, split="all", seed=3)
    pairs = draw_exchange(TASK, latent="a", n=n, split="all", seed=3)
    for index, cell in enumerate(found.cells):
        answers = []
        for row in range(n):
            one = pairs.select(slice(row, row + 1))
            source = FromTrace(run(model, one.source.tokens, record=[cell.site]))
            trace = run(model, one.base.tokens, patches=[cell.patch(source, torch.arange(1))])
            answers.append(int(trace.logits[0, 2].argmax()))
        said = torch.tensor(answers)
        a, b = pairs.source.tokens[:, 0], pairs.base.tokens[:, 1]
        assert found.accuracy[index].mean == pytest.approx(float((said == (a + b) % P).double().mean()))
        assert found.kept[index] == pytest.approx(float((said == pairs.base.targets[:, 2]).double().mean()))
        assert found.source[index] == pytest.approx(float((said == pairs.source.targets[:, 2]).double().mean()))
        others = pairs.others[:, 2]
        telling = (others != pairs.base.targets[:, 2]) & (others != pairs.targets[:, 2])
        assert 0 < int(telling.sum()) < n
        assert found.chance[index] == pytest.approx(float((said == others)[telling].double().mean()))
    assert 0 < found.ceiling < min(found.base_accuracy, found.source_accuracy) < 1


@pytest.mark.parametrize("latent", ["a", "b", "answer"])
def test_answers_of_base_source_and_counterfactual_differ(latent):
    pairs = draw_exchange(TASK, latent=latent, n=25, split="all", seed=1)
    base, source = pairs.base.targets[:, 2], pairs.source.targets[:, 2]
    given = pairs.source.latents[latent].value
    a, b = pairs.base.tokens[:, 0], pairs.base.tokens[:, 1]
    expected = {"a": (given + b) % P, "b": (a + given) % P, "answer": given}[latent]
    assert torch.equal(pairs.targets[:, 2], expected)
    assert (pairs.targets[:, 2] != base).all()
    assert (source != base).all()
    assert pairs.decided == (latent == "answer")
    assert bool((pairs.targets[:, 2] == source).any()) == pairs.decided
    assert torch.equal(TASK.examples("all").tokens[pairs.rows], pairs.source.tokens)
    # Of independent pairs, at least those with equal answers are dropped.
    assert pairs.dropped > 0


def test_dropped_counts_what_was_looked_at():
    few, many = (draw_exchange(TASK, latent="a", n=n, split="all", seed=1) for n in (10, 25))
    assert torch.equal(many.base.tokens[:10], few.base.tokens)
    assert few.dropped <= many.dropped <= len(TASK.examples("all")) - 25


SEARCH = {"train_split": "train", "test_split": "test", "n": 12}


def test_search_finds_the_planted_directions():
    model = planted()
    found = das(model, TASK, latent="b", site="L0.resid_pre", dimension=P - 1, steps=120, **SEARCH)
    assert found.cell == Cell(site=Site.parse("L0.resid_pre"), position=1)
    assert found.accuracy.mean == found.whole.mean == found.ceiling == 1
    assert cosines(found.basis, span(model, slice(0, P))).min() > 0.95
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(P - 1), atol=1e-5)
    assert found.losses[-1] < 0.3 < 1 < found.losses[0]
    # The controls: what cannot be carried cannot be learnt, and random directions carry little.
    assert found.shuffled.mean < 0.5
    assert found.random < 0.5
    assert found.selectivity == found.accuracy.mean - found.shuffled.mean


@pytest.mark.slow
def test_search_tells_two_latents_of_one_place_apart():
    """At `=` the stream holds both operands: only some directions exchange b alone."""
    model = planted()
    found = das(model, TASK, latent="b", site="L0.resid_mid", position=2, dimension=P - 1, **SEARCH)
    assert found.whole.mean == 0
    assert found.accuracy.mean == 1
    assert cosines(found.basis, span(model, B)).min() > 0.95
    assert cosines(found.basis, span(model, A)).max() < 0.3


def test_too_few_directions_do_not_carry_it():
    found = das_map(
        planted(), TASK, latent="answer", sites="resid_post", positions=[2], dimensions=(1, P - 1), steps=120, **SEARCH
    )
    narrow, wide = found.subspaces
    assert narrow.accuracy.mean < 0.7
    assert wide.accuracy.mean == 1


def test_search_leaves_the_model_alone_and_repeats():
    model = planted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, again = (
        das(model, TASK, latent="a", site="L0.z.h0", position=2, dimension=2, steps=5, **SEARCH) for _ in "ab"
    )
    assert torch.equal(first.basis, again.basis)
    assert first.summary() == again.summary()
    assert first.basis.shape == (P, 2)
    other = das(model, TASK, latent="a", site="L0.z.h0", position=2, dimension=2, steps=5, seed=1, **SEARCH)
    assert not torch.allclose(first.basis, other.basis)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_map_goes_through_places_and_says_where_nothing_can_be_learnt():
    told = []
    found = das_map(
        planted(), TASK, latent="a", sites="resid_pre,resid_post", dimensions=(1, 6), steps=25,
        progress=lambda done, of, subspace: told.append((done, of, subspace.dimension)), **SEARCH,
    )  # fmt: skip
    assert told == [(i, 12, 1 if i % 2 else 6) for i in range(1, 13)]
    frame = found.frame
    silent = set(zip(frame["site"][~frame["learnt"]], frame["position"][~frame["learnt"]], strict=True))
    assert silent == {("L0.resid_pre", 2), ("L0.resid_post", 0), ("L0.resid_post", 1)}
    assert (frame["accuracy"][~frame["learnt"]] == 0).all()
    assert (frame["kept"][~frame["learnt"]] == 1).all()
    best = frame.loc[frame["accuracy"].idxmax()]
    assert (best["site"], best["position"], best["dimension"]) == ("L0.resid_pre", 0, 6)


class Deaf:
    """A model whose pass meets no edit."""

    def __init__(self, model):
        self.model, self.config, self.sites, self.provenance = model, model.config, model.sites, model.provenance

    def forward(self, tokens, edits=None):
        return self.model.forward(tokens)


def test_an_exchange_that_did_not_happen_is_an_error():
    pairs = draw_exchange(TASK, latent="a", n=4, split="all")
    cell = Cell(site=Site.parse("L0.resid_pre"), position=0)
    vectors, basis = torch.zeros(4, 31), torch.eye(31)
    with pytest.raises(WorkbenchError, match="wrote 0 rows of 4"):
        exchanged_logits(Deaf(planted()), pairs, cell, vectors, basis)
    with pytest.raises(WorkbenchError, match="did not fire|never reached"):
        interchange(Deaf(planted()), TASK, latent="a", n=4)


def test_exchanging_all_directions_is_the_whole_exchange():
    rng = torch.Generator().manual_seed(0)
    base, source = torch.randn(2, 3, 5, generator=rng)
    basis = torch.linalg.qr(torch.randn(5, 2, generator=rng)).Q
    assert torch.allclose(exchange_coordinates(base, source, torch.eye(5)), source, atol=1e-6)
    swapped = exchange_coordinates(base, source, basis)
    assert torch.allclose(swapped @ basis, source @ basis, atol=1e-6)
    rest = torch.eye(5) - basis @ basis.T
    assert torch.allclose(swapped @ rest, base @ rest, atol=1e-6)


@pytest.mark.parametrize("site", ["L0.z.h1", "L0.pre", "L0.post", "L0.resid_mid", "embed"])
def test_all_directions_of_a_place_are_the_place(site):
    model = noisy()
    pairs = draw_exchange(TASK, latent="b", n=12, split="all")
    cell, every = Cell(site=Site.parse(site), position=0 if site == "embed" else 2), torch.arange(12)
    source = run(model, pairs.source.tokens, record=[site])
    expected = run(model, pairs.base.tokens, patches=[cell.patch(FromTrace(source), every)]).logits
    vectors = source[site][:, cell.start]
    found = exchanged_logits(model, pairs, cell, vectors, torch.eye(vectors.shape[1]))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, run(model, pairs.base.tokens).logits, atol=1e-3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mute(Modular):
    """A task whose answer does not depend on its latents."""

    def with_latent(self, batch, latent, values):
        return batch.targets


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: interchange(m, TASK, latent="carry", n=5), "Unknown latent 'carry'"),
        (lambda m: interchange(m, TASK, latent="a", n=50), "Ask for 1 to"),
        (lambda m: interchange(m, TASK, latent="a", n=0), "Ask for 1 to"),
        (lambda m: interchange(m, TASK, latent="a", n=5, sites="pattern"), "no position to exchange"),
        (lambda m: interchange(m, TASK, latent="a", n=5, split="tset"), "Did you mean 'test'"),
        (lambda m: interchange(m, Mute(p=7, train_fraction=0.5), latent="a", n=5), "No headroom"),
        (lambda m: das(m, TASK, latent="carry", site="embed", dimension=2, n=5), "Unknown latent 'carry'"),
        (lambda m: das(m, TASK, latent="a", site="embed", dimension=32, n=5), "1 to 31 dimensions"),
        (lambda m: das(m, TASK, latent="a", site="embed", dimension=0, n=5), "1 to 31 dimensions"),
        (lambda m: das(m, TASK, latent="a", site="L0.z.h0", dimension=8, n=5), "1 to 7 dimensions"),
        (lambda m: das(m, TASK, latent="a", site="L0.z", dimension=2, n=5), "stands for 2 places"),
        (lambda m: das(m, TASK, latent="a", site="L0.post.n3", dimension=1, n=5), "L0.post"),
        (lambda m: das(m, TASK, latent="a", site="embed", dimension=2, position=3, n=5), "they have 0 to 2"),
        (lambda m: das(m, TASK, latent="a", site="embed", dimension=2, steps=0, n=5), "at least one step"),
        (lambda m: das(m, TASK, latent="a", site="embed", dimension=2, train_split="all", n=5), "share 25 prompts"),
        (lambda m: das(m, TASK, latent="a", site="L0.resid_pre", position=2, dimension=2, n=5), "No headroom at"),
        (lambda m: das(m, TASK, latent="a", site="L0.resid_post", position=0, dimension=2, n=5), "No headroom at"),
        (lambda m: das_map(m, TASK, latent="a", sites="embed", dimensions=(), n=5), "Nothing to search"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(WorkbenchError, match=message):
        call(planted())


def test_a_task_must_say_what_its_answers_become():
    task = Pairs(vocab=("x", "y"), clean=((0, 1),), corrupt=((1, 1),), answer=(0,), distractor=(1,))
    with pytest.raises(WorkbenchError, match="with_latent"):
        interchange(planted(), task, latent="answer", n=1)


def test_results_are_tables_and_figures():
    model = planted()
    search = das_map(model, TASK, latent="b", sites="resid_pre", dimensions=(1, 2), steps=3, **SEARCH)
    for result in (interchange(model, TASK, latent="b", sites="z,mlp_out", n=12), search, search.subspaces[2]):
        assert result.provenance.kernel == "reference"
        assert result.summary()["latent"] == "b"
        for table in result.tables():
            assert "n = 12" in table.caption
            assert len(table.frame)
            if table.kind != "table":
                assert figure(table).data
    row = search.summary()["cells"][2]
    assert {"accuracy", "low", "high", "kept", "shuffled", "random", "whole", "ceiling", "n", "dropped"} <= set(row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "mlp_out"])
def test_exchange_in_a_basis_equals_transformer_lens(kind):
    from transformer_lens.tools.analysis.interchange import (
        SubspaceInterchange,
        collect_activations,
        random_basis,
        run_with_intervention,
    )

    model = noisy()
    bridge, _ = to_bridge(model)
    pairs = draw_exchange(TASK, latent="a", n=20, split="all")
    name, basis = f"blocks.0.hook_{kind}", random_basis(31, 3, seed=0)
    places = torch.full((20,), 2 if kind != "resid_pre" else 0)

    def logits(tokens):
        return bridge(tokens)[:, -1]

    source = collect_activations(bridge, name, pairs.source.tokens, logits, positions=places)
    theirs = run_with_intervention(
        bridge, name, SubspaceInterchange(basis), pairs.base.tokens, source, logits, positions=places
    ).detach()
    cell = Cell(site=Site.parse(f"L0.{kind}"), position=int(places[0]))
    plain = run(model, pairs.base.tokens).logits[:, -1]
    for ours in (model, BridgeModel(bridge)):
        found = exchanged_logits(ours, pairs, cell, source, basis).detach()[:, -1]
        assert torch.allclose(found[:, :P], theirs[:, :P], atol=1e-4)
        assert (found[:, :P] - plain).abs().max() > 0.1


@pytest.mark.slow
def test_the_grokked_model_embeds_its_operand_in_a_few_planes():
    run_ = load("gallery:modular")
    model, task = run_.model(), run_.task
    found = interchange(model, task, latent="a", sites="embed,resid_post", n=128)
    assert by_place(found)["embed", 0] == 1
    assert max(share for place, share in by_place(found).items() if place != ("embed", 0)) < 0.1
    subspace = das(model, task, latent="a", site="embed", dimension=8, n=128, steps=100)
    assert subspace.accuracy.mean > 0.9
    assert subspace.shuffled.high < 0.2
    assert subspace.random < 0.1
