"""What the fused kernels gain on a GPU: `python -m apps.kernel_benchmarks` prints a row of JSON for each operation.

Each row is one operation forward and backward: median milliseconds of `REPEATS` alternating repeats of the kernel, of
eager PyTorch and of `torch.compile`, the ratio of medians to each with its bootstrap interval, and the share of the
card's measured copy bandwidth at which the bytes move that must (operands and results, once); of matrix products also
the share of the card's measured float32 rate. Operands are several times the cache, or those of a recipe. Then follow
AdamW's updates, also against PyTorch's fused one, and whole training steps, as one CUDA graph and piece by piece.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.adamw import adamw

from apps.bench import median, ratio_interval
from apps.step_benchmarks import deep_search, still_trainer, wide_composition
from workbench.kernels import reference
from workbench.kernels.dispatch import OVERRIDE, kernels_for
from workbench.kernels.reference import Group
from workbench.models.kinds import build
from workbench.models.transformer import EPS
from workbench.runtime import WorkbenchError, pick_device
from workbench.training.capture import aside, recorded
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe, modular

REPEATS = 9
CALLS = 10
"""Calls that one repeat times together."""
WARM_UP = 3
COPY_BYTES = 2**31
PRODUCT_SIZE = 8192
FEW = 512
"""Rows or prompts whose gradients are compared with float64."""
WIDTHS = (64, 128, 256)
SHAPES = (
    (65536, 3, 4, 32),
    (32768, 6, 4, 64),
    (16384, 12, 4, 64),
    (8192, 24, 4, 64),
    (8192, 32, 1, 64),
    (4096, 64, 1, 64),
)
"""Prompts, positions, heads and their width."""
ANSWERS = ((3830, 128, 113), (512, 256, 2201), (65536, 128, 113), (16384, 256, 2201))
"""Rows, their width and the vocabulary: the recipe `modular`, a wider `composition`, and more rows of both."""
UPDATED = ("modular", "composition", "composition-paper")
"""Recipes whose parameters are updated."""
BETAS, EPSILON, GROKFAST = (0.9, 0.98), 1e-8, (0.98, 2.0)
STEPS: Mapping[str, Callable[[], Recipe]] = {
    "modular": modular,
    "composition": wide_composition,
    "search": deep_search,
}
Operation = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """An operation at one size."""

    name: str
    fused: Operation
    plain: Operation
    """Its definition."""
    operands: Sequence[Tensor]
    least_bytes: int
    """What forward and backward must move together."""
    least_products: int = 0
    """Pairs of numbers that matrix products must multiply."""


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
    """Medians, and every other's ratio to ours: [low, ratio of medians, high]."""
    row: dict[str, Any] = {f"{name}_ms": round(median(each), 4) for name, each in times.items()}
    for name, each in times.items():
        if name != ours:
            low, high = ratio_interval(each, times[ours], seed=0)
            row[f"against_{name}"] = [round(x, 2) for x in (low, median(each) / median(times[ours]), high)]
    return row


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy on the card reads and writes."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * COPY_BYTES / median(times) * 1e3


def product_rate(device: torch.device) -> float:
    """Pairs of numbers a second that a product of large matrices multiplies, in exact float32."""
    one, other = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device) for _ in range(2))
    times = alternate({"product": lambda: one @ other})["product"]
    return PRODUCT_SIZE**3 / median(times) * 1e3


def cases(device: torch.device) -> Iterator[Case]:
    """Every operation, at the widths and lengths of the shipped recipes and beyond."""
    yield from add_norm_cases(device)
    yield from attention_cases(device)
    yield from cross_entropy_cases(device)


def add_norm_cases(device: torch.device) -> Iterator[Case]:
    """Residual add and LayerNorm, by width."""
    kernels = kernels_for(device)
    for width in WIDTHS:
        rows = 2**27 // width
        x, added = (torch.randn(rows, width, device=device) for _ in range(2))
        w, b = (torch.randn(width, device=device) for _ in range(2))
        yield Case(
            name=f"add_norm {rows} x {width}",
            fused=lambda x, added, w, b: kernels.add_norm(x, added, w, b, EPS),
            plain=lambda x, added, w, b: reference.add_norm(x, added, w, b, EPS),
            operands=(x, added, w, b),
            # Forward reads two and writes two; backward reads the sum and two gradients, and writes one.
            least_bytes=8 * x.nbytes,
        )


def attention_cases(device: torch.device) -> Iterator[Case]:
    """Attention, by length."""
    kernels = kernels_for(device)
    for prompts, positions, heads, width in SHAPES:
        q, k, v = (torch.randn(prompts, positions, heads, width, device=device) for _ in range(3))
        yield Case(
            name=f"attention {prompts} x {positions} x {heads} x {width}",
            fused=kernels.attention,
            plain=reference.attention,
            operands=(q, k, v, torch.ones(1, positions, positions, dtype=torch.bool, device=device).tril()),
            # Forward reads three and writes one; backward reads those and a gradient, and writes three.
            least_bytes=12 * q.nbytes,
        )


def cross_entropy_cases(device: torch.device) -> Iterator[Case]:
    """Unembedding and cross-entropy, by size and by the loss's precision; the kernels, however few the logits are."""
    from workbench.kernels import fused_cross_entropy

    for (rows, width, vocab), dtype in product(ANSWERS, (torch.float32, torch.float64)):
        x, w = torch.randn(rows, width, device=device), torch.randn(width, vocab, device=device) / width**0.5
        answer = torch.randint(vocab, (rows,), device=device)

        def run(function: Operation, x: Tensor, w: Tensor, answer: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return function(x, w, None, answer, torch.promote_types(dtype, x.dtype))

        yield Case(
            name=f"cross_entropy {rows} x {width} x {vocab} {str(dtype).removeprefix('torch.')}",
            fused=partial(run, fused_cross_entropy.cross_entropy),
            plain=partial(run, reference.cross_entropy),
            operands=(x, w, answer),
            # Forward reads rows, matrix and answers and writes losses; backward reads those, and writes two gradients.
            least_bytes=3 * (x.nbytes + w.nbytes) + 2 * (answer.nbytes + rows * dtype.itemsize),
            # One product forward and two backward; the kernels do five.
            least_products=3 * rows * width * vocab,
        )


def both_ways(function: Operation, operands: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the operation and of its gradients, with random ones from above."""
    leaves = [each.detach().requires_grad_() if each.is_floating_point() else each for each in operands]
    needed = [each for each in leaves if each.requires_grad]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Drawn in float32, so that two dtypes of the same seed have the same.
    above = [torch.randn(each.shape, device=each.device).to(each) for each in outputs]
    return lambda: torch.autograd.grad(function(*leaves), needed, above)


def error(function: Operation, plain: Operation, operands: Sequence[Tensor]) -> float:
    """The greatest relative error of any gradient against the definition's in float64."""
    exact = [each.double() if each.is_floating_point() else each for each in operands]
    found = []
    for call, given in ((function, operands), (plain, exact)):
        torch.manual_seed(0)
        found.append(both_ways(call, given)())
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(*found, strict=True))


def operation_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each operation."""
    rate, products = copy_rate(device), product_rate(device)
    yield {"name": "copy", "terabytes_a_second": round(rate / 1e12, 2)}
    yield {"name": "product", "tera_multiplications_a_second": round(products / 1e12, 2)}
    for case in cases(device):
        calls = {
            "kernel": both_ways(case.fused, case.operands),
            "eager": both_ways(case.plain, case.operands),
            "compiled": both_ways(torch.compile(case.plain, dynamic=False), case.operands),
        }
        row = summary(alternate(calls), "kernel")
        few = [each[:FEW] for each in case.operands]
        if case.least_products:
            row["share_of_products"] = round(case.least_products / row["kernel_ms"] * 1e3 / products, 3)
        yield {
            "name": case.name,
            **row,
            "share_of_bandwidth": round(case.least_bytes / row["kernel_ms"] * 1e3 / rate, 3),
            "kernel_error": error(case.fused, case.plain, few),
            "eager_error": error(case.plain, case.plain, few),
        }
        torch.cuda.empty_cache()


def foreach_adamw(
    groups: Sequence[Group], betas: tuple[float, float], eps: float, grokfast: tuple[float, float] | None
) -> None:
    """As `reference.adamw`, by PyTorch's operations on lists of tensors."""
    for group in groups:
        adamw(
            list(group.weights), reference.filtered(group, grokfast), list(group.means), list(group.squares), [],
            list(group.steps), foreach=True, capturable=group.weights[0].is_cuda, amsgrad=False, beta1=betas[0],
            beta2=betas[1], lr=group.rate, weight_decay=group.decay, eps=eps, maximize=False,
        )  # fmt: skip


def update_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for the parameters of each recipe, with Grokfast's filter."""
    rate, ours = copy_rate(device), kernels_for(device).adamw
    peers = {"kernel": ours, "fused": reference.adamw, "eager": foreach_adamw}
    for name in UPDATED:
        shapes = [parameter.shape for parameter in build(find_recipe(name).model, generator=None).parameters()]
        # A compiled update of its own for each, so that none counts as a change of another's sizes.
        torch.compiler.reset()
        compiled = torch.compile(foreach_adamw, dynamic=False)
        calls = {
            peer: partial(update, [random_group(shapes, device)], BETAS, EPSILON, GROKFAST)
            for peer, update in (peers | {"compiled": compiled}).items()
        }
        row = summary(alternate(calls), "kernel")
        # Weights, gradients, two moments and what Grokfast remembers are read, all but gradients written.
        least_bytes = sum(shape.numel() for shape in shapes) * 4 * 9
        share = round(least_bytes / row["kernel_ms"] * 1e3 / rate, 3)
        yield {"name": f"adamw {name} with Grokfast", "tensors": len(shapes), **row, "share_of_bandwidth": share}
        torch.cuda.empty_cache()


def random_group(shapes: Sequence[torch.Size], device: torch.device) -> Group:
    """Parameters of these shapes, with gradients, before their first update."""
    weights, gradients, means, squares, slow = (
        [torch.randn(shape, device=device).abs() for shape in shapes] for _ in range(5)
    )
    steps = [torch.zeros((), device=device) for _ in shapes]
    return Group(
        weights=weights, gradients=gradients, means=means, squares=squares, steps=steps, slow=slow, rate=1e-3, decay=1.0
    )


def training_step(recipe: Recipe) -> Callable[[], None]:
    """Forward, loss, backward and AdamW on one batch of a recipe, as a card can repeat them without the processor."""
    trainer = still_trainer(recipe, Accelerator())
    data, count = trainer.draw()
    (optimiser,) = trainer.optimisers

    def step() -> None:
        optimiser.zero_grad(set_to_none=False)
        trainer.wrapped(data, float(count), {}).backward()
        optimiser.step()

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one launch, warmed up."""
    for _ in range(WARM_UP):
        aside(step)
    return recorded(step)


def step_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each recipe: captured with either kernels, and launched piece by piece with the plain ones."""
    for name, make in STEPS.items():
        calls: dict[str, Callable[[], object]] = {}
        for kernels in ("triton", "reference"):
            with mock.patch.dict(os.environ, {OVERRIDE: kernels}):
                calls[f"{kernels}_graph"] = captured(training_step(make()))
        with mock.patch.dict(os.environ, {OVERRIDE: "reference"}):
            calls["reference_eager"] = training_step(make())
            yield {"name": f"{name} step", **summary(alternate(calls), "triton_graph")}


def main() -> None:
    """Every row, as it is measured.

    Raises:
        WorkbenchError: there is no CUDA device.
    """
    device = pick_device()
    if device.type != "cuda":
        raise WorkbenchError("These benchmarks measure GPU kernels, and this machine has no CUDA device.")
    sys.stdout.write(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}) + "\n")
    for rows in (operation_rows, update_rows, step_rows):
        for row in rows(device):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except WorkbenchError as error_of_user:
        sys.exit(str(error_of_user))
