"""AdamW for all parameters at once, interpreted on the CPU, against torch's in float64."""

import pytest
import torch
from exactness import RELATIVE, error
from torch import nn

from workbench.training.acceleration import amplify_slow
from workbench.training.optimisers import AdamW

pytest.importorskip("triton", reason="Triton is published for Linux alone")

SHAPES = ((5,), (40, 33), (7, 1, 2), (), (2048,), (1025,))
"""One a multiple of what a program updates, one of an entry more."""
NOTHING_ADDED = (0.9, 0.0)
"""Of the filter's mean: what is left is plain AdamW."""
RULE = {"lr": 1e-2, "betas": (0.9, 0.98)}


def parameters(rng):
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]


def groups(weights):
    """The first two decay by 1, the others do not."""
    return [{"params": weights[:2], "weight_decay": 1.0}, {"params": weights[2:], "weight_decay": 0.0}]


def in_float64(weights):
    return [nn.Parameter(weight.detach().double()) for weight in weights]


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.0, 0.999)])
@pytest.mark.parametrize("grokfast", [(0.9, 0.0), (0.98, 2.0)])
def test_fifty_updates_are_torchs(grokfast, betas):
    rng = torch.Generator().manual_seed(0)
    ours = parameters(rng)
    theirs = in_float64(ours)
    rule = {**RULE, "betas": betas}
    fused = AdamW(groups(ours), **rule, weight_decay=1.0, grokfast=grokfast)
    plain = torch.optim.AdamW(groups(theirs), **rule)
    means = [None] * len(ours)
    for step in range(50):
        for optimiser in (fused, plain):
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * min(1, (step + 1) / 10)
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = torch.randn(one.shape, generator=rng)
            other.grad = one.grad.double()
            other.grad, means[index] = amplify_slow(other.grad, means[index], *grokfast)
        fused.step()
        plain.step()
        if step in (0, 49):
            for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                assert error(one, other) < RELATIVE, (step, index)
                for name in ("exp_avg", "exp_avg_sq"):
                    assert error(fused.state[one][name], plain.state[other][name]) < RELATIVE, (step, index, name)
                assert error(fused.state[one]["slow"], means[index]) < RELATIVE, (step, index)


def test_the_first_update_is_a_whole_rate_against_the_gradient():
    # Both corrections undo what the means lack; in float32 the second would be off by 4e-5.
    weight, gradient = nn.Parameter(torch.zeros(4)), torch.tensor([1.0, -2.0, 30.0, -0.1])
    weight.grad = gradient
    AdamW([weight], lr=1e-2, betas=(0.9, 0.999), weight_decay=1.0, grokfast=NOTHING_ADDED).step()
    torch.testing.assert_close(weight.detach(), -1e-2 * gradient.sign(), rtol=1e-6, atol=0)


def test_a_parameter_without_a_gradient_waits_with_a_count_of_its_own():
    rng = torch.Generator().manual_seed(0)
    ours = parameters(rng)
    theirs = in_float64(ours)
    before = ours[1].detach().clone()
    fused, plain = (
        AdamW(ours, **RULE, weight_decay=1.0, grokfast=NOTHING_ADDED),
        torch.optim.AdamW(theirs, **RULE, weight_decay=1.0),
    )
    for step in range(4):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if index == 1 and step < 2:
                continue
            one.grad = torch.randn(one.shape, generator=rng)
            other.grad = one.grad.double()
        fused.step()
        plain.step()
        assert torch.equal(ours[1], before) == (step < 2)
    assert [int(fused.state[one]["step"]) for one in ours] == [4, 2, 4, 4, 4, 4]
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other) < RELATIVE


def test_without_any_gradient_nothing_happens():
    weight = nn.Parameter(torch.ones(3))
    AdamW([weight], **RULE, weight_decay=1.0, grokfast=NOTHING_ADDED).step()
    assert weight.tolist() == [1, 1, 1]


def test_nothing_beside_the_parameters_is_written():
    rng = torch.Generator().manual_seed(0)
    store = torch.randn(3 * 1300, generator=rng)
    before = store.clone()
    weight = nn.Parameter(store[1300 : 2 * 1300])
    weight.grad = torch.randn(1300, generator=rng)
    AdamW([weight], **RULE, weight_decay=1.0, grokfast=NOTHING_ADDED).step()
    changed = store != before
    assert changed[1300 : 2 * 1300].all()
    assert not changed[:1300].any()
    assert not changed[2 * 1300 :].any()


def test_many_blocks_are_shared_out_among_the_programs(monkeypatch):
    from workbench.kernels import fused_adamw

    # Six blocks and 4 entries, for 2 programs: three blocks each, and a third program for what is left.
    monkeypatch.setattr(fused_adamw, "PROGRAMS", 2)
    assert fused_adamw.constants([6 * 1024 + 4], (0.9, 0.98), 1e-8, (0.9, 0.0))["BLOCKS"] == 3
    test_fifty_updates_are_torchs((0.98, 2.0), (0.9, 0.98))
    rng = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(6 * 1024 + 4, generator=rng))
    theirs = nn.Parameter(ours.detach().double())
    ours.grad = torch.randn(ours.shape, generator=rng)
    theirs.grad = ours.grad.double()
    AdamW([ours], **RULE, weight_decay=1.0, grokfast=NOTHING_ADDED).step()
    torch.optim.AdamW([theirs], **RULE, weight_decay=1.0).step()
    assert error(ours, theirs) < RELATIVE


def test_without_the_filter_pytorchs_own_update_is_taken(monkeypatch):
    from workbench.kernels import fused_adamw

    launched = []
    real = fused_adamw.adamw
    monkeypatch.setattr(fused_adamw, "adamw", lambda *given: launched.append(given) or real(*given))
    for grokfast, count in ((None, 0), (NOTHING_ADDED, 1)):
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        AdamW([weight], **RULE, weight_decay=1.0, grokfast=grokfast).step()
        assert len(launched) == count


@pytest.mark.parametrize("grokfast", [None, NOTHING_ADDED])
def test_gradients_and_parameters_may_lie_in_any_order(grokfast):
    rng = torch.Generator().manual_seed(0)
    for make in (lambda: torch.randn(6, 4, generator=rng), lambda: torch.randn(4, 6, generator=rng).T):
        one = nn.Parameter(make())
        other = nn.Parameter(one.detach().double())
        one.grad = torch.randn(4, 6, generator=rng).T
        other.grad = one.grad.double()
        AdamW([one], **RULE, weight_decay=1.0, grokfast=grokfast).step()
        torch.optim.AdamW([other], **RULE, weight_decay=1.0).step()
        assert error(one, other) < RELATIVE


def test_what_is_remembered_is_torchs_and_either_goes_on_from_the_others():
    rng = torch.Generator().manual_seed(0)
    ours = parameters(rng)
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    first = AdamW(ours, **RULE, weight_decay=1.0, grokfast=NOTHING_ADDED)
    second = torch.optim.AdamW(theirs, **RULE, weight_decay=1.0, fused=True)
    for weight, twin in zip(ours, theirs, strict=True):
        weight.grad = torch.randn(weight.shape, generator=rng)
        twin.grad = weight.grad.clone()
    first.step()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for weight, twin in zip(ours, theirs, strict=True):
            twin.copy_(weight)
    first.step()
    second.step()
    for weight, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weight, twin)
