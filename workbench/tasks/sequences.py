"""Sequences of letters with a word to be said at each (Friedman et al. 2023, appendix B).

A prompt is `<s>`, up to `n_ctx` - 1 letters, `</s>` where the function has one, and padding. What is read, and scored,
is the answer at every letter that the function is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, check_choice, sample_pairs
from workbench.tasks.sequence_functions import FUNCTIONS, UNREAD, Lengths, Letters, SequenceFunction

PAD, BEGIN, END = "<pad>", "<s>", "</s>"
TRIES = 5
"""Sequences drawn for each that is wanted; those that came before are left out."""
LARGEST_DOMAIN = 400_000


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A function of letter sequences; a value that rebuilds its world."""

    # Without annotations these are the class's, not fields.
    name = "sequences"
    splits = ("train", "val", "test", "domain")
    measured = ("train", "val", "test")
    contrasts = ("letter",)
    memorised_accuracy = 0.99
    solved_accuracy = 0.99
    pooled = False

    function: str = "hist"
    """reverse, sort, hist, double_hist, most_freq, dyck or induction."""
    letters: int = 6
    """Size of the alphabet."""
    n_ctx: int = 8
    """Positions of a prompt, special tokens included."""
    size: int = 20_000
    """Most sequences in all splits together; fewer where the alphabet has no more."""
    seed: int = 0
    """Seed of the sequences and of their split."""

    def __post_init__(self) -> None:
        check_choice("function", self.function, list(FUNCTIONS))
        if self.letters < 1:
            raise WorkbenchError(f"letters must be at least 1, got {self.letters}.")
        if self.longest < 1:
            raise WorkbenchError(f"n_ctx {self.n_ctx} leaves no room for a letter. Give at least 3.")
        if self.size < 20:
            raise WorkbenchError(f"size must be at least 20, so that every split has sequences, got {self.size}.")
        self._definition.alphabet(self.letters)

    @property
    def _definition(self) -> SequenceFunction:
        return FUNCTIONS[self.function]

    @property
    def longest(self) -> int:
        """Most letters of a prompt."""
        return self.n_ctx - 1 - self._definition.ends

    @property
    def causal(self) -> bool:
        """Whether an answer depends on what stands before it alone."""
        return self._definition.causal

    @property
    def inputs(self) -> Sequence[str]:
        """Words that prompts are made of: the letters, padding, `<s>` and, where there is one, `</s>`."""
        return (*self._definition.alphabet(self.letters), PAD, BEGIN, *([END] if self._definition.ends else []))

    @property
    def vocab(self) -> Sequence[str]:
        """The words of prompts, then those that only answers have."""
        return tuple(dict.fromkeys([*self.inputs, *self._definition.outputs(self.letters, self.longest)]))

    @property
    def d_vocab_out(self) -> int:
        """Words that votes are counted for: all."""
        return len(self.vocab)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Tokens that may be an answer."""
        return tuple(self.vocab.index(word) for word in self._definition.outputs(self.letters, self.longest))

    @property
    def pad_token(self) -> int:
        """What fills short prompts."""
        return self.letters

    @property
    def position_labels(self) -> Sequence[str]:
        """Positions by number; 0 is `<s>`."""
        return tuple(map(str, range(self.n_ctx)))

    def examples(self, split: str) -> Batch:
        """All examples of a split; `domain` is every sequence there is, by length.

        Raises:
            WorkbenchError: the domain is asked for, and too large or not defined by letters alone.
        """
        check_choice("split", split, self.splits)
        if split == "domain":
            return self.batch(*self._domain())
        letters, length = _drawn(self)
        order = np.random.default_rng(self._seed("sequences split")).permutation(len(letters))
        test = round(0.1 * len(letters))
        val = round(0.1 * (len(letters) - test))
        rows = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}[split]
        return self.batch(letters[rows], length[rows])

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` sequences of a split without repeats, each with one letter changed."""
        return sample_pairs(
            self.examples(split), n, split=split, seed=seed, contrast=lambda batch, rng: self.contrast(batch, seed=rng)
        )

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with one letter of each sequence replaced by another; where no answer changes, it is dropped.

        A changed letter may make a sequence that training never draws, where the function is as defined as before.
        """
        check_choice("contrast", self.contrasts[0] if kind is None else kind, self.contrasts)
        rng = generator(seed, "contrast")
        length = (batch.tokens < self.letters).sum(1)
        place = 1 + (torch.rand(len(batch), generator=rng) * length).long()
        rows = torch.arange(len(batch))
        shift = 1 + (torch.rand(len(batch), generator=rng) * max(1, self.letters - 1)).long()
        corrupt = batch.tokens.clone()
        corrupt[rows, place] = (corrupt[rows, place] + shift) % self.letters
        changed = self.batch(corrupt[:, 1 : 1 + self.longest].numpy(), length.numpy())
        differs = ((changed.targets != batch.targets) & batch.read & changed.read).any(1)
        whole = replace(batch, corrupt=corrupt, distractor=changed.targets)
        return replace(whole.select(differs), dropped=int((~differs).sum()))

    def prompt(self, text: str) -> Batch:
        """One typed sequence: letters with spaces between them, or none, such as `1 3 3`.

        Raises:
            WorkbenchError: it is empty, too long, or has a letter that is not in the alphabet.
        """
        alphabet = list(self.inputs[: self.letters])
        words = text.split()
        if len(words) == 1 and len(words[0]) > 1 and words[0] not in alphabet:
            words = list(words[0])
        if not words:
            raise WorkbenchError(f"An empty sequence has no answer. Type letters such as '{' '.join(alphabet[:3])}'.")
        for word in words:
            if word not in alphabet:
                raise WorkbenchError(f"Letter {word!r} is not in the alphabet: {' '.join(alphabet)}.")
        if len(words) > self.longest:
            raise WorkbenchError(f"{len(words)} letters are too many: the longest sequence has {self.longest}.")
        letters = np.zeros((1, self.longest), dtype=np.int64)
        letters[0, : len(words)] = [alphabet.index(word) for word in words]
        return self.batch(letters, np.array([len(words)]))

    def decode(self, tokens: Sequence[int]) -> str:
        """The letters of a prompt, as one types them."""
        return " ".join(self.vocab[int(token)] for token in tokens if int(token) < self.letters)

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    def batch(self, letters: Letters, length: Lengths) -> Batch:
        """Prompts of letter sequences, with their answers."""
        inside = np.arange(self.longest) < length[:, None]
        letters = np.where(inside, letters, 0)
        begin, end = self.inputs.index(BEGIN), self.pad_token + 2
        tokens = np.full((len(letters), self.n_ctx), self.pad_token)
        tokens[:, 0] = begin
        tokens[:, 1 : 1 + self.longest] = np.where(inside, letters, self.pad_token)
        if self._definition.ends:
            tokens[np.arange(len(letters)), 1 + length] = end
        found = self._definition.answer(letters, length, self.letters)
        read = np.zeros(tokens.shape, dtype=bool)
        read[:, 1 : 1 + self.longest] = inside & (found != UNREAD)
        targets = np.zeros_like(tokens)
        targets[:, 1 : 1 + self.longest] = np.array(self.outputs)[found]
        tensors = (torch.from_numpy(np.where(read, targets, 0)), torch.from_numpy(read))
        return Batch(tokens=torch.from_numpy(tokens), targets=tensors[0], read=tensors[1])

    def _domain(self) -> tuple[Letters, Lengths]:
        count = sum(self.letters**length for length in range(1, self.longest + 1))
        if not self._definition.free or count > LARGEST_DOMAIN:
            raise WorkbenchError(
                f"The whole domain of {self.function} with {self.letters} letters is not listed: it has {count:,} "
                f"sequences, or not all of them are inputs. Use the split test; up to {LARGEST_DOMAIN:,} are listed."
            )
        rows, lengths = [], []
        for length in range(1, self.longest + 1):
            found = np.stack(np.unravel_index(np.arange(self.letters**length), (self.letters,) * length), 1)
            rows.append(np.pad(found, ((0, 0), (0, self.longest - length))))
            lengths.append(np.full(len(found), length))
        return np.concatenate(rows), np.concatenate(lengths)

    def _seed(self, purpose: str) -> int:
        return generator(self.seed, purpose).initial_seed()


@lru_cache(maxsize=4)
def _drawn(task: Sequences) -> tuple[Int64[np.ndarray, "sequence place"], Int64[np.ndarray, " sequence"]]:
    """Different sequences in the order in which they were drawn."""
    rng = np.random.default_rng(task._seed("sequences"))
    letters, length = FUNCTIONS[task.function].draw(rng, TRIES * task.size, task.letters, task.longest)
    letters = np.where(np.arange(task.longest) < length[:, None], letters, 0)
    _, first = np.unique(np.concatenate([letters, length[:, None]], 1), axis=0, return_index=True)
    kept = np.sort(first)[: task.size]
    return letters[kept], length[kept]
