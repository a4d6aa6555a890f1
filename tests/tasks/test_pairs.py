import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.models.config import ModelConfig
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Task
from workbench.tasks.pairs import Pairs
from workbench.training.recipe import Recipe

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


def padded():
    return task(clean=((1, 2), (2,), (3, 4)), corrupt=((1, 3), (4,), (3, 1)), pad_token=0, predictable=5)


@pytest.mark.parametrize("pairs", [task(), padded()], ids=["one length", "padded"])
def test_is_a_task_and_rebuilds_from_json(pairs):
    assert isinstance(pairs, Task)
    model = ModelConfig(n_layers=1, d_model=4, n_heads=1, d_head=4, d_mlp=0, n_ctx=2, d_vocab=5, d_vocab_out=5)
    recipe = Recipe(name="imported", task=pairs, model=model, train=None, shows="pairs")
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_reads_the_answer_at_the_last_token_and_pairs_as_given():
    assert task().position_labels == ("t0", "t1")
    batch = task().contrast(task().examples("test"))
    # The third pair's answer is its distractor: no headroom.
    assert batch.dropped == 1
    assert batch.tokens.tolist() == [[1, 2], [2, 3]]
    assert batch.corrupt.tolist() == [[1, 3], [2, 4]]
    assert batch.targets.tolist() == [[0, 3], [0, 4]]
    assert batch.distractor.tolist() == [[0, 4], [0, 1]]
    assert batch.read.tolist() == [[False, True], [False, True]]
    assert batch.latents["answer"].position == 1
    assert batch.latents["answer"].value.tolist() == [3, 4]


def test_shorter_prompts_are_padded_on_the_right_and_read_at_their_own_end():
    batch = padded().contrast(padded().examples("test"))
    assert batch.tokens.tolist() == [[1, 2], [2, 0]]
    assert batch.read.tolist() == [[False, True], [True, False]]
    assert batch.corrupt.tolist() == [[1, 3], [4, 0]]
    assert batch.distractor.tolist() == [[0, 4], [1, 0]]
    assert padded().decode(batch.tokens[1].tolist()) == "b"
    assert batch.latents == {}


def check_repeated_prompts():
    repeated = task(
        clean=((1, 2), (1, 2), (1, 2)), corrupt=((1, 3), (1, 4), (3, 2)), answer=(3, 3, 2), distractor=(4, 1, 1)
    )
    batch = repeated.contrast(repeated.examples("test"))
    assert batch.corrupt.tolist() == [[1, 3], [1, 4], [3, 2]]
    assert batch.distractor[:, 1].tolist() == [4, 1, 1]
    # The third stands for the same prompt with another answer, and only for that.
    assert repeated.contrast(batch.select(slice(2, 3))).corrupt.tolist() == [[3, 2]]


def test_every_counterfactual_of_a_repeated_prompt_is_used():
    check_repeated_prompts()


def test_the_check_of_repeated_prompts_can_fail(monkeypatch):
    def always_the_last(self, batch):
        last = {prompt: row for row, prompt in enumerate(self.clean)}
        return [last[tuple(prompt)] for prompt in batch.tokens.tolist()]

    monkeypatch.setattr(Pairs, "_rows_of", always_the_last)
    with pytest.raises(AssertionError):
        check_repeated_prompts()


tokens = st.integers(1, 4)
prompts = st.integers(1, 3).flatmap(lambda n: st.tuples(*[st.tuples(*[tokens] * n)] * 2))


@given(st.lists(st.tuples(prompts, tokens, tokens), min_size=1, max_size=12), st.integers(0, 9))
def test_contrasting_all_examples_gives_back_the_pairs_and_a_sample_reorders_them(rows, seed):
    whole = task(
        clean=tuple(clean for (clean, _), _, _ in rows),
        corrupt=tuple(corrupt for (_, corrupt), _, _ in rows),
        answer=tuple(answer for _, answer, _ in rows),
        distractor=tuple(distractor for _, _, distractor in rows),
        pad_token=0,
    )
    wanted = [(*pair, answer, distractor) for pair, answer, distractor in rows if answer != distractor]

    def given_back(batch):
        texts = [[whole.decode(row) for row in rows.tolist()] for rows in (batch.tokens, batch.corrupt)]
        return [*zip(*texts, batch.targets[batch.read].tolist(), batch.distractor[batch.read].tolist(), strict=True)]

    named = [(whole.decode(clean), whole.decode(corrupt), *answers) for clean, corrupt, *answers in wanted]
    batch = whole.contrast(whole.examples("test"))
    assert given_back(batch) == named
    assert batch.dropped == len(rows) - len(wanted)
    if wanted:
        assert sorted(given_back(whole.sample(99, seed=seed))) == sorted(named)


def test_sample_is_seeded_without_repeats_and_takes_all_there_are():
    samples = [task().sample(2, seed=seed).tokens.tolist() for seed in (0, 0, 1, 2, 3)]
    assert samples[0] == samples[1]
    assert len({str(sample) for sample in samples}) == 2
    assert sorted(samples[0]) == [[1, 2], [2, 3]]
    assert len(task().sample(1)) == 1
    everything = task().sample(64)
    assert len(everything) == 2
    assert everything.dropped == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: task().sample(0), "Asked for 0 pairs; 2 have headroom"),
        (lambda: task(answer=(4, 1, 1)).sample(1), "Asked for 1 pairs; 0 have headroom"),
        (lambda: task().sample(1, split="train"), "Unknown split 'train'. Known: test"),
        (lambda: task().contrast(task().examples("test"), "operand"), "Unknown contrast 'operand'. Known: given"),
        (
            lambda: task().contrast(task().prompt("d d => b")),
            "No counterfactual is known for 'd d => b': it is not among the imported pairs",
        ),
        # The prompt is known, but with another answer.
        (lambda: task().contrast(task().prompt("a b => d")), "No counterfactual is known for 'a b => d'"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(WorkbenchError, match=message):
        call()


def test_typed_prompts_find_their_answer_or_bring_it():
    assert task().prompt("a b").targets[0, 1] == 3
    assert task().prompt(" a  c ").targets[0, 1] == 4
    typed = task().prompt("d d d => b")
    assert typed.tokens.tolist() == [[4, 4, 4]]
    assert typed.read.tolist() == [[False, False, True]]
    assert typed.targets[0, 2] == 2
    assert torch.equal(task().contrast(task().prompt("a b")).corrupt, torch.tensor([[1, 3]]))
    # A shorter one than the longest is a batch of its own width, and finds its counterfactual still.
    assert padded().contrast(padded().prompt("b")).corrupt.tolist() == [[4]]


@given(st.lists(tokens, min_size=1, max_size=4), tokens)
def test_prompts_read_back(prompt, answer):
    batch = task().prompt(f"{task().decode(prompt)} => {VOCAB[answer]}")
    assert batch.tokens.tolist() == [prompt]
    assert batch.targets[batch.read].tolist() == [answer]


def test_a_vocabulary_may_have_an_arrow_of_its_own():
    arrows = task(vocab=("pad", "a", "b", "=>", "d"))
    assert arrows.prompt("b =>").tokens.tolist() == [[2, 3]]
    assert arrows.prompt("=> => a").tokens.tolist() == [[3]]
    assert arrows.prompt("b => => d").tokens.tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d d", "The answer to 'd d' is not known. Write it as 'PROMPT => ANSWER'"),
        ("a e", "Token 'e' is outside the vocabulary of 5 tokens"),
        ("a => e", "Token 'e' is outside the vocabulary of 5 tokens"),
        ("", "An empty prompt has nothing to read"),
        ("=> a", "An empty prompt has nothing to read"),
        ("a => b c", "must be one token, got 'b c'"),
        ("a =>", "must be one token, got ''"),
        ("a pad => b", "Token 'pad' is padding and stands in no prompt"),
    ],
)
def test_bad_prompts(text, message):
    with pytest.raises(WorkbenchError, match=message):
        task(pad_token=0).prompt(text)


def test_a_prompt_with_two_answers_has_none():
    torn = task(clean=((1, 2), (1, 2), (3, 4)))
    with pytest.raises(WorkbenchError, match="The answer to 'a b' is c or d. Write it as"):
        torn.prompt("a b")
    assert torn.prompt("a b => d").targets[0, 1] == 4


def test_an_answer_that_the_model_cannot_give_is_refused():
    few = task(predictable=4, answer=(3, 3, 1), distractor=(2, 1, 1))
    assert few.prompt("a => c").targets[0, 0] == 3
    with pytest.raises(WorkbenchError, match="cannot answer 'd': it predicts 'pad' to 'c'"):
        few.prompt("a => d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": (1,)}, "got 3, 3, 1, 3"),
        ({"clean": (), "corrupt": (), "answer": (), "distractor": ()}, "got 0, 0, 0, 0"),
        ({"corrupt": ((1, 3), (2, 4), (3,))}, "Pair 3: the prompts have 2 and 1 tokens"),
        ({"clean": ((), (2, 3), (3, 4)), "corrupt": ((), (2, 4), (3, 1))}, "Pair 1: the prompts have 0 and 0 tokens"),
        ({"clean": ((1,), (2, 3), (3, 4)), "corrupt": ((2,), (2, 4), (3, 1))}, "no padding token"),
        ({"pad_token": 4}, "Pair 2: a prompt holds the padding token 'd'"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(WorkbenchError, match=message):
        task(**changes)
