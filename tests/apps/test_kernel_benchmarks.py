import pytest
import torch

from apps import kernel_benchmarks
from apps.kernel_benchmarks import both_ways, error, main, summary
from workbench.runtime import WorkbenchError


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(WorkbenchError, match="this machine has no CUDA device"):
        main()
