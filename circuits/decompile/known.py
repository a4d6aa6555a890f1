"""A Transformer Program as a model whose circuit is known: what each of its variables is made of, read off its text.

The truth is meant for resample ablation: zeros and means are no values of a program's variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from circuits.decompile.decompiled import ranges_on, sequences
from circuits.decompile.graph import VOTES, Dependency, dependencies
from circuits.decompile.python import Names
from circuits.decompile.ranges import Ranges
from circuits.decompile.simplify import find_live
from circuits.graph import LOGITS
from workbench.models.known import KnownCircuit
from workbench.models.program import TransformerProgram
from workbench.models.program_config import ProgramConfig
from workbench.models.program_parts import CONTINUED, ProgramParts
from workbench.tasks.base import Batch
from workbench.tasks.sequences import Sequences

SLOTS = {"query": "<q>", "key": "<k>", "value": "<v>"}
"""How an edge names what a head reads a variable for."""
PART = re.compile(r"(copy|sum|table|counts)_(\d+)_(\d+)")


def known_program(model: TransformerProgram, task: Sequences, *, name: str) -> KnownCircuit:
    """The circuit of a program's dependency graph: variables that no vote needs are left out.

    What occurs is seen on the whole domain where that is listed; otherwise it is what the program's text admits, so
    that an edge may count as true whose variable never changes.

    Args:
        model: the trained Transformer Program.
        task: what it was trained on, which draws the pairs: one letter is changed.
        name: of the circuit.

    Raises:
        WorkbenchError: the program has no heads.
    """
    program = model.discrete_program(tuple(task.vocab))
    batch, listed = sequences(task)
    ranges = ranges_on(program, task, batch if listed else None)
    names = Names(program, ranges)
    found = dependencies(program, find_live(program, ranges), names)
    constants = _constant(names, ranges)
    parts = ProgramParts(model)
    return KnownCircuit(
        name=name,
        model=parts,
        pairs=partial(_pairs, task),
        structural=frozenset(_edges([each for each in found if each.source not in constants], model.config)),
        constants=frozenset(_edges([each for each in found if each.source in constants], model.config)),
        metric="logit_difference",
        ablations=("resample",),
        about=f"A Transformer Program that learnt {task.function}, by its dependency graph.",
        vocab=tuple(task.vocab),
        gradients=CONTINUED,
        clusters={step: [[table] for table in range(parts.config.d_mlp)] for step in range(parts.config.n_steps)},
    )


def _pairs(task: Sequences, n: int, seed: int) -> Batch:
    """Sequences of the test split with one letter changed, read where that changes the answer."""
    batch = task.sample(n, split="test", seed=seed)
    _, distractor = batch.pairs()
    return replace(batch, read=batch.read & (batch.targets != distractor))


def _constant(names: Names, ranges: Ranges) -> frozenset[str]:
    """Variables that have one value."""
    categorical = [name for name, values in zip(names.categorical, ranges.values, strict=True) if len(values) == 1]
    numerical = [name for name, (low, high) in zip(names.numerical, ranges.numbers, strict=True) if low == high]
    return frozenset([*categorical, *numerical])


def _edges(found: list[Dependency], config: ProgramConfig) -> Iterator[str]:
    """The edges that dependencies are; the number 1 is no variable, and has no writer."""
    for each in found:
        if each.source != "ones":
            target = LOGITS if each.target == VOTES else _node(each.target, config) + SLOTS.get(each.role, "")
            yield f"{_node(each.source, config)}->{target}"


def _node(variable: str, config: ProgramConfig) -> str:
    """The node of a graph that writes a variable."""
    part = PART.fullmatch(variable)
    if part is None:
        return "pos" if variable == "positions" else "embed"
    layer, at = part[2], int(part[3])
    # Numerical parts stand behind the categorical ones.
    return {
        "copy": f"a{layer}.h{at}",
        "sum": f"a{layer}.h{config.categorical_heads + at}",
        "table": f"m{layer}.c{at}",
        "counts": f"m{layer}.c{config.categorical_mlps + at}",
    }[part[1]]
