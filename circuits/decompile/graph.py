"""What each variable of a program is made of: the program as a graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from circuits.decompile.python import Names
from circuits.decompile.simplify import Live, find_voters
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalFunction,
    NumericalHead,
)

VOTES = "votes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dependency:
    """One variable that another is made of."""

    source: str
    target: str
    role: str
    """query, key, value, one or two; `votes` for what the classifier reads."""


def dependencies(program: DiscreteProgram, live: Live, names: Names) -> list[Dependency]:
    """All that the votes rest on, in the order in which it is computed.

    Args:
        program: the program.
        live: variables that are still needed.
        names: what they are called.
    """
    found = []
    for part in live.parts(program):
        match part.does:
            case CategoricalHead() as head:
                reads = {"query": head.query, "key": head.key, "value": head.value}
                sources = {role: names.categorical[read] for role, read in reads.items()}
            case NumericalHead() as head:
                reads = {"query": head.query, "key": head.key}
                sources = {role: names.categorical[read] for role, read in reads.items()}
                sources["value"] = names.numerical[head.value]
            case CategoricalTable() as mlp:
                sources = dict(zip(("one", "two"), (names.categorical[read] for read in mlp.reads), strict=True))
            case NumericalFunction() as mlp:
                sources = dict(zip(("one", "two"), (names.numerical[read] for read in mlp.reads), strict=True))
        found += [Dependency(source=source, target=part.name, role=role) for role, source in sources.items()]
    voters = find_voters(program, names.ranges)
    voting = [
        *(names.categorical[place] for place in sorted(voters.categorical)),
        *(names.numerical[place] for place in sorted(voters.numerical)),
    ]
    return found + [Dependency(source=name, target=VOTES, role=VOTES) for name in voting]


def as_dot(found: Sequence[Dependency]) -> str:
    """The graph in the language of Graphviz: heads are boxes, tables are ovals, queries and keys are dashed."""
    nodes = dict.fromkeys(name for each in found for name in (each.source, each.target))
    lines = ["digraph program {", "  rankdir=LR;"]
    for name in nodes:
        shape = "box" if name.startswith(("copy_", "sum_")) else "oval" if "_" in name else "plaintext"
        lines.append(f"  {json.dumps(name)} [shape={shape}];")
    for each in found:
        style = "dashed" if each.role in ("query", "key") else "solid"
        label = "" if each.role == VOTES else f", label={each.role}"
        lines.append(f"  {json.dumps(each.source)} -> {json.dumps(each.target)} [style={style}{label}];")
    return "\n".join([*lines, "}", ""])
