"""Circuits of a run: found on pairs of one draw, judged on those of another."""

from __future__ import annotations

import pytest

from apps.circuits_of_runs import circuit_of, history_of
from circuits.discovery import extract
from circuits.faithfulness import evaluate
from workbench import load
from workbench.runtime import WorkbenchError

RUN = load("gallery:modular")


def test_a_circuit_is_judged_on_other_pairs_than_it_was_found_on() -> None:
    found = circuit_of(RUN, method="eap", edges=12, n=16, seed=3)
    model, (own, other) = RUN.model(), (RUN.task.sample(16, split="test", seed=seed) for seed in (3, 4))
    circuit = extract(model, own, method="eap", edges=12)
    assert found.circuit.edges == circuit.edges
    here, there = (evaluate(model, circuit, pairs, seed=3) for pairs in (own, other))
    assert found.faithfulness == there.faithfulness != here.faithfulness
    assert found.random_95 == there.random_95 != here.random_95


def test_edges_none_of_which_lies_in_a_circuit_are_refused_with_what_to_do() -> None:
    asked = {"method": "exact", "granularity": "positions", "edges": 3, "n": 16}
    with pytest.raises(WorkbenchError, match=r"of the 3 largest .* is pruned .* more edges, or say select='grow'"):
        circuit_of(RUN, **asked)  # pyright: ignore[reportArgumentType]
    with pytest.raises(WorkbenchError, match=r"of grown from the logits to 3 .* Ask for more edges\.$"):
        circuit_of(RUN, select="grow", **asked)  # pyright: ignore[reportArgumentType]


def test_a_history_is_judged_on_other_pairs_than_it_was_found_on() -> None:
    found = history_of(RUN, method="eap", edges=12, n=16, seed=3)
    assert (found.controls, found.judged_on) == (100, 16)
    last = found.moments[-1]
    other = RUN.task.sample(16, split="test", seed=4)
    judged = evaluate(RUN.model(), last.circuit, other, seed=3)
    assert (last.faithfulness, last.accuracy) == (judged.faithfulness, judged.accuracy)
    assert (last.random_95, last.controls_size) == (judged.random_95, judged.controls_size)
    assert last.circuit.edges == circuit_of(RUN, method="eap", edges=12, n=16, seed=3).circuit.edges
