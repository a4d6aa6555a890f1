"""The Transformer Program against the definition of what it becomes, and its heads by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from program_models import config_of, model_of

from circuits.patching import patch_each
from workbench.instrument.passes import run
from workbench.instrument.sites import Site, check_site, select_sites
from workbench.instrument.trace import FromTrace, Patch
from workbench.models.discrete import CategoricalHead, DiscreteProgram, Layer, NumericalHead, ProgramShape
from workbench.models.interpreter import program_logits, run_program
from workbench.models.program import Gumbel, most_likely, variable_site
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.sequences import Sequences

HIST = Sequences(size=200)


def as_numbers(one_hot):
    return one_hot.argmax(-1).numpy()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    function=st.sampled_from(["hist", "reverse", "dyck", "induction"]),
    layers=st.integers(1, 3),
    heads=st.tuples(*[st.integers(0, 2)] * 4).filter(any),
    coded=st.booleans(),
    pooled=st.booleans(),
)
def test_the_discretised_model_is_its_program(seed, function, layers, heads, coded, pooled):
    sizes = {"reverse": (5, 8), "hist": (6, 8), "dyck": (4, 10), "induction": (8, 10)}
    letters, n_ctx = sizes[function]
    task = Sequences(function=function, letters=letters, n_ctx=n_ctx, size=60)
    names = ("categorical_heads", "numerical_heads", "categorical_mlps", "numerical_mlps")
    shape = {"n_layers": layers, **dict(zip(names, heads, strict=True)), "cardinality": 10}
    columns = {"coded": True, "columns": 2} if coded else {}
    model = model_of(task, seed, **shape, **columns, pooled=pooled)
    batch = task.examples("train")
    logits = model.forward(batch.tokens).detach()
    program = model.discrete_program(tuple(task.vocab))
    wanted = torch.from_numpy(program_logits(program, batch.tokens.numpy())).clamp_min(-1e30)
    real = batch.tokens != task.pad_token
    assert torch.allclose(logits[real], wanted[real], atol=1e-12)
    # And every variable on the way, which the sites show.
    trace = run(model, batch.tokens, record=model.sites)
    categorical, numerical = run_program(program, batch.tokens.numpy())
    for place in range(categorical.shape[2]):
        shown = as_numbers(trace[variable_site(model.config, place)])
        assert np.array_equal(shown[real.numpy()], categorical[:, :, place][real.numpy()])
    with pytest.raises(WorkbenchError, match=f"no categorical variable {categorical.shape[2]}"):
        variable_site(model.config, categorical.shape[2])
    sums = [trace[f"L{layer}.sums"].numpy() for layer in range(layers) if heads[1]]
    assert np.array_equal(
        np.concatenate([np.ones_like(numerical[..., :1]), *sums], 2)[real.numpy()], numerical[real.numpy()]
    )


def test_each_kind_of_site_has_the_heads_that_write_it():
    """Four copying heads, one sum, two tables: each is a site of its own, and there is no other."""
    model = model_of(HIST, n_layers=1, categorical_heads=4, numerical_heads=1, categorical_mlps=1, numerical_mlps=1)
    sizes = {"token_values": 1, "position_values": 1, "L0.z": 4, "L0.sums": 1, "L0.codes": 2}
    for name, size in sizes.items():
        assert [str(site) for site in select_sites(name, model)] == [f"{name}.h{head}" for head in range(size)]
        with pytest.raises(WorkbenchError, match=rf"{name}.h{size}: this model has heads 0 to {size - 1}"):
            check_site(Site.parse(f"{name}.h{size}"), model)
    batch = HIST.sample(8, split="test")
    assert len({cell.site for cell in patch_each(model, batch, sites="z,sums,codes").cells}) == 7


def by_hand(layer, *, causal=False):
    votes = np.zeros((2 + len(layer.categorical_heads), 8, 8))
    return DiscreteProgram(
        shape=ProgramShape(cardinality=8, n_ctx=8, causal=causal),
        vocab=tuple("abcdef") + ("<pad>", "<s>"),
        classes=tuple("abcdef") + ("<pad>", "<s>"),
        pad_token=6,
        embedding=np.arange(8)[:, None],
        layers=(layer,),
        W_categorical=votes,
        W_numerical=np.zeros((1 + len(layer.numerical_heads), 8)),
        allowed=(True,) * 8,
    )


def layer_of(*heads, numerical=()):
    return Layer(categorical_heads=heads, numerical_heads=numerical, categorical_mlps=(), numerical_mlps=())


SAME_TOKEN = CategoricalHead(query=0, key=0, value=1, predicate=np.arange(8))


def test_the_nearest_match_is_taken_the_earlier_of_two_and_oneself_last():
    # <s> a b a a c: places 0 to 5.
    tokens = np.array([[7, 0, 1, 0, 0, 2, 6]])
    found, _ = run_program(by_hand(layer_of(SAME_TOKEN)), tokens)
    # a at 1: 3 before 4. b alone: itself. a at 3: 4 at distance 1, not 1 at distance 2. a at 4: 3. c alone, <s> alone.
    assert found[0, :6, 2].tolist() == [0, 3, 2, 4, 3, 5]
    # Two matches at distance 2 from place 3: the earlier one, and not the position itself.
    tokens = np.array([[7, 0, 1, 0, 2, 0]])
    assert run_program(by_hand(layer_of(SAME_TOKEN)), tokens)[0][0, 3, 2] == 1
    # Causal: nothing later is there.
    assert run_program(by_hand(layer_of(SAME_TOKEN), causal=True), tokens)[0][0, 1:, 2].tolist() == [1, 2, 1, 4, 3]


def test_without_a_match_position_0_is_taken():
    nowhere = replace_predicate(SAME_TOKEN, np.full(8, 5))
    found, _ = run_program(by_hand(layer_of(nowhere)), np.array([[7, 0, 1]]))
    assert found[0, :, 2].tolist() == [0, 0, 0]


def replace_predicate(head, predicate):
    return replace(head, predicate=predicate)


def test_numbers_are_summed_over_all_matches_oneself_too():
    count = NumericalHead(query=0, key=0, value=0, predicate=np.arange(8))
    _, found = run_program(by_hand(layer_of(numerical=(count,))), np.array([[7, 0, 1, 0, 0, 6, 6]]))
    assert found[0, :5, 1].tolist() == [1, 3, 1, 3, 3]


def test_the_tie_rule_of_the_published_emitter_is_another():
    # The published one costs oneself as many places as there are matches: 2 here, and so the match at distance 3 loses.
    tokens = np.array([[7, 0, 1, 1, 0]])
    assert run_program(by_hand(layer_of(SAME_TOKEN)), tokens)[0][0, 1, 2] == 4


@pytest.mark.parametrize("function", ["reverse", "hist"])
def test_the_batch_changes_no_logits(function):
    task = Sequences(function=function, letters=5, size=100)
    model = model_of(task)
    batch = task.examples("train")
    together = model.forward(batch.tokens)
    alone = torch.cat([model.forward(row[None]) for row in batch.tokens])
    assert torch.equal(together, alone)
    # Nor does what stands behind padding, that nobody sees.
    for row in range(5):
        length = int((batch.tokens[row] != task.pad_token).sum())
        short = model.forward(batch.tokens[row : row + 1, :length])
        assert torch.allclose(short[0], together[row, :length], atol=1e-12)


def test_pooled_votes_are_the_mean_over_the_prompt_by_hand():
    apart, pooled = (model_of(HIST, pooled=each) for each in (False, True))
    tokens = HIST.prompt("1 3").tokens
    votes, mean = apart.forward(tokens)[0, :3].mean(0), pooled.forward(tokens)[0]
    allowed = apart.allowed
    assert torch.allclose(mean[:, allowed], votes[allowed].expand(len(mean), -1))
    assert (mean[:, ~allowed] == -1e30).all()


def test_cold_choices_are_the_most_likely_ones():
    rng = generator(0, "gumbel")
    logits = torch.tensor([[0.0, 4.0, 1.0], [30.0, 0.0, 0.0]])
    assert torch.equal(most_likely(logits), torch.tensor([[0.0, 1, 0], [1, 0, 0]]))
    warm = Gumbel(temperature=3.0, generator=rng)(logits)
    assert torch.allclose(warm.sum(-1), torch.ones(2))
    assert 0.05 < float(warm[0].min()) < float(warm[0].max()) < 0.95
    # A sample's most likely value is drawn by the softmax of the logits (Gumbel-max).
    cold = Gumbel(temperature=0.01, generator=rng)(logits[:1].expand(20_000, 3)).argmax(-1)
    shares = cold.bincount(minlength=3) / len(cold)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.015)


def test_a_variable_can_be_patched():
    task = HIST
    # With these weights the heads and the MLPs read what one letter changes.
    model = model_of(task, seed=2, n_layers=1, categorical_heads=2, numerical_heads=2, d_mlp=64)
    batch = task.sample(12, split="test", seed=0)
    clean, corrupt = (run(model, tokens, record=model.sites) for tokens in (batch.tokens, batch.corrupt))
    whole = [Patch(site=Site.parse(name), source=FromTrace(corrupt)) for name in ("token_values", "position_values")]
    assert torch.equal(run(model, batch.tokens, patches=whole).logits, corrupt.logits)
    one = Patch(site=Site.parse("L0.z"), source=FromTrace(corrupt))
    assert not torch.equal(run(model, batch.tokens, patches=[one]).logits, clean.logits)
    # The MLPs of the layer see what the heads were changed to.
    changed = run(
        model, batch.tokens, patches=[Patch(site=Site.parse("L0.sums"), source=FromTrace(corrupt))], record=["L0.codes"]
    )
    assert not torch.equal(changed["L0.codes"], clean["L0.codes"])
    effects = patch_each(model, batch, sites="L0.z,L0.sums,L0.codes", direction="denoise")
    assert len(effects.tables())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"numerical_heads": -1}, "numerical_heads must be at least 0"),
        ({"cardinality": 4}, "8 of them need a cardinality of at least 8, got 4"),
        ({"columns": 2}, "not coded has one variable"),
        ({"outputs": (99,)}, "outputs must be among the 10 words"),
        ({"pad_token": 50}, "pad_token 50 is outside"),
        (
            {"categorical_heads": 0, "numerical_heads": 0, "categorical_mlps": 0, "numerical_mlps": 0},
            "computes nothing",
        ),
    ],
)
def test_bad_shapes_are_one_clear_error(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        config_of(HIST, **fields)


def induction_by_hand(fallback):
    """Copies the token before, then the one at which that copy is the own letter; nothing matches a new letter."""
    task = Sequences(function="induction", letters=8, n_ctx=10, size=400)
    heads = {"categorical_heads": 1, "numerical_heads": 0, "categorical_mlps": 0, "numerical_mlps": 0}
    model = model_of(task, **heads, cardinality=10, fallback=fallback)
    begin = task.vocab.index("<s>")
    sure = 20.0
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.zero_()
        for layer, (query, key) in zip(model.layers, [(1, 1), (0, 2)], strict=True):
            layer.categorical.read_q[0, query] = layer.categorical.read_k[0, key] = sure
            layer.categorical.read_v[0, 0] = sure
        for value in range(10):
            model.layers[0].categorical.predicate[0, value, max(0, value - 1)] = sure
            model.layers[1].categorical.predicate[0, value, value] = sure
        for answer in task.outputs:
            model.W_categorical[3, begin if answer == task.vocab.index("<unk>") else answer, answer] = sure
    return task, model


@pytest.mark.parametrize("fallback", ["sum", "max"])
def test_where_nothing_matches_a_relaxed_head_falls_back_too(fallback):
    task, model = induction_by_hand(fallback)
    batch = task.examples("train")
    assert (model.forward(batch.tokens).argmax(2) == batch.targets)[batch.read].all()
    said = model.relaxed(batch.tokens, Gumbel(temperature=1.0, generator=generator(0, "g"))).argmax(2)
    new = batch.read & (batch.targets == task.vocab.index("<unk>"))
    share = (said == batch.targets)[new].double().mean()
    # As the authors' code has it, a head that finds nothing says any digit until choices are nearly made.
    assert share > 0.9 if fallback == "max" else share < 0.8
