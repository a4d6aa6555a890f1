"""What all tasks over search graphs share: how their prompts are drawn, split, changed and read.

Training never repeats a prompt: its examples are drawn as they are needed. What is held out for the tests is a tenth of
all graphs, told apart by a random number for each graph with its names, start and goal: the order of edges does not
matter to it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int64

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Latent, check_choice, join, sample_pairs
from workbench.tasks.graph_prompts import PATH, QUERY, Layout, check_question
from workbench.tasks.graphs import MOST_VERTICES, Graphs, Sets, members, numpy_generator

EDGE = re.compile(r"(\d+)\s*>\s*(\d+)")
PROMPT = re.compile(r"((?:\s*\d+\s*>\s*\d+[\s,;]*)+)Q\s*(\d+)\s+(\d+)((?:\s+(?:P|\d+))*)\s*")
AT_ONCE = 512
"""Fewest candidates of a round: fewer cost nearly as much."""
HELD_OUT = 10
"""One graph in so many belongs to the tests."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidates:
    """Questions that a task may ask: what has been drawn and not rejected."""

    rows: np.ndarray
    """Which of the levels asked for each one belongs to."""
    graphs: Graphs
    tail: Int64[np.ndarray, "batch tail"]
    """What follows the edges: vertices and marks."""
    right: Sets
    """The right answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTask(ABC):
    """How any task over search graphs deals out its examples; what is asked of a graph is the task's own."""

    # Without annotations these are the class's, not fields.
    contrasts = ("name",)
    memorised_accuracy = 0.99
    solved_accuracy = 0.99
    name: ClassVar[str]

    size: int
    """Positions of a prompt."""
    spare: int = 1
    """Vertex names beyond those that the largest graph needs, so that some name is absent from every prompt."""
    test_size: int = 2500
    """Examples of each test split."""
    seed: int = 0
    """Seed of the tests and of what is held out for them."""
    level_draws: int = 1
    """Levels drawn for each training example, which has the largest of them: one draw makes all equally likely, more
    draws make the hard ones likelier."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """How prompts are written."""

    @property
    @abstractmethod
    def levels(self) -> range:
        """How hard a question can be, those levels that training does not see too."""

    @property
    @abstractmethod
    def hardest(self) -> int:
        """The hardest level of training."""

    @abstractmethod
    def _propose(self, rng: np.random.Generator, levels: Int64[np.ndarray, " batch"], kind: str) -> Candidates:
        """A candidate for each level, without those that are not as they should be.

        Args:
            rng: draws them.
            levels: how hard each shall be.
            kind: `train`, `test`, or what follows `test_` in a split that is no level.
        """

    @abstractmethod
    def _right(self, graphs: Graphs, tail: Int64[np.ndarray, "batch tail"]) -> Sets:
        """The right answers to questions."""

    @property
    def splits(self) -> Sequence[str]:
        """What training sees; all levels together and each alone."""
        return self.measured

    @property
    def measured(self) -> Sequence[str]:
        """What training sees; all levels together and each alone."""
        return ("train", "test", *(f"test_{level}" for level in self.levels))

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
        """`n` fresh training examples, none of a graph that is held out, and none harder than the level, if given."""
        hardest = self.hardest if level is None else min(self.hardest, level)
        rng = numpy_generator(seed, "stream")
        drawn = rng.integers(self.levels[0], hardest + 1, (self.level_draws, n))
        return self._draw(rng, drawn.max(0), "train")

    def examples(self, split: str) -> Batch:
        """The examples of a test split, or as many of training's distribution: a sample, as training never repeats."""
        check_choice("split", split, self.splits)
        return _examples(self, split)

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` examples of a split without repeats, each with a counterfactual of the default kind.

        Raises:
            WorkbenchError: the split has fewer than `n` examples with headroom.
        """
        return sample_pairs(
            self.examples(split), n, split=split, seed=seed, contrast=lambda batch, rng: self.contrast(batch, seed=rng)
        )

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with counterfactuals of a kind; prompts that have none are dropped and counted in `dropped`.

        `name`: the answer's name is exchanged with another vertex' in all edges, which then is a right answer, and the
        old one is not. The other vertex is one that the tail does not name and that was no right answer.
        """
        kind = self.contrasts[0] if kind is None else kind
        check_choice("contrast", kind, self.contrasts)
        tokens, answer, kept = self._change(batch, kind, numpy_generator(seed, "contrast"))
        distractor = torch.where(batch.read, torch.from_numpy(answer)[:, None], 0)
        whole = replace(batch, corrupt=torch.from_numpy(tokens), distractor=distractor)
        return replace(whole.select(torch.from_numpy(kept)), dropped=int((~kept).sum()))

    def prompt(self, text: str) -> Batch:
        """One typed prompt, such as `1>2 1>4 2>3 Q 1 3`: edges, start and goal, then what the task shows of its path.

        Raises:
            WorkbenchError: it is no prompt of this task, or its graph cannot be asked about.
        """
        match = PROMPT.fullmatch(text)
        if match is None:
            raise WorkbenchError(
                f"Cannot read {text!r} as a prompt. Write edges, then Q, start and goal, like '1>2 1>4 2>3 Q 1 3'."
            )
        edges = [(int(source), int(target)) for source, target in EDGE.findall(match[1])]
        path = [PATH if word == "P" else int(word) for word in match[4].split()]
        # The first mark is one that stands there anyway.
        path = path[1:] if path[:1] == [PATH] else path
        return self.ask(edges, int(match[2]), int(match[3]), path)

    def ask(self, edges: Sequence[tuple[int, int]], start: int, goal: int, path: Sequence[int] = ()) -> Batch:
        """The prompt of one graph of a person's own, its edges in the order given.

        Args:
            edges: source and target of each.
            start: a vertex.
            goal: another one.
            path: vertices and marks at the tail's end; without any, the start alone.

        Raises:
            WorkbenchError: too many edges, one of them twice, a vertex without a name, a cycle, a graph in several
                parts, a goal that cannot be reached from the start, or a path that leaves nothing to answer.
        """
        path = list(path) or [start]
        room = len(self.layout.tail) - 3
        if len(path) >= room:
            raise WorkbenchError(f"The path has {len(path)} tokens; this prompt has room for {room - 1}.")
        if next((vertex for vertex in path if vertex >= 0), start) != start:
            raise WorkbenchError(f"The path must begin at the start {start}.")
        tail = [QUERY, start, goal, *[PATH] * (room - len(path)), *path]
        tokens = self.layout.write_one(edges, tail)[None]
        graphs = self.layout.read(tokens)
        check_question(graphs)
        right = members(self._right(graphs, self.layout.read_tail(tokens)), len(self.vocab))
        if not right.any():
            raise WorkbenchError("After this path there is nothing to answer. Shorten it.")
        return self._batch(tokens, right, right.argmax(1))

    def decode(self, tokens: Sequence[int]) -> str:
        """A prompt as one types it, without padding."""
        vocab, end = self.vocab, self.layout.end
        body = [int(token) for token in tokens[:end] if int(token) != self.pad_token]
        edges = (f"{source}>{target}" for source, target in zip(body[1::3], body[2::3], strict=True))
        tail = [vocab[int(token)] for token in tokens[end:]]
        shown = next((place for place in range(3, len(tail)) if tail[place] != "P"), len(tail) - 1)
        path = tail[shown:]
        return " ".join([*edges, *tail[:3], *([] if path == [tail[1]] else ["P", *path])])

    def graphs(self, batch: Batch) -> Graphs:
        """The graphs that the prompts describe; their vertices are tokens."""
        return self.layout.read(batch.tokens.numpy())

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    def _check_sizes(self, *, least: int) -> None:
        """Raise a WorkbenchError if prompts are too short or too long, or counts are not counts."""
        if self.size < least:
            raise WorkbenchError(
                f"Prompts of size {self.size} are too short for a search: give at least {least} positions."
            )
        if self.spare < 0 or self.layout.n_names >= MOST_VERTICES:
            raise WorkbenchError(
                f"Size {self.size} with {self.spare} spare names makes {self.layout.n_names} vertex names; "
                f"0 or more spare ones and fewer than {MOST_VERTICES} in all are wanted. Shorten the prompts."
            )
        for name in ("test_size", "level_draws"):
            if getattr(self, name) < 1:
                raise WorkbenchError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def _draw(self, rng: np.random.Generator, levels: Int64[np.ndarray, " batch"], kind: str) -> Batch:
        """A prompt for each level: candidates are drawn until all that is wrong has been rejected."""
        pending = np.arange(len(levels))
        tokens = np.empty((len(levels), self.size), np.int64)
        right = np.zeros((len(levels), len(self.vocab)), bool)
        while len(pending):
            asked = np.resize(pending, max(len(pending), AT_ONCE))
            found = self._propose(rng, levels[asked], kind)
            written = self.layout.write(found.graphs, found.tail, rng, seed=self.seed)
            ours = np.flatnonzero((written.code % HELD_OUT == 0) == (kind != "train"))
            # The first of each that was asked for several times.
            rows, first = np.unique(asked[found.rows[ours]], return_index=True)
            chosen = ours[first]
            tokens[rows] = written.tokens[chosen]
            name = written.name[chosen]
            right[rows[:, None], name] = members(found.right[chosen], name.shape[1])
            pending = np.setdiff1d(pending, rows)
        answers = np.where(right, rng.random(right.shape, np.float32), -1).argmax(1)
        return self._batch(tokens, right, answers)

    def _change(
        self, batch: Batch, kind: str, rng: np.random.Generator
    ) -> tuple[Int64[np.ndarray, "batch pos"], Int64[np.ndarray, " batch"], Bool[np.ndarray, " batch"]]:
        """Counterfactual prompts of a kind, their answers, and which prompts have one."""
        tokens, answer = batch.tokens.numpy().copy(), batch.targets[batch.read].numpy()
        tail, n_names = self.layout.read_tail(tokens), self.layout.n_names
        rows = np.arange(len(tokens))
        taken = np.zeros((len(tokens), n_names + 1), bool)
        taken[rows[:, None], np.maximum(tail, 0)] = True
        named = taken[rows, answer]
        taken |= members(self._right(self.layout.read(tokens), tail), n_names + 1)
        score = np.where(taken, -1, rng.random(taken.shape, np.float32))
        score[:, 0] = -1
        other, kept = score.argmax(1), (score.max(1) >= 0) & ~named
        body = tokens[:, : self.layout.end]
        is_answer, is_other = body == answer[:, None], body == other[:, None]
        body[...] = np.where(is_answer, other[:, None], np.where(is_other, answer[:, None], body))
        return tokens, other, kept

    def _batch(self, tokens: np.ndarray, right: np.ndarray, answers: np.ndarray) -> Batch:
        prompts, answer = torch.from_numpy(tokens), torch.from_numpy(answers)
        read = (torch.arange(self.size) == self.size - 1).expand(len(tokens), -1)
        names, end = range(1, self.layout.n_names + 1), self.layout.end
        return Batch(
            tokens=prompts,
            targets=torch.where(read, answer[:, None], 0),
            read=read,
            right=torch.from_numpy(right),
            latents={
                "start": Latent(value=prompts[:, end + 1], position=end + 1, among=names),
                "goal": Latent(value=prompts[:, end + 2], position=end + 2, among=names),
                "next": Latent(value=answer, position=self.size - 1, among=names),
            },
        )


@lru_cache(maxsize=32)
def _examples(task: GraphTask, split: str) -> Batch:
    rng, kind = numpy_generator(task.seed, task.name, split), split.partition("_")[2]
    if split == "train":
        return task.stream(task.test_size, seed=task.seed)
    if split == "test":
        return join([_examples(task, f"test_{level}") for level in task.levels])
    level = int(kind) if kind.isdecimal() else task.levels[-1]
    return task._draw(rng, np.full(task.test_size, level), "test" if kind.isdecimal() else kind)
