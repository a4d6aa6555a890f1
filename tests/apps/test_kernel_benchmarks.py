from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apps import kernel_benchmarks
from apps.kernel_benchmarks import (
    both_ways,
    cross_entropy_cases,
    error,
    foreach_adamw,
    main,
    random_group,
    reference,
    summary,
    training_step,
)
from workbench.runtime import WorkbenchError
from workbench.training.recipes import find_recipe


def test_ratios_are_of_medians_and_told_with_an_interval():
    row = summary({"kernel": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 12.0]}, "kernel")
    assert (row["kernel_ms"], row["eager_ms"]) == (2.0, 6.0)
    # Every round has the same ratio, so that every resample has.
    assert row["against_eager"] == [3.0, 3.0, 3.0]
    assert "against_kernel" not in row


def test_an_error_is_that_of_the_worst_gradient():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 1, 4, generator=rng) for _ in range(3))
    allowed = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    plain = kernel_benchmarks.reference.attention
    assert [each.shape for each in both_ways(plain, [q, k, v, allowed])()] == [q.shape] * 3
    assert error(plain, plain, [q, k, v, allowed]) < 1e-6
    assert error(lambda q, k, v, allowed: plain(q, k, 1.01 * v, allowed), plain, [q, k, v, allowed]) > 0.009


def test_cross_entropy_is_measured_against_its_definition(monkeypatch):
    monkeypatch.setattr(kernel_benchmarks, "ANSWERS", ((40, 8, 13),))
    single, double = cross_entropy_cases(torch.device("cpu"))
    assert (single.name, double.name) == ("cross_entropy 40 x 8 x 13 float32", "cross_entropy 40 x 8 x 13 float64")
    assert single.plain(*single.operands).dtype == torch.float32
    assert double.fused(*double.operands).dtype == torch.float64
    assert [each.shape for each in both_ways(single.fused, single.operands)()] == [(40, 8), (8, 13)]
    assert 0 < error(single.fused, single.plain, single.operands) < 1e-6
    # Three times both matrices of float32, and twice a row's answer and loss.
    assert single.least_bytes == 12 * (40 * 8 + 8 * 13) + 2 * 40 * (8 + 4)
    assert single.least_products == 3 * 40 * 8 * 13


@pytest.mark.parametrize("grokfast", [None, (0.98, 2.0)])
def test_pytorchs_lists_of_tensors_are_updated_as_by_the_definition(grokfast):
    start = random_group([torch.Size([3, 4]), torch.Size([])], torch.device("cpu"))
    found = []
    for update in (foreach_adamw, reference.adamw):
        names = ("weights", "means", "squares", "steps", "slow")
        group = replace(start, **{name: [tensor.clone() for tensor in getattr(start, name)] for name in names})
        for _ in range(3):
            update([group], (0.9, 0.98), 1e-8, grokfast)
        found.append([tensor for name in names for tensor in getattr(group, name)])
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0][0], start.weights[0])


class Ops(TorchDispatchMode):
    """Names of the operations that run under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_no_step_asks_the_card_for_a_value(monkeypatch, kernels):
    monkeypatch.setenv("WORKBENCH_KERNELS", kernels)
    sizes = ["p=5", "d_model=16", "d_head=4", "d_mlp=8", "normalization=LN", "grokfast=[0.9,2]"]
    step = training_step(find_recipe("modular-smoke").override(sizes))
    step()
    with Ops() as ops:
        step()
    assert "mm" in ops.names
    # What a captured step may not do: read a number, or have a size that depends on values.
    assert not ops.names & {"_local_scalar_dense", "item", "nonzero", "_unique2", "masked_select"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(WorkbenchError, match="this machine has no CUDA device"):
        main()
