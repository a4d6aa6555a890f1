"""Many inputs with their controls, and the causal test, on the model that is wired to merge paths."""

import json

import pytest
import torch
from search_models import branches, prompt_of, random_model

from circuits.attention_ops import count_by_layer
from circuits.path_ablation import ablate_operations
from circuits.path_controls import CONTROLS, MODEL, SWEEP, random_operations
from circuits.path_merging import trace_paths
from circuits.path_traces import trace_inputs
from workbench.intervals import share_of
from workbench.models.planted_search import path_doubling
from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import search_layout

LAYOUT = search_layout(26, 1)
WIRED = path_doubling(LAYOUT)
N = 4


@pytest.fixture(scope="module")
def found():
    prompts = [(length, branches(length, 2, LAYOUT, seed=seed)) for length in (1, 2, 3) for seed in range(N)]
    full = prompt_of([(1, 2), (2, 3), (1, 4), (4, 5), (5, 6), (6, 7), (7, 8)], 1, 3, LAYOUT)
    told = []
    traces = trace_inputs(WIRED, random_model(LAYOUT), [*prompts, (2, full)], seed=1, on_progress=told.append)
    assert told == sorted(told)
    return traces


def test_shares_and_their_intervals(found):
    row = found.share(MODEL)
    assert row["n"] == 2 * N
    assert row["explained"] == row["explained_strict"] == row["correct"] == 1
    assert row["explained_strict_low"] == share_of(torch.ones(2 * N, dtype=torch.bool)).low
    assert found.share(MODEL, 3)["n"] == N
    assert found.share("hand_built")["explained_strict"] == 1
    assert found.share(MODEL, 7) is None
    # Without vertices beside start, goal and one other there is no wrong graph.
    assert found.share("wrong_graph", 1) is None
    assert found.skipped == 1


def test_controls_are_not_explained(found):
    for name in ("untrained", "random_operations", "wrong_graph"):
        assert found.share(name)["explained_strict"] <= 0.1, name
        assert found.share(name)["n"] == 2 * N
    # What cannot be told apart in graphs of three edges: one hop from the start, one back from the goal.
    assert found.share("one_hop")["explained_strict"] == 1
    for name in SWEEP:
        assert found.share(name)["explained_strict"] == 1


def test_controls_have_as_many_operations(found):
    for each in found.inputs:
        counts = count_by_layer(each.traces[MODEL].operations)
        for name in ("untrained", "random_operations", "wrong_graph", "one_hop"):
            if name in each.traces:
                assert count_by_layer(each.traces[name].operations) == counts


def test_random_operations_repeat_by_seed():
    like = trace_paths(WIRED, branches(3, 2, LAYOUT, seed=0)).operations
    first, again, other = (random_operations(like, 23, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({(each.layer, each.dest, each.src) for each in first}) == len(like)
    assert all(each.dest == 22 for each in first if each.layer == 2)


def test_causal_test(found):
    """The wired model computes by its operations alone: kept, all is right; removed, nothing is but by chance."""
    causal = found.ablations
    assert causal.n == 2 * N
    found = {place: estimate.mean for place, estimate in causal.accuracy.items()}
    for ablation in ("zero", "mean"):
        assert found[ablation, "kept"] == found[ablation, "removed_random"] == causal.full.mean == 1
        assert found[ablation, "nothing_kept"] <= 0.75
    assert causal.chance == 0.5
    assert found["zero", "removed"] == 0
    # Wired heads take the largest entry, however small: a part of it that is left in the mean still decides.
    assert found["mean", "removed"] == 1
    assert causal.operations == 7
    assert len(causal.rows()) == 9


def test_ablations_by_hand():
    """Removed operations are the mean over prompts of both rows: computed here entry by entry, layer by layer."""
    traces = [trace_paths(WIRED, branches(2, 2, LAYOUT, seed=seed)) for seed in range(5)]
    tokens = torch.stack([trace.prompt.padded for trace in traces])
    patterns, right = {}, []
    with torch.no_grad():
        sites = [site for site in WIRED.sites if site.kind.name == "pattern"]
        WIRED(tokens, {site: lambda x, s=site: patterns.setdefault(s.layer, x) for site in sites})
        for row, trace in enumerate(traces):

            def edit(pattern, layer, row=row, trace=trace):
                pattern = pattern.clone()
                for each in trace.strict.operations:
                    if each.layer == layer:
                        dest, src = (int(trace.prompt.position[place]) for place in (each.dest, each.src))
                        seen = [r for r in range(5) if min(dest, src) >= int(traces[r].prompt.position[0])]
                        pattern[0, 0, dest, src] = sum(patterns[layer][r, 0, dest, src] for r in seen) / len(seen)
                return pattern

            edits = {site: lambda x, layer=site.layer, edit=edit: edit(x, layer) for site in sites}
            right.append(int(WIRED(tokens[row : row + 1], edits)[0, -1].argmax()) in trace.prompt.answers)
    assert ablate_operations(WIRED, traces, seed=0).accuracy["mean", "removed"] == share_of(torch.tensor(right))
    with pytest.raises(WorkbenchError, match="No traced inputs to ablate"):
        ablate_operations(WIRED, [], seed=0)


def test_tables_and_summary(found):
    tables = {table.name: table for table in found.tables()}
    assert set(tables) == {
        *("explained", "explained_strict", "right_and_explained", "causes", "longest_paths", "merges"),
        *("explained_judged", "ablated_operations"),
    }
    judged = tables["explained_judged"].frame.set_index(["variant", "merge"])
    assert judged.loc[(MODEL, "strict"), "explained"] == judged.loc[(MODEL, "published"), "explained"] == 1
    assert set(judged["n"]) == {2 * N}
    assert "1 skipped" in tables["explained"].caption
    assert tables["right_and_explained"].frame["inputs"].sum() == 3 * N
    longest = tables["longest_paths"].frame
    at_three = longest[longest["lookahead"] == 3]["longest_median"].tolist()
    # One vertex, one edge, two edges, and a path from start to goal.
    assert at_three == [0, 1, 2, 3]
    causes = tables["causes"].frame
    assert set(causes[causes["layer"] == 0]["cause"]) == {"forward", "backward", "goal"}
    assert set(causes[causes["layer"] == 1]["cause"]) == {"token"}
    summary = json.loads(json.dumps(found.summary()))
    assert summary["explained_strict"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    assert set(summary["controls"]) == set(CONTROLS)
    assert {row["ablation"] for row in summary["causal"]["conditions"]} == {"none", "zero", "mean"}
    assert summary["judged"]["n"] == 2 * N


def test_only_what_is_judged_is_ablated():
    traces = trace_inputs(WIRED, random_model(LAYOUT), [(1, branches(1, 2, LAYOUT, seed=0))])
    assert traces.ablations is None
    assert traces.summary()["causal"] is None
    assert traces.summary()["judged"] is None
    assert not {"ablated_operations", "explained_judged"} & {table.name for table in traces.tables()}


def test_nothing_to_trace():
    full = prompt_of([(1, 2), (2, 3), (1, 4), (4, 5), (5, 6), (6, 7), (7, 8)], 1, 3, LAYOUT)
    with pytest.raises(WorkbenchError, match="None of 1 prompts leaves a vertex name unused"):
        trace_inputs(WIRED, WIRED, [(2, full)])
