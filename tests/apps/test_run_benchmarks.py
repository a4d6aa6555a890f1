"""Benchmarks of runs: both sides find the same, and the comparison notices when they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apps import run_benchmarks
from apps.bench import measure
from apps.run_benchmarks import RUNS, composition_data, fast_program, importing, many_at_once
from workbench.tasks.composition import Composition
from workbench.training import batched
from workbench.training.recipes import modular_smoke

TOY = ["p=7", "d_model=16", "d_head=4", "d_mlp=32"]


def test_members_at_once_have_the_gradients_of_members_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = many_at_once("toy", modular_smoke().override(TOY), members=3, target=1.0, gate=0.1)
    result = measure(benchmark, repeats=2, round_seconds=0)
    assert result.agrees
    assert result.conditions["members"] == 3
    assert result.conditions["examples"] == 24
    # The seeds have gradients of their own.
    theirs, ours = benchmark.prepare()
    first, second, _ = theirs()
    assert run_benchmarks.distance(first, second) > 0.1
    # Stacked weights that are another member's are noticed.
    swapped = batched.Stack.gradients
    monkeypatch.setattr(batched.Stack, "gradients", lambda self: reversed(list(swapped(self))))
    assert not measure(benchmark, repeats=1, round_seconds=0).agrees


def test_plain_python_finds_the_chains_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Composition(entities=30, relations=6, out_degree=4, phi=1.0, ood_fraction=0.2)
    toy = replace(composition_data(), prepare=lambda: run_benchmarks._prepare_data(task))
    result = measure(toy, repeats=1, round_seconds=0)
    assert result.agrees
    theirs, ours = toy.prepare()
    assert len(theirs()) == len(ours()) > 50
    assert run_benchmarks._share_that_differs(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]])) == 1.0


def test_the_fast_module_answers_as_the_readable_one() -> None:
    toy = replace(fast_program(), prepare=lambda: run_benchmarks._prepare_program("gallery:induction"))
    assert measure(toy, repeats=1, round_seconds=0).agrees
    assert run_benchmarks._share_of_answers([["a"], ["b"]], [["a"], ["c"]]) == 0.5


def test_imports_are_timed_in_processes_of_their_own() -> None:
    # What each child uses counts for its side, though nothing runs here; a failed import is another result.
    busy, idle = "sum(range(10**7))", "pass"
    benchmark = importing("toy", "Nothing.", idle, target=2.0, gate=1.0)
    sides = (lambda: run_benchmarks._import(busy), lambda: run_benchmarks._import(idle))
    result = measure(replace(benchmark, prepare=lambda: sides), repeats=2, round_seconds=0)
    assert result.agrees
    assert result.ratio > 2
    assert run_benchmarks._import("import nothing_of_that_name") == 1


def test_every_benchmark_is_named_as_it_is_registered() -> None:
    assert {make().name for make in RUNS.values()} == set(RUNS)
