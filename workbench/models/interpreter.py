"""What a discrete program computes, by its definition: integers and distances, no weights until the votes.

It shares no code with the model that programs are made from, so that the two check each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalFunction,
    NumericalHead,
)

Tokens = Int64[np.ndarray, "batch pos"]
Categorical = Int64[np.ndarray, "batch pos variable"]
Numerical = Int64[np.ndarray, "batch pos number"]
Sees = Bool[np.ndarray, "batch dest src"]


def run_program(program: DiscreteProgram, tokens: Tokens) -> tuple[Categorical, Numerical]:
    """The categorical and the numerical variables at every position, in the order of `workbench.models.discrete`."""
    categorical = [program.embedding[tokens, column] for column in range(program.embedding.shape[1])]
    categorical.append(np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
    numerical = [np.ones_like(tokens)]
    sees = _sees(program, tokens)
    for part in program.parts:
        match part.does:
            case CategoricalHead() as head:
                categorical.append(_copied(head, categorical, sees))
            case NumericalHead() as head:
                matches = _matches(head, categorical, sees)
                numerical.append((matches * numerical[head.value][:, None, :]).sum(2))
            case CategoricalTable() as mlp:
                categorical.append(mlp.table[tuple(categorical[read] for read in mlp.reads)])
            case NumericalFunction() as mlp:
                categorical.append(mlp(np.stack([numerical[read] for read in mlp.reads], 2)))
    return np.stack(categorical, 2), np.stack(numerical, 2)


def program_logits(program: DiscreteProgram, tokens: Tokens) -> Float64[np.ndarray, "batch pos output"]:
    """The votes at every position; minus infinity where a class may not be the output."""
    categorical, numerical = run_program(program, tokens)
    logits = numerical @ program.W_numerical
    for variable in range(categorical.shape[2]):
        logits = logits + program.W_categorical[variable][categorical[:, :, variable]]
    if program.shape.pooled:
        real = (tokens != program.pad_token)[:, :, None]
        logits = np.broadcast_to(logits.mean(1, keepdims=True, where=real), logits.shape)
    return np.where(np.array(program.allowed), logits, -np.inf)


def _sees(program: DiscreteProgram, tokens: Tokens) -> Sees:
    real = tokens != program.pad_token
    sees = real[:, :, None] & real[:, None, :]
    return np.tril(sees) if program.shape.causal else sees


def _matches(head: CategoricalHead | NumericalHead, categorical: Sequence[Tokens], sees: Sees) -> Sees:
    wanted = head.predicate[categorical[head.query]]
    return (wanted[:, :, None] == categorical[head.key][:, None, :]) & sees


def _copied(head: CategoricalHead, categorical: Sequence[Tokens], sees: Sees) -> Tokens:
    matches = _matches(head, categorical, sees)
    n = sees.shape[1]
    place = np.arange(n)
    distance = np.abs(place[:, None] - place)
    # Of equal distances the earlier position comes first, as argmin has it; the position itself comes last.
    order = np.where(distance == 0, n, distance)
    nearest = np.where(matches, order, n + 1).argmin(2)
    nearest = np.where(matches.any(2), nearest, 0)
    return np.take_along_axis(categorical[head.value], nearest, 1)
