"""What the solver says against what running the program on every sequence says, and definitions against the tasks."""

from dataclasses import replace

import numpy as np
import pytest
import z3
from hypothesis import given, settings
from hypothesis import strategies as st
from program_models import model_of

from circuits.decompile.proof import prove
from circuits.decompile.specifications import SPECIFICATIONS
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    Layer,
    NumericalHead,
    ProgramShape,
)
from workbench.models.interpreter import program_logits
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tasks.sequence_functions import FUNCTIONS
from workbench.tasks.sequences import Sequences

PROVENANCE = Provenance(code_version="", recipe="", seed=None, parents=())
SIZES = {"reverse": (3, 6), "sort": (3, 6), "hist": (3, 5), "double_hist": (3, 5), "dyck": (4, 6)}
SIZES |= {"most_freq": (3, 5), "induction": (4, 6)}


def task_of(function):
    letters, n_ctx = SIZES[function]
    return Sequences(function=function, letters=letters, n_ctx=n_ctx, size=60)


def every(task, length):
    """All sequences of a length."""
    letters = np.stack(np.unravel_index(np.arange(task.letters**length), (task.letters,) * length), 1)
    letters = np.pad(letters, ((0, 0), (0, task.longest - length)))
    return task.batch(letters, np.full(len(letters), length))


@pytest.mark.parametrize("function", SPECIFICATIONS)
@pytest.mark.parametrize("letters", [2, 4])
def test_definitions_are_the_tasks(function, letters):
    """On given letters a formula is a truth value, so that definitions can be run."""
    assert set(SPECIFICATIONS) == set(FUNCTIONS)
    task = Sequences(function=function, letters=letters, n_ctx=7, size=60)
    for length in range(1, 5):
        batch = every(task, length)
        arrays = (batch.tokens.tolist(), batch.targets.tolist(), batch.read.tolist())
        for tokens, targets, read in zip(*arrays, strict=True):
            given_letters = [{letter: True} for letter in tokens[1 : 1 + length]]
            said = SPECIFICATIONS[function](given_letters, letters)
            outputs = [[one for one, held in value.items() if held is True] for value in said]
            wanted = [[target] if asked else [] for target, asked in zip(targets, read, strict=True)]
            assert [[task.outputs[one] for one in each] for each in outputs] == wanted[1 : 1 + length]


def right(program, task, length):
    """Whether the program is, on each sequence of the length."""
    batch = every(task, length)
    said = program_logits(program, batch.tokens.numpy()).argmax(2)
    return ((said == batch.targets.numpy()) | ~batch.read.numpy()).all(1), batch


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), function=st.sampled_from(list(SIZES)), coded=st.booleans())
def test_the_solver_says_what_running_says(seed, function, coded):
    """Random programs are wrong at once, so the letters' own votes are planted: some lengths come out right."""
    task = task_of(function)
    model = model_of(task, seed, **({"coded": True, "columns": 2} if coded else {}))
    program = model.discrete_program(tuple(task.vocab))
    proof = prove(program, task, longest=3, provenance=PROVENANCE)
    for each in proof.lengths:
        found, batch = right(program, task, each.length)
        assert each.verdict == ("proved" if found.all() else "refuted")
        if each.verdict == "refuted":
            wrong = batch.tokens[~found]
            assert each.counterexample in {task.decode(row.tolist()) for row in wrong}
    assert [each.length for each in proof.lengths] == list(range(1, 1 + len(proof.lengths)))
    assert all(each.verdict == "proved" for each in proof.lengths[:-1])


def counts(longest=4):
    """A program of hist by hand, and its task: a head counts the own letter, the count has most votes."""
    task = Sequences(letters=3, n_ctx=longest + 1, size=60)
    n = len(task.vocab)
    count = NumericalHead(query=0, key=0, value=0, predicate=np.arange(8))
    votes = np.zeros((2, n))
    for number in range(1, 1 + longest):
        # 2 n x - n² is largest where n is x.
        votes[:, task.vocab.index(str(number))] = (-(number**2), 2 * number)
    program = DiscreteProgram(
        shape=ProgramShape(cardinality=8, n_ctx=longest + 1, causal=False),
        vocab=tuple(task.vocab),
        classes=tuple(task.vocab),
        pad_token=task.pad_token,
        embedding=np.arange(n)[:, None],
        layers=(Layer(categorical_heads=(), numerical_heads=(count,), categorical_mlps=(), numerical_mlps=()),),
        W_categorical=np.zeros((2, 8, n)),
        W_numerical=votes,
        allowed=tuple(word in {str(number) for number in range(1, 1 + longest)} for word in task.vocab),
    )
    return program, task


def test_a_right_program_is_proved_and_a_wrong_one_has_a_shortest_counterexample():
    program, task = counts()
    proof = prove(program, task, provenance=PROVENANCE)
    assert [each.verdict for each in proof.lengths] == ["proved"] * 4
    assert proof.proved_to == 4
    [table] = proof.tables()
    assert table.frame["length"].tolist() == [1, 2, 3, 4]

    # Three of a letter are said to be two: wrong from length 3 on, on three sequences of that length.
    votes = program.W_numerical.copy()
    votes[:, task.vocab.index("2")] = (-8, 6)
    wrong = replace(program, W_numerical=votes)
    proof = prove(wrong, task, provenance=PROVENANCE)
    assert (proof.proved_to, proof.lengths[-1].length) == (2, 3)
    assert proof.lengths[-1].counterexample in {"0 0 0", "1 1 1", "2 2 2"}


def program_of(task, layers, votes):
    """A program by hand, of votes by place of the variable, value and word."""
    n_variables = 2 + sum(len(layer.categorical_heads) + len(layer.categorical_mlps) for layer in layers)
    W_categorical = np.zeros((n_variables, 8, len(task.vocab)))
    for (variable, value, word), vote in votes.items():
        W_categorical[variable, value, task.vocab.index(word)] = vote
    return DiscreteProgram(
        shape=ProgramShape(cardinality=8, n_ctx=task.n_ctx, causal=task.causal),
        vocab=tuple(task.vocab),
        classes=tuple(task.vocab),
        pad_token=task.pad_token,
        embedding=np.arange(len(task.vocab))[:, None],
        layers=tuple(layers),
        W_categorical=W_categorical,
        W_numerical=np.zeros((1, len(task.vocab))),
        allowed=tuple(token in task.outputs for token in range(len(task.vocab))),
    )


def layer_of(head, *tables):
    return Layer(categorical_heads=(head,), numerical_heads=(), categorical_mlps=tables, numerical_mlps=())


def induction_heads(key):
    """A head that copies the token before, a table of letters that digits follow, and a head that looks for `key`."""
    task = Sequences(function="induction", letters=4, n_ctx=6, size=60)
    before = CategoricalHead(query=1, key=1, value=0, predicate=np.arange(8) - 1)
    # Variable 2 is what stands before; variable 3 is that where a digit stands here, 7 elsewhere.
    named = np.full((8, 8), 7)
    named[:2, 2:4] = np.arange(2)[:, None]
    followed = CategoricalTable(reads=(2, 0), table=named)
    again = CategoricalHead(query=0, key=key, value=0, predicate=np.arange(8))
    begin = task.inputs.index("<s>")
    votes = {(4, 2, "0"): 1, (4, 3, "1"): 1, (4, begin, "<unk>"): 1}
    return program_of(task, [layer_of(before, followed), layer_of(again)], votes), task


def test_an_induction_head_is_proved_and_one_that_copies_any_letter_is_not():
    program, task = induction_heads(key=3)
    proof = prove(program, task, provenance=PROVENANCE)
    assert [each.verdict for each in proof.lengths] == ["proved"] * 5
    assert right(program, task, 4)[0].all()
    # Mutant: what followed need not be a digit.
    proof = prove(induction_heads(key=2)[0], task, provenance=PROVENANCE)
    assert (proof.proved_to, proof.lengths[-1].counterexample) in {(1, "a a"), (1, "b b")}


def test_the_two_most_frequent_letters_are_proved_and_a_wrong_vote_is_not():
    """Of two letters the first is the earlier; a second is there if it is another."""
    task = Sequences(function="most_freq", letters=2, n_ctx=3, size=20)
    first = CategoricalHead(query=1, key=1, value=0, predicate=np.ones(8, dtype=int))
    same = CategoricalTable(reads=(2, 0), table=np.eye(8, dtype=int))
    votes = {(0, 0, "0"): 2, (0, 1, "1"): 2, (3, 1, "<s>"): 3, (1, 1, "<s>"): -5}
    program = program_of(task, [layer_of(first, same)], votes)
    assert [each.verdict for each in prove(program, task, provenance=PROVENANCE).lengths] == ["proved"] * 2
    # Mutant: the first letter is not told from the second.
    wrong = program_of(task, [layer_of(first, same)], {**votes, (1, 1, "<s>"): 0})
    proof = prove(wrong, task, provenance=PROVENANCE)
    assert (proof.proved_to, proof.lengths[-1].length) == (0, 1)


def test_votes_are_compared_exactly():
    """A vote of 2**-20 decides, and of equal votes the first class wins."""
    program, task = counts(longest=1)
    for votes, verdict in ((0.0, "proved"), (2.0**-20, "refuted")):
        weights = np.zeros_like(program.W_numerical)
        weights[0, task.vocab.index("0")] = votes
        allowed = tuple(word in ("0", "1") for word in task.vocab)
        # `0` stands before `1` in the vocabulary: among equals it is said, and it is wrong.
        weights[0, task.vocab.index("1")] = 2.0**-21
        changed = replace(program, W_numerical=weights, allowed=allowed)
        assert prove(changed, task, provenance=PROVENANCE).lengths[0].verdict == verdict
    equal = replace(program, W_numerical=np.zeros_like(program.W_numerical), allowed=allowed)
    assert prove(equal, task, provenance=PROVENANCE).lengths[0].verdict == "refuted"


def test_what_takes_too_long_is_unknown(monkeypatch):
    program, task = counts()
    monkeypatch.setattr(z3.Solver, "check", lambda self: z3.unknown)
    calls = []
    proof = prove(program, task, provenance=PROVENANCE, on_progress=lambda *of: calls.append(of))
    assert [(each.verdict, each.counterexample) for each in proof.lengths] == [("unknown", "")] * 4
    assert proof.proved_to == 0
    assert calls == [(length / 4, f"length {length}: unknown") for length in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("function", "longest", "message"),
    [
        ("hist", 0, "holds 1 to 4 letters, got a longest of 0"),
        ("hist", 5, "holds 1 to 4 letters, got a longest of 5"),
    ],
)
def test_what_cannot_be_proved_is_said(function, longest, message):
    program, _ = counts()
    task = Sequences(function=function, letters=3, n_ctx=5, size=60)
    with pytest.raises(WorkbenchError, match=message):
        prove(program, task, longest=longest, provenance=PROVENANCE)
