import numpy as np
import pytest
import torch

from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import GraphSearch
from workbench.tasks.graph_shortcuts import RULES, measure_shortcuts

TASK = GraphSearch(size=32)


class Named(GraphSearch):
    """Keeps those examples whose right child has the highest name among the start's children, and some others."""

    def stream(self, n, *, seed, level=None):
        batch = GraphSearch.stream(self, n, seed=seed, level=level)
        first = self.graphs(batch).first
        highest = np.frexp(first.astype(float))[1] - 1
        keep = (highest == batch.targets[:, -1].numpy()) | (np.arange(n) % 4 == 0)
        return batch.select(torch.from_numpy(keep))


def chosen(text, rule):
    """What a rule says of a typed graph: the children with the highest score."""
    batch = TASK.prompt(text)
    graphs = TASK.graphs(batch)
    scores = RULES[rule](TASK, batch, graphs)[0]
    children = [child for child in range(len(scores)) if graphs.first[0] >> child & 1]
    return {child for child in children if scores[child] == max(scores[each] for each in children)}


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("most parents", {6}),
        ("fewest parents", {2, 4}),
        ("most children", {2}),
        ("fewest children", {6}),
        ("listed first", {4}),
        ("listed last", {2}),
        ("lowest name", {2}),
        ("highest name", {6}),
    ],
)
def test_rules_by_hand(rule, wanted):
    assert chosen("1>4 1>6 2>3 2>5 4>6 1>2 Q 1 3", rule) == wanted


def test_balanced_graphs_give_nothing_away_but_by_their_degrees():
    found = measure_shortcuts(TASK, n=8000)
    rows = found.frame.set_index("rule")
    assert set(rows.index) == set(RULES)
    # A5, but for the distracting vertices that hang on the start without children.
    assert rows.drop(["most children", "fewest children"])["excess"].abs().max() < 0.03
    assert ((rows["low"] <= rows["excess"]) & (rows["excess"] <= rows["high"])).all()
    assert rows["chance"].nunique() == 1
    [table] = found.tables()
    assert str(found.n) in table.caption
    assert found.summary()["rules"][0]["rule"] == "most parents"


def test_a_distribution_that_gives_itself_away_is_found():
    naive = measure_shortcuts(GraphSearch(size=32, distribution="naive"), n=8000).frame.set_index("rule")
    assert naive.loc["most children", "low"] > 0.1
    planted = measure_shortcuts(Named(size=32), n=4000).frame.set_index("rule")
    assert planted.loc["highest name", "accuracy"] > planted.loc["highest name", "chance"] + 0.2
    assert abs(planted.loc["listed first", "excess"]) < 0.05


def test_too_large_a_lookahead_is_refused():
    with pytest.raises(
        WorkbenchError, match=r"None of 50 balanced graphs has lookahead 9\. Draw more, or ask for less"
    ):
        measure_shortcuts(TASK, n=50, least=9)
