"""Every pair of a modular task, laid out so that the operation is addition.

Fourier analysis needs a group in which the operation is a sum. For `a + b` and `a - b` it is the residues themselves;
for `a * b` and `a / b` it is the discrete logarithm of the residues that are not 0, modulo p - 1. Its cosines are the
characters of the group (Chughtai et al. 2023 read networks on other groups the same way). One mechanism serves all
four: residue r has the *exponent* e(r), the second operand enters with the operation's sign, and

    e(answer) = e(a) + s * e(b)   (mod order),   s = +1 for + and *, -1 for - and /.

Cell (x, y) of the grid is the pair with e(a) = x and s * e(b) = y, so that its answer has the exponent x + y whatever
the operation. With a shuffle the residues get exponents at random: the control in which no analysis may find anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented
from workbench.models.fast import ReadPlan, read_logits, read_neurons
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch
from workbench.tasks.modular import Modular, is_prime

ROWS = 20_000
"""Prompts of one forward pass: bounds memory."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairGrid:
    """All pairs of the group, cell (x, y) at index x * order + y."""

    task: Modular
    residue: Int[Tensor, " order"]
    """The residue with each exponent."""
    batch: Batch
    """The pairs, in the order of the cells."""

    @property
    def order(self) -> int:
        """Elements of the group."""
        return len(self.residue)

    @property
    def answers(self) -> Int[Tensor, " cell"]:
        """The right token of each cell."""
        return self.batch.targets[self.batch.read]

    def cells(self, split: str) -> Int[Tensor, " example"]:
        """Cells of a split's examples; pairs outside the group (with a factor 0) are left out."""
        batch = self.task.examples(split)
        index = torch.full((self.task.p, self.task.p), -1)
        index[self.batch.latents["a"].value, self.batch.latents["b"].value] = torch.arange(self.order**2)
        found = index[batch.latents["a"].value, batch.latents["b"].value]
        return found[found >= 0]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Observation:
    """What a model does on every pair (x, y), at the position where the answer is read."""

    logits: Float[Tensor, "order order vocab"]
    neurons: Float[Tensor, "order order d_mlp"] | None
    """Active neurons of the last layer; None for a model without MLP."""


def pair_grid(task: Modular, *, shuffle_seed: int | None = None) -> PairGrid:
    """The grid of a task's pairs.

    Args:
        task: the operation and its modulus.
        shuffle_seed: give the residues exponents at random, as a control.

    Raises:
        WorkbenchError: the task is not modular arithmetic, or its operation is not a sum on one cyclic group.
    """
    if not isinstance(task, Modular):
        raise WorkbenchError(f"Fourier analysis reads modular arithmetic; this run's task is {task.name!r}.")
    if task.operation in ("add", "sub"):
        residue = torch.arange(task.p)
    elif is_prime(task.p):
        residue = powers_of_primitive_root(task.p)
    else:
        raise WorkbenchError(
            f"Fourier analysis of multiplication needs a prime modulus, got p={task.p}: only then are the residues "
            "that are not 0 the powers of one of them. Train with p=113 or p=97."
        )
    order = len(residue)
    if shuffle_seed is not None:
        residue = residue[torch.randperm(order, generator=generator(shuffle_seed, "residue shuffle"))]
    sign = 1 if task.operation in ("add", "mul") else -1
    second = residue[(sign * torch.arange(order)) % order]
    return PairGrid(task=task, residue=residue, batch=_pairs(task, residue, second))


def powers_of_primitive_root(p: int) -> Int[Tensor, " order"]:
    """g^0, g^1, … g^(p-2) modulo a prime, for the smallest g whose powers are all residues but 0."""
    for g in range(1, p):
        powers = [1]
        while (following := powers[-1] * g % p) != 1:
            powers.append(following)
        if len(powers) == p - 1:
            return torch.tensor(powers)
    raise AssertionError(f"every prime has a primitive root, {p} has none")


def observe(model: Instrumented, grid: PairGrid) -> Observation:
    """Logits and neurons on every pair, by the fast path where the model is our own."""
    chunks = [grid.batch.select(slice(first, first + ROWS)) for first in range(0, grid.order**2, ROWS)]
    logits, neurons = zip(*(_observe(model, chunk) for chunk in chunks), strict=True)
    square = (grid.order, grid.order)
    found = [part for part in neurons if part is not None]
    return Observation(
        logits=torch.cat(logits).unflatten(0, square), neurons=torch.cat(found).unflatten(0, square) if found else None
    )


def cell_losses(
    logits: Float[Tensor, "order order vocab"], grid: PairGrid, cells: Int[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Cross-entropy of the right answer on each of these cells, in double precision."""
    return functional.cross_entropy(logits.flatten(0, 1)[cells].double(), grid.answers[cells], reduction="none")


def embeddings(model: Instrumented, grid: PairGrid) -> Float[Tensor, "order d_model"]:
    """The embedding of the residue with each exponent."""
    trace = run(model, grid.batch.tokens[:: grid.order], record=["embed"])
    return trace["embed"][:, grid.batch.latents["a"].position]


def neuron_logit_map(model: Instrumented, grid: PairGrid) -> Float[Tensor, "order d_mlp"] | None:
    """What each of the last layer's neurons writes to the logit of each exponent: W_L of Nanda et al. 2023.

    None for a model that is not our own, or has no MLP. A final LayerNorm is left out.
    """
    if not isinstance(model, Transformer) or not model.config.d_mlp:
        return None
    mlp = model.block(model.config.n_steps - 1).mlp
    assert mlp is not None
    return (mlp.W_out @ model.W_U).detach()[:, grid.residue].T


def sum_squared_weights(model: Instrumented) -> float | None:
    """Sum of all squared parameters; None for a model whose parameters are not at hand."""
    if not isinstance(model, nn.Module):
        return None
    return sum(float(parameter.detach().double().square().sum()) for parameter in model.parameters())


@torch.no_grad()
def _observe(
    model: Instrumented, batch: Batch
) -> tuple[Float[Tensor, "cell vocab"], Float[Tensor, "cell d_mlp"] | None]:
    if isinstance(model, Transformer):
        plan = ReadPlan.of(model.config, batch.tokens, batch.read)
        return read_neurons(model, plan) if model.config.d_mlp else (read_logits(model, plan), None)
    last = [site for site in model.sites if site.kind.name == "post"][-1:]
    trace = run(model, batch.tokens, record=last)
    return trace.logits[batch.read], trace[last[0]][batch.read] if last else None


def _pairs(task: Modular, first: Int[Tensor, " order"], second: Int[Tensor, " order"]) -> Batch:
    """The task's examples with these operands, sorted by cell."""
    order, absent = len(first), -1
    x, y = (torch.full((task.p,), absent) for _ in range(2))
    x[first], y[second] = torch.arange(order), torch.arange(order)
    batch = task.examples("all")
    x, y = x[batch.latents["a"].value], y[batch.latents["b"].value]
    inside = ((x != absent) & (y != absent)).nonzero()[:, 0]
    return batch.select(inside[(x * order + y)[inside].argsort()])
