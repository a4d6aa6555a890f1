"""States at cells, and lines through them: what a linear classifier can tell from the activations of one place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.runtime import WorkbenchError

MAX_ITERATIONS = 1000

Cell = tuple[Site, int]
"""A site and a position."""


@runtime_checkable
class Line(Protocol):
    """A linear classifier that was fitted; scikit-learn, whose pipeline it is, takes a second to import."""

    def predict(self, X: NDArray[np.float64]) -> NDArray[np.int64]:
        """The class of each row."""
        ...

    def predict_proba(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability of each class, by row."""
        ...


def read_cells(
    model: Instrumented,
    tokens: Int[Tensor, "batch pos"],
    *,
    sites: str | Iterable[str | Site],
    positions: Sequence[int] | None,
) -> Mapping[Cell, Float[Tensor, "batch feature"]]:
    """Activations of each site and position, flat.

    Raises:
        WorkbenchError: a site that has no positions, or a position that the prompts do not have.
    """
    chosen, n_positions = select_sites(sites, model), tokens.shape[1]
    if without := [str(site) for site in chosen if "pos" not in site.kind.dims]:
        raise WorkbenchError(
            f"A probe reads one position, and {', '.join(without)} has source and destination. Probe z or attn_out."
        )
    wanted = range(n_positions) if positions is None else positions
    if wrong := [position for position in wanted if not 0 <= position < n_positions]:
        raise WorkbenchError(f"No position {wrong[0]}: prompts have positions 0 to {n_positions - 1}.")
    trace = run(model, tokens, record=chosen)
    return {
        (site, position): trace[site][:, position].reshape(len(tokens), -1).cpu()
        for site in chosen
        for position in wanted
    }


def fit_line(features: Float[Tensor, "batch feature"], labels: Int[Tensor, " batch"]) -> Line:
    """A logistic regression on features of mean 0 and variance 1; labels of at least two classes."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    line = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        # One that is not done after so many steps is still a line, and is scored on what it never saw.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Classes may be many for the prompts there are: these are names, not numbers to regress on.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return cast(Line, line.fit(features.double().numpy(), labels.numpy()))


def told_by_line(
    line: Line, features: Float[Tensor, "batch feature"], labels: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Which prompts' class the line tells."""
    predicted: NDArray[np.int64] = line.predict(features.double().numpy())
    return torch.from_numpy(predicted) == labels
