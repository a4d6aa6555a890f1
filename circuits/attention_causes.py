"""Why a row attends to another: which features of the prompt the score between the two hangs on.

A feature is a token (perturbed by a vertex that does not occur in the prompt, put in its place wherever it stands) or
the position of a row (perturbed by taking its embedding away). Patterns of the layers before are held as they were,
MLPs and LayerNorms are computed again (Saparov et al. 2025, appendix). The perturbed prompts serve all layers and all
entries, so that they are run once, in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attention_effects import CleanPass, read_slot, write
from circuits.search_prompts import CURRENT, GOAL, START
from workbench.runtime import WorkbenchError

Kind = Literal["token", "forward", "backward", "start and goal", "goal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """One reason for which a row attends to another."""

    kind: Kind
    """The same vertex in both; the next or the previous row; the marks of start and goal, or of the goal."""
    key: int
    """What the key hangs on: a token for kind `token`, else a row."""

    def __str__(self) -> str:
        return f"{self.kind} {self.key}" if self.kind == "token" else self.kind


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Perturbed:
    """Queries and keys of every layer under each perturbation."""

    clean: CleanPass
    tokens: tuple[int, ...]
    """Those that are perturbed, the first features; the others are the positions of all rows."""
    q: tuple[Float[Tensor, "feature row d_head"], ...]
    k: tuple[Float[Tensor, "feature row d_head"], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, clean: CleanPass) -> Perturbed:
        """Run every perturbed prompt.

        Raises:
            WorkbenchError: all vertices occur, so that none can stand for another.
        """
        model, prompt = clean.model, clean.prompt
        if prompt.unused is None:
            raise WorkbenchError(
                f"All {prompt.layout.n_names} vertices occur in the prompt, so that none can stand for another. Trace "
                "a smaller graph, or train with a spare name."
            )
        tokens = tuple(sorted(set(prompt.tokens.tolist())))
        each, places = torch.arange(len(prompt)), torch.arange(len(prompt)) + len(tokens)
        prompts = prompt.padded.repeat(len(tokens) + len(prompt), 1)
        for feature, token in enumerate(tokens):
            prompts[feature, prompt.padded == token] = prompt.unused
        embedded, placed = (written[:, prompt.position].clone() for written in model.write_inputs(prompts))
        placed[places, each] = 0
        x, q, k = embedded + placed, [], []
        for step, pattern in enumerate(clean.pattern):
            q.append(read_slot(model, step, "q", x))
            k.append(read_slot(model, step, "k", x))
            x = write(model, step, x, pattern @ read_slot(model, step, "v", x))
        return cls(clean=clean, tokens=tokens, q=tuple(q), k=tuple(k))

    def causes(self, step: int, dest: int, src: int, *, sign: int, threshold: float) -> tuple[Cause, ...]:
        """Why an entry is large, or small, the strongest first.

        Args:
            step: layer.
            dest: row that attends.
            src: row that is attended to.
            sign: 1 where the entry matters by being large, -1 where it does by being small.
            threshold: by how much the score must change, in units of attention scores.
        """
        scale = self.clean.q[step].shape[-1] ** 0.5
        q, k = self.clean.q[step][dest], self.clean.k[step][src]
        clean = q @ k / scale
        of_key = sign * (clean - self.k[step][:, src] @ q / scale)
        of_query = sign * (clean - self.q[step][:, dest] @ k / scale)
        n_tokens = len(self.tokens)
        rows = {int(row) - n_tokens for row in (of_query > threshold).nonzero()[:, 0] if row >= n_tokens}
        found = []
        for feature in of_key.argsort(descending=True, stable=True).tolist():
            if of_key[feature] <= threshold:
                break
            row = feature - n_tokens
            if row >= 0 and row + 1 in rows:
                found.append(Cause(kind="backward", key=row))
            elif row >= 0 and row - 1 in rows:
                found.append(Cause(kind="forward", key=row))
            elif row < 0 and self._is_vertex(feature) and of_query[feature] > threshold:
                found.append(Cause(kind="token", key=self.tokens[feature]))
        return (*found, *self._marks(of_key[n_tokens:] > threshold, rows))

    def _is_vertex(self, feature: int) -> bool:
        return 1 <= self.tokens[feature] <= self.clean.prompt.layout.n_names

    def _marks(self, of_key: Tensor, query_rows: set[int]) -> list[Cause]:
        """Causes at the last rows: what is reachable from both start and goal, or from the goal."""
        n_rows, found = len(of_key), []
        if of_key[START] and of_key[GOAL] and n_rows + CURRENT in query_rows:
            found.append(Cause(kind="start and goal", key=n_rows + START))
        if of_key[GOAL]:
            found.append(Cause(kind="goal", key=n_rows + GOAL))
        return found
