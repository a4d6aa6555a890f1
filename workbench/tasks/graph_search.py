"""Search in a directed graph: which child of the start leads to the goal (Saparov et al. 2025)?

Training never repeats a prompt: its examples are drawn as they are needed. What is held out for the tests is a tenth of
all graphs, told apart by a random number for each graph with its names, start and goal: the order of edges does not
matter to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int64

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Latent, check_choice, join, sample_pairs
from workbench.tasks.graph_distributions import DISTRIBUTIONS, Distribution, largest_lookahead
from workbench.tasks.graph_prompts import TAIL, Layout, check_question
from workbench.tasks.graphs import (
    MOST_VERTICES,
    Graphs,
    bit,
    choose_member,
    descendants,
    distances,
    members,
    numpy_generator,
)

Mode = Literal["strict", "legacy"]
SMALLEST = 20
"""Positions of the shortest prompts: five edges, the fewest at which a lookahead of 2 fits."""
EDGE = re.compile(r"(\d+)\s*>\s*(\d+)")
PROMPT = re.compile(rf"((?:\s*{EDGE.pattern.replace('(', '(?:')}[\s,;]*)+)Q\s*(\d+)\s+(\d+)\s*")
HELD_OUT = 10
"""One graph in so many belongs to the tests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSearch:
    """Prompts of one length over graphs of one distribution; a value that rebuilds its world."""

    # Without annotations these are the class's, not fields.
    name = "graph_search"
    contrasts = ("goal",)
    memorised_accuracy = 0.99
    solved_accuracy = 0.99

    size: int = 26
    """Positions of a prompt: n positions hold (n - 5) // 3 edges."""
    distribution: Distribution = "balanced"
    """Where training graphs come from; the tests by lookahead are balanced always."""
    lookahead: int | None = None
    """Largest lookahead in training; None is the largest that fits."""
    mode: Mode = "strict"
    """Whether a balanced graph's lookahead is the one that was drawn for it (strict), or may drift from it by what its
    distracting vertices do, as it did in the published runs (legacy)."""
    spare: int = 1
    """Vertex names beyond those that the largest graph needs, so that some name is absent from every prompt."""
    test_size: int = 2500
    """Examples of each test split."""
    seed: int = 0
    """Seed of the tests and of what is held out for them."""

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, get_args(Distribution))
        check_choice("mode", self.mode, get_args(Mode))
        if self.size < SMALLEST:
            raise WorkbenchError(
                f"Prompts of size {self.size} are too short for a search: give at least {SMALLEST} positions, which "
                "hold 5 edges and a lookahead of 2. Try size=26."
            )
        if self.spare < 0 or self.layout.n_names >= MOST_VERTICES:
            raise WorkbenchError(
                f"Size {self.size} with {self.spare} spare names makes {self.layout.n_names} vertex names; "
                f"0 or more spare ones and fewer than {MOST_VERTICES} in all are wanted. Shorten the prompts."
            )
        most = largest_lookahead(self.layout.n_edges)
        if self.lookahead is not None and not 0 <= self.lookahead <= most:
            raise WorkbenchError(
                f"Lookahead {self.lookahead} does not fit prompts of size {self.size}: two branches of that length "
                f"must. Choose 0 to {most}, or a size of {3 * (2 * self.lookahead + 1) + 5}."
            )
        if self.test_size < 1:
            raise WorkbenchError(f"test_size must be at least 1, got {self.test_size}.")

    @property
    def layout(self) -> Layout:
        """How prompts are written."""
        return Layout(size=self.size, spare=self.spare)

    @property
    def lookaheads(self) -> range:
        """All lookaheads that fit the prompts, those that training does not see too."""
        return range(largest_lookahead(self.layout.n_edges) + 1)

    @property
    def splits(self) -> Sequence[str]:
        """What training sees; all lookaheads together and each alone; the other two distributions."""
        return ("train", *self.measured[1:], "test_naive", "test_star")

    @property
    def measured(self) -> Sequence[str]:
        """The lookaheads together and each alone."""
        return ("train", "test", *(f"test_{lookahead}" for lookahead in self.lookaheads))

    @property
    def vocab(self) -> Sequence[str]:
        """Vertices, then the marks of path and edge, padding, and the mark of the question."""
        return self.layout.vocab

    @property
    def pad_token(self) -> int:
        """Fills the left of short prompts."""
        return self.layout.pad

    @property
    def position_labels(self) -> Sequence[str]:
        """Edges by number, then the tail."""
        return self.layout.position_labels

    def stream(self, n: int, *, seed: int | torch.Generator, level: int | None = None) -> Batch:
        """`n` fresh training examples, none of a graph that is held out; a level is the largest lookahead."""
        rng = numpy_generator(seed, "stream")
        most = self.lookaheads[-1] if self.lookahead is None else self.lookahead
        most = most if level is None else min(most, level)
        wanted = rng.integers(0, most + 1, n)
        return self._draw(rng, self.distribution, wanted, most=most, test=False)

    def examples(self, split: str) -> Batch:
        """The examples of a test split, or as many of training's distribution, which are not among those it is given.

        Graphs of the tests have one right answer; those by lookahead are balanced, `test_naive` and `test_star` come
        from these distributions, with a goal that is no child of the start and more than one child.
        """
        check_choice("split", split, self.splits)
        return _examples(self, split)

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` examples of a split without repeats, each with a counterfactual.

        Raises:
            WorkbenchError: the split has fewer than `n` examples with headroom; those of lookahead 0 have none.
        """
        return sample_pairs(
            self.examples(split), n, split=split, seed=seed, contrast=lambda batch, rng: self.contrast(batch, seed=rng)
        )

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with the goal moved to a vertex that only other children lead to, as far from the start if any is.

        Nothing else in the prompt changes. Prompts that have no such vertex are dropped and counted in `dropped`.
        """
        check_choice("contrast", kind or self.contrasts[0], self.contrasts)
        graphs, rng = self.graphs(batch), numpy_generator(seed, "contrast")
        width, rows = graphs.children.shape[1], np.arange(len(batch))
        useful, below = graphs.useful(), descendants(graphs.children) | bit(np.arange(width))
        old, new = (
            np.bitwise_or.reduce(np.where(members(children, width), below, 0), axis=1)
            for children in (useful, graphs.first & ~useful)
        )
        depth = distances(graphs.children, graphs.start)
        off = np.abs(depth - depth[rows, graphs.goal][:, None])
        score = np.where(members(new & ~old, width), rng.random(off.shape) - off, -np.inf)
        goal, kept = score.argmax(1), (new & ~old) != 0
        moved = Graphs(children=graphs.children, start=graphs.start, goal=goal)
        answer = choose_member(moved.useful(), width, rng)
        corrupt = batch.tokens.clone()
        corrupt[:, -3] = torch.from_numpy(goal)
        distractor = torch.where(batch.read, torch.from_numpy(answer)[:, None], 0)
        whole = replace(batch, corrupt=corrupt, distractor=distractor)
        return replace(whole.select(torch.from_numpy(kept)), dropped=int((~kept).sum()))

    def ask(self, edges: Sequence[tuple[int, int]], start: int, goal: int) -> Batch:
        """The prompt of one graph of a person's own, its edges in the order given.

        Raises:
            WorkbenchError: too many edges, one of them twice, a vertex without a name, a cycle, a graph in several
                parts, or a goal that cannot be reached from the start.
        """
        tokens = self.layout.write_one(edges, start, goal)[None]
        graphs = self.layout.read(tokens)
        check_question(graphs)
        right = members(graphs.useful(), len(self.vocab))
        return self._batch(tokens, right, right.argmax(1))

    def prompt(self, text: str) -> Batch:
        """One typed prompt, such as `1>2 1>4 2>3 Q 1 3`: edges, then start and goal.

        Raises:
            WorkbenchError: it is no prompt of this task, or its graph cannot be asked about.
        """
        match = PROMPT.fullmatch(text)
        if match is None:
            raise WorkbenchError(
                f"Cannot read {text!r} as a prompt. Write edges, then Q, start and goal, like '1>2 1>4 2>3 Q 1 3'."
            )
        edges = [(int(source), int(target)) for source, target in EDGE.findall(match[1])]
        return self.ask(edges, int(match[2]), int(match[3]))

    def decode(self, tokens: Sequence[int]) -> str:
        """A prompt as one types it, without padding."""
        body = [int(token) for token in tokens[:-TAIL] if int(token) != self.pad_token]
        edges = (f"{source}>{target}" for source, target in zip(body[1::3], body[2::3], strict=True))
        return " ".join([*edges, "Q", str(int(tokens[-4])), str(int(tokens[-3]))])

    def graphs(self, batch: Batch) -> Graphs:
        """The graphs that the prompts describe; their vertices are tokens."""
        return self.layout.read(batch.tokens.numpy())

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    def _draw(
        self,
        rng: np.random.Generator,
        distribution: Distribution,
        wanted: Int64[np.ndarray, " batch"],
        *,
        most: int,
        test: bool,
    ) -> Batch:
        """A prompt for each lookahead wanted: candidates are drawn until all that is wrong has been rejected."""
        layout, pending = self.layout, np.arange(len(wanted))
        tokens = np.empty((len(wanted), self.size), np.int64)
        right = np.zeros((len(wanted), len(self.vocab)), bool)
        while len(pending):
            graphs = DISTRIBUTIONS[distribution](rng, wanted[pending], layout.n_edges)
            useful = graphs.useful()
            fits = (graphs.n_edges <= layout.n_edges) & (useful != 0)
            if test:
                fits &= np.bitwise_count(useful) == 1
            if test and distribution != "balanced":
                fits &= (graphs.first != useful) & (graphs.first & bit(graphs.goal) == 0)
            rows = np.flatnonzero(fits)
            found = graphs.select(rows).lookahead()
            exact = distribution == "balanced" and (test or self.mode == "strict")
            rows = rows[found == wanted[pending[rows]] if exact else found <= most]
            written = layout.write(graphs.select(rows), rng, seed=self.seed)
            ours = (written.code % HELD_OUT == 0) == test
            rows, name = rows[ours], written.name[ours]
            tokens[pending[rows]] = written.tokens[ours]
            places = pending[rows][:, None], name
            right[places] = members(useful[rows], name.shape[1])
            pending = np.delete(pending, rows)
        answers = np.where(right, rng.random(right.shape, np.float32), -1).argmax(1)
        return self._batch(tokens, right, answers)

    def _batch(self, tokens: np.ndarray, right: np.ndarray, answers: np.ndarray) -> Batch:
        prompts, answer = torch.from_numpy(tokens), torch.from_numpy(answers)
        read = (torch.arange(self.size) == self.size - 1).expand(len(tokens), -1)
        names, last = range(1, self.layout.n_names + 1), self.size - 1
        return Batch(
            tokens=prompts,
            targets=torch.where(read, answer[:, None], 0),
            read=read,
            right=torch.from_numpy(right),
            latents={
                "start": Latent(value=prompts[:, -4], position=last - 3, among=names),
                "goal": Latent(value=prompts[:, -3], position=last - 2, among=names),
                "next": Latent(value=answer, position=last, among=names),
            },
        )


@lru_cache(maxsize=32)
def _examples(task: GraphSearch, split: str) -> Batch:
    rng, kind = numpy_generator(task.seed, "graph search", split), split.partition("_")[2]
    n, most = task.test_size, task.lookaheads[-1]
    if split == "train":
        return task.stream(n, seed=task.seed)
    if split == "test":
        return join([_examples(task, f"test_{lookahead}") for lookahead in task.lookaheads])
    if kind.isdecimal():
        return task._draw(rng, "balanced", np.full(n, int(kind)), most=most, test=True)
    return task._draw(rng, kind, np.full(n, most), most=most, test=True)
