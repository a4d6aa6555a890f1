"""Circuit finders on Transformer Programs, held against the programs' own dependency graphs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from program_models import model_of

from circuits.components import inputs_of, run_parts, weighted
from circuits.decompile.known import known_program
from circuits.experiment import NoHeadroom
from circuits.memoised import circuit_values
from circuits.scorecard import card_from_json, scorecard
from circuits.truths import experiment_on, truths
from workbench.models.program_parts import CONTINUED
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.sequences import Sequences

TASK = Sequences(function="hist", letters=3, n_ctx=5, size=200)


@pytest.fixture(scope="module")
def counter():
    """One head counts the own letter, one table reads the count, and the votes are by the table: nothing else."""
    model = model_of(TASK, n_layers=1, categorical_heads=1, numerical_heads=1)
    k = model.config.cardinality
    layer = model.layers[0]
    with torch.no_grad():
        for name in ("read_q", "read_k"):
            getattr(layer.numerical, name)[0] = torch.tensor([1.0, 0.0])
        layer.numerical.predicate[0] = torch.eye(k)
        layer.number_tables.read[0] = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        # Code = count: of the lines c*x - c*c/2 the one with the nearest c is the largest.
        layer.number_tables.W_in[0] = 0
        layer.number_tables.W_in[0, 0, 0] = 1
        layer.number_tables.W_out[0] = 0
        layer.number_tables.W_out[0, 0] = torch.arange(k)
        layer.number_tables.b_out[0] = -(torch.arange(k) ** 2) / 2
        model.W_categorical.zero_()
        model.W_numerical.zero_()
        for count in range(1, TASK.longest + 1):
            model.W_categorical[4, count, TASK.vocab.index(str(count))] = 10
    return known_program(model, TASK, name="counter")


def test_the_truth_is_read_off_the_program(counter):
    assert counter.structural == {
        "embed->a0.h1<q>",
        "embed->a0.h1<k>",
        "a0.h1->m0.c1",
        "m0.c1->logits",
    }
    assert not counter.constants
    batch = counter.pairs(8, 0)
    assert (counter.model.forward(batch.tokens).argmax(2) == batch.targets)[batch.read].all()
    assert (batch.targets != batch.distractor)[batch.read].all()


def test_finders_are_judged_by_it_and_the_card_says_what_gradients_see(counter):
    card = scorecard(["exact", "eap", "eap-ig", "acdc"], circuits=[counter], n=8)
    frame = card.frame.set_index(["finder", "truth"])
    # Four of 26 edges, all of which break some answer alone.
    assert frame["true"].eq(4).all()
    assert frame["edges"].eq(26).all()
    for finder in ("exact", "eap", "eap-ig", "acdc"):
        assert frame.loc[(finder, "structural"), "auroc"] == 1
    assert card.gradients == {"counter": CONTINUED}
    assert CONTINUED in card.tables()[0].caption
    assert card_from_json(card.summary()).gradients == card.gradients
    assert card.version is None


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    function=st.sampled_from(["reverse", "hist", "dyck"]),
    layers=st.integers(1, 2),
    coded=st.booleans(),
)
def test_the_dependencies_alone_answer_like_the_program_and_together_is_one_by_one(seed, function, layers, coded):
    task = Sequences(function=function, letters=2 if function == "dyck" else 3, n_ctx=6, size=60)
    columns = {"coded": True, "columns": 2} if coded else {}
    known = known_program(model_of(task, seed, n_layers=layers, **columns), task, name="random")
    try:
        plan = experiment_on(known, known.pairs(2, seed), "resample")
    except NoHeadroom:
        return
    except WorkbenchError as error:
        # A random program may answer nearly every prompt alike.
        if "have headroom" not in str(error):
            raise
        return
    kept = plan.graph.mask(known.structural)
    some = torch.rand(2, len(kept), generator=generator(seed, "some")) < 0.7
    keep = torch.cat([kept[None], some])
    found = circuit_values(plan, keep)
    torch.testing.assert_close(found[0], plan.full)
    inputs = inputs_of(plan.model, plan.graph, plan.batch.tokens)
    for mask, values in zip(keep, found, strict=True):
        mix = weighted(plan.graph, mask[None].to(inputs), plan.ablated)
        stream = run_parts(plan.model, plan.graph, plan.batch.tokens, inputs, mix)[1]
        torch.testing.assert_close(values, plan.measure(plan.model.finish(stream[plan.batch.read], {})))
    # What breaks an answer alone is always among the dependencies.
    causal = truths(known, plan)["causal"]
    assert not (causal & ~kept).any()
