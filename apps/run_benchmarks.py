"""What runs cost beside their steps: many members at once, the data that they learn, what is read off, importing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from apps.bench import Benchmark, Run
from apps.programs import decompile_run, sequences_of
from apps.step_benchmarks import Gradients, distance, gradients, still
from circuits.decompile.decompiled import load_module
from workbench.runtime import generator
from workbench.store import RunFolder
from workbench.tasks.composition import Composition
from workbench.training.batched import Stack
from workbench.training.checkpoints import load
from workbench.training.loop import Trainer
from workbench.training.recipe import Recipe
from workbench.training.recipes import modular_smoke

SEQUENCES = 2_000
"""Sequences that a module is timed on."""


def many_at_once(name: str, recipe: Recipe, *, members: int, target: float, gate: float) -> Benchmark:
    """A step of several seeds of a recipe as one model, against a step of each in turn."""
    width = recipe.transformer.d_model
    return Benchmark(
        name=name,
        compares=f"A training step of {members} seeds of modular addition at width {width}, all of them.",
        peer="the members' own steps in turn",
        prepare=partial(_prepare_many, recipe, members),
        agreement=_largest_distance,
        tolerance=1e-4,
        target=target,
        gate=gate,
        conditions={"members": members, "d_model": width, "examples": len(recipe.task.examples("train"))},
    )


def _prepare_many(recipe: Recipe, members: int) -> tuple[Run, Run]:
    seeds = [still(recipe.with_seed(seed)) for seed in range(members)]
    alone, together = ([_trainer(each) for each in seeds] for _ in range(2))
    stack = Stack(together)

    def theirs() -> list[Gradients]:
        for trainer in alone:
            trainer.position.step = 0
            trainer.step()
        return [gradients(trainer.model) for trainer in alone]

    def ours() -> list[Gradients]:
        for trainer in together:
            trainer.position.step = 0
        stack.step()
        return list(stack.gradients())

    return theirs, ours


def _trainer(recipe: Recipe) -> Trainer:
    return Trainer(recipe, RunFolder(path=Path(recipe.name), reference=recipe.name), Accelerator(cpu=True))


def _largest_distance(theirs: list[Gradients], ours: list[Gradients]) -> float:
    return max(distance(*pair) for pair in zip(theirs, ours, strict=True))


def composition_data() -> Benchmark:
    """The chains of a split of the composition task, against plain Python over its facts."""
    task = Composition(entities=2000, relations=200, out_degree=20, phi=1.0)
    n = len(task.examples("id_ood"))
    return Benchmark(
        name="data-composition",
        compares=f"The {n:,} prompts of two hops of which the second is OOD, from 40,000 facts.",
        peer="a loop over facts in plain Python",
        prepare=partial(_prepare_data, task),
        agreement=_share_that_differs,
        tolerance=0.0,
        target=4.0,
        gate=2.0,
        conditions={
            "entities": task.entities,
            "relations": task.relations,
            "out_degree": task.out_degree,
            "prompts": n,
        },
    )


def _prepare_data(task: Composition) -> tuple[Run, Run]:
    told, untold = (_facts(task, split) for split in ("atomic_id", "atomic_ood"))
    second: dict[int, list[tuple[int, int]]] = {}
    for head, relation, tail in untold:
        second.setdefault(head, []).append((relation, tail))

    def theirs() -> Tensor:
        chains = [
            (head, first, last, answer) for head, first, bridge in told for last, answer in second.get(bridge, ())
        ]
        return torch.tensor(chains)

    def ours() -> Tensor:
        batch = task.examples("id_ood")
        return torch.cat([batch.tokens, batch.targets[:, 2:]], 1)

    return theirs, ours


def _facts(task: Composition, split: str) -> list[list[int]]:
    batch = task.examples(split)
    return torch.cat([batch.tokens[:, :2], batch.targets[:, 1:2]], 1).tolist()


def _share_that_differs(theirs: Tensor, ours: Tensor) -> float:
    one, other = ({tuple(row) for row in rows.tolist()} for rows in (theirs, ours))
    return len(one ^ other) / len(one)


def fast_program() -> Benchmark:
    """The fast module of a Transformer Program on many sequences, against the readable one on each."""
    return Benchmark(
        name="program-fast",
        compares=f"The answers to {SEQUENCES:,} random sequences by the module of gallery:sort, budget 0.001.",
        peer="the readable module, a sequence at a time",
        prepare=partial(_prepare_program, "gallery:sort"),
        agreement=_share_of_answers,
        tolerance=0.0,
        target=10.0,
        gate=5.0,
        conditions={"run": "gallery:sort", "sequences": SEQUENCES},
    )


def _prepare_program(reference: str) -> tuple[Run, Run]:
    run = load(reference)
    task, found = sequences_of(run), decompile_run(run, None, budget=0.001, most=SEQUENCES)
    readable, fast = (load_module(found.forms[form]) for form in ("python", "fast"))
    rng = generator(0, "sequences of a benchmark")
    lengths = torch.randint(1, task.longest + 1, (SEQUENCES,), generator=rng).tolist()
    given = [
        [task.vocab[letter] for letter in torch.randint(task.letters, (length,), generator=rng).tolist()]
        for length in lengths
    ]
    return lambda: list(map(readable.run, given)), lambda: fast.run_all(given)


def _share_of_answers(theirs: list[list[str]], ours: list[list[str]]) -> float:
    return sum(one != other for one, other in zip(theirs, ours, strict=True)) / len(theirs)


def importing(name: str, compares: str, ours: str, *, target: float, gate: float) -> Benchmark:
    """A new process that imports, against one that imports TransformerLens."""
    return Benchmark(
        name=name,
        compares=compares,
        peer="import transformer_lens",
        prepare=lambda: (partial(_import, "import transformer_lens"), partial(_import, ours)),
        agreement=lambda theirs, ours: float(theirs != ours),
        target=target,
        gate=gate,
    )


def _import(statement: str) -> int:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", statement], capture_output=True).returncode


HELP = "import apps.cli; apps.cli.build_parser().format_help()"
NOTEBOOK = (
    "import workbench, circuits, probes; from circuits import evaluate, extract, patch_each; from probes import fourier"
)
NARROW = ["d_model=32", "d_head=8", "d_mlp=128"]
RUNS: Mapping[str, Callable[[], Benchmark]] = {
    name: partial(many_at_once, name, modular_smoke().override(settings), members=members, target=target, gate=gate)
    for name, settings, members, target, gate in (
        ("many-84", ["p=13", *NARROW], 64, 5.0, 3.5),
        ("many-264", ["p=23", *NARROW], 32, 3.8, 3.5),
        ("many-wide", ["p=59", "d_model=128", "d_head=32", "d_mlp=512"], 8, 1.0, 0.95),
    )
} | {
    "data-composition": composition_data,
    "program-fast": fast_program,
    "import-help": partial(
        importing, "import-help", "A process that prints the help of the command line.", HELP, target=20.0, gate=10.0
    ),
    "import-notebook": partial(
        importing, "import-notebook", "A process that imports what a notebook starts with.", NOTEBOOK, target=1.5,
        gate=1.0,
    ),
}  # fmt: skip
"""What can be measured of runs, by name."""
