"""A Transformer Program in parts: each head and each table from an input of its own, which is what circuits ask for.

The residual stream is the program's variables side by side. Of a categorical one it holds a weight for each value, so
that each writer's part is a stretch of its own, and a sum of parts is all variables at once. Where the program says so
many whole values, the parts say what it says, exactly.

A program's choices have no gradient. What gradient methods see here is its *continuation* between values, without
temperature or noise, and not the relaxation that it was trained in. A weight is the probability of a value: a key
matches with the probability that it is the one wanted, a head copies from the nearest match as if matches were
independent of each other, a table says its values in the proportion of its cells; numbers have tables interpolated
between whole ones, at which the slope is the mean of both sides. At whole values all this is the program.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from workbench.instrument.sites import Edit, Site, SiteKind, Slot
from workbench.models.discrete import CategoricalHead, CategoricalTable, NumericalHead, NumericalMLP
from workbench.models.program import NEVER, TransformerProgram
from workbench.runtime import WorkbenchError

CONTINUED = (
    "The program's choices have no gradient. Gradient methods see its continuation between values: weights as "
    "probabilities, matches and tables multilinear in them, tables of numbers interpolated with the mean slope of both "
    "sides. There is no temperature, and at whole values it is the program; exact, acdc and greedy see nothing else."
)
"""What is said wherever gradient methods look at a program."""
Head = CategoricalHead | NumericalHead
Table = CategoricalTable | NumericalMLP


@dataclass(frozen=True, kw_only=True, slots=True)
class PartsShape:
    """The shape that a program has for circuits: heads of both kinds in one row, and tables for neurons."""

    n_steps: int
    n_heads: int
    d_mlp: int
    """Tables of each layer."""
    n_ctx: int
    causal: bool
    d_vocab: int
    pad_token: int

    def heads_of(self, kind: SiteKind) -> int:
        """Heads of each layer, the categorical ones first."""
        return self.n_heads


class ProgramParts(nn.Module):
    """An `EdgeReadable` of a Transformer Program."""

    def __init__(self, program: TransformerProgram) -> None:
        """Take the program apart.

        Raises:
            WorkbenchError: it has no heads, so that nothing joins its positions, or one answer for all of them.
        """
        super().__init__()
        self.program = program
        config = program.config
        heads = config.categorical_heads + config.numerical_heads
        if not heads:
            raise WorkbenchError("A program without heads has no circuit: each position is read for itself.")
        if config.pooled:
            raise WorkbenchError("A program that answers by the mean of all positions' votes is not taken apart.")
        self.config = PartsShape(
            n_steps=config.n_layers,
            n_heads=heads,
            d_mlp=config.n_mlps,
            n_ctx=config.n_ctx,
            causal=config.causal,
            d_vocab=config.d_vocab,
            pad_token=config.pad_token,
        )
        self.sites, self.provenance = program.sites, program.provenance
        discrete = program.discrete_program(tuple(map(str, range(config.d_vocab))))
        self._columns = torch.from_numpy(discrete.embedding)
        n_numbers = len(discrete.W_numerical) - 1
        self.width = len(discrete.W_categorical) * config.cardinality + n_numbers
        self.heads: list[list[tuple[Head, int]]] = [[] for _ in discrete.layers]
        self.tables: list[list[tuple[Table, int]]] = [[] for _ in discrete.layers]
        for part in discrete.parts:
            layer = int(part.name.split("_")[1])
            match part.does:
                case CategoricalHead() | NumericalHead() as does:
                    self.heads[layer].append((does, part.writes))
                case CategoricalTable() | NumericalMLP() as does:
                    self.tables[layer].append((does, part.writes))
        self._maps = [self._head_maps(step) for step in range(config.n_layers)]
        weights = [discrete.W_categorical.reshape(-1, config.d_vocab_out), discrete.W_numerical[1:]]
        self._votes = torch.from_numpy(np.concatenate(weights))
        self._bias = torch.from_numpy(discrete.W_numerical[0])
        self._allowed = torch.tensor(discrete.allowed)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits of the whole program."""
        return self.program.forward(tokens, edits)

    def write_inputs(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float64[Tensor, "batch pos d_model"], Float64[Tensor, "batch pos d_model"]]:
        """The variables of the tokens, and those of the positions."""
        k, columns = self.program.config.cardinality, self._columns.shape[1]
        embedded = torch.zeros(*tokens.shape, self.width, dtype=torch.float64)
        embedded.scatter_(2, self._columns[tokens] + k * torch.arange(columns), 1.0)
        placed = torch.zeros_like(embedded)
        place = torch.arange(tokens.shape[1])
        placed[:, place, columns * k + place] = 1
        return embedded, placed

    def read_heads(
        self, step: int, slot: Slot, heads: slice, x: Float[Tensor, "*rows #head d_model"]
    ) -> Float[Tensor, "*rows head d_head"]:
        """The key that each head wants, the key that there is, or the value: in proportion of the weights."""
        weight, bias = self._maps[step][slot]
        return (
            torch.einsum("...hd,hdk->...hk", x.expand(*x.shape[:-2], len(weight[heads]), -1), weight[heads])
            + bias[heads]
        )

    def pull_heads(
        self,
        step: int,
        slot: Slot,
        x: Float[Tensor, "point *rows d_model"],
        gradient: Float[Tensor, "point *rows head d_head"],
    ) -> Float[Tensor, "*rows head d_model"]:
        """Gradient at what each head reads, from that at its queries, keys or values: the mean over points."""
        return torch.einsum("...hk,hdk->...hd", gradient.mean(0), self._maps[step][slot][0])

    def patterns(
        self,
        step: int,
        heads: slice,
        scores: Float[Tensor, "*rows head dest src"],
        allowed: Bool[Tensor, "*#rows #head dest src"],
        dest: Int[Tensor, " dest"],
    ) -> Float[Tensor, "*rows head dest src"]:
        """The probability that each match is the nearest; of a head that adds up, that it is a match."""
        match = (scores * self.program.config.cardinality**0.5).masked_fill(~allowed, 0.0)
        order = _by_distance(dest, match.shape[-1]).expand_as(match)
        in_order = match.gather(-1, order)
        none = (1 - in_order).cumprod(-1)
        nearest = in_order * torch.cat([torch.ones_like(none[..., :1]), none[..., :-1]], -1)
        copied = nearest.gather(-1, order.argsort(-1))
        # Where nothing matches it is position 0.
        copied = torch.cat([copied[..., :1] + none[..., -1:], copied[..., 1:]], -1)
        sums = torch.tensor([isinstance(head, NumericalHead) for head, _ in self.heads[step][heads]])
        return torch.where(sums[:, None, None], match, copied)

    def write_heads(
        self, step: int, heads: slice, z: Float[Tensor, "*rows head d_head"]
    ) -> Float[Tensor, "*rows head d_model"]:
        """Each head's variable."""
        found = z.new_zeros(*z.shape[:-1], self.width)
        for at, (head, writes) in enumerate(self.heads[step][heads]):
            where = self._stretch(writes, numerical=isinstance(head, NumericalHead))
            found[..., at, where] = z[..., at, : where.stop - where.start]
        return found

    def sum_heads(self, step: int, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        """The variables of all heads."""
        return self.write_heads(step, slice(None), z).sum(-2)

    def write_neurons(
        self, step: int, neurons: Int[Tensor, " neuron"] | None, x: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """The variables of some tables, or of all."""
        chosen = range(self.config.d_mlp) if neurons is None else neurons.tolist()
        found = torch.zeros_like(x)
        for table, writes in (self.tables[step][at] for at in chosen):
            said = self._looked_up(table, x) if isinstance(table, CategoricalTable) else self._counted(table, x)
            found[..., self._stretch(writes)] = said
        return found

    def constant(self, step: int, part: str) -> Float64[Tensor, " d_model"]:
        """Zeros: no part has a bias."""
        return torch.zeros(self.width, dtype=torch.float64)

    def finish(self, x: Float[Tensor, "*rows d_model"], edits: Mapping[Site, Edit]) -> Float[Tensor, "*rows vocab"]:
        """The votes."""
        return (x @ self._votes + self._bias).masked_fill(~self._allowed, NEVER)

    def allowed(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "#batch dest src"]:
        """Which position each may look at."""
        return self.program.seen(tokens)

    def _stretch(self, place: int, *, numerical: bool = False) -> slice:
        """Where a variable stands in the stream; the constant number 1 is not in it."""
        k = self.program.config.cardinality
        if not numerical:
            return slice(k * place, k * place + k)
        first = self.width - (self.program.config.n_layers * self.program.config.numerical_heads) + place - 1
        return slice(first, first + 1)

    def _head_maps(self, step: int) -> dict[Slot, tuple[Float64[Tensor, "head d_model d_head"], Tensor]]:
        """What each head reads as a linear map, and its bias: the number 1 where that is what it adds up."""
        k, n = self.program.config.cardinality, self.config.n_heads
        found: dict[Slot, tuple[Tensor, Tensor]] = {
            slot: (torch.zeros(n, self.width, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.float64))
            for slot in ("q", "k", "v")
        }
        own = torch.eye(k, dtype=torch.float64)
        for at, (head, _) in enumerate(self.heads[step]):
            found["q"][0][at, self._stretch(head.query)] = own[torch.from_numpy(head.predicate)]
            found["k"][0][at, self._stretch(head.key)] = own
            if isinstance(head, CategoricalHead):
                found["v"][0][at, self._stretch(head.value)] = own
            elif head.value:
                found["v"][0][at, self._stretch(head.value, numerical=True), 0] = 1
            else:
                found["v"][1][at, 0] = 1
        return found

    def _looked_up(self, mlp: CategoricalTable, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows value"]:
        """A table's values, of weights for what it reads; one variable that is read twice has one value."""
        values = torch.eye(self.program.config.cardinality, dtype=torch.float64)[torch.from_numpy(mlp.table)]
        one, two = (x[..., self._stretch(read)] for read in mlp.reads)
        if mlp.reads[0] == mlp.reads[1]:
            return one @ values.diagonal().T
        return torch.einsum("...i,...j,ijv->...v", one, two, values)

    def _counted(self, mlp: NumericalMLP, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows value"]:
        """A table of numbers, interpolated between whole ones; at these the mean from both sides."""
        one = torch.ones_like(x[..., 0])
        numbers = [x[..., self._stretch(read, numerical=True)][..., 0] if read else one for read in mlp.reads]
        return torch.stack([_interpolated(mlp, numbers, side) for side in (1, -1)]).mean(0)


def _interpolated(mlp: NumericalMLP, numbers: list[Tensor], side: int) -> Float[Tensor, "*rows value"]:
    """Between the whole numbers nearest below and the next, or nearest above and the one before."""
    whole = [side * (side * number.detach()).floor() for number in numbers]
    beyond = [side * (number - near) for number, near in zip(numbers, whole, strict=True)]
    codes = torch.eye(len(mlp.b_out), dtype=torch.float64)
    total = torch.zeros(())
    for steps, share in _corners(beyond, together=mlp.reads[0] == mlp.reads[1]):
        read = torch.stack([near + side * step for near, step in zip(whole, steps, strict=True)], -1)
        total = total + share[..., None] * codes[torch.from_numpy(mlp(read.long().numpy()))]
    return total


def _corners(beyond: list[Tensor], *, together: bool) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Whether each number goes a step further, and the share that this has; one number read twice goes once."""
    first, second = beyond
    for one, two in [(0, 0), (1, 1)] if together else itertools.product((0, 1), repeat=2):
        share = first if one else 1 - first
        yield (one, two), share if together else share * (second if two else 1 - second)


def _by_distance(dest: Int[Tensor, " dest"], n: int) -> Int[Tensor, "dest src"]:
    """Positions in the order in which a head prefers them: near ones, the earlier of two, the own one last."""
    place = torch.arange(n)
    distance = (dest[:, None] - place).abs()
    return torch.where(distance == 0, n, distance).argsort(dim=1, stable=True)
