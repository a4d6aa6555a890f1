"""Frequencies of a model of modular arithmetic, after Nanda et al. 2023 (arXiv 2301.05217).

A network that adds modulo p turns each operand into angles w_k a and w_k b, for a few key frequencies
w_k = 2 pi k / p, and finds the answer c where all cos(w_k (a + b - c)) are 1 at once. So in the Fourier basis it is
sparse, and what it uses can be measured and taken away:

1. the embedding's norm along each frequency;
2. for each neuron, the share of its variance over all pairs that lies in
   {1, cos w_k a, sin w_k a} x {1, cos w_k b, sin w_k b}, for the best k; the frequencies that own neurons are key;
3. the share of the logits that cos(w_k (a + b - c)) of the key frequencies explain;
4. the loss when of the logits' dependence on the pair only cos and sin(w_k (a + b)) of the key frequencies are kept
   (restricted), and when those are taken out (excluded).

`probes/modular.py` lays out the pairs so that all of this reads the same for subtraction, multiplication and division.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.clock_pizza import distance_irrelevance, gradient_symmetricity
from probes.modular import (
    PairGrid,
    cell_losses,
    embeddings,
    neuron_logit_map,
    observe,
    pair_grid,
    sum_squared_weights,
)
from probes.spectra import (
    EXPLAINED,
    OWNED,
    LogitSpectrum,
    NeuronSpectrum,
    check_frequencies,
    exclude,
    gini,
    logit_spectrum,
    neuron_spectrum,
    norm_by_frequency,
    restrict,
    spectrum,
)
from workbench.instrument.sites import Instrumented
from workbench.intervals import Estimate, paired_bootstrap
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.modular import Modular


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FourierResult:
    """The Fourier analysis of one model."""

    operation: str
    order: int
    """Size of the group: p for addition and subtraction, p - 1 for multiplication and division."""
    key_frequencies: tuple[int, ...]
    embedding_norm: Float[Tensor, " frequency"]
    """Norm of the embedding matrix along each frequency, from 1."""
    neurons: NeuronSpectrum | None
    """None for a model without MLP."""
    logits: LogitSpectrum
    losses: Mapping[str, Estimate]
    """On the test split: `loss`, `loss_without_other_frequencies`, `loss_without_key_frequencies`."""
    gradient_symmetricity: float
    distance_irrelevance: float
    gini_W_E: float
    gini_W_L: float | None
    """None where the weights are not ours to read, or there is no MLP."""
    sum_squared_weights: float | None
    n: int
    """Pairs of the test split that the losses are means over."""
    shuffle_seed: int | None
    """Seed of the control's random relabelling of residues; None for the analysis itself."""
    provenance: Provenance

    @property
    def logits_explained(self) -> float:
        """Share of the centred logits that the key frequencies explain."""
        return self.logits.share_explained(self.key_frequencies)

    def neurons_of(self, frequency: int) -> list[int]:
        """Live neurons that a frequency owns, best explained first."""
        if self.neurons is None:
            return []
        mine = self.neurons.live & (self.neurons.explained > OWNED) & (self.neurons.frequency == frequency)
        order = self.neurons.explained.argsort(descending=True)
        return order[mine[order]].tolist()

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object; shares are fractions, null where the model has no such part."""
        return {
            "key_frequencies": list(self.key_frequencies),
            "neurons_explained": None if self.neurons is None else self.neurons.share_explained,
            "neurons_explained_of_all": None if self.neurons is None else self.neurons.share_explained_of_all,
            "live_neurons": None if self.neurons is None else int(self.neurons.live.sum()),
            "logits_explained": self.logits_explained,
            **{name: estimate.mean for name, estimate in self.losses.items()},
            "gradient_symmetricity": self.gradient_symmetricity,
            "distance_irrelevance": self.distance_irrelevance,
            "gini_W_E": self.gini_W_E,
            "gini_W_L": self.gini_W_L,
            "sum_squared_weights": self.sum_squared_weights,
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in self.losses.items()},
            "n": self.n,
            "operation": self.operation,
            "shuffle_seed": self.shuffle_seed,
        }

    def tables(self) -> Sequence[Table]:
        """Spectra of embedding and logits, losses under ablation, the numbers, and what each frequency owns."""
        tables = [self._spectrum_table(), self._logit_table(), self._loss_table(), self._summary_table()]
        return tables if self.neurons is None else [*tables, self._owner_table(), self._explained_table()]

    def _spectrum_table(self) -> Table:
        frame = pd.DataFrame(
            {"frequency": range(1, len(self.embedding_norm) + 1), "norm": self.embedding_norm.tolist()}
        )
        return Table(
            name="embedding_spectrum",
            frame=frame,
            kind="bar",
            axes={"x": "frequency", "y": "norm"},
            unit="norm",
            caption=f"Norm of the embedding along each frequency. Key frequencies: {self._key_text}.",
        )

    def _logit_table(self) -> Table:
        frame = pd.DataFrame(
            {
                "frequency": range(1, len(self.logits.coefficient) + 1),
                "coefficient": self.logits.coefficient.tolist(),
                "explained": self.logits.explained.tolist(),
            }
        )
        return Table(
            name="logit_spectrum",
            frame=frame,
            kind="bar",
            axes={"x": "frequency", "y": "coefficient"},
            unit="logits",
            caption=f"Coefficient of cos(w(a+b-c)) in the logits; the key frequencies ({self._key_text}) explain "
            f"{self.logits_explained:.3f} of the centred logits' variance over all {self.order**2} pairs.",
        )

    def _loss_table(self) -> Table:
        frame = pd.DataFrame(
            [
                {"logits": LOSS_LABELS[name], "loss": value.mean, "low": value.low, "high": value.high}
                for name, value in self.losses.items()
            ]
        )
        return Table(
            name="frequency_ablation",
            frame=frame,
            kind="bar",
            axes={"x": "logits", "y": "loss", "low": "low", "high": "high"},
            unit="nats",
            caption=f"Test loss with frequencies removed from the logits (key: {self._key_text}); n = {self.n} pairs, "
            f"95 % bootstrap interval. Guessing costs ln {self.order} = {math.log(self.order):.3f}.",
            log_y=True,
        )

    def _summary_table(self) -> Table:
        skipped = ("intervals", "key_frequencies")
        rows = [{"measure": name, "value": value} for name, value in self.summary().items() if name not in skipped]
        return Table(
            name="fourier_summary",
            frame=pd.DataFrame(rows, dtype=object),
            kind="table",
            axes={},
            unit="",
            caption=f"Fourier analysis of {self.operation}; key frequencies {self._key_text}.",
        )

    def _owner_table(self) -> Table:
        assert self.neurons is not None
        owners = self.neurons.owners()
        frame = pd.DataFrame({"frequency": list(owners), "neurons": list(owners.values())})
        return Table(
            name="neuron_frequencies",
            frame=frame,
            kind="bar",
            axes={"x": "frequency", "y": "neurons"},
            unit="neurons",
            caption=f"Live neurons (n = {int(self.neurons.live.sum())}) by the frequency that explains more than "
            f"{OWNED:.0%} of their variance.",
        )

    def _explained_table(self) -> Table:
        assert self.neurons is not None
        bins = 20
        live = self.neurons.explained[self.neurons.live].double()
        counts = torch.histc(live, bins=bins, min=0, max=1).int().tolist()
        frame = pd.DataFrame({"explained": [(i + 0.5) / bins for i in range(bins)], "neurons": counts})
        return Table(
            name="neurons_explained",
            frame=frame,
            kind="bar",
            axes={"x": "explained", "y": "neurons"},
            unit="neurons",
            caption=f"Share of each live neuron's variance that its best frequency explains (n = {len(live)}); "
            f"{self.neurons.share_explained:.3f} of them lie above {EXPLAINED}.",
        )

    @property
    def _key_text(self) -> str:
        return ", ".join(map(str, self.key_frequencies)) or "none"


LOSS_LABELS = {
    "loss": "whole",
    "loss_without_other_frequencies": "key frequencies only",
    "loss_without_key_frequencies": "key frequencies removed",
}


def fourier(
    model: Instrumented,
    task: Modular,
    *,
    key_frequencies: Sequence[int] | None = None,
    shuffle_seed: int | None = None,
) -> FourierResult:
    """What a model of modular arithmetic computes, in the Fourier basis of its operation.

    Args:
        model: the model; neurons are those of its last layer.
        task: its task, whose splits the losses are taken on.
        key_frequencies: the key set, where it comes from another checkpoint; None finds it here, from the neurons, or
            from the logits of a model that has none.
        shuffle_seed: relabel the residues at random, as a control.

    Raises:
        WorkbenchError: the operation has no Fourier basis, or a frequency is outside of it.
    """
    grid = pair_grid(task, shuffle_seed=shuffle_seed)
    seen = observe(model, grid)
    neurons = None if seen.neurons is None else neuron_spectrum(seen.neurons)
    logits = logit_spectrum(seen.logits[..., grid.residue])
    if key_frequencies is None:
        key_frequencies = (logits if neurons is None else neurons).key_frequencies()
    check_frequencies(key_frequencies, grid.order)
    embedded, neuron_logits = spectrum(embeddings(model, grid)), neuron_logit_map(model, grid)
    test = grid.cells("test")
    return FourierResult(
        operation=task.operation,
        order=grid.order,
        key_frequencies=tuple(key_frequencies),
        embedding_norm=norm_by_frequency(embedded),
        neurons=neurons,
        logits=logits,
        losses=_test_losses(seen.logits, grid, key_frequencies, test),
        gradient_symmetricity=gradient_symmetricity(model, grid),
        distance_irrelevance=distance_irrelevance(seen.logits, grid),
        gini_W_E=gini(embedded[1:]),
        gini_W_L=None if neuron_logits is None else gini(spectrum(neuron_logits)[1:]),
        sum_squared_weights=sum_squared_weights(model),
        n=len(test),
        shuffle_seed=shuffle_seed,
        provenance=model.provenance,
    )


def ablate_frequencies(model: Instrumented, task: Modular, frequencies: Sequence[int]) -> dict[str, float]:
    """Losses of both splits, whole and with these frequencies of a + b removed from the logits."""
    grid = pair_grid(task)
    check_frequencies(frequencies, grid.order)
    whole = observe(model, grid).logits
    variants = {"": whole, "_ablated": exclude(whole, frequencies)}
    return {
        f"{split}_loss{suffix}": float(cell_losses(logits, grid, grid.cells(split)).mean())
        for suffix, logits in variants.items()
        for split in ("train", "test")
    }


def neuron_grid(model: Instrumented, task: Modular, neuron: int) -> Table:
    """Activation of one neuron of the last layer on every pair, operands in the order of their exponents.

    Raises:
        WorkbenchError: the model has no such neuron.
    """
    grid = pair_grid(task)
    seen = observe(model, grid)
    n_neurons = 0 if seen.neurons is None else seen.neurons.shape[2]
    if seen.neurons is None or not 0 <= neuron < n_neurons:
        raise WorkbenchError(f"No neuron {neuron}: the last layer has {n_neurons}, counted from 0.")
    columns = {name: [str(value) for value in grid.batch.latents[name].value.tolist()] for name in ("a", "b")}
    ordered = "" if grid.order == task.p else " Operands are in the order of their discrete logarithms."
    return Table(
        name=f"neuron_{neuron}",
        frame=pd.DataFrame({**columns, "activation": seen.neurons[..., neuron].flatten().tolist()}),
        kind="heatmap",
        axes={"x": "b", "y": "a", "value": "activation"},
        unit="activation",
        caption=f"Neuron {neuron} of the last layer on all {grid.order**2} pairs.{ordered}",
    )


def _test_losses(
    whole: Float[Tensor, "order order vocab"],
    grid: PairGrid,
    key_frequencies: Sequence[int],
    test: Int[Tensor, " example"],
) -> dict[str, Estimate]:
    """Loss of the test pairs: whole, with only the key frequencies, and without them."""
    variants = (whole, restrict(whole, key_frequencies), exclude(whole, key_frequencies))
    values = torch.stack([cell_losses(logits, grid, test) for logits in variants], 1)
    low, high = paired_bootstrap(values)
    columns = zip(LOSS_LABELS, values.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: Estimate(mean=mean, low=lower, high=upper) for name, mean, lower, upper in columns}
