"""Modules written from programs against the programs, by random programs, by hand, and by mutants that must fail."""

import ast
import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from program_models import model_of

from circuits.decompile import decompiled, forms
from circuits.decompile.decompiled import decompile, load_module
from circuits.decompile.forms import write_forms
from circuits.decompile.python import emit_python
from circuits.decompile.ranges import find_ranges, observed_ranges
from circuits.decompile.simplify import find_live
from circuits.decompile.votes import ballots, logits_of, prune_votes, round_votes
from workbench.models.discrete import (
    CategoricalHead,
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
@example(seed=223, function="reverse", layers=2, heads=(1, 1, 0, 0), coded=True)  # A sum that is 1 everywhere votes.
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
    # Whole numbers wherever every sequence was seen, and a formatter has nothing to do: lines are comparable.
    assert not found.exhaustive or not any(isinstance(value, float) for value in constants(found.text))
    assert formatted(found.text) == found.text


def test_a_function_of_too_many_numbers_to_list_is_written_as_its_sums():
    task = Sequences(function="dyck", letters=2, n_ctx=16, size=40)
    sizes = {"categorical_heads": 0, "numerical_heads": 2, "categorical_mlps": 0, "d_mlp": 3}
    model = model_of(task, seed=1, n_layers=2, **sizes)
    # Sums of sums, up to 256 each, are read together.
    last = model.layers[1]
    last.numerical.read_v.data.fill_(0)[:, 1] = 10
    for at, read in enumerate((3, 4)):
        last.number_tables.read.data[:, at] = 10 * torch.eye(5)[read]
    found = decompile(model, task)
    assert "outputs = [total + b for total, b in zip(sums, b_out)]" in found.text
    assert formatted(found.text) == found.text


def constants(text):
    return [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]


def formatted(text):
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "88", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


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
    # What was observed is exactly what occurs, by parts or at once, and inside what could be.
    tokens = batch.tokens.numpy()
    seen = observed_ranges(program, np.array_split(tokens, 3))
    assert seen == observed_ranges(program, [tokens])
    for place, values in enumerate(seen.values):
        assert values == set(categorical[real][:, place].tolist())
    assert seen.numbers == tuple((column.min(), column.max()) for column in numerical[real].T)
    for part in program.parts:
        if isinstance(part.does, CategoricalTable | NumericalMLP):
            read = categorical if isinstance(part.does, CategoricalTable) else numerical
            found = {tuple(pair) for pair in read[real][:, part.does.reads].tolist()}
            assert seen.pairs[part.name] == found <= (ranges.pairs[part.name] or found)


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
    needed = {part.name for part in live.parts(program)}
    dead = [part for part in program.parts if part.name not in needed and not votes(part, program)]
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
    return forms_of(program, task)["python"]


def forms_of(program, task):
    return write_forms(program, find_ranges(program, range(len(task.inputs))), task)


def test_a_program_by_hand_is_a_module_by_hand():
    text = module_of(hist_by_hand(), Sequences(letters=2, n_ctx=4, size=20))
    run = load_module(text).run
    assert run(["0", "1", "0"]) == ["2", "1", "2"]
    assert "    sum_0_0 = add_up(tokens, tokens, ones, lambda query: query)\n" in text
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
    ("predicate", "written"),
    [
        (lambda query: query, "copy_nearest(positions, positions, tokens, lambda query: query)"),
        (lambda query: query - 1, "copy_nearest(positions, positions, tokens, lambda query: query - 1)"),
        (lambda query: 5 - query, "copy_nearest(positions, positions, tokens, lambda query: 5 - query)"),
        (lambda query: 3 + 0 * query, "copy_nearest(positions, positions, tokens, lambda query: 3)"),
        (lambda query: 7 - 0 * query, "copy_nearest(positions, positions, tokens, lambda query: None)"),
        (
            lambda query: np.where(query == 2, 4, query - 1),
            "WANTED_BY_COPY_0_0 = {1: 0, 2: 4, 3: 2, 4: 3, 5: 4}",
        ),
    ],
)
def test_predicates_are_as_short_as_they_can_be(predicate, written):
    task = task_of("hist")
    model = model_of(task, n_layers=1, categorical_heads=1, numerical_heads=0, categorical_mlps=0, numerical_mlps=0)
    program = model.discrete_program(tuple(task.vocab))
    [layer] = program.layers
    # Positions are variable 1.
    head = replace(layer.categorical_heads[0], query=1, key=1, value=0, predicate=predicate(np.arange(8)))
    program = replace(program, layers=(replace(layer, categorical_heads=(head,)),))
    assert written in module_of(program, task)


def test_a_module_that_says_something_else_is_refused(monkeypatch):
    task = task_of("hist")
    model = model_of(task, seed=3)

    # Mutant: a match of one's own is as good as any other.
    def careless(*arguments):
        text = emit_python(*arguments)
        assert "(at == place, abs(at - place), at)" in text
        return text.replace("(at == place, abs(at - place), at)", "(abs(at - place), at)")

    monkeypatch.setattr(forms, "emit_python", careless)
    with pytest.raises(WorkbenchError, match="The readable module is not the program: for '.*' it says"):
        decompile(own_matches(model), task)


def own_matches(model):
    """The model with heads that look for their own token, and copy where they found it."""
    for layer in model.layers:
        heads = layer.categorical
        for gate, variable in ((heads.read_q, 0), (heads.read_k, 0), (heads.read_v, 1)):
            gate.data.fill_(0)[:, variable] = 10
        heads.predicate.data.copy_(10 * torch.eye(8)[None])
    return model


@pytest.mark.parametrize(("function", "split", "least"), [("hist", "domain", 1.0), ("dyck", "train", 0.95)])
def test_single_rows_of_predicates_matter_and_are_caught(function, split, least):
    """Where all sequences are seen every change that matters is caught; elsewhere nearly every one.

    What matters elsewhere is judged on all strings of brackets, of which training draws a few.
    """
    task = task_of(function)
    program = own_matches(model_of(task, seed=3)).discrete_program(tuple(task.vocab))
    batch, everything = task.examples(split), all_prompts(task)
    said = program_logits(program, batch.tokens.numpy()).argmax(2)
    truth = program_logits(program, everything).argmax(2)
    letters = everything < task.letters
    caught = missed = 0
    for index, layer in enumerate(program.layers):
        for row in range(task.letters):
            predicate = layer.categorical_heads[0].predicate.copy()
            predicate[row] = (predicate[row] + 1) % task.letters
            head = replace(layer.categorical_heads[0], predicate=predicate)
            layers = list(program.layers)
            layers[index] = replace(layer, categorical_heads=(head,))
            mutant = replace(program, layers=tuple(layers))
            if np.array_equal(program_logits(mutant, everything).argmax(2)[letters], truth[letters]):
                continue
            try:
                decompiled._check(forms_of(mutant, task), task, batch, said)
                missed += 1
            except WorkbenchError:
                caught += 1
    assert caught > 0
    assert caught >= least * (caught + missed)


def all_prompts(task):
    """Every string of letters of the greatest length, framed."""
    letters = np.array(list(itertools.product(range(task.letters), repeat=task.longest)))
    return task.batch(letters, np.full(len(letters), task.longest)).tokens.numpy()


def test_votes_are_left_out_within_the_budget():
    task = task_of("hist")
    program = model_of(task, seed=1).discrete_program(tuple(task.vocab))
    batch = task.examples("train")
    arrays = (batch.tokens.numpy(), batch.targets.numpy(), batch.read.numpy())

    def right(program):
        return (program_logits(program, arrays[0]).argmax(2) == arrays[1])[arrays[2]].mean()

    cast = ballots(program, *arrays)
    assert cast.count.sum() == arrays[2].sum()
    assert len(cast.count) < cast.count.sum()
    assert cast.accuracy(logits_of(program, cast)) == pytest.approx(right(program))
    lowest = right(program) - 0.05
    pruned, steps = prune_votes(program, cast, lowest=lowest)
    assert steps
    assert right(pruned) == pytest.approx(steps[-1].accuracy)
    assert right(pruned) >= lowest - 1e-12
    assert len(module_of(pruned, task)) < len(module_of(program, task))
    # One variable less than the last costs too much, whichever it is.
    assert prune_votes(pruned, cast, lowest=lowest)[1] == []


def test_votes_are_rounded_as_coarsely_as_is_accepted():
    program = hist_by_hand()
    sizes = []

    def accept(rounded):
        sizes.append(np.abs(rounded.W_numerical).max())
        return len(sizes) == 3

    rounded = round_votes(program, accept)
    assert sizes == [2, 4, 8]
    # 9 becomes 8, and 6 becomes 5.33.
    assert rounded.W_numerical.tolist() == [[0, -1, 0, 0, -4, -8], [0, 2, 0, 0, 4, 5]]
    assert round_votes(program, lambda rounded: False) is None


def test_agreement_is_with_the_model_itself(monkeypatch):
    """Another model's program is checked against itself and says what it says; that is not what the model says."""
    task = task_of("hist")
    model, other = model_of(task, seed=2), model_of(task, seed=3)
    assert decompile(model, task).agreement == 1
    monkeypatch.setattr(model, "discrete_program", other.discrete_program)
    batch = task.examples("domain")
    wanted = (model(batch.tokens).argmax(2) == other(batch.tokens).argmax(2))[batch.read].double().mean()
    assert decompile(model, task).agreement == pytest.approx(wanted.item())
    assert wanted < 1


def test_a_budget_shortens_the_module_and_the_whole_one_changes_nothing():
    task = task_of("hist")
    model = model_of(task, seed=2)
    whole, short = (decompile(model, task, budget=budget) for budget in (0.0, 0.2))
    assert whole.agreement == 1 > short.agreement
    assert short.lines < short.lines_unsimplified == whole.lines
    assert len(short.frontier) > 0 == len(whole.frontier)


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
    assert (found.checked, found.exhaustive) == (50, False)
    # What it is does not hang on how much it was run.
    every = decompile(model_of(task), task)
    assert (every.checked, every.exhaustive) == (len(task.examples("domain")), True)
    assert (found.text, found.domain_accuracy) == (every.text, every.domain_accuracy)
    assert decompile(model_of(task_of("dyck")), task_of("dyck")).domain_accuracy is None


@pytest.mark.parametrize("budget", [-0.1, 1.0, float("nan")])
def test_a_budget_is_a_share(budget):
    task = task_of("hist")
    with pytest.raises(WorkbenchError, match="at least 0 and below 1"):
        decompile(model_of(task), task, budget=budget)


def test_a_table_of_one_variable_is_one_of_one():
    table = np.tile(np.arange(8) % 2, (8, 1))
    assert 'TABLE_0_0 = {"0": 0, "1": 1, "2": 0, "<s>": 0}' in module_with_table((0, 0), table)


@pytest.mark.parametrize(
    ("table", "written"),
    [
        # One letter decides: one rule says it.
        (
            lambda letter, position: np.where(letter == 1, 5, 2),
            'def table_0_0_of(one: str, two: int) -> int:\n    if one == "1":\n        return 5\n    return 2\n',
        ),
        # No rule is shorter than the table.
        (lambda letter, position: (3 * letter + position**2) % 7, 'TABLE_0_0 = {\n    "0": {0: 0, 1: 1, 2: 4,'),
    ],
)
def test_tables_are_rules_or_rows_whichever_is_shorter(table, written):
    letter, position = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    assert written in module_with_table((0, 1), table(letter, position))


def module_with_table(reads, table):
    """The module of one table that votes."""
    task = task_of("hist")
    model = model_of(task, n_layers=1, categorical_heads=0, numerical_heads=0, numerical_mlps=0)
    program = model.discrete_program(tuple(task.vocab))
    layer = replace(program.layers[0], categorical_mlps=(CategoricalTable(reads=reads, table=table),))
    return module_of(replace(program, layers=(layer,)), task)


def test_the_published_emitters_defects_are_none_of_ours():
    """Both programs are ones that the published emitter writes differently from its model.

    There a match of one's own stands at a distance of as many as there are matches, so it beats one that is farther;
    and a table of counts lists no count above the number of positions less one, while the sum of a sum reaches more.
    """
    task = Sequences(letters=2, n_ctx=4, size=20)
    program = hist_by_hand()
    copy = CategoricalHead(query=0, key=0, value=1, predicate=np.arange(8))
    votes = np.zeros((3, 8, 6))
    # A vote for the number of the position copied from: position 3 of `0 1 0` copies from 1, two places away.
    votes[2, [1, 2, 3], [1, 4, 5]] = 1
    layer = Layer(categorical_heads=(copy,), numerical_heads=(), categorical_mlps=(), numerical_mlps=())
    tie = replace(program, layers=(layer,), W_categorical=votes, W_numerical=np.zeros((1, 6)))
    assert load_module(module_of(tie, task)).run(["0", "1", "0"]) == ["3", "2", "1"]

    # All positions see all: 4 ones, 4 fours. The published table ends at 7 and falls back to its default.
    every = np.zeros(8, dtype=int)
    code = CategoricalTable(reads=(0, 0), table=np.zeros((8, 8), dtype=int))
    heads = [NumericalHead(query=2, key=2, value=value, predicate=every) for value in (0, 1)]
    above = NumericalMLP(
        reads=(2, 2),
        W_in=np.array([[1.0], [0.0]]),
        b_in=np.array([-15.0]),
        W_out=np.array([[0.0, 2.0, *[0.0] * 6]]),
        b_out=np.array([1.0, 0.0, *[-1.0] * 6]),
    )
    layers = (
        Layer(categorical_heads=(), numerical_heads=(), categorical_mlps=(code,), numerical_mlps=()),
        Layer(categorical_heads=(), numerical_heads=(heads[0],), categorical_mlps=(), numerical_mlps=()),
        Layer(categorical_heads=(), numerical_heads=(heads[1],), categorical_mlps=(), numerical_mlps=(above,)),
    )
    votes = np.zeros((4, 8, 6))
    votes[3, 1, 5] = votes[3, 0, 1] = 1
    counts = replace(program, layers=layers, W_categorical=votes, W_numerical=np.zeros((3, 6)))
    text = module_of(counts, task)
    run = load_module(text).run
    assert "    table_0_0 = [0 for one in tokens]\n" in text
    assert run(["0", "1", "0"]) == ["3", "3", "3"]
    assert run(["0", "1"]) == ["1", "1"]
    for wrong in (tie, counts):
        said = program_logits(wrong, task.examples("domain").tokens.numpy()).argmax(2)
        decompiled._check(forms_of(wrong, task), task, task.examples("domain"), said)
