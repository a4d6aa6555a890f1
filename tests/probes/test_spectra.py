import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.spectra import (
    check_frequencies,
    exclude,
    fourier_basis,
    gini,
    logit_spectrum,
    mean_by_sum,
    neuron_spectrum,
    norm_by_frequency,
    restrict,
    row_frequency,
    spectrum,
)
from workbench.runtime import WorkbenchError

orders = st.integers(3, 40)


def wave(order, k, *terms):
    """cos(w_k times a sum of the terms), over all x, y and z, of which terms pick: wave(p, 2, "x", "y", "-z")."""
    axes = dict(zip("xyz", torch.meshgrid(*[torch.arange(order).double()] * 3, indexing="ij"), strict=True))
    total = sum((-1 if term.startswith("-") else 1) * axes[term[-1]] for term in terms)
    return (2 * math.pi * k / order * total).cos()


@given(orders)
def test_basis_is_orthonormal(order):
    basis = fourier_basis(order)
    torch.testing.assert_close(basis @ basis.T, torch.eye(order, dtype=torch.float64))


def test_rows_by_hand():
    half = 0.5**0.5
    expected = torch.tensor([[0.5, 0.5, 0.5, 0.5], [half, 0, -half, 0], [0, half, 0, -half], [0.5, -0.5, 0.5, -0.5]])
    torch.testing.assert_close(fourier_basis(4), expected.double())
    assert row_frequency(4).tolist() == [0, 1, 1, 2]
    assert row_frequency(5).tolist() == [0, 1, 1, 2, 2]


@given(orders, st.integers(1, 20))
def test_spectrum_of_one_frequency_is_there_alone(order, k):
    k = min(k, order // 2)
    angle = 2 * math.pi * k / order * torch.arange(order)
    norms = norm_by_frequency(spectrum(torch.stack([angle.cos(), angle.sin()], 1).float()))
    assert len(norms) == order // 2
    assert int(norms.argmax()) + 1 == k
    assert norms.sum() - norms.max() < 1e-4 * norms.max()


def test_neurons_by_hand():
    order = 13
    w1x, w2y = wave(order, 1, "x")[..., 0], wave(order, 2, "y")[..., 0]
    product = wave(order, 3, "x")[..., 0] * wave(order, 3, "y")[..., 0]
    neurons = torch.stack([2 * w1x + w2y, product + 5, torch.full_like(product, 7.0), 0.01 * product], 2).float()
    found = neuron_spectrum(neurons)
    assert found.frequency[:2].tolist() == [1, 3]
    # Variances 4 and 1: the best of two frequencies explains 4 / 5.
    assert found.explained[:2].tolist() == pytest.approx([0.8, 1.0], abs=1e-4)
    # A constant neuron has no variance to explain; the last one follows 3, but is too weak to count as live.
    assert found.live.tolist() == [True, True, False, False]
    assert found.share_explained == 0.5
    assert found.share_explained_of_all == 0.5
    assert found.owners() == {1: 1, 3: 1}


def test_a_product_of_two_frequencies_is_owned_by_none():
    mixed = wave(13, 2, "x")[..., 0] * wave(13, 5, "y")[..., 0]
    found = neuron_spectrum(mixed[..., None].float())
    assert found.explained.item() == pytest.approx(0.0, abs=1e-5)
    assert found.owners() == {}
    assert found.key_frequencies() == ()


def test_key_frequencies_own_two_in_a_hundred():
    order = 11
    one, other = (wave(order, k, "x")[..., :1].expand(-1, -1, n) for k, n in ((4, 98), (5, 2)))
    assert neuron_spectrum(torch.cat([one, other], 2).float()).key_frequencies() == (4, 5)
    more = torch.cat([one, one[..., :3], other], 2).float()
    assert neuron_spectrum(more).key_frequencies() == (4,)
    # Two dead neurons count for the share of all, not for the live ones'.
    dead = neuron_spectrum(torch.cat([one[..., :6], 0 * one[..., :2]], 2).float())
    assert (dead.share_explained, dead.share_explained_of_all) == (1.0, 0.75)


def test_dead_layer_explains_nothing():
    found = neuron_spectrum(torch.zeros(5, 5, 3))
    assert found.live.tolist() == [False, False, False]
    assert found.share_explained == 0.0
    assert found.key_frequencies() == ()


@pytest.mark.parametrize("order", [11, 12])
def test_logits_by_hand(order):
    alternating = order // 2
    logits = 3 * wave(order, 2, "x", "y", "-z") + wave(order, alternating, "x", "y", "-z")
    # The same for every answer: no part of the centred logits.
    logits = logits + 9 * wave(order, 1, "x")
    found = logit_spectrum(logits)
    assert found.coefficient[1] == pytest.approx(3.0)
    assert found.coefficient[alternating - 1] == pytest.approx(1.0)
    # Mean squares of the two cosines: 1/2 each, but 1 for the one that alternates at even order.
    small = 1.0 if order == 12 else 0.5
    assert found.explained[1] == pytest.approx(4.5 / (4.5 + small))
    assert found.share_explained([2, alternating]) == pytest.approx(1.0)
    assert found.key_frequencies() == (2, alternating)


def test_logits_of_the_difference_are_not_explained():
    # Mutant: a model that subtracts, read as one that adds.
    found = logit_spectrum(wave(13, 3, "x", "-y", "-z"))
    assert found.explained.max() < 1e-12
    assert found.key_frequencies() == ()


@given(orders, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_restricted_and_excluded_make_the_whole(order, vocab, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(order, order, vocab, generator=rng, dtype=torch.float64)
    chosen = [k for k in range(1, order // 2 + 1) if torch.rand((), generator=rng) < 0.5]
    mean = logits.mean((0, 1))
    torch.testing.assert_close(restrict(logits, chosen) + exclude(logits, chosen), logits + mean)
    # What is kept has nothing left once it is removed, and both keep the mean.
    torch.testing.assert_close(exclude(restrict(logits, chosen), chosen), mean.expand_as(logits))
    torch.testing.assert_close(restrict(logits, chosen).mean((0, 1)), mean)


def test_restriction_keeps_the_sum_of_its_frequency_alone():
    order = 11
    kept = 2 * wave(order, 4, "x", "y", "-z") + 5
    others = wave(order, 3, "x", "y", "-z") + wave(order, 4, "x", "-y") + wave(order, 4, "x", "z")
    torch.testing.assert_close(restrict(kept + others, [4]), kept)
    torch.testing.assert_close(exclude(kept + others, [4]), others + 5)
    torch.testing.assert_close(restrict(kept + others, []), torch.full_like(kept, 5.0))


def test_mean_by_sum_by_hand():
    values = torch.tensor([[1.0, 2.0], [4.0, 3.0]])[..., None]
    assert mean_by_sum(values)[:, 0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("sizes", "expected"), [([0, 0, 5, 0], 0.75), ([2, 2, 2], 0.0), ([1, 3], 0.25), ([3, 1], 0.25), ([0, 0], 0.0)]
)
def test_gini_by_hand(sizes, expected):
    assert gini(torch.tensor(sizes, dtype=torch.float32)) == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [[0], [6], [2, 2], [-1]])
def test_frequencies_outside_the_basis_are_refused(wrong):
    with pytest.raises(WorkbenchError, match=r"Frequencies go from 1 to 5, each once; got \["):
        check_frequencies(wrong, 11)
    check_frequencies([], 11)
    check_frequencies([1, 5], 11)
