"""The harness: what it reports of two sides whose cost and whose results are known."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from apps import benchmarks
from apps.bench import Benchmark, BenchmarkResult, measure
from apps.benchmarks import BENCHMARKS, _acdc, _curve, _eap_ig, _patching, run_benchmark
from apps.tensor_memory import TensorMemory
from circuits.memoised import circuit_values
from workbench.models.config import ModelConfig
from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import GraphSearch

TOY = ModelConfig(
    n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=32, n_ctx=6, d_vocab=20, d_vocab_out=20, normalization="LN",
    activation="gelu", biases=("attn", "mlp", "unembed"),
)  # fmt: skip


def spin(seconds: float, result: Any = 1.0) -> Callable[[], Any]:
    """Uses that much CPU time."""

    def run() -> Any:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        return result

    return run


def spinning(theirs: Any = 1.0, ours: Any = 1.0, **changes: Any) -> Benchmark:
    fields = {
        "name": "spin", "compares": "Waiting.", "peer": "patience", "target": 5.0, "gate": 2.0,
        "prepare": lambda: (spin(0.02, theirs), spin(0.004, ours)), "agreement": lambda one, other: abs(one - other),
    }  # fmt: skip
    return Benchmark(**{**fields, **changes})


def test_the_ratio_is_that_of_the_work_and_lies_in_its_interval() -> None:
    result = measure(spinning(), repeats=5, round_seconds=0)
    assert result.low <= result.ratio <= result.high
    assert result.ratio == pytest.approx(5, rel=0.3)
    assert len(result.theirs) == len(result.ours) == 5
    assert result.agrees
    assert result.met
    assert not measure(spinning(gate=50.0), repeats=2, round_seconds=0).met


def test_the_share_of_the_machines_rate_is_that_of_our_side() -> None:
    result = measure(spinning(), repeats=1, round_seconds=0)
    # A product of two 64 x 64 matrices, 2 · 64³ operations, in half a second of a machine that does 2²⁰ a second.
    counted = measure(
        spinning(prepare=lambda: (spin(0.001), lambda: float((torch.ones(64, 64) @ torch.ones(64, 64))[0, 0])),
                 agreement=lambda one, other: 0.0),
        repeats=1, round_seconds=0,
    )  # fmt: skip
    assert counted.flops == 2 * 64**3
    assert result.flops == 0
    assert replace(counted, theirs=(8.0,), ours=(0.5,), gemm_rates=(2.0**20,)).gemm_share == 1.0


def test_the_memory_is_what_tensors_hold_at_once() -> None:
    """A thousand numbers of four bytes are squared, twice; what is no longer held is not counted."""
    x = torch.ones(1000)

    def both() -> float:
        square = x * x
        return float((square * square)[0])

    def one() -> float:
        square = x * x
        square = square.mul_(square)
        return float(square[0])

    result = measure(spinning(prepare=lambda: (both, one)), repeats=1, round_seconds=0)
    # A number alone has four bytes, too, and is taken out of what is still held.
    assert result.peak_bytes == (8000, 4000)
    assert result.summary()["peak_bytes"] == {"peer": 8000, "ours": 4000}


def test_memory_that_backward_needs_is_counted() -> None:
    x = torch.ones(1000, requires_grad=True)
    with TensorMemory() as memory:
        y = x * 2
        for _ in range(3):
            y = y.exp()
        y.sum().backward()
    # Each exponential is kept for its gradient, and their gradients pass through one or two at a time.
    assert 4 * 3 * 1000 <= memory.peak <= 4 * 6 * 1000 + 8


def test_the_interval_is_of_the_ratio_of_medians_over_rounds() -> None:
    """Where both sides slow down together, the ratio stands still and so does its interval."""
    rounds = iter([1, 1, 1, 3, 1, 2, 1])
    share: dict[str, float] = {}

    def theirs() -> float:
        share["factor"] = next(rounds)
        return spin(0.01 * share["factor"])()

    result = measure(
        spinning(prepare=lambda: (theirs, lambda: spin(0.005 * share["factor"])())), repeats=5, round_seconds=0
    )
    assert max(result.theirs) > 2.5 * min(result.theirs)
    assert result.high < 1.5 * result.low


def test_sides_run_alternately_on_one_thread_which_is_given_back() -> None:
    before, calls = torch.get_num_threads(), []

    def side(name: str) -> Callable[[], float]:
        def run() -> float:
            calls.append((name, torch.get_num_threads()))
            return 0.0

        return run

    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="broken"):
            measure(spinning(prepare=lambda: (side("theirs"), spin(0.0)), agreement=fail), repeats=1)
        assert torch.get_num_threads() == 2
        calls.clear()
        slow = replace(spinning(), prepare=lambda: (side("theirs"), lambda: (spin(0.001)(), side("ours")())[1]))
        result = measure(slow, repeats=3, round_seconds=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    # Once untimed, once more for ours to be counted, once each for their memory, then three rounds.
    assert (
        calls
        == [("theirs", 1), ("ours", 1), ("ours", 1), ("theirs", 1), ("ours", 1)] + [("theirs", 1), ("ours", 1)] * 3
    )
    assert result.conditions["threads"] == 1


def fail(*results: Any) -> float:
    raise RuntimeError("broken")


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_another_result_is_no_success(wrong: float) -> None:
    result = measure(spinning(ours=wrong), repeats=2, round_seconds=0)
    assert not result.agrees
    assert not result.met
    assert result.summary()["agrees"] is False


def test_a_result_that_goes_wrong_later_is_noticed() -> None:
    answers = iter([1.0, 1.0, 1.0, 1.0, float("nan"), 1.0])
    result = measure(
        spinning(prepare=lambda: (spin(0.002), lambda: spin(0.001, next(answers))())), repeats=3, round_seconds=0
    )
    assert not result.agrees


def test_a_quick_side_runs_several_times_in_a_round() -> None:
    calls = {"quick": 0, "slow": 0}

    def side(name: str, seconds: float) -> Callable[[], Any]:
        def run() -> float:
            calls[name] += 1
            return spin(seconds)()

        return run

    benchmark = spinning(prepare=lambda: (side("slow", 0.04), side("quick", 0.004)))
    result = measure(benchmark, repeats=2, round_seconds=0.02)
    # One call that does not count, one in which ours is counted, one for memory, then two rounds: of one call each, and
    # of about five.
    assert calls["slow"] == 4
    assert 9 <= calls["quick"] <= 13
    # Seconds are still those of one call.
    assert result.ratio == pytest.approx(10, rel=0.3)


def test_result_says_what_was_measured() -> None:
    result = measure(spinning(conditions={"pairs": 3}), repeats=2, round_seconds=0)
    summary = result.summary()
    assert summary["ratio_interval"] == [result.low, result.high]
    assert summary["n"] == 2
    assert {"pairs", "threads", "load_before", "load_after", "torch", "transformer-lens", "python"} <= set(
        result.conditions
    )
    (table,) = result.tables()
    assert list(table.frame["side"]) == ["patience", "workbench"]
    assert (table.frame["least"] <= table.frame["seconds"]).all()
    assert "n = 2" in table.caption
    assert result.provenance.seed == 0


def toy_patching() -> BenchmarkResult:
    return measure(_patching("toy", TOY, pairs=3, target=2.0), repeats=2, round_seconds=0)


def test_patching_agrees_with_transformer_lens_on_a_toy_shape() -> None:
    result = toy_patching()
    assert result.agrees
    assert result.ratio > 0
    assert result.conditions["pairs"] == 3
    assert result.conditions["shared_positions"] == 2


def test_patching_that_finds_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuits import cone

    monkeypatch.setattr(cone.functional, "scaled_dot_product_attention", lambda q, k, v, attn_mask: 0.9 * q)
    assert not toy_patching().agrees


@pytest.mark.parametrize(
    "make", [partial(_eap_ig, "toy"), partial(_acdc, "toy", shares=(0.1,)), partial(_curve, "toy")]
)
def test_circuits_agree_with_the_plain_way_on_a_toy_shape(make: Callable[[ModelConfig], Benchmark]) -> None:
    result = measure(make(TOY), repeats=2, round_seconds=0)
    assert result.agrees
    assert result.ratio > 0


def test_a_curve_that_finds_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "circuit_values", lambda plan, keep: circuit_values(plan, ~keep))
    assert not measure(_curve("toy", TOY), repeats=1, round_seconds=0).agrees


def test_attention_effects_agree_with_one_pass_an_edit_on_a_toy_shape() -> None:
    task = GraphSearch(size=20)
    words = len(task.vocab)
    shape = {"n_layers": 2, "n_ctx": 20, "d_vocab": words, "d_vocab_out": words, "d_model": 48, "d_head": 48}
    toy = replace(benchmarks.SEARCH, **shape, pad_token=task.pad_token)
    result = measure(benchmarks._attention_effects("toy", toy), repeats=1, round_seconds=0)
    assert result.agrees
    assert result.ratio > 0
    assert "pairs" not in result.conditions


def test_every_benchmark_is_named_as_it_is_registered() -> None:
    for name, make in BENCHMARKS.items():
        benchmark = make()
        assert benchmark.name == name
        assert 0 < benchmark.gate <= benchmark.target
    assert {"patch-toy-1", "patch-toy-32", "patch-gpt2", "acdc", "curve"} <= set(BENCHMARKS)


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(WorkbenchError, match="Unknown benchmark 'patch-toy'. Did you mean 'patch-toy-"):
        run_benchmark("patch-toy")
    with pytest.raises(WorkbenchError, match="at least 1 round, got 0"):
        run_benchmark("patch-toy-1", repeats=0)
