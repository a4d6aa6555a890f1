"""What the page Graft asks: donors and their base, a graft with its judgement, and what a typed prompt is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import streamlit as st
import torch

from apps.grafting import delta_of, examples_of, graft_of, labelled, learn_regions
from apps.ui import state
from circuits.graft_judgement import GraftJudgement, over_densities, overlaps
from circuits.graft_masks import Labelled
from circuits.grafting import Graft
from workbench.tables import Table
from workbench.tasks.skills import ANSWERS, Skills
from workbench.training.checkpoints import Run

SPINNER = "Finding the graft and its controls …"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Which graft; the hashes stand for the weights."""

    donor: str
    donor_sha256: str
    base_sha256: str
    method: str
    density: float
    foreign: str | None


def is_donor(run: Run) -> bool:
    """Whether a run was taught one skill of a base."""
    return isinstance(run.task, Skills) and run.recipe.start is not None and bool(run.checkpoints)


def base_of(run: Run) -> Run:
    """The run that a donor began with."""
    assert run.recipe.start is not None
    return state.open_run(run.recipe.start.run)


def siblings(run: Run) -> list[str]:
    """Donors of the same base that learnt another skill."""
    return state.references_where(
        lambda other: is_donor(other) and other.recipe.start == run.recipe.start and other.task != run.task
    )


@st.cache_resource(max_entries=32, show_spinner=SPINNER)
def judgement_of(asked: Asked) -> GraftJudgement:
    """The graft and everything that it is compared with."""
    donor = state.open_run(asked.donor)
    foreign = None if asked.foreign is None else state.open_run(asked.foreign)
    return graft_of(base_of(donor), donor, method=asked.method, density=asked.density, foreign=foreign)


@st.cache_resource(max_entries=8, show_spinner="Finding grafts of every size …")
def sizes_of(donor: str, donor_sha256: str, base_sha256: str) -> Table:
    """Relative gain by density, of learned regions and what they have to beat."""
    run = state.open_run(donor)
    base = base_of(run)
    train, test = (examples_of(base, run, split) for split in ("train", "test"))
    return over_densities(delta_of(base, run), train, test)


@st.cache_resource(max_entries=8, show_spinner="Finding the other donors' grafts …")
def overlaps_of(asked: Asked) -> Table:
    """How far this donor's region and those of its siblings coincide."""
    run = state.open_run(asked.donor)
    donors = {reference: state.open_run(reference) for reference in (asked.donor, *siblings(run))}
    return overlaps(learn_regions(base_of(run), donors, method=asked.method, density=asked.density))


def examples_to_judge(run: Run) -> Labelled:
    """The donor's test split."""
    return examples_of(base_of(run), run, "test")


def without(graft: Graft, name: str, examples: Labelled) -> Mapping[str, float]:
    """Accuracy of the graft, and of the donor, when one tensor is left to the base."""
    one = {key: torch.full_like(mask, key != name) for key, mask in graft.mask.items()}
    weights = {"graft": graft.without([name]).weights(), "donor": graft.delta.weights(one)}
    return {who: examples.accuracy(each) for who, each in weights.items()}


def answers(run: Run, graft: Graft, text: str) -> pd.DataFrame:
    """What base, graft and donor say to a typed prompt, with their probability of yes."""
    batch = run.task.prompt(text)
    asked, delta = labelled(base_of(run), batch), graft.delta
    rows = {"base": delta.base, "graft": graft.weights(), "donor": delta.uniform(1.0)}
    said = {who: asked.logits(weights)[0].softmax(0) for who, weights in rows.items()}
    right = ANSWERS[int(batch.targets[batch.read][0])]
    return pd.DataFrame(
        [{"": who, "answer": ANSWERS[int(each.argmax())], "P(yes)": float(each[1]), "right": right}
         for who, each in said.items()]
    ).set_index("")  # fmt: skip
