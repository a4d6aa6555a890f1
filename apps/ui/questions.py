"""What the page Explore asks, a checkpoint and two prompts; answers are kept by the hash of weights and the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import streamlit as st

from apps.analyses import tuned_lens_of
from apps.ui import state
from circuits.patching import Cell, Direction, PatchMap, patch_each
from circuits.swaps import Base, Swap, swap
from probes.attention import AttentionPatterns, attention_patterns
from probes.attribution import Attribution, Granularity, direct_logit_attribution
from probes.logit_lens import Trajectory, logit_lens
from probes.places import PlaceReading, read_place
from probes.tuned_lens import TunedLens
from workbench.instrument.answers import Answers, top_answers
from workbench.instrument.passes import run as run_model
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Task

KEPT = 256
"""Results of each kind that are kept in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the page is asked: a checkpoint and two prompts. A key of caches."""

    reference: str
    step: int
    sha256: str
    clean: str
    corrupt: str

    @property
    def task(self) -> Task:
        """The run's task."""
        return state.open_run(self.reference).task

    @property
    def batch(self) -> Batch:
        """The pair, as a batch of one."""
        return paired(self.task.prompt(self.clean), self.task.prompt(self.corrupt))

    @property
    def labels(self) -> tuple[str, ...]:
        """What stands at each position, with the clean prompt's token."""
        return position_names(self.task, self.task.prompt(self.clean).tokens[0].tolist())


def paired(clean: Batch, other: Batch) -> Batch:
    """A prompt with another one as its counterfactual.

    Raises:
        WorkbenchError: the two are not answered at the same place.
    """
    if clean.read.shape == other.read.shape and (clean.read != other.read).any():
        places = [int(batch.read[0].nonzero()[0]) for batch in (clean, other)]
        raise WorkbenchError(
            f"The prompt is answered at position {places[0]} and its counterfactual at {places[1]}. "
            "Give two prompts of one length."
        )
    return replace(clean, corrupt=other.tokens, distractor=other.targets)


def position_names(task: Task, tokens: Sequence[int]) -> tuple[str, ...]:
    """Names of the positions of a prompt: `a=3`, or the token alone where it is its own name."""
    names = [task.vocab[token] for token in tokens]
    # A typed prompt may be longer than those of the task, where it has prompts of several lengths.
    known = task.position_labels
    labels = [*known, *(f"t{position}" for position in range(len(known), len(names)))][: len(names)]
    return tuple(name if label == name else f"{label}={name}" for label, name in zip(labels, names, strict=True))


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def answered(asked: Asked) -> Answers:
    """Top answers to the clean prompt."""
    batch = asked.batch
    return top_answers(run_model(_model(asked), batch.tokens).logits, batch.read)


@st.cache_resource(max_entries=KEPT, show_spinner="Patching …")
def patches(asked: Asked, sites: str, direction: Direction) -> PatchMap:
    """The map of this one pair."""
    return patch_each(_model(asked), asked.batch, sites=sites, direction=direction, position_labels=asked.labels)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def reading(asked: Asked, cell: Cell) -> PlaceReading:
    """What a place holds in the clean run."""
    assert cell.position is not None
    return read_place(_model(asked), asked.batch, cell.site, cell.position, names=asked.task.vocab)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def swapped(asked: Asked, cell: Cell, base: Base, source: str, text: str | None) -> Swap:
    """What something else at a place does to one run of the pair: `source`, or the activation of another text."""
    filling = source if text is None else asked.task.prompt(text).tokens
    return swap(_model(asked), asked.batch, cell, source=filling, base=base)


@st.cache_resource(max_entries=KEPT, show_spinner="Measuring …")
def swapped_over(asked: Asked, cell: Cell, base: Base, source: str, text: str | None, kind: str | None, n: int) -> Swap:
    """The same over `n` pairs of the task; with a kind of change, their counterfactuals are of that kind."""
    run = state.open_run(asked.reference)
    pairs = run.task.sample(n, split=state.unseen_split(run), seed=0)
    if kind is not None:
        pairs = run.task.contrast(pairs, kind, seed=0)
    filling = source if text is None else run.task.prompt(text).tokens
    return swap(_model(asked), pairs, cell, source=filling, base=base)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def trajectory(asked: Asked) -> Trajectory:
    """The logit lens on the clean prompt."""
    return logit_lens(_model(asked), asked.batch, position_labels=asked.labels)


@st.cache_resource(max_entries=KEPT, show_spinner="Fitting the tuned lens …")
def tuned(reference: str, step: int, sha256: str, split: str) -> TunedLens:
    """Both lenses over prompts of a split, the tuned one fitted at this checkpoint."""
    return tuned_lens_of(state.open_run(reference), step, split=split)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def split_of(asked: Asked) -> str | None:
    """The narrowest split that has the clean prompt, if any has."""
    task, tokens = asked.task, asked.batch.tokens
    for split in reversed(task.splits):
        if (task.examples(split).tokens == tokens).all(1).any():
            return split
    return None


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def attributed(asked: Asked, by: Granularity) -> Attribution:
    """What each part adds directly to the answer's lead."""
    return direct_logit_attribution(_model(asked), asked.batch, by=by)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def attended(asked: Asked) -> AttentionPatterns:
    """Where each head looks in the clean prompt."""
    return attention_patterns(_model(asked), asked.batch, position_labels=asked.labels)


def _model(asked: Asked) -> Transformer:
    return state.model_at(state.open_run(asked.reference), asked.step)
