import pytest
import torch

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Task
from workbench.tasks.pairs import Pairs
from workbench.training.recipes import _task_from_json, _with_tuples

VOCAB = ("pad", "a", "b", "c", "d")


def task(**changes):
    fields = {
        "vocab": VOCAB,
        "clean": ((1, 2), (2, 3), (3, 4)),
        "corrupt": ((1, 3), (2, 4), (3, 1)),
        "answer": (3, 4, 1),
        "distractor": (4, 1, 1),
    }
    return Pairs(**{**fields, **changes})


def test_is_a_task_and_rebuilds_from_json():
    assert isinstance(task(), Task)
    assert _task_from_json(_with_tuples(task().to_json())) == task()


def test_reads_the_answer_at_the_last_token_and_pairs_as_given():
    batch = task().contrast(task().examples("test"))
    # The third pair's answer is its distractor: no headroom.
    assert batch.dropped == 1
    assert batch.tokens.tolist() == [[1, 2], [2, 3]]
    assert batch.corrupt.tolist() == [[1, 3], [2, 4]]
    assert batch.targets[batch.read].tolist() == [3, 4]
    assert batch.distractor[batch.read].tolist() == [4, 1]
    assert batch.latents["answer"].position == 1


def test_shorter_prompts_are_padded_on_the_right_and_read_at_their_own_end():
    padded = task(clean=((1, 2), (2,), (3, 4)), corrupt=((1, 3), (4,), (3, 1)), pad_token=0)
    batch = padded.contrast(padded.examples("test"))
    assert batch.tokens.tolist() == [[1, 2], [2, 0]]
    assert batch.read.tolist() == [[False, True], [True, False]]
    assert batch.corrupt.tolist() == [[1, 3], [4, 0]]
    assert padded.decode(batch.tokens[1].tolist()) == "b"
    assert batch.latents == {}


def test_sample_is_seeded_and_without_repeats():
    samples = [task().sample(2, seed=seed).tokens.tolist() for seed in (0, 0, 1, 2, 3)]
    assert samples[0] == samples[1]
    assert len({str(sample) for sample in samples}) == 2
    assert sorted(samples[0]) == [[1, 2], [2, 3]]
    with pytest.raises(WorkbenchError, match="Asked for 3 pairs; there are 2 with headroom"):
        task().sample(3)


def test_typed_prompts_find_their_answer_or_bring_it():
    assert task().prompt("a b").targets[0, 1] == 3
    assert task().prompt("a c").targets[0, 1] == 4
    typed = task().prompt("d d d => b")
    assert typed.tokens.tolist() == [[4, 4, 4]]
    assert typed.targets[0, 2] == 2
    assert torch.equal(task().contrast(task().prompt("a b")).corrupt, torch.tensor([[1, 3]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d d", "No answer is known for 'd d'. Write it as 'PROMPT => ANSWER'"),
        ("a e", "Token 'e' is outside the vocabulary of 5 tokens"),
        ("", "An empty prompt has nothing to read"),
        ("a => b c", "must be one token, got 'b c'"),
    ],
)
def test_bad_prompts(text, message):
    with pytest.raises(WorkbenchError, match=message):
        task().prompt(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": (1,)}, "got 3, 3, 1, 3"),
        ({"corrupt": ((1, 3), (2, 4), (3,))}, "Pair 3: the prompts have 2 and 1 tokens"),
        ({"clean": ((1,), (2, 3), (3, 4)), "corrupt": ((2,), (2, 4), (3, 1))}, "no padding token"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(WorkbenchError, match=message):
        task(**changes)


def test_a_stranger_has_no_counterfactual():
    with pytest.raises(WorkbenchError, match="No counterfactual is known"):
        task().contrast(task().prompt("d d => b"))
