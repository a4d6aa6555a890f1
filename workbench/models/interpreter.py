"""What a discrete program computes, by its definition: integers and distances, no weights until the votes.

It shares no code with the model that programs are made from, so that the two check each other.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64, Int64

from workbench.models.discrete import CategoricalHead, DiscreteProgram, NumericalHead

Tokens = Int64[np.ndarray, "batch pos"]
Categorical = Int64[np.ndarray, "batch pos variable"]
Numerical = Int64[np.ndarray, "batch pos number"]
Sees = Bool[np.ndarray, "batch dest src"]


def run_program(program: DiscreteProgram, tokens: Tokens) -> tuple[Categorical, Numerical]:
    """The categorical and the numerical variables at every position, in the order of `workbench.models.discrete`."""
    place = np.broadcast_to(np.arange(tokens.shape[1])[None, :, None], (*tokens.shape, 1))
    categorical = np.concatenate([program.embedding[tokens], place], 2)
    numerical = np.ones((*tokens.shape, 1), dtype=np.int64)
    sees = _sees(program, tokens)
    for layer in program.layers:
        copied = [_copied(head, categorical, sees) for head in layer.categorical_heads]
        summed = [_summed(head, categorical, numerical, sees) for head in layer.numerical_heads]
        categorical = np.stack([*np.moveaxis(categorical, 2, 0), *copied], 2)
        numerical = np.stack([*np.moveaxis(numerical, 2, 0), *summed], 2)
        codes = [mlp.table[tuple(categorical[:, :, read] for read in mlp.reads)] for mlp in layer.categorical_mlps]
        codes += [mlp(numerical[:, :, list(mlp.reads)]) for mlp in layer.numerical_mlps]
        categorical = np.stack([*np.moveaxis(categorical, 2, 0), *codes], 2)
    return categorical, numerical


def program_logits(program: DiscreteProgram, tokens: Tokens) -> Float64[np.ndarray, "batch pos output"]:
    """The votes at every position; minus infinity where a class may not be the output."""
    categorical, numerical = run_program(program, tokens)
    logits = numerical @ program.W_numerical
    for variable in range(categorical.shape[2]):
        logits = logits + program.W_categorical[variable][categorical[:, :, variable]]
    return np.where(np.array(program.allowed), logits, -np.inf)


def _sees(program: DiscreteProgram, tokens: Tokens) -> Sees:
    real = tokens != program.pad_token
    sees = real[:, :, None] & real[:, None, :]
    return np.tril(sees) if program.shape.causal else sees


def _matches(head: CategoricalHead | NumericalHead, categorical: Categorical, sees: Sees) -> Sees:
    wanted = head.predicate[categorical[:, :, head.query]]
    return (wanted[:, :, None] == categorical[:, None, :, head.key]) & sees


def _copied(head: CategoricalHead, categorical: Categorical, sees: Sees) -> Int64[np.ndarray, "batch pos"]:
    matches = _matches(head, categorical, sees)
    n = sees.shape[1]
    place = np.arange(n)
    distance = np.abs(place[:, None] - place)
    # Of equal distances the earlier position comes first, as argmin has it; the position itself comes last.
    order = np.where(distance == 0, n, distance)
    nearest = np.where(matches, order, n + 1).argmin(2)
    nearest = np.where(matches.any(2), nearest, 0)
    return np.take_along_axis(categorical[:, :, head.value], nearest, 1)


def _summed(
    head: NumericalHead, categorical: Categorical, numerical: Numerical, sees: Sees
) -> Int64[np.ndarray, "batch pos"]:
    return (_matches(head, categorical, sees) * numerical[:, None, :, head.value]).sum(2)
