"""Spectra over a cyclic group: of vectors, of neurons on all pairs, of logits; and what is left without a frequency.

Everything is exact linear algebra in the orthonormal real Fourier basis of the integers modulo `order`. Shapes: `x` and
`y` are the exponents of the operands (see `probes/modular.py`), `z` that of an answer. A function of (x, y) that only
depends on x + y lives in the components cos w_k (x + y) and sin w_k (x + y); averaging over the pairs of each sum
projects onto these, so that ablations cost one small matrix product (Nanda et al. 2023, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.runtime import WorkbenchError

LIVE = 0.01
"""A neuron is live if its variance over all pairs is at least this share of the largest neuron's."""
OWNED = 0.5
"""A frequency owns a neuron if it explains more than this share of its variance; at a half, only one can."""
EXPLAINED = 0.85
"""A neuron counts as explained by one frequency above this share of its variance (Nanda et al. 2023, section 4.3)."""
KEY_SHARE = 0.02
"""A frequency is key if it owns at least this share of the live neurons."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NeuronSpectrum:
    """Which frequency each neuron follows."""

    frequency: Int[Tensor, " d_mlp"]
    """The frequency that explains most of the neuron's variance."""
    explained: Float[Tensor, " d_mlp"]
    """The share that it explains."""
    live: Bool[Tensor, " d_mlp"]

    @property
    def share_explained(self) -> float:
        """Share of live neurons that one frequency explains almost wholly."""
        return float((self.explained[self.live] > EXPLAINED).double().mean()) if self.live.any() else 0.0

    @property
    def share_explained_of_all(self) -> float:
        """The same share of all neurons, weak and dead ones too: does not depend on where live begins."""
        return float((self.explained > EXPLAINED).double().mean())

    def owners(self) -> dict[int, int]:
        """Frequency -> number of live neurons that it owns, where there are any."""
        owned = self.frequency[self.live & (self.explained > OWNED)]
        values, counts = owned.unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def key_frequencies(self) -> tuple[int, ...]:
        """Frequencies that own enough of the live neurons."""
        enough = KEY_SHARE * int(self.live.sum())
        return tuple(frequency for frequency, count in self.owners().items() if count >= enough)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LogitSpectrum:
    """How much of the logits each cos(w_k (a + b - c)) is."""

    coefficient: Float[Tensor, " frequency"]
    """Least-squares coefficient of the cosine, in logits."""
    explained: Float[Tensor, " frequency"]
    """Share of the variance of the logits, centred over the answers c of each pair."""

    def share_explained(self, frequencies: Sequence[int]) -> float:
        """Share that these frequencies explain together: their cosines are orthogonal."""
        return float(sum(self.explained[frequency - 1] for frequency in frequencies))

    def key_frequencies(self) -> tuple[int, ...]:
        """Frequencies that explain enough of the logits: what is key where there are no neurons."""
        return tuple((1 + (self.explained >= KEY_SHARE).nonzero()[:, 0]).tolist())


def fourier_basis(order: int) -> Float[Tensor, "row element"]:
    """Orthonormal real Fourier basis of the integers modulo `order`.

    Rows are the constant, then cosine and sine of each frequency from 1; an even order ends with the cosine that
    alternates, whose sine is 0.
    """
    element = torch.arange(order, dtype=torch.float64)
    rows = [torch.ones(order, dtype=torch.float64)]
    for frequency in range(1, order // 2 + 1):
        # The product modulo the order keeps the angle small, and with it the rounding.
        angle = 2 * math.pi / order * (frequency * element % order)
        rows += [angle.cos()] if 2 * frequency == order else [angle.cos(), angle.sin()]
    basis = torch.stack(rows)
    return basis / basis.norm(dim=1, keepdim=True)


def row_frequency(order: int) -> Int[Tensor, " row"]:
    """Frequency of each row of the basis; the constant has 0."""
    return (torch.arange(order) + 1) // 2


def check_frequencies(frequencies: Sequence[int], order: int) -> None:
    """Raise a WorkbenchError unless these are frequencies of the group, each once."""
    wrong = [frequency for frequency in frequencies if not 1 <= frequency <= order // 2]
    if wrong or len(set(frequencies)) < len(frequencies):
        raise WorkbenchError(f"Frequencies go from 1 to {order // 2}, each once; got {list(frequencies)}.")


def spectrum(vectors: Float[Tensor, "order width"]) -> Float[Tensor, " row"]:
    """Norm of a vector for each element along each row of the Fourier basis."""
    return (fourier_basis(len(vectors)) @ vectors.double()).norm(dim=1)


def norm_by_frequency(spectrum: Float[Tensor, " row"]) -> Float[Tensor, " frequency"]:
    """Cosine and sine of each frequency together, from frequency 1."""
    frequency = row_frequency(len(spectrum))
    squares = spectrum.new_zeros(len(spectrum) // 2 + 1).index_add(0, frequency, spectrum.square())
    return squares[1:].sqrt()


def neuron_spectrum(neurons: Float[Tensor, "order order d_mlp"]) -> NeuronSpectrum:
    """The frequency that each neuron follows over all pairs (x, y)."""
    basis = fourier_basis(len(neurons)).to(neurons.dtype)
    by_x = (basis @ neurons.flatten(1)).unflatten(1, neurons.shape[1:])
    energy = (basis @ by_x).square()
    frequency = row_frequency(len(neurons))
    variance = energy.sum((0, 1)) - energy[0, 0]
    shares = []
    for k in range(1, len(neurons) // 2 + 1):
        rows = ((frequency == k) | (frequency == 0)).nonzero()[:, 0]
        shares.append(energy[rows][:, rows].sum((0, 1)) - energy[0, 0])
    # A dead neuron's variance is 0, and of 0 nothing explains anything.
    explained, best = (torch.stack(shares) / variance.clamp(min=torch.finfo(variance.dtype).tiny)).max(0)
    live = (variance >= LIVE * variance.max()) & (variance > 0)
    return NeuronSpectrum(frequency=best + 1, explained=explained.clamp(0, 1), live=live)


def logit_spectrum(logits: Float[Tensor, "order order order"]) -> LogitSpectrum:
    """How much of the logits over (x, y, z) each cos(w_k (x + y - z)) is."""
    order = len(logits)
    basis, frequency = fourier_basis(order), row_frequency(order)
    centred = logits.double() - logits.double().mean(2, keepdim=True)
    # The cosine depends on (x, y) only through their sum, and cos(s - z) is cos cos + sin sin.
    aligned = (basis @ mean_by_sum(centred) @ basis.T).diagonal()
    coefficient = aligned.new_zeros(order // 2 + 1).index_add(0, frequency, aligned)[1:] / order
    # Squared norm of the cosine over all (x, y, z): half of the cells, but all of them where it alternates.
    squared_norm = order**3 / frequency.bincount()[1:]
    total = centred.square().sum().clamp(min=torch.finfo(centred.dtype).tiny)
    return LogitSpectrum(coefficient=coefficient, explained=coefficient.square() * squared_norm / total)


def restrict(
    logits: Float[Tensor, "order order vocab"], frequencies: Sequence[int]
) -> Float[Tensor, "order order vocab"]:
    """Logits that depend on the pair by these frequencies of x + y alone: every other component but the mean is 0."""
    kept = _component(logits, frequencies) + logits.double().mean((0, 1))
    return kept[_sums(len(logits))]


def exclude(
    logits: Float[Tensor, "order order vocab"], frequencies: Sequence[int]
) -> Float[Tensor, "order order vocab"]:
    """Logits without these frequencies of x + y; every other component, the mean too, stays."""
    return logits.double() - _component(logits, frequencies)[_sums(len(logits))]


def mean_by_sum(values: Float[Tensor, "order order vocab"]) -> Float[Tensor, "order vocab"]:
    """Mean over the pairs with each x + y."""
    order, vocab = len(values), values.shape[2]
    total = values.new_zeros(order, vocab).index_add(0, _sums(order).flatten(), values.flatten(0, 1))
    return total / order


def gini(sizes: Float[Tensor, " size"]) -> float:
    """Gini coefficient: 0 where all are alike, (n - 1) / n where one has everything (Hurley & Rickard 2009)."""
    ordered, n = sizes.double().sort().values, len(sizes)
    total = float(ordered.sum())
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float(weights @ ordered) / (n * total) if total else 0.0


def _component(logits: Float[Tensor, "order order vocab"], frequencies: Sequence[int]) -> Float[Tensor, "order vocab"]:
    """The part of the logits along these frequencies of x + y, by x + y."""
    chosen = torch.isin(row_frequency(len(logits)), torch.tensor(list(frequencies), dtype=torch.long))
    basis = fourier_basis(len(logits))[chosen]
    return basis.T @ (basis @ mean_by_sum(logits.double()))


def _sums(order: int) -> Int[Tensor, "order order"]:
    element = torch.arange(order)
    return (element[:, None] + element) % order
