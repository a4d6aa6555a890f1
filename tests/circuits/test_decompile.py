"""Modules written from programs against the programs, by random programs, by hand, and by mutants that must fail."""

import ast
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from program_models import model_of

from circuits.decompile import decompiled
from circuits.decompile.decompiled import decompile, load_module
from circuits.decompile.python import emit_python
from circuits.decompile.ranges import find_ranges
from circuits.decompile.simplify import find_live, prune_votes
from workbench.models.discrete import (
    CategoricalTable,
    DiscreteProgram,
    Layer,
    NumericalHead,
    NumericalMLP,
    ProgramShape,
)
from workbench.models.interpreter import program_logits, run_program
from workbench.runtime import WorkbenchError
from workbench.tasks.sequences import Sequences

SIZES = {"reverse": (3, 6), "hist": (3, 6), "dyck": (2, 8), "induction": (4, 6)}


def task_of(function):
    letters, n_ctx = SIZES[function]
    return Sequences(function=function, letters=letters, n_ctx=n_ctx, size=60)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    function=st.sampled_from(list(SIZES)),
    layers=st.integers(1, 3),
    heads=st.tuples(*[st.integers(0, 2)] * 4).filter(any),
    coded=st.booleans(),
)
def test_a_module_says_what_its_program_says(seed, function, layers, heads, coded):
    names = ("categorical_heads", "numerical_heads", "categorical_mlps", "numerical_mlps")
    columns = {"coded": True, "columns": 2} if coded else {}
    task = task_of(function)
    model = model_of(task, seed, n_layers=layers, **dict(zip(names, heads, strict=True)), **columns)
    found = decompile(model, task)
    # It was run on all of these, and would have been refused.
    assert found.checked == len(task.examples("domain" if function in ("reverse", "hist") else "train"))
    assert found.exhaustive == (function in ("reverse", "hist"))
    assert found.agreement == 1
    assert (found.domain_accuracy is not None) == found.exhaustive
    assert found.lines == found.lines_unsimplified == len(found.text.splitlines())
    imported = {each.module for each in ast.walk(ast.parse(found.text)) if isinstance(each, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "typing"}
    assert max(map(len, found.text.splitlines())) <= 125


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), function=st.sampled_from(list(SIZES)))
def test_nothing_occurs_outside_the_ranges(seed, function):
    task = task_of(function)
    program = model_of(task, seed).discrete_program(tuple(task.vocab))
    ranges = find_ranges(program, range(len(task.inputs)))
    batch = task.examples("train")
    categorical, numerical = run_program(program, batch.tokens.numpy())
    real = (batch.tokens != task.pad_token).numpy()
    for place, values in enumerate(ranges.values):
        assert set(categorical[real][:, place].tolist()) <= values
    for place, (low, high) in enumerate(ranges.numbers):
        assert low <= numerical[real][:, place].min() <= numerical[real][:, place].max() <= high


def lives(part, live):
    return part.writes in (live.numerical if isinstance(part.does, NumericalHead) else live.categorical)


def votes(part, program):
    weights = program.W_numerical if isinstance(part.does, NumericalHead) else program.W_categorical
    return weights[part.writes].any()


def without(program, ranges, parts):
    """The program whose parts look for letter 0, or say one of the values that they may say, whatever they read."""
    writes = {id(part.does): part.writes for part in parts}

    def silent(part):
        if id(part) not in writes:
            return part
        if isinstance(part, CategoricalTable | NumericalMLP):
            value = min(ranges.values[writes[id(part)]])
            if isinstance(part, CategoricalTable):
                return replace(part, table=np.full_like(part.table, value))
            return replace(part, W_out=np.zeros_like(part.W_out), b_out=np.eye(len(part.b_out))[value])
        return replace(part, predicate=np.zeros_like(part.predicate))

    names = ("categorical_heads", "numerical_heads", "categorical_mlps", "numerical_mlps")
    layers = [
        replace(layer, **{name: tuple(map(silent, getattr(layer, name))) for name in names}) for layer in program.layers
    ]
    return replace(program, layers=tuple(layers))


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_what_does_not_live_changes_no_answer(seed):
    task = task_of("hist")
    model = model_of(task, seed)
    # Half of the variables have no votes.
    model.W_categorical.data[::2] = 0
    model.W_numerical.data[1:] = 0
    program = model.discrete_program(tuple(task.vocab))
    ranges = find_ranges(program, range(len(task.inputs)))
    live = find_live(program, ranges)
    tokens = task.examples("domain").tokens.numpy()
    real = tokens != task.pad_token
    # Nothing that a live part reads is dead: what dead parts do may be anything that they can do.
    dead = [part for part in program.parts if not lives(part, live) and not votes(part, program)]
    changed = without(program, ranges, dead)
    first, second = (program_logits(each, tokens)[real] for each in (program, changed))
    assert np.array_equal(first, second)


def test_a_sum_lives_by_the_sum_that_it_sums():
    """The second head counts what the first counted; only the second has votes."""
    first, second = (NumericalHead(query=0, key=0, value=value, predicate=np.arange(8)) for value in (0, 1))
    program = hist_by_hand()
    layers = [
        Layer(categorical_heads=(), numerical_heads=(head,), categorical_mlps=(), numerical_mlps=())
        for head in (first, second)
    ]
    counts, votes = program.W_numerical
    summed = replace(program, layers=tuple(layers), W_numerical=np.array([counts, 0 * votes, votes]))
    live = find_live(summed, find_ranges(summed, range(4)))
    assert {1, 2} <= live.numerical
    assert 0 in live.categorical


def hist_by_hand():
    """Counts the letters `0` and `1` like their own, and votes for the count."""
    votes = np.zeros((2, 8, 6))
    count = NumericalHead(query=0, key=0, value=0, predicate=np.arange(8))
    return DiscreteProgram(
        shape=ProgramShape(cardinality=8, n_ctx=4, causal=False),
        vocab=("0", "1", "<pad>", "<s>", "2", "3"),
        classes=("0", "1", "<pad>", "<s>", "2", "3"),
        pad_token=2,
        embedding=np.arange(6)[:, None],
        layers=(Layer(categorical_heads=(), numerical_heads=(count,), categorical_mlps=(), numerical_mlps=()),),
        W_categorical=votes,
        # 2 n x - n² is largest where n is x.
        W_numerical=np.array([[0, -1, 0, 0, -4, -9], [0, 2, 0, 0, 4, 6.0]]),
        allowed=(False, True, False, False, True, True),
    )


def module_of(program, task):
    ranges = find_ranges(program, range(len(task.inputs)))
    begin = task.inputs.index("<s>")
    interface = decompiled.Interface(title="t", letters=task.letters, begin=begin, end=None, longest=task.longest)
    return emit_python(program, ranges, find_live(program, ranges), interface)


def test_a_program_by_hand_is_a_module_by_hand():
    text = module_of(hist_by_hand(), Sequences(letters=2, n_ctx=4, size=20))
    run = load_module(text)
    assert run(["0", "1", "0"]) == ["2", "1", "2"]
    assert "def wanted_by_sum_0_0(query: str) -> str | None:\n    return query\n" in text
    # Votes of what votes nothing, positions and the other kind of head are not written.
    assert not any(each in text for each in ("VOTES_OF_TOKENS", "positions", "copy_nearest"))
    for letters, message in (
        ([], "Give 1 to 3 letters, got 0"),
        (["0"] * 4, "Give 1 to 3 letters, got 4"),
        (["0", "<pad>"], "Letter '<pad>' is not in the alphabet: 0 1."),
    ):
        with pytest.raises(ValueError, match=message):
            run(letters)


@pytest.mark.parametrize(
    ("predicate", "body"),
    [
        (lambda query: query, "return query"),
        (lambda query: query - 1, "return query - 1"),
        (lambda query: 5 - query, "return 5 - query"),
        (lambda query: 3 + 0 * query, "return 3"),
        (lambda query: np.where(query == 2, 4, query - 1), "if query == 2:\n        return 4\n    return query - 1"),
    ],
)
def test_predicates_are_closed_forms_where_they_can_be(predicate, body):
    task = task_of("hist")
    model = model_of(task, n_layers=1, categorical_heads=1, numerical_heads=0, categorical_mlps=0, numerical_mlps=0)
    program = model.discrete_program(tuple(task.vocab))
    [layer] = program.layers
    # Positions are variable 1.
    head = replace(layer.categorical_heads[0], query=1, key=1, value=0, predicate=predicate(np.arange(8)))
    program = replace(program, layers=(replace(layer, categorical_heads=(head,)),))
    assert f"(query: int) -> int | None:\n    {body}\n" in module_of(program, task)


def test_a_module_that_says_something_else_is_refused(monkeypatch):
    task = task_of("hist")
    model = model_of(task, seed=3)

    # Mutant: a match of one's own is as good as any other.
    def careless(*arguments):
        return emit_python(*arguments).replace("[at for at in matches if at != place] or matches", "matches")

    monkeypatch.setattr(decompiled, "emit_python", careless)
    with pytest.raises(WorkbenchError, match="The module is not the program: for '.*' it says"):
        decompile(own_matches(model), task)


def own_matches(model):
    """The model with heads that look for their own token, and copy where they found it."""
    for layer in model.layers:
        heads = layer.categorical
        for gate, variable in ((heads.read_q, 0), (heads.read_k, 0), (heads.read_v, 1)):
            gate.data.fill_(0)[:, variable] = 10
        heads.predicate.data.copy_(10 * torch.eye(8)[None])
    return model


def test_single_rows_of_predicates_matter_and_are_caught():
    task = task_of("hist")
    program = own_matches(model_of(task, seed=3)).discrete_program(tuple(task.vocab))
    batch = task.examples("domain")
    tokens, read = batch.tokens.numpy(), batch.read.numpy()
    said = program_logits(program, tokens).argmax(2)
    caught = missed = 0
    for row in range(task.letters):
        layer = program.layers[0]
        predicate = layer.categorical_heads[0].predicate.copy()
        predicate[row] = (predicate[row] + 1) % task.letters
        head = replace(layer.categorical_heads[0], predicate=predicate)
        mutant = replace(program, layers=(replace(layer, categorical_heads=(head,)), *program.layers[1:]))
        if np.array_equal(program_logits(mutant, tokens).argmax(2)[read], said[read]):
            continue
        try:
            decompiled._check(module_of(mutant, task), task, batch, said)
            missed += 1
        except WorkbenchError:
            caught += 1
    assert (missed, caught > 0) == (0, True)


def test_votes_are_left_out_within_the_budget():
    task = task_of("hist")
    program = model_of(task, seed=1).discrete_program(tuple(task.vocab))
    batch = task.examples("train")
    arrays = (batch.tokens.numpy(), batch.targets.numpy(), batch.read.numpy())
    right = (program_logits(program, arrays[0]).argmax(2) == arrays[1])[arrays[2]].mean()
    pruned, steps = prune_votes(program, *arrays, budget=0.05)
    left = (program_logits(pruned, arrays[0]).argmax(2) == arrays[1])[arrays[2]].mean()
    assert steps
    assert left == pytest.approx(steps[-1].accuracy)
    assert left >= right - 0.05 - 1e-12
    assert len(module_of(pruned, task)) < len(module_of(program, task))


def test_the_parts_stand_where_they_write():
    program = model_of(task_of("hist")).discrete_program(tuple(task_of("hist").vocab))
    assert [(part.name, part.writes) for part in program.parts] == [
        ("copy_0_0", 2),
        ("sum_0_0", 1),
        ("table_0_0", 3),
        ("counts_0_0", 4),
        ("copy_1_0", 5),
        ("sum_1_0", 2),
        ("table_1_0", 6),
        ("counts_1_0", 7),
    ]


def test_some_sequences_are_not_all():
    task = task_of("hist")
    found = decompile(model_of(task), task, most=50)
    assert (found.checked, found.exhaustive, found.domain_accuracy) == (50, False, None)


@pytest.mark.parametrize("budget", [-0.1, 1.0, float("nan")])
def test_a_budget_is_a_share(budget):
    task = task_of("hist")
    with pytest.raises(WorkbenchError, match="at least 0 and below 1"):
        decompile(model_of(task), task, budget=budget)


def test_a_table_of_one_variable_is_a_function_of_one():
    task = task_of("hist")
    model = model_of(task, n_layers=1, categorical_heads=0, numerical_heads=0, numerical_mlps=0)
    program = model.discrete_program(tuple(task.vocab))
    table = np.tile(np.arange(8) % 2, (8, 1))
    layer = replace(program.layers[0], categorical_mlps=(CategoricalTable(reads=(0, 0), table=table),))
    text = module_of(replace(program, layers=(layer,)), task)
    assert "def table_0_0_of(first: str) -> int:\n    if first == '1':\n        return 1\n    return 0" in text.replace(
        "in {'1', '<s>'}", "== '1'"
    )
