"""Means over seeds, and what does not compare."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from circuits.discovery import extract
from circuits.faithfulness import Evaluation, evaluate
from circuits.seeds import over_seeds
from tests.circuits.test_memoised import planned
from workbench.intervals import Estimate
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError


def judged() -> Evaluation:
    gate = PLANTED["and_gate"]()
    pairs = gate.pairs(16, 0)
    return evaluate(gate.model, extract(gate.model, pairs, method="exact", edges=5), pairs, controls=0)


def test_the_mean_over_runs_with_its_interval() -> None:
    one = replace(judged(), faithfulness=Estimate(mean=0.8, low=0.7, high=0.9))
    runs = [replace(one, faithfulness=Estimate(mean=value, low=0.0, high=1.0)) for value in (0.8, 0.9, 1.0)]
    found = over_seeds(runs, ["a", "b", "c"])
    frame = found.frame.set_index(["run", "measure"])
    assert frame.loc[("mean", "faithfulness"), "value"] == pytest.approx(0.9)
    assert 0.8 <= frame.loc[("mean", "faithfulness"), "low"] < 0.9 < frame.loc[("mean", "faithfulness"), "high"] <= 1.0
    assert frame.loc[("b", "faithfulness"), "value"] == pytest.approx(0.9)
    assert frame.loc[("mean", "size"), "value"] == one.circuit.size
    assert math.isnan(frame.loc[("a", "random_95"), "value"])
    assert found.summary()["runs"] == ["a", "b", "c"]
    assert len(found.tables()[0].frame) == 4 * 6


def test_what_does_not_compare_is_refused() -> None:
    one = judged()
    with pytest.raises(WorkbenchError, match="two runs or more with a name each; got 1 and 1 names"):
        over_seeds([one], ["a"])
    with pytest.raises(WorkbenchError, match="got 2 and 1 names"):
        over_seeds([one, one], ["a"])
    other = replace(one.circuit, terms=replace(one.circuit.terms, ablation="zero"))
    with pytest.raises(WorkbenchError, match="do not compare"):
        over_seeds([one, replace(one, circuit=other)], ["a", "b"])
    plan = planned("attention only")
    foreign = extract(plan.model, plan.batch, method="exact", edges=3)
    with pytest.raises(WorkbenchError, match="another model's graph"):
        over_seeds([one, replace(one, circuit=foreign)], ["a", "b"])
