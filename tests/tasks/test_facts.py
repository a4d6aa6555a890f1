import pytest
import torch

from workbench.runtime import WorkbenchError
from workbench.tasks.facts import check_phi, choose, draw_below


def test_candidates_are_equally_likely():
    rng = torch.Generator().manual_seed(0)
    allowed = torch.tensor([[True, False, True, True], [False] * 4]).repeat(3000, 1)
    chosen, any_allowed = choose(allowed, rng)
    assert any_allowed.tolist() == [True, False] * 3000
    counts = torch.bincount(chosen[::2], minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] - 1000).abs().max() < 120
    drawn = draw_below(torch.tensor([0, 1, 3]).repeat(3000), rng).view(3000, 3)
    assert not drawn[:, :2].any()
    assert (torch.bincount(drawn[:, 2]) - 1000).abs().max() < 120


def test_as_much_as_the_pool_holds_may_be_told():
    check_phi(2.0, n_id=5, pool=10)
    with pytest.raises(WorkbenchError, match="phi=2.2 asks for 11 inferred facts .* holds 10 for 5 .* at most 2.$"):
        check_phi(2.2, n_id=5, pool=10)
    with pytest.raises(WorkbenchError, match="leaves split 'train_inferred' empty"):
        check_phi(2.0, n_id=5, pool=0)
