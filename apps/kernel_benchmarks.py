"""What the fused kernels gain on a GPU: `python -m apps.kernel_benchmarks` prints a row of JSON for each operation.

Each row is one operation forward and backward: median milliseconds of `REPEATS` alternating repeats of the kernel, of
eager PyTorch and of `torch.compile`, the ratios with their least and greatest, the bytes that must move (operands and
results once), and the share of the card's measured copy bandwidth that this is. Operands are several times the cache.
The training steps are those of a shipped size, in eager PyTorch and captured as one CUDA graph.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.kernels import reference
from workbench.kernels.dispatch import OVERRIDE, kernels_for
from workbench.models.config import ModelConfig
from workbench.models.fast import ReadPlan, read_logits
from workbench.models.transformer import EPS, Transformer
from workbench.runtime import WorkbenchError, pick_device

REPEATS = 9
CALLS = 10
"""Calls that one repeat times together."""
WARM_UP = 3
COPY_BYTES = 2**31
SHAPES = (
    (65536, 3, 4, 32),
    (32768, 6, 4, 64),
    (16384, 12, 4, 64),
    (8192, 24, 4, 64),
    (8192, 32, 1, 64),
    (4096, 64, 1, 64),
)
"""Prompts, positions, heads and their width."""


def milliseconds(call: Callable[[], object]) -> float:
    """Time of one call on the card, as its events tell it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def alternate(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each call, `REPEATS` times in turn, after a warm-up."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return times


def summary(times: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    """Medians, and every other's ratio to ours: [least, median, greatest] over the repeats."""
    row: dict[str, Any] = {f"{name}_ms": round(statistics.median(each), 4) for name, each in times.items()}
    for name in times.keys() - {ours}:
        ratios = sorted(theirs / own for theirs, own in zip(times[name], times[ours], strict=True))
        row[f"against_{name}"] = [round(each, 2) for each in (ratios[0], statistics.median(ratios), ratios[-1])]
    return row


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy on the card reads and writes."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * COPY_BYTES / statistics.median(times) * 1e3


def operations(device: torch.device) -> Iterator[tuple[str, Callable, Callable, list[Tensor], int]]:
    """Name, kernel, definition, operands, and the least bytes that forward and backward move together."""
    kernels = kernels_for(device)
    for width in (64, 128, 256):
        rows = 2**27 // width
        x, added = (torch.randn(rows, width, device=device) for _ in range(2))
        w, b = torch.randn(width, device=device), torch.randn(width, device=device)
        # Forward reads two and writes two; backward reads the sum and two gradients, and writes one.
        yield f"add_norm {rows} x {width}", kernels.add_norm, reference.add_norm, [x, added, w, b], 8 * x.nbytes
    for batch, positions, heads, width in SHAPES:
        q, k, v = (torch.randn(batch, positions, heads, width, device=device) for _ in range(3))
        allowed = torch.ones(1, positions, positions, dtype=torch.bool, device=device).tril()
        # Forward reads three and writes one; backward reads those and a gradient, and writes three.
        name = f"attention {batch} x {positions} x {heads} x {width}"
        yield name, kernels.attention, reference.attention, [q, k, v, allowed], 12 * q.nbytes


def both_ways(function: Callable, operands: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the operation and of its gradients, with random ones from above."""
    leaves = [each.detach().requires_grad_() if each.is_floating_point() else each for each in operands]
    needed = [each for each in leaves if each.requires_grad]
    extra = (EPS,) if len(operands) == 4 and operands[-1].is_floating_point() else ()
    outputs = function(*leaves, *extra)
    above = [
        torch.randn(each.shape, device=each.device).to(each)
        for each in (outputs if isinstance(outputs, tuple) else (outputs,))
    ]

    def call() -> tuple[Tensor, ...]:
        results = function(*leaves, *extra)
        return torch.autograd.grad(results, needed, above)

    return call


def error(function: Callable, plain: Callable, operands: list[Tensor]) -> float:
    """The greatest relative error of any gradient against the definition's in float64."""
    exact = [each.double() if each.is_floating_point() else each for each in operands]
    found = []
    for call, given in ((function, operands), (plain, exact)):
        torch.manual_seed(0)
        found.append(both_ways(call, given)())
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(*found, strict=True))


def operation_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each operation."""
    rate = copy_rate(device)
    yield {"name": "copy", "terabytes_a_second": round(rate / 1e12, 2)}
    for name, fused, plain, operands, least in operations(device):
        calls = {
            "kernel": both_ways(fused, operands),
            "eager": both_ways(plain, operands),
            "compiled": both_ways(torch.compile(plain, dynamic=False), operands),
        }
        row = summary(alternate(calls), "kernel")
        share = least / row["kernel_ms"] * 1e3 / rate
        few = [each[:512] if each.dim() > 1 else each for each in operands]
        errors = {"kernel_error": error(fused, plain, few), "eager_error": error(plain, plain, few)}
        yield {"name": name, **row, "share_of_bandwidth": round(share, 3), **errors}
        torch.cuda.empty_cache()


STEPS = {
    "modular": ModelConfig(
        n_layers=1, d_model=128, n_heads=4, d_head=32, d_mlp=512, n_ctx=3, d_vocab=114, d_vocab_out=113
    ),
    "composition": ModelConfig(
        n_layers=4, d_model=256, n_heads=4, d_head=64, d_mlp=1024, n_ctx=5, d_vocab=2200, d_vocab_out=2200,
        normalization="LN", activation="gelu", tied=True,
    ),
    "search": ModelConfig(
        n_layers=6, d_model=64, n_heads=1, d_head=64, d_mlp=256, n_ctx=64, d_vocab=64, d_vocab_out=64,
        normalization="LN", activation="gelu",
    ),
}  # fmt: skip
EXAMPLES = {"modular": 3830, "composition": 512, "search": 256}


def training_step(name: str, device: torch.device) -> Callable[[], None]:
    """A whole step on a fixed batch of random prompts, read at the last position: forward, backward and AdamW."""
    config, rng = STEPS[name], torch.Generator().manual_seed(0)
    tokens = torch.randint(config.d_vocab_out, (EXAMPLES[name], config.n_ctx), generator=rng)
    read = torch.zeros(tokens.shape, dtype=torch.bool)
    read[:, -1] = True
    answers = torch.randint(config.d_vocab_out, (len(tokens),), generator=rng).to(device)
    model = Transformer(config, generator=rng).to(device)
    plan = ReadPlan.of(config, tokens.to(device), read.to(device))
    optimiser = torch.optim.AdamW(model.parameters(), fused=True, capturable=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(read_logits(model, plan), answers).backward()
        optimiser.step()

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one launch; it holds what the graph points to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(step: Callable[[], None] = step) -> None:
        graph.replay()

    return replay


def step_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each shipped size."""
    for name in STEPS:
        calls: dict[str, Callable[[], object]] = {}
        for kernels in ("triton", "reference"):
            os.environ[OVERRIDE] = kernels
            calls[f"{kernels}_graph"] = captured(training_step(name, device))
        step = training_step(name, device)
        calls["reference_eager"] = step
        yield {"name": f"{name} step", **summary(alternate(calls), "triton_graph")}
        del os.environ[OVERRIDE]


def main() -> None:
    """Every row, as it is measured."""
    device = pick_device()
    if device.type != "cuda":
        raise WorkbenchError("These benchmarks measure GPU kernels, and this machine has no CUDA device.")
    sys.stdout.write(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}) + "\n")
    for rows in (operation_rows, step_rows):
        for row in rows(device):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
