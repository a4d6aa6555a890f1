"""The fast module and the RASP text against the readable module and the program, by random programs and by hand."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from program_models import model_of
from rasp_language import run_rasp

from circuits.decompile import decompiled, forms
from circuits.decompile.decompiled import decompile, load_module
from circuits.decompile.forms import write_forms
from circuits.decompile.ranges import find_ranges
from workbench.models.discrete import Layer, NumericalHead, NumericalTree, Split
from workbench.models.interpreter import program_logits
from workbench.runtime import WorkbenchError
from workbench.tasks.sequences import Sequences

SIZES = {"reverse": (3, 6), "hist": (3, 6), "dyck": (2, 8), "induction": (4, 6)}


def task_of(function):
    letters, n_ctx = SIZES[function]
    return Sequences(function=function, letters=letters, n_ctx=n_ctx, size=60)


def rasp_says(text, task, tokens):
    """The RASP program's words at the letters of a prompt."""
    words = [task.vocab[token] for token in tokens if token != task.pad_token]
    n_letters = sum(token < task.letters for token in tokens)
    return run_rasp(text, words)["answer"][1 : 1 + n_letters]


def program_says(program, tokens):
    """The program's words at the letters of a prompt."""
    n_letters = sum(token < program.pad_token for token in tokens)
    said = program_logits(program, np.array([tokens])).argmax(2)[0]
    return [program.classes[word] for word in said[1 : 1 + n_letters]]


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    function=st.sampled_from(list(SIZES)),
    layers=st.integers(1, 3),
    heads=st.tuples(*[st.integers(0, 2)] * 4).filter(any),
    coded=st.booleans(),
)
def test_the_rasp_text_says_what_its_program_says(seed, function, layers, heads, coded):
    names = ("categorical_heads", "numerical_heads", "categorical_mlps", "numerical_mlps")
    columns = {"coded": True, "columns": 2} if coded else {}
    task = task_of(function)
    model = model_of(task, seed, n_layers=layers, **dict(zip(names, heads, strict=True)), **columns)
    program = model.discrete_program(tuple(task.vocab))
    text = write_forms(program, find_ranges(program, range(len(task.inputs))), task)["rasp"]
    for tokens in task.examples("test").tokens.tolist():
        assert rasp_says(text, task, tokens) == program_says(program, tokens)


def test_a_mutant_of_the_rasp_text_says_something_else():
    task = task_of("reverse")
    program = model_of(task, 3).discrete_program(tuple(task.vocab))
    text = write_forms(program, find_ranges(program, range(len(task.inputs))), task)["rasp"]
    assert "(indices - step)" in text
    # Mutant: of two at one distance the later.
    wrong = text.replace("(indices + step)", "(indices * step)")
    said = [rasp_says(wrong, task, tokens) for tokens in task.examples("train").tokens.tolist()]
    assert said != [rasp_says(text, task, tokens) for tokens in task.examples("train").tokens.tolist()]


def test_a_count_in_rasp_is_a_line():
    program, task = counts()
    text = write_forms(program, find_ranges(program, range(len(task.inputs))), task)["rasp"]
    lines = text.splitlines()
    assert "found_by_sum_0_0 = select(tokens, tokens, ==);" in lines
    assert "sum_0_0 = round(selector_width(found_by_sum_0_0));" in lines
    # No head copies, and no position is asked for.
    assert not any(name in text for name in ("nearest", "positions", "ones"))


def counts():
    """A program whose only variable counts the own letter, and its task."""
    task = Sequences(letters=2, n_ctx=5, size=20)
    program = model_of(task, n_layers=1, categorical_heads=0, categorical_mlps=0, numerical_mlps=0).discrete_program(
        tuple(task.vocab)
    )
    head = NumericalHead(query=0, key=0, value=0, predicate=np.arange(8))
    layer = Layer(categorical_heads=(), numerical_heads=(head,), categorical_mlps=(), numerical_mlps=())
    return replace(program, layers=(layer,), W_categorical=np.zeros((2, 8, len(task.vocab)))), task


@pytest.mark.parametrize("most_cells", [4096, 1])
def test_a_tree_says_the_same_in_every_form(most_cells, monkeypatch):
    """Where its numbers can be listed and where they cannot."""
    for module in ("ranges", "fast"):
        monkeypatch.setattr(f"circuits.decompile.{module}.MOST_CELLS", most_cells)
    program, task = counts()
    inner = Split(reads=1, at_most=0, below=5, above=Split(reads=0, at_most=2, below=3, above=6))
    tree = NumericalTree(reads=(1, 0), root=Split(reads=0, at_most=1, below=2, above=inner))
    [layer] = program.layers
    votes = np.zeros((3, 8, len(task.vocab)))
    votes[2, 2, task.vocab.index("1")] = votes[2, 3, task.vocab.index("2")] = votes[2, 6, task.vocab.index("3")] = 1
    program = replace(
        program,
        layers=(replace(layer, numerical_mlps=(tree,)),),
        W_categorical=votes,
        W_numerical=np.zeros((2, len(task.vocab))),
    )
    written = write_forms(program, find_ranges(program, range(len(task.inputs))), task)
    run, run_all = load_module(written["python"]).run, load_module(written["fast"]).run_all
    for letters, words in ((["0", "1", "0"], ["2", "1", "2"]), (["1"] * 4, ["3"] * 4), (["0"], ["1"])):
        assert (
            run(letters) == run_all([letters])[0] == run_rasp(written["rasp"], ["<s>", *letters])["answer"][1:] == words
        )
    assert "    if one <= 1:\n        return 2\n    if two <= 0:\n        return 5\n" in written["python"]
    assert '"sum_0_0" -> "counts_0_0"' in written["graph"]


def test_the_fast_module_is_held_to_the_program(monkeypatch):
    """Mutant: the own place is as near as any other."""
    emit = forms.emit_fast

    def careless(*arguments):
        text = emit(*arguments)
        assert "NEAR = np.where(DISTANCE == 0, len(PLACES), DISTANCE)" in text
        return text.replace("NEAR = np.where(DISTANCE == 0, len(PLACES), DISTANCE)", "NEAR = DISTANCE")

    monkeypatch.setattr(forms, "emit_fast", careless)
    task = task_of("hist")
    model = model_of(task, seed=3)
    # Heads that look for their own token, and copy where they found it.
    for layer in model.layers:
        heads = layer.categorical
        for gate, variable in ((heads.read_q, 0), (heads.read_k, 0), (heads.read_v, 1)):
            gate.data.fill_(0)[:, variable] = 10
        heads.predicate.data.copy_(10 * torch.eye(8)[None])
    with pytest.raises(WorkbenchError, match="The fast module is not the program: for '.*' it says"):
        decompile(model, task)


def test_the_fast_module_has_the_letters_and_the_command_line_of_the_readable_one(tmp_path):
    task = Sequences(letters=4, n_ctx=6, size=1400)
    found = decompile(model_of(task), task, most=1)
    file = tmp_path / "fast.py"
    file.write_text(found.forms["fast"])
    command = [sys.executable, "-W", "error", str(file), "0", "3", "0"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    slow, fast = (load_module(found.forms[form]) for form in ("python", "fast"))
    assert said == slow.run(["0", "3", "0"]) == fast.run(["0", "3", "0"])
    given_letters = [[task.vocab[token] for token in row if token < task.letters] for row in tokens_of(task)]
    assert list(map(slow.run, given_letters)) == fast.run_all(given_letters)
    for letters, message in (
        ([], "Give 1 to 5 letters, got 0"),
        (["0"] * 8, "Give 1 to 5 letters, got 8"),
        (["<pad>"], "Letter '<pad>' is not in the alphabet: 0 1 2 3."),
    ):
        with pytest.raises(ValueError, match=message):
            fast.run_all([["0"], letters])
    assert fast.run_all([]) == []


@pytest.mark.parametrize("form", ["python", "fast"])
@pytest.mark.parametrize(
    ("letters", "says"),
    [((), "Give 1 to 5 letters, got 0."), (("0", "None"), "Letter 'None' is not in the alphabet: 0 1 2.")],
)
def test_a_module_that_is_run_says_in_one_line_what_it_cannot_read(form, letters, says, tmp_path):
    task = task_of("hist")
    file = tmp_path / "module.py"
    file.write_text(decompile(model_of(task), task).forms[form])
    said = subprocess.run([sys.executable, str(file), *letters], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout, said.stderr) == (1, "", f"{says}\n")


def tokens_of(task):
    return task.examples("train").tokens.tolist()


def test_all_forms_are_there_and_the_exact_ones_too():
    task = task_of("hist")
    whole, short = (decompile(model_of(task, seed=2), task, budget=budget) for budget in (0.0, 0.2))
    assert set(whole.forms) == set(forms.FORMS)
    assert whole.forms == whole.exact == short.exact
    assert all(len(short.forms[form]) < len(whole.forms[form]) for form in forms.FORMS)
    assert decompiled.load_module(short.text).run(["0"])
