"""Benchmarks: how much faster an analysis is than its peer, measured so that the ratio survives a busy machine.

Both sides run alternately in one process on one thread, the clock is the CPU time of the process, and what is reported
is the ratio of medians with a bootstrap interval over rounds. Every round's results are compared, too: a fast answer
that is another answer is no answer. Beside them, in every round, the rate is taken at which the machine multiplies
matrices, and ours is told as a share of it: how much is left to gain without computing less. The most memory that the
tensors of a call hold at once is counted once for each side, and does not vary.

A benchmark is one function that returns a `Benchmark`, and an entry in `BENCHMARKS`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from apps.tensor_memory import TensorMemory
from workbench.runtime import WorkbenchError, code_version, generator, one_thread, thread_count
from workbench.store import Provenance
from workbench.tables import Table

REPEATS = 7
ROUND_SECONDS = 0.5
"""A side that takes less runs several times in a round, so that the clock's grain and a cold cache do not count."""
RESAMPLES = 2000
LEVEL = 0.95
GEMM_SIZE = 1024
"""Rows and columns of the matrices whose product is the machine's rate."""
Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Benchmark:
    """Two ways to the same result."""

    name: str
    compares: str
    """What is computed, in one sentence."""
    peer: str
    """The other library, or the plain way."""
    prepare: Callable[[], tuple[Run, Run]]
    """Builds what both need, untimed, and returns theirs and ours."""
    agreement: Callable[[Any, Any], float]
    """Distance between their result and ours; 0 is equality."""
    tolerance: float = 1e-5
    target: float
    """Their time over ours that is aimed at."""
    gate: float
    """What the lower end of the ratio's interval must reach."""
    precision: torch.dtype = torch.float32
    """What ours multiplies matrices in, so that its rate is compared with the machine's there."""
    conditions: Mapping[str, object] = field(default_factory=dict)
    """Shapes, numbers of examples: what else the ratio depends on."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BenchmarkResult:
    """CPU seconds of both sides, round by round, and what follows from them."""

    benchmark: Benchmark
    theirs: tuple[float, ...]
    ours: tuple[float, ...]
    ratio: float
    """Median of theirs over median of ours."""
    low: float
    high: float
    distance: float
    """Largest distance between the two results in any round."""
    flops: int
    """Floating-point operations of the matrix products in ours."""
    gemm_rates: tuple[float, ...]
    """Floating-point operations a second of a large matrix product, round by round."""
    peak_bytes: tuple[int, int]
    """Most memory that the tensors of a call hold at once: theirs and ours."""
    conditions: Mapping[str, object]
    provenance: Provenance

    @property
    def agrees(self) -> bool:
        """Whether both sides gave the same result in every round."""
        return self.distance <= self.benchmark.tolerance

    @property
    def met(self) -> bool:
        """Whether the gate is met, by equal results."""
        return self.agrees and self.low >= self.benchmark.gate

    @property
    def gemm_share(self) -> float:
        """Rate of the matrix products in ours, all of its time counted, over the machine's."""
        return self.flops / median(self.ours) / median(self.gemm_rates)

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "name": self.benchmark.name,
            "compares": self.benchmark.compares,
            "peer": self.benchmark.peer,
            "ratio": self.ratio,
            "ratio_interval": [self.low, self.high],
            "target": self.benchmark.target,
            "gate": self.benchmark.gate,
            "met": self.met,
            "agreement": self.distance,
            "tolerance": self.benchmark.tolerance,
            "agrees": self.agrees,
            "seconds": {"peer": median(self.theirs), "ours": median(self.ours)},
            "gemm_share": self.gemm_share,
            "peak_bytes": dict(zip(("peer", "ours"), self.peak_bytes, strict=True)),
            "gemm_flops_per_second": median(self.gemm_rates),
            "n": len(self.ours),
            "conditions": dict(self.conditions),
        }

    def tables(self) -> Sequence[Table]:
        """CPU seconds of both sides."""
        rows = [
            {"side": side, "seconds": median(seconds), "least": min(seconds), "most": max(seconds)}
            for side, seconds in ((self.benchmark.peer, self.theirs), ("workbench", self.ours))
        ]
        return [
            Table(
                name=f"bench_{self.benchmark.name.replace('-', '_')}",
                frame=pd.DataFrame(rows),
                kind="bar",
                axes={"x": "side", "y": "seconds", "low": "least", "high": "most"},
                unit="CPU seconds",
                caption=(
                    f"{self.benchmark.compares} Median and range of n = {len(self.ours)} alternating rounds on one "
                    f"thread: {self.ratio:.3g} times as fast ({100 * LEVEL:.0f} % bootstrap interval {self.low:.3g} "
                    f"to {self.high:.3g}); results differ by {self.distance:.1g} (at most "
                    f"{self.benchmark.tolerance:.0e} allowed)."
                ),
            )
        ]


def measure(
    benchmark: Benchmark, *, repeats: int = REPEATS, seed: int = 0, round_seconds: float = ROUND_SECONDS
) -> BenchmarkResult:
    """Run both sides alternately, after one call of each that does not count, and compare times and results.

    Args:
        benchmark: what to measure.
        repeats: timed rounds.
        seed: of the bootstrap.
        round_seconds: about how long a side runs in a round, by being called as often as that takes.

    Raises:
        WorkbenchError: fewer than one round is asked for.
    """
    if repeats < 1:
        raise WorkbenchError(f"A benchmark needs at least 1 round, got {repeats}.")
    with one_thread():
        threads, load = thread_count(), os.getloadavg()[0]
        sides = benchmark.prepare()
        calls = [max(1, math.ceil(round_seconds / max(_timed(side, 1)[1], 1e-6))) for side in sides]
        flops, rates = _matrix_flops(sides[1]), list[float]()
        peak_bytes = (_peak_bytes(sides[0]), _peak_bytes(sides[1]))
        distances: list[float] = []
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            results = []
            for side, times, n in zip(sides, seconds, calls, strict=True):
                result, spent = _timed(side, n)
                results.append(result)
                times.append(spent)
            distances.append(benchmark.agreement(*results))
            rates.append(_gemm_rate(benchmark.precision))
    low, high = ratio_interval(*seconds, seed=seed)
    measured = {"threads": threads, "load_before": load, "load_after": os.getloadavg()[0], **_versions()}
    return BenchmarkResult(
        benchmark=benchmark,
        theirs=tuple(seconds[0]),
        ours=tuple(seconds[1]),
        ratio=median(seconds[0]) / median(seconds[1]),
        low=low,
        high=high,
        # max() would pass over a NaN that is not the first.
        distance=float(torch.tensor(distances, dtype=torch.float64).max()),
        flops=flops,
        gemm_rates=tuple(rates),
        peak_bytes=peak_bytes,
        conditions={**benchmark.conditions, **measured},
        provenance=Provenance(code_version=code_version(), seed=seed),
    )


class MatrixFlops(TorchDispatchMode):
    """Counts floating-point operations of matrix products by torch's formulas.

    torch's own counter follows modules by hooks, which fail where gradients are off, and passes over attention on a
    processor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """As torch calls it."""
        result, packet = func(*args, **(kwargs or {})), func.overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        elif str(packet) == "mkldnn._linear_pointwise":
            rows, matrix = (each.shape for each in args[:2])
            self.total += 2 * rows.numel() * matrix[0]
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def _timed(side: Run, calls: int) -> tuple[Any, float]:
    """The last call's result, and the CPU seconds of one call."""
    # As in timeit: no garbage, which may be another's, is collected while the clock runs.
    gc.disable()
    try:
        begun = cpu_seconds()
        for _ in range(calls - 1):
            side()
        result = side()
        return result, (cpu_seconds() - begun) / calls
    finally:
        gc.enable()


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak_bytes(side: Run) -> int:
    """Most memory that the tensors of one call hold at once."""
    with TensorMemory() as memory:
        side()
    return memory.peak


def _matrix_flops(side: Run) -> int:
    """Floating-point operations of the matrix products in one call."""
    with MatrixFlops() as counter:
        side()
    return counter.total


def _gemm_rate(precision: torch.dtype) -> float:
    """Floating-point operations a second of a square product, the fastest of a few."""
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=precision)
    return 2 * GEMM_SIZE**3 / min(_timed(lambda: matrix @ matrix, 1)[1] for _ in range(3))


def ratio_interval(theirs: Sequence[float], ours: Sequence[float], *, seed: int) -> tuple[float, float]:
    """Percentile interval of the ratio of medians, rounds resampled as pairs."""
    both = torch.tensor([theirs, ours], dtype=torch.float64)
    draws = torch.randint(0, len(ours), (RESAMPLES, len(ours)), generator=generator(seed, "benchmark"))
    above, below = both[:, draws].quantile(0.5, dim=2)
    tail = (1 - LEVEL) / 2
    low, high = (above / below).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def median(seconds: Sequence[float]) -> float:
    """Median of the rounds."""
    return float(torch.tensor(seconds, dtype=torch.float64).quantile(0.5))


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformer-lens")}
    return {"python": platform.python_version(), "machine": platform.machine(), **libraries}
