"""The tracer on a model that is known to merge paths, on models that are broken, and its rules by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_models import branches, prompt_of, random_model

from circuits.attention_causes import Cause, Perturbed
from circuits.attention_effects import CleanPass
from circuits.attention_ops import PUBLISHED, SHARE, Operation, important_operations
from circuits.exchange import load_circuit, save_circuit
from circuits.path_circuit import merge_circuit
from circuits.path_merging import Tracer, trace_paths
from circuits.reachable_sets import merge_paths, rows_of_graph
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.instrument.trace import Patch, Value, Zero
from workbench.models.planted_search import path_doubling
from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import search_layout

LAYOUT = search_layout(26, 1)
WIRED = path_doubling(LAYOUT)
FORK = [(1, 2), (2, 3), (1, 4), (4, 5)]
"""Rows 1, 2; 4, 5; 7, 8; 10, 11 are the ends of the edges, 13 and 14 start and goal, 16 the last."""


@pytest.fixture
def fork():
    return prompt_of(FORK, 1, 3, LAYOUT)


def op(layer, dest, src, *causes, sign=1):
    return Operation(layer=layer, dest=dest, src=src, sign=sign, strength=2.0, causes=causes)


def merged(prompt, operations, *, n_layers=3, **rule):
    rows = rows_of_graph(operations, n_layers=n_layers, last=len(prompt) - 1)
    return merge_paths(prompt, operations, rows, **rule)


def at(kind, key):
    return Cause(kind=kind, key=key)


def test_every_operation_of_the_wired_model_is_found_and_explained(fork):
    found = trace_paths(WIRED, fork)
    places = {(each.layer, each.dest, each.src): each.causes[0] for each in found.strict.operations}
    assert places == {
        # Edges are bound by position, the goal is copied to the last row.
        (0, 1, 2): at("forward", 2),
        (0, 4, 5): at("forward", 5),
        (0, 5, 4): at("backward", 4),
        (0, 16, 14): at("goal", 14),
        # 1→2 meets 2→3 in vertex 2; the last row meets 2→3 in the goal.
        (1, 1, 4): at("token", 2),
        (1, 16, 5): at("token", 3),
        # The answer is read off the row of 1→2.
        (2, 16, 1): places[2, 16, 1],
    }
    assert places[2, 16, 1].kind == "token"
    assert found.explained
    assert found.explained_strict
    assert found.correct
    assert found.predicted == 2
    assert len(found.operations) == 7
    assert [dict(rows) for rows in found.strict.held[1:]] == [
        {1: {1, 2}, 4: {4, 5}, 5: {4, 5}, 16: {14, 16}},
        {1: {1, 2, 4, 5}, 16: {4, 5, 14, 16}},
        {16: {1, 2, 4, 5, 14, 16}},
    ]


@settings(max_examples=12)
@given(length=st.sampled_from([2, 3]), seed=st.integers(0, 10**6), thresholds=st.sampled_from([SHARE, PUBLISHED]))
def test_the_wired_model_is_explained(length, seed, thresholds):
    found = trace_paths(WIRED, branches(length, 2, LAYOUT, seed=seed), thresholds)
    assert found.correct
    assert found.explained
    assert found.explained_strict
    assert all(operation.causes for operation in found.strict.operations)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_broken_merge_is_not_explained(layer):
    """Without what layer 0 binds or layer 1 merges, no input is: whatever the model then answers."""
    mutant = path_doubling(LAYOUT)
    mutant.weights[layer].attn.W_O.data.zero_()
    for seed in range(4):
        found = trace_paths(mutant, branches(2 + seed % 2, 2, LAYOUT, seed=seed))
        assert not found.explained
        assert not found.explained_strict


def test_a_wrong_graph_is_not_explained():
    for seed in range(6):
        prompt = branches(2 + seed % 2, 2, LAYOUT, seed=seed)
        tracer = Tracer.of(WIRED, prompt)
        operations = important_operations(tracer.edited, SHARE)
        assert tracer.trace(operations).explained_strict
        wrong = tracer.trace(operations, prompt=prompt.relabelled(seed))
        assert not wrong.explained
        assert not wrong.explained_strict
        assert wrong.correct, "the answer is judged by the prompt's own graph"


def test_an_operation_without_a_cause_is_merged_by_the_published_rule_alone(fork):
    bound = [op(0, 4, 5, at("forward", 5)), op(0, 16, 14, at("goal", 14))]
    # Row 7 holds its own set only after row 4 came by: in the published order it is then the first, and needs a cause.
    early = [*bound, op(1, 7, 4), op(2, 16, 7, at("token", 1))]
    assert not merged(fork, early, strict=False).explained
    operations = [*bound, op(1, 1, 4), op(2, 16, 1, at("token", 1))]
    published, strict = (merged(fork, operations, strict=rule) for rule in (False, True))
    assert published.explained
    assert not strict.explained
    assert published.held[2][1] == {1, 4, 5}
    assert strict.held[2][1] == {1}
    assert [each.causes for each in published.operations if each.layer == 1] == [()]
    assert not any(each.layer == 1 for each in strict.operations)


@pytest.mark.parametrize(
    ("operation", "accepted"),
    [
        (op(0, 1, 2, at("forward", 2)), True),
        # Row 1 is the source of row 2: nothing leads backward from there, and row 5 is not the one after it.
        (op(0, 1, 2, at("backward", 2)), False),
        (op(0, 1, 5, at("forward", 5)), False),
        (op(0, 2, 1, at("backward", 1)), True),
        (op(0, 2, 1, at("forward", 1)), False),
        (op(0, 4, 2, at("token", 2)), True),
        (op(0, 4, 2, at("token", 3)), False),
        # Rows alone never hold both start and goal.
        (op(0, 16, 14, at("start and goal", 13)), False),
        (op(0, 16, 14, at("goal", 14)), True),
        (op(0, 16, 13, at("goal", 14)), False),
        (op(0, 1, 2), False),
    ],
)
def test_causes_that_let_a_set_in(fork, operation, accepted):
    to_answer = (
        [] if operation.dest == 16 else [op(1, 16, operation.dest, at("token", int(fork.tokens[operation.dest])))]
    )
    found = merged(fork, [operation, *to_answer], n_layers=2, strict=True)
    assert (operation in found.operations) == accepted


def test_the_rival_takes_one_hop_at_a_time():
    """1→2→3→4→5: two sets of two edges that meet in 3 make a path of four; with one hop a layer 5 is not reached."""
    prompt = prompt_of([(1, 2), (2, 3), (3, 4), (4, 5)], 1, 5, LAYOUT)
    pairs = [(1, 2), (4, 5), (7, 8), (10, 11)]
    bind = [op(0, source, target, at("forward", target)) for source, target in pairs]
    double = [op(1, 1, 4, at("token", 2)), op(1, 7, 10, at("token", 4))]
    operations = [*bind, *double, op(2, 1, 7, at("token", 3)), op(3, 16, 1, at("token", 1))]
    whole = merged(prompt, operations, n_layers=4, strict=True)
    hops = merged(prompt, operations, n_layers=4, strict=True, hypothesis="one hop")
    assert whole.explained
    assert whole.held[3][1] == {1, 2, 4, 5, 7, 8, 10, 11}
    assert not hops.explained
    # Of {3, 4, 5}, held at row 7, only 4 is one edge away from {1, 2, 3}; 3 itself is there.
    assert hops.held[3][1] == {1, 2, 4, 5, 7, 8, 10}
    assert (whole.maximal, whole.short) == (2, 0)
    late = [*bind, op(1, 7, 10, at("token", 4)), op(2, 7, 4, at("token", 3)), op(3, 19, 7, at("token", 3))]
    # Row 4 merges nothing after layer 0; that row 7 then takes a path of one edge into one of two is its fault.
    found = merged(prompt_of([(1, 2), (2, 3), (3, 4), (4, 6), (6, 5)], 1, 5, LAYOUT), late, n_layers=4, strict=True)
    assert (found.maximal, found.short) == (4, 1)


def test_what_is_read_off_is_read_whole_by_the_rival_too(fork):
    operations = [op(0, 4, 5, at("forward", 5)), op(1, 16, 4, at("start and goal", 13))]
    assert not merged(fork, operations, n_layers=2, strict=True).operations
    goal = [op(0, 4, 14, at("token", 3)), op(0, 4, 2, at("token", 2)), op(1, 16, 4, at("goal", 14))]
    found = merged(fork, goal, n_layers=2, strict=True, hypothesis="one hop")
    assert found.held[2][16] == {2, 4, 14, 16}
    assert found.explained


def test_perturbed_prompts_are_those_run_one_by_one(fork):
    """Every query and key under every perturbation, by a pass of its own with the earlier patterns held."""
    layout = search_layout(17, 2)
    prompt = prompt_of([(1, 2), (2, 3), (1, 4)], 1, 3, layout)
    model = random_model(layout)
    clean = CleanPass.of(model, prompt)
    found = Perturbed.of(clean)
    whole = run(model, prompt.padded[None], record=[f"L{layer}.pattern" for layer in range(3)])
    held = [Patch(site=site, source=Value(whole[site])) for site in whole.activations]
    assert found.tokens == (1, 2, 3, 4, layout.path, layout.edge, layout.query)
    for feature in range(len(found.q[0])):
        tokens, patches = prompt.padded.clone(), list(held)
        if feature < len(found.tokens):
            tokens[tokens == found.tokens[feature]] = 5
        else:
            position = int(prompt.position[feature - len(found.tokens)])
            patches.append(Patch(site=Site.parse("pos_embed"), positions=[position], source=Zero()))
        record = [f"L{layer}.{slot}" for layer in range(3) for slot in "qk"]
        slow = run(model, tokens[None], record=record, patches=patches)
        for layer in range(3):
            for slot, mine in (("q", found.q), ("k", found.k)):
                theirs = slow[f"L{layer}.{slot}"][0, prompt.position, 0]
                torch.testing.assert_close(mine[layer][feature], theirs, atol=1e-4, rtol=1e-4)


def test_signs_of_causes(fork):
    """What makes a score large is the cause of a copy, what makes it small that of an inhibited one."""
    perturbed = Perturbed.of(CleanPass.of(WIRED, fork))
    assert perturbed.causes(0, 1, 2, sign=1, threshold=0.1) == (at("forward", 2),)
    assert perturbed.causes(0, 1, 2, sign=-1, threshold=0.1) == ()
    assert perturbed.causes(0, 1, 5, sign=1, threshold=0.1) == ()
    score = 20.0
    assert perturbed.causes(0, 1, 2, sign=1, threshold=score + 0.1) == ()


def test_results(fork, tmp_path):
    found = trace_paths(WIRED, fork)
    operations, sets = found.tables()
    assert len(operations.frame) == 7
    assert operations.frame["merged_strict"].all()
    # The prompt of 17 rows stands at the end of 26 positions.
    first = operations.frame.iloc[0].to_dict()
    assert {name: first[name] for name in ("layer", "dest", "src", "dest_token", "src_token", "causes")} == {
        **{"layer": 0, "dest": 10, "src": 11, "dest_token": "1", "src_token": "2", "causes": "forward"},
    }
    assert sets.frame.iloc[-1].to_dict() == {"layer": 3, "position": 25, "holds": "1 2 3"}
    assert "An operation counts from 10% of the answer's lead on." in operations.caption
    assert "from a fall of 0.4 on" in trace_paths(WIRED, fork, PUBLISHED).tables()[0].caption
    assert found.summary()["explained_strict"] is True
    circuit = merge_circuit(WIRED, found)
    assert circuit.size == 14
    assert {"input@11:2->a0.h0<v>@11:2", "a0.h0@13:2->a1.h0<v>@13:2", "a2.h0@25:1->logits@25:1"} <= set(circuit.edges)
    assert torch.equal(circuit.graph.connected(circuit.keep), circuit.keep)
    save_circuit(tmp_path / "merge.json", circuit)
    assert load_circuit(tmp_path / "merge.json").edges == circuit.edges
    save_circuit(tmp_path / "merge.dot", circuit)
    assert "path-merging" in (tmp_path / "merge.dot").read_text()


def test_no_name_to_perturb_with():
    full = prompt_of([(1, 2), (2, 3), (1, 4), (4, 5), (5, 6), (6, 7), (7, 8)], 1, 3, LAYOUT)
    with pytest.raises(WorkbenchError, match="All 8 vertices occur in the prompt"):
        trace_paths(WIRED, full)
