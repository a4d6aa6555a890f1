"""What the page Graft asks: donors and their base, a graft with its judgement, and what a typed prompt is answered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st
import torch

from apps.analyses import PAIRS, SEED
from apps.graft_pairs import Pair, delta_of, examples_of, is_sibling, pair_of_runs, pair_of_texts
from apps.grafting import REAL_STEPS, graft_in, kept_graft, learn_regions
from apps.ui import state
from circuits.graft_edges import graft_edges
from circuits.graft_judgement import GraftJudgement, over_densities, overlaps
from circuits.grafting import Graft
from workbench.runtime import WorkbenchError
from workbench.tables import Table
from workbench.training.checkpoints import Run
from workbench.training.text_donors import TextDonor, donor_names, load_donor

SPINNER = "Finding the graft and its controls …"
QUICK = 256
"""Test examples of a real model that a click is answered on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Which graft; the hashes stand for the weights."""

    donor: str
    donor_sha256: str
    base_sha256: str
    method: str
    density: float
    foreign: str | None


def base_of(run: Run) -> Run:
    """The run that a donor began with."""
    assert run.recipe.start is not None
    return state.open_run(run.recipe.start.run)


def pair_of(reference: str) -> Pair:
    """A donor, of a run or of a real model, with its base.

    Raises:
        WorkbenchError: there is none, or its base is not there any more.
    """
    if reference in donor_names():
        donor = load_donor(reference)
        return pair_of_texts(donor.recipe.base, donor)
    run = state.open_run(reference)
    return pair_of_runs(base_of(run), run)


def siblings(run: Run) -> list[str]:
    """Donors of the same base that learnt another skill."""
    return state.references_where(lambda other: is_sibling(other, run))


def real_siblings(donor: TextDonor) -> list[str]:
    """Donors of the same real model that learnt another task."""
    found = []
    for name in donor_names():
        with contextlib.suppress(WorkbenchError):
            other = load_donor(name).recipe
            if other.base_sha256 == donor.recipe.base_sha256 and other.task != donor.recipe.task:
                found.append(name)
    return found


@st.cache_resource(max_entries=32, show_spinner=SPINNER)
def judgement_of(asked: Asked) -> GraftJudgement:
    """The graft and everything that it is compared with."""
    return graft_in(pair_of(asked.donor), **_options(asked))


def kept_judgement_of(asked: Asked) -> GraftJudgement | None:
    """The same of a real model, where a job has kept it."""
    read = kept_graft(pair_of(asked.donor), steps=REAL_STEPS, **_options(asked))
    return None if read is None else _read(asked, read)


def command_of(asked: Asked, base: str) -> tuple[str, ...]:
    """The command whose result `kept_judgement_of` reads."""
    foreign = () if asked.foreign is None else ("--foreign", asked.foreign)
    return (
        *("graft", base, asked.donor, "--method", asked.method, "--density", str(asked.density)),
        *("--steps", str(REAL_STEPS), *foreign, "--json"),
    )


@st.cache_resource(max_entries=32, show_spinner="Scoring the edges …")
def edges_of(asked: Asked) -> Table:
    """The edges of the circuit that the graft changes most."""
    run = state.open_run(asked.donor)
    batch = run.task.sample(PAIRS, split="test", seed=SEED)
    return graft_edges(base_of(run).model(), judgement_of(asked).graft, batch).table()


@st.cache_resource(max_entries=8, show_spinner="Finding grafts of every size …")
def sizes_of(donor: str, donor_sha256: str, base_sha256: str) -> Table:
    """Relative gain by density, of learned regions and what they have to beat."""
    run = state.open_run(donor)
    base = base_of(run)
    train, test = (examples_of(base, run, split) for split in ("train", "test"))
    return over_densities(delta_of(base, run), train, test)


@st.cache_resource(max_entries=8, show_spinner="Finding the other donors' grafts …")
def overlaps_of(asked: Asked, others: Sequence[str]) -> Table:
    """How far this donor's region and those of its siblings coincide."""
    donors = {reference: state.open_run(reference) for reference in (asked.donor, *others)}
    return overlaps(learn_regions(base_of(donors[asked.donor]), donors, method=asked.method, density=asked.density))


def without(pair: Pair, graft: Graft, name: str) -> Mapping[str, float]:
    """Accuracy of the graft and of the donor when one tensor is left to the base, and on how many test examples."""
    examples = pair.examples("test", QUICK if pair.is_real else None)
    one = {key: torch.full_like(mask, key != name) for key, mask in graft.mask.items()}
    weights = {"graft": graft.without([name]).weights(), "donor": graft.delta.weights(one)}
    return {**{who: examples.accuracy(each) for who, each in weights.items()}, "n": len(examples)}


def answers(pair: Pair, graft: Graft, text: str) -> pd.DataFrame:
    """What base, graft and donor say to a typed prompt, with the probability of each label.

    Raises:
        WorkbenchError: the prompt is empty, or not one of the task.
    """
    asked, delta = pair.typed(text), graft.delta
    rows = {"base": delta.base, "graft": graft.weights(), "donor": delta.uniform(1.0)}
    said = {who: asked.logits(weights)[0].softmax(0) for who, weights in rows.items()}
    right = {} if pair.is_real else {"right": pair.labels[int(asked.answers[0])]}
    return pd.DataFrame(
        [
            {
                "": who,
                "answer": pair.labels[int(each.argmax())],
                **{f"P({label})": float(share) for label, share in zip(pair.labels, each, strict=True)},
                **right,
            }
            for who, each in said.items()
        ]
    ).set_index("")


@st.cache_resource(max_entries=4, show_spinner="Reading the graft …")
def _read(asked: Asked, _read_kept: Callable[[], GraftJudgement]) -> GraftJudgement:
    # What is asked names the donor's and the base's weights: the same question has the same answer.
    return _read_kept()


def _options(asked: Asked) -> dict[str, Any]:
    foreign = None if asked.foreign is None else pair_of(asked.foreign)
    return {"method": asked.method, "density": asked.density, "foreign": foreign}
