"""Sequence functions against what one would write for a single sequence, and the prompts made of them."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.runtime import WorkbenchError
from workbench.tasks.sequence_functions import FUNCTIONS
from workbench.tasks.sequences import Sequences

TASKS = {
    "reverse": Sequences(function="reverse", letters=5, size=400),
    "sort": Sequences(function="sort", letters=5, size=400),
    "hist": Sequences(size=400),
    "double_hist": Sequences(function="double_hist", size=400),
    "most_freq": Sequences(function="most_freq", size=400),
    "dyck": Sequences(function="dyck", letters=4, n_ctx=16, size=400),
    "induction": Sequences(function="induction", letters=8, n_ctx=10, size=400),
}


def most_frequent(letters):
    counts = Counter(letters)
    ranked = sorted(counts, key=lambda each: (-counts[each], letters.index(each)))
    return [*ranked, *["<s>"] * (len(letters) - len(ranked))]


def balanced(letters):
    pairs = {")": "(", "}": "{"}
    said, stack, failed = [], [], False
    for each in letters:
        if each in pairs:
            failed = failed or not stack or stack.pop() != pairs[each]
        else:
            stack.append(each)
        said.append("F" if failed else "P" if stack else "T")
    return said


def induced(letters):
    said, known = [], {}
    for place, each in enumerate(letters):
        if each.isalpha():
            said.append(known.get(each, "<unk>"))
        elif place and letters[place - 1].isalpha():
            known[letters[place - 1]] = each
    return said


BY_HAND = {
    "reverse": lambda letters: letters[::-1],
    "sort": sorted,
    "hist": lambda letters: [str(letters.count(each)) for each in letters],
    "double_hist": lambda letters: [
        str(sum(count == letters.count(each) for count in Counter(letters).values())) for each in letters
    ],
    "most_freq": most_frequent,
    "dyck": balanced,
    "induction": induced,
}


def said(task, batch, row=0):
    return [task.vocab[token] for token in batch.targets[row][batch.read[row]].tolist()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_answers_are_those_of_one_sequence_at_a_time(name):
    task = TASKS[name]
    for split in ("train", "val", "test"):
        batch = task.examples(split)
        for row in range(min(60, len(batch))):
            letters = task.decode(batch.tokens[row].tolist()).split()
            assert said(task, batch, row) == BY_HAND[name](letters), letters


@given(text=st.lists(st.sampled_from("012345"), min_size=1, max_size=7))
def test_what_is_typed_is_read(text):
    task = TASKS["hist"]
    for typed in (" ".join(text), "".join(text)):
        batch = task.prompt(typed)
        assert task.decode(batch.tokens[0].tolist()) == " ".join(text)
        assert said(task, batch) == BY_HAND["hist"](text)


def test_letters_are_sorted_by_name():
    task = Sequences(function="sort", letters=12, size=100)
    assert said(task, task.prompt("2 10 1")) == ["1", "10", "2"]


def test_a_prompt_by_hand():
    batch = TASKS["sort"].prompt("3 0")
    # Letters 0 to 4, then padding, beginning and end.
    assert batch.tokens.tolist() == [[6, 3, 0, 7, 5, 5, 5, 5]]
    assert batch.read.tolist() == [[False, True, True, False, False, False, False, False]]
    assert batch.targets[0, 1:3].tolist() == [0, 3]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_sequence_is_in_two_splits(name):
    seen = [tuple(row) for split in ("train", "val", "test") for row in TASKS[name].examples(split).tokens.tolist()]
    assert len(set(seen)) == len(seen)
    assert len(seen) <= 400


def test_the_whole_domain_has_every_sequence_once():
    task = Sequences(function="reverse", letters=3, n_ctx=5, size=60)
    batch = task.examples("domain")
    assert len(batch) == 3 + 9 + 27
    assert len({tuple(row) for row in batch.tokens.tolist()}) == len(batch)
    drawn = {tuple(row) for split in ("train", "val", "test") for row in task.examples(split).tokens.tolist()}
    assert drawn <= {tuple(row) for row in batch.tokens.tolist()}
    for wide in (TASKS["dyck"], Sequences(letters=9, n_ctx=9)):
        with pytest.raises(WorkbenchError, match="is not listed"):
            wide.examples("domain")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pairs_differ_in_one_letter_and_in_an_answer(name):
    task = TASKS[name]
    batch = task.sample(12, split="test", seed=1)
    corrupt, distractor = batch.pairs()
    assert (corrupt != batch.tokens).sum(1).tolist() == [1] * 12
    assert ((distractor != batch.targets) & batch.read).any(1).all()
    for row in range(12):
        letters = task.decode(corrupt[row].tolist()).split()
        changed = BY_HAND[name](letters)
        if len(changed) == int(batch.read[row].sum()):
            assert [task.vocab[token] for token in distractor[row][batch.read[row]].tolist()] == changed


def test_a_seed_is_a_world():
    first, again, other = (Sequences(size=100, seed=seed).examples("train").tokens for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_half_of_the_brackets_begin_balanced():
    letters, _ = FUNCTIONS["dyck"].draw(np.random.default_rng(0), 2000, 2, 15)
    ends = FUNCTIONS["dyck"].answer(letters, np.full(2000, 15), 2)
    # Any 15 brackets begin with `()`, or `(` and a second `(`, or not at all; balanced strings always begin.
    assert 0.7 < (ends[:, 0] != 2).mean() < 0.8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function": "histo"}, "Unknown function 'histo'.*hist"),
        ({"letters": 0}, "letters must be at least 1, got 0"),
        ({"function": "dyck", "letters": 3}, "Brackets come in pairs: letters must be 2, 4, 6 or 8, got 3"),
        ({"function": "induction", "letters": 7}, "letters must be even, got 7"),
        ({"n_ctx": 1}, "n_ctx 1 leaves no room for a letter"),
        ({"size": 5}, "size must be at least 20"),
    ],
)
def test_bad_worlds_are_one_clear_error(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        Sequences(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "An empty sequence has no answer. Type letters such as '0 1 2'"),
        ("1 x", "Letter 'x' is not in the alphabet: 0 1 2 3 4 5"),
        ("<pad> 1", "Letter '<pad>' is not in the alphabet"),
        ("1 2 3 4 5 0 1 2", "8 letters are too many: the longest sequence has 7"),
    ],
)
def test_bad_prompts_are_one_clear_error(text, message):
    with pytest.raises(WorkbenchError, match=message):
        TASKS["hist"].prompt(text)
