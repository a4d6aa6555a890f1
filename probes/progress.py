"""Progress measures: what forms inside a network while its test loss still says nothing (Nanda et al. 2023, section 5).

With the key frequencies of the final network, every checkpoint is asked:

- *excluded loss*: the training loss without the key frequencies. It rises while the network goes over from what it
  memorised to the circuit;
- *restricted loss*: the test loss with nothing but the key frequencies. It falls while the circuit forms, before the
  test loss does, which waits for the memorised part to be cleaned up;
- how sparse embedding and neuron-logit map are in the Fourier basis (Gini coefficient), how many neurons and how much
  of the logits single frequencies explain, the sum of squared weights, and the measures of Clock and Pizza.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

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
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.modular import Modular

DIGITS = 5
"""Significant digits of the spectra in a row: enough to draw, and a log of many checkpoints stays small."""

CURVES = {
    "progress_loss": ("nats", ("train_loss", "test_loss", "excluded_loss", "restricted_loss")),
    "progress_explained": ("fraction", ("neurons_explained", "logits_explained")),
    "progress_gini": ("Gini coefficient", ("gini_W_E", "gini_W_L")),
    "progress_weights": ("sum of squares", ("sum_squared_weights",)),
    "progress_clock_pizza": ("measure", ("gradient_symmetricity", "distance_irrelevance")),
}
CAPTIONS = {
    "progress_loss": "Train and test loss; excluded: training loss without the key frequencies; "
    "restricted: test loss with the key frequencies alone.",
    "progress_explained": "Share of live neurons that one frequency explains, and of the logits that the key ones do.",
    "progress_gini": "Sparsity of the embedding and of the neuron-logit map in the Fourier basis.",
    "progress_weights": "Sum of all squared weights.",
    "progress_clock_pizza": "Gradient symmetricity (Pizza near 1) and distance irrelevance (Clock near 1).",
}

OnStep = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Landmarks:
    """When a measure first did what announces generalisation; None where it never did."""

    excluded_doubles: int | None
    """First step at which the excluded loss is twice its minimum, after that minimum."""
    restricted_halves: int | None
    """First step at which the restricted loss is half its peak, after that peak."""
    test_halves: int | None
    """First step at which the test loss is half its peak, after that peak."""

    def lead(self, step: int | None, *, memorised: int | None, generalised: int | None) -> float | None:
        """How far `step` precedes the halving of the test loss, in units of the way from memorising to generalising.

        None where one of the four is missing, or nothing lies between memorising and generalising.
        """
        if step is None or self.test_halves is None or memorised is None or generalised is None:
            return None
        return (self.test_halves - step) / (generalised - memorised) if generalised > memorised else None

    def summary(self, *, memorised: int | None, generalised: int | None) -> dict[str, object]:
        """The steps, and the two leads."""
        ends = {"memorised": memorised, "generalised": generalised}
        return {
            "excluded_doubles": self.excluded_doubles,
            "restricted_halves": self.restricted_halves,
            "test_halves": self.test_halves,
            "excluded_lead": self.lead(self.excluded_doubles, **ends),
            "restricted_lead": self.lead(self.restricted_halves, **ends),
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProgressMeasures:
    """The measures of each checkpoint, in the order of steps."""

    rows: Sequence[Mapping[str, Any]]
    """One mapping a checkpoint, ready for JSON: `step`, the measures by name, and the spectra `embedding_norm` and
    `logit_coefficient` by frequency from 1."""
    key_frequencies: tuple[int, ...]
    provenance: Provenance

    @property
    def landmarks(self) -> Landmarks:
        """When the measures announced generalisation."""
        return landmarks(self.rows)

    def summary(self) -> dict[str, object]:
        """Key frequencies, rows and landmarks as one JSON object."""
        return {
            "key_frequencies": list(self.key_frequencies),
            "excluded_doubles": self.landmarks.excluded_doubles,
            "restricted_halves": self.landmarks.restricted_halves,
            "test_halves": self.landmarks.test_halves,
            "rows": [dict(row) for row in self.rows],
        }

    def tables(self) -> Sequence[Table]:
        """Curves of all measures, and the embedding's spectrum through the checkpoints."""
        return [*(self._curve(name) for name in CURVES), self._spectra()]

    def _curve(self, name: str) -> Table:
        unit, measures = CURVES[name]
        wide = pd.DataFrame([{key: row[key] for key in ("step", *measures)} for row in self.rows])
        frame = wide.melt(id_vars="step", var_name="measure", value_name="value").dropna()
        return Table(
            name=name,
            frame=frame,
            kind="curve",
            axes={"x": "step", "y": "value", "series": "measure"},
            unit=unit,
            caption=f"{CAPTIONS[name]} {len(self.rows)} checkpoints; key frequencies "
            f"{', '.join(map(str, self.key_frequencies)) or 'none'}.",
            log_y=name == "progress_loss",
        )

    def _spectra(self) -> Table:
        cells = [
            {"step": row["step"], "frequency": frequency, "norm": norm}
            for row in self.rows
            for frequency, norm in enumerate(row["embedding_norm"], start=1)
        ]
        return Table(
            name="progress_embedding",
            frame=pd.DataFrame(cells),
            kind="heatmap",
            axes={"x": "step", "y": "frequency", "value": "norm"},
            unit="norm",
            caption=f"Norm of the embedding along each frequency at each of {len(self.rows)} checkpoints.",
        )


def progress(
    checkpoints: Iterable[tuple[int, Instrumented]],
    task: Modular,
    key_frequencies: Sequence[int],
    *,
    on_step: OnStep | None = None,
) -> ProgressMeasures:
    """The progress measures of every checkpoint.

    Args:
        checkpoints: step and model; drawn one at a time, so that a generator keeps one model in memory.
        task: whose splits the losses are taken on.
        key_frequencies: those of the final checkpoint, the same for all.
        on_step: told of each row.

    Raises:
        WorkbenchError: there is no checkpoint, or a frequency is outside of the operation's basis.
    """
    grid = pair_grid(task)
    check_frequencies(key_frequencies, grid.order)
    rows, parents, provenance = [], [], None
    for step, model in checkpoints:
        row = {"step": step, **_measure(model, grid, key_frequencies)}
        rows.append(row)
        provenance = model.provenance
        parents += provenance.parents
        if on_step is not None:
            on_step(row)
    if provenance is None:
        raise WorkbenchError("Progress measures need checkpoints, and this run has none. Train it first.")
    return ProgressMeasures(
        rows=rows, key_frequencies=tuple(key_frequencies), provenance=replace(provenance, parents=tuple(parents))
    )


def landmarks(rows: Sequence[Mapping[str, Any]]) -> Landmarks:
    """When the measures of some rows announced generalisation."""
    return Landmarks(
        excluded_doubles=_first_after_extreme(rows, "excluded_loss", factor=2.0),
        restricted_halves=_first_after_extreme(rows, "restricted_loss", factor=0.5),
        test_halves=_first_after_extreme(rows, "test_loss", factor=0.5),
    )


def _measure(model: Instrumented, grid: PairGrid, key_frequencies: Sequence[int]) -> dict[str, Any]:
    seen = observe(model, grid)
    train, test = grid.cells("train"), grid.cells("test")
    logits = logit_spectrum(seen.logits[..., grid.residue])
    embedded, neuron_logits = spectrum(embeddings(model, grid)), neuron_logit_map(model, grid)
    return {
        "train_loss": float(cell_losses(seen.logits, grid, train).mean()),
        "test_loss": float(cell_losses(seen.logits, grid, test).mean()),
        "excluded_loss": float(cell_losses(exclude(seen.logits, key_frequencies), grid, train).mean()),
        "restricted_loss": float(cell_losses(restrict(seen.logits, key_frequencies), grid, test).mean()),
        "gini_W_E": gini(embedded[1:]),
        "gini_W_L": None if neuron_logits is None else gini(spectrum(neuron_logits)[1:]),
        "neurons_explained": None if seen.neurons is None else neuron_spectrum(seen.neurons).share_explained,
        "logits_explained": logits.share_explained(key_frequencies),
        "sum_squared_weights": sum_squared_weights(model),
        "gradient_symmetricity": gradient_symmetricity(model, grid),
        "distance_irrelevance": distance_irrelevance(seen.logits, grid),
        "embedding_norm": _rounded(norm_by_frequency(embedded).tolist()),
        "logit_coefficient": _rounded(logits.coefficient.tolist()),
    }


def _first_after_extreme(rows: Sequence[Mapping[str, Any]], measure: str, *, factor: float) -> int | None:
    """First step from the extreme on at which the measure is `factor` times it: the minimum if it is to grow."""
    if not rows:
        return None
    values = [row[measure] for row in rows]
    extreme = min(values) if factor > 1 else max(values)
    start = values.index(extreme)
    for row, value in zip(rows[start:], values[start:], strict=True):
        if (value >= factor * extreme) if factor > 1 else (value <= factor * extreme):
            return row["step"]
    return None


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
