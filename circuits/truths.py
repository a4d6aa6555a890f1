"""Models whose circuits are known, as a frozen set, and which of their edges are true.

Two truths, and they differ. *Structural* are the edges through which the model computes, as it was wired, trained or
compiled; under zero ablation also those that carry only constants, which zeros take away too. *Causal* are the edges
that change an answer when they are ablated alone: found by trying each. Structural edges that stand in for each other
(an OR gate), or that carry the same in prompt and counterfactual (positions), are not causal; and in a trained model
nearly every edge changes an answer a little, whatever it was trained to hold.

A version of the set never changes: a change of circuits, weights, truths or prompts is another version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.experiment import Experiment, experiment
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from workbench.models.known import ABLATIONS, Ablation, KnownCircuit
from workbench.models.planted import PLANTED
from workbench.models.tracr import load_tracr
from workbench.runtime import WorkbenchError, nearest
from workbench.store import digest
from workbench.tasks.base import Batch

SET_VERSION = "1"
SET_N, SET_SEED = 32, 0
"""Pairs of each circuit, and the seed that draws them."""
SET_DIGEST = "95eb3f997834dccd8007972554b7064b393e8285c358bb6446ce0008a58ba966"
"""What `set_digest` gives for the whole set."""
SET = (
    "copy",
    "induction",
    "and_gate",
    "or_gate",
    "modular_addition",
    "trained_xor",
    "trained_two_hop",
    "tracr-count",
    "tracr-count_less_freq",
    "tracr-detect",
    "tracr-frac_prevs",
    "tracr-hist",
    "tracr-length",
    "tracr-pair_balance",
    "tracr-reverse",
    "tracr-shift_by",
    "tracr-shuffle_dyck1",
    "tracr-shuffle_dyck2",
    "tracr-sort",
    "tracr-sort_freq",
    "tracr-sort_unique",
)
"""Wired by hand, trained to hold a program, compiled from a program."""
CHANGE = 1e-3
"""An answer changes if the metric of some example moves by more than this share of the mean headroom."""
GRAIN = 2.0**-12
"""Weights count as equal that round to the same multiple: processors differ in the last digits of a cosine."""
Truth = Literal["structural", "causal"]
TRUTHS: tuple[Truth, ...] = get_args(Truth)


def load_known(name: str) -> KnownCircuit:
    """A circuit of the set by name.

    Raises:
        WorkbenchError: the set has none of that name.
    """
    if name not in SET:
        raise WorkbenchError(f"Version {SET_VERSION} of the known circuits has no {name!r}. {nearest(name, SET)}")
    return PLANTED[name]() if name in PLANTED else load_tracr(name.removeprefix("tracr-"))


def ablations_of(known: KnownCircuit) -> list[Ablation]:
    """The ablations that the circuit's truth is meant for."""
    return [ablation for ablation in ABLATIONS if ablation in known.ablations]


def experiment_on(known: KnownCircuit, batch: Batch, ablation: Ablation) -> Experiment:
    """Its model on the graph that its edges are named in, judged by its metric."""
    graph = circuit_graph(known.model, split_inputs=True, clusters=known.clusters)
    return experiment(known.model, batch, graph=graph, ablation=ablation, metric=known.metric)


def truths(known: KnownCircuit, plan: Experiment) -> dict[Truth, Bool[Tensor, " edge"]]:
    """Which edges are true, by either truth."""
    constants = known.constants if plan.ablation == "zero" else frozenset[str]()
    return {"structural": plan.graph.mask(known.structural | constants), "causal": causal_edges(plan)}


def causal_edges(plan: Experiment) -> Bool[Tensor, " edge"]:
    """Edges whose ablation alone moves the metric of some example by more than `CHANGE` of the headroom.

    Each carrying edge is tried; the others carry the same in both runs, or reach nothing that is read.
    """
    tried = plan.carrying.nonzero()[:, 0]
    keep = torch.ones(len(tried), len(plan.carrying), dtype=torch.bool)
    keep[torch.arange(len(tried)), tried] = False
    moved = (circuit_values(plan, keep) - plan.full).abs().amax(1)
    found = torch.zeros_like(plan.carrying)
    found[tried] = moved > CHANGE * abs(plan.headroom)
    return found


def fingerprint(
    known: KnownCircuit, batch: Batch, found: Mapping[Ablation, Mapping[Truth, Bool[Tensor, " edge"]]]
) -> str:
    """Digest of a circuit's weights, prompts and truths."""
    parts: dict[str, object] = {
        "name": known.name,
        "metric": known.metric,
        "weights": {name: _rounded(tensor) for name, tensor in sorted(known.model.state_dict().items())},
        "tokens": batch.tokens.tolist(),
        "corrupt": None if batch.corrupt is None else batch.corrupt.tolist(),
        "read": batch.read.tolist(),
        "truths": {
            f"{truth}, {ablation}": marked.nonzero()[:, 0].tolist()
            for ablation, both in found.items()
            for truth, marked in both.items()
        },
    }
    return digest(json.dumps(parts, sort_keys=True).encode())


def set_digest(fingerprints: Mapping[str, str]) -> str:
    """Digest of several circuits, in whatever order they come."""
    return digest(json.dumps(dict(fingerprints), sort_keys=True).encode())


def _rounded(tensor: Tensor) -> str:
    """Digest of a weight in multiples of the grain."""
    return digest((tensor.double() / GRAIN).round().to(torch.int64).numpy().tobytes())
