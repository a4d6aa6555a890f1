"""A program in every form that it is written in, for people, for machines and for other tools."""

from __future__ import annotations

from typing import Literal, get_args

from circuits.decompile.fast import emit_fast
from circuits.decompile.graph import as_dot, dependencies
from circuits.decompile.python import Interface, Names, emit_python
from circuits.decompile.ranges import Ranges
from circuits.decompile.rasp import emit_rasp
from circuits.decompile.simplify import find_live
from workbench.models.discrete import DiscreteProgram
from workbench.tasks.sequences import BEGIN, END, Sequences

Form = Literal["python", "fast", "rasp", "graph"]
"""A module that a person reads, one that runs many sequences at once, RASP, and the graph in Graphviz's language."""
FORMS: tuple[Form, ...] = get_args(Form)


def write_forms(program: DiscreteProgram, ranges: Ranges, task: Sequences) -> dict[Form, str]:
    """The texts of a program, each without what no vote needs."""
    live = find_live(program, ranges)
    interface = Interface(
        title=f"{task.function} of up to {task.longest} letters, as a program that was learnt.",
        letters=task.letters,
        begin=task.inputs.index(BEGIN),
        end=task.inputs.index(END) if END in task.inputs else None,
        longest=task.longest,
    )
    return {
        "python": emit_python(program, ranges, live, interface),
        "fast": emit_fast(program, ranges, live, interface),
        "rasp": emit_rasp(program, ranges, live, interface),
        "graph": as_dot(dependencies(program, live, Names(program, ranges))),
    }
