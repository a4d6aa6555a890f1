"""What the page Search asks: a checkpoint and one typed graph; answers are kept by the hash of weights and the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st
import torch

from apps.ui import state
from circuits.attention_ops import Operation
from circuits.operation_removal import logits_without
from circuits.path_merging import PathTrace, trace_paths
from circuits.search_prompts import SearchPrompt
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.graph_distributions import Distribution
from workbench.tasks.graph_prompts import EDGE_LENGTH
from workbench.tasks.graph_search import GraphSearch

EDGE, ENDS = re.compile(r"(\d+)\s*>\s*(\d+)"), re.compile(r"Q\s*(\d+)\s+(\d+)")
KEPT = 128
"""Results of each kind that are kept in memory."""
Edges = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the page is asked: a checkpoint and a typed graph. A key of caches."""

    reference: str
    step: int
    sha256: str
    text: str

    @property
    def task(self) -> GraphSearch:
        """The run's task."""
        task = state.open_run(self.reference).task
        assert isinstance(task, GraphSearch)
        return task

    @property
    def prompt(self) -> SearchPrompt:
        """The graph, read back from the prompt.

        Raises:
            WorkbenchError: it is no prompt of the task, or cannot be asked about.
        """
        return SearchPrompt.read(self.task.prompt(self.text).tokens[0], self.task.layout)


def example(task: GraphSearch, distribution: Distribution, lookahead: int, seed: int) -> str:
    """One of the test prompts of a distribution with this lookahead, as one types it; which one says the seed.

    Raises:
        WorkbenchError: the tests have none.
    """
    split = f"test_{lookahead}" if distribution == "balanced" else f"test_{distribution}"
    examples = task.examples(split)
    rows = np.flatnonzero(task.graphs(examples).lookahead() == lookahead)
    if not len(rows):
        raise WorkbenchError(
            f"None of {len(examples)} {distribution} test graphs has a lookahead of {lookahead}. Choose another."
        )
    drawn = int(torch.randint(len(rows), (), generator=generator(seed, "page Search", split)))
    return task.decode(examples.tokens[rows[drawn]].tolist())


def read_text(text: str) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """Edges, start and goal of a typed graph, whether or not it can be asked about; no edges where it is no graph."""
    edges, ends = EDGE.findall(text), ENDS.search(text)
    if not edges or ends is None:
        return [], None
    return [(int(source), int(target)) for source, target in edges], (int(ends[1]), int(ends[2]))


def write_text(edges: Edges, start: int, goal: int) -> str:
    """A graph as one types it."""
    return " ".join([*(f"{source}>{target}" for source, target in edges), "Q", str(start), str(goal)])


def name_of(operation: Operation, prompt: SearchPrompt) -> str:
    """An operation as it stands in lists and in the URL: its layer, the row that attends, and the one attended to."""
    return f"L{operation.layer}: {row_label(prompt, operation.dest)} from {row_label(prompt, operation.src)}"


def row_label(prompt: SearchPrompt, row: int) -> str:
    """What stands at a row: `3 of 3>1`, `E of 3>1`, `goal 6`; `answer` at the last."""
    names = [prompt.layout.vocab[token] for token in prompt.tokens.tolist()]
    token, label = names[row], prompt.layout.position_labels[int(prompt.position[row])]
    edge = row // EDGE_LENGTH
    if edge < len(prompt.graph.edges):
        source, target = names[EDGE_LENGTH * edge + 1 : EDGE_LENGTH * (edge + 1)]
        return f"{token} of {source}>{target}"
    if row == len(prompt) - 1:
        return "answer"
    return token if prompt.vertex(row) is None else f"{label} {token}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Choice:
    """What the model answers."""

    answer: str
    """The most probable token."""
    right: bool
    frame: pd.DataFrame
    """The probability of every child of the start, and of all else: columns child, probability, right."""


@st.cache_resource(max_entries=KEPT, show_spinner="Tracing …")
def traced(asked: Asked) -> PathTrace:
    """The path-merging trace of the prompt.

    Raises:
        WorkbenchError: it cannot be asked about, or the model cannot be traced.
    """
    return trace_paths(_model(asked), asked.prompt)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def choice(asked: Asked, removed: tuple[str, ...] = ()) -> Choice:
    """What the model answers, with some operations undone.

    Raises:
        WorkbenchError: the prompt cannot be asked about.
    """
    prompt = asked.prompt
    undone = [each for each in traced(asked).operations if name_of(each, prompt) in removed] if removed else []
    share = logits_without(_model(asked), prompt, undone).softmax(0)
    children = sorted(prompt.graph.children(prompt.start))
    frame = pd.DataFrame(
        {
            "child": [*map(str, children), "all else"],
            "probability": [*share[children].tolist(), max(0.0, 1 - float(share[children].sum()))],
            "right": [*(child in prompt.answers for child in children), False],
        }
    )
    best = int(share.argmax())
    return Choice(answer=asked.task.vocab[best], right=best in prompt.answers, frame=frame)


def _model(asked: Asked) -> Transformer:
    return state.model_at(state.open_run(asked.reference), asked.step)
