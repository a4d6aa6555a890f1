import pytest
import torch

from workbench.runtime import WorkbenchError
from workbench.tasks.skills import HELD_OUT, SKILLS, Skills
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe

SMALL = {"n_words": 16, "length": 5, "size": 3000}


def answer_by_definition(task, words, skill):
    """The skill of a list of word numbers, by counting."""
    traits = task.traits.tolist()
    if skill == "repeat":
        return len(set(words)) < len(words)
    if skill == "ends":
        return traits[2][words[0]] == traits[2][words[-1]]
    return sum(traits[["tone", "topic"].index(skill)][word] for word in words) > len(words) / 2


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_those_of_the_definition(skill):
    task = Skills(skill=skill, **SMALL)
    batch = task.examples("val")
    first = task.vocab.index("w0")
    for tokens, answer in zip(batch.tokens[:200].tolist(), batch.targets[batch.read].tolist(), strict=False):
        assert task.vocab[tokens[-1]] == f"{skill}?"
        assert answer_by_definition(task, [token - first for token in tokens[:-1]], skill) == bool(answer)
    share = float(batch.targets[batch.read].double().mean())
    assert 0.2 < share < 0.8


def test_plain_questions_have_their_answer_and_open_ones_any():
    task = Skills(**SMALL)
    batch = task.examples("train")
    first, rightly = task.vocab.index("w0"), {":": [], "?": []}
    for tokens, answer in zip(batch.tokens.tolist(), batch.targets[batch.read].tolist(), strict=True):
        skill, mark = task.vocab[tokens[-1]][:-1], task.vocab[tokens[-1]][-1]
        rightly[mark].append(
            answer_by_definition(task, [token - first for token in tokens[:-1]], skill) == bool(answer)
        )
    assert all(rightly[":"])
    assert 0.55 < sum(rightly["?"]) / len(rightly["?"]) < 0.75


@pytest.mark.parametrize("skill", ["mixture", "tone"])
def test_splits_share_no_list_of_words(skill):
    task = Skills(skill=skill, **SMALL)
    rows = torch.cat([task.examples(split).tokens[:, :-1] for split in task.splits])
    assert len(rows) == SMALL["size"] + 2 * HELD_OUT == len(rows.unique(dim=0))


def test_a_changed_word_changes_the_answer():
    task = Skills(skill="ends", **SMALL)
    pairs = task.sample(50, seed=1)
    corrupt, distractor = pairs.pairs()
    assert ((corrupt != pairs.tokens).sum(1) == 1).all()
    assert (distractor[pairs.read] != pairs.targets[pairs.read]).all()
    assert pairs.dropped > 0


def test_pairs_of_the_mixture_ask_plainly():
    task = Skills(**SMALL)
    asked = task.sample(50).tokens[:, -1]
    assert all(task.vocab[token].endswith(":") for token in asked.tolist())


def test_a_typed_prompt_is_read():
    task = Skills(skill="repeat", **SMALL)
    batch = task.prompt("w1 w2 w3 w4 w1")
    assert task.decode(batch.tokens[0].tolist()) == "w1 w2 w3 w4 w1 repeat?"
    assert batch.targets[batch.read].tolist() == [1]
    assert task.decode(task.prompt("w1 w2 w3 w4 w1 tone:").tokens[0].tolist()).endswith("tone:")


@pytest.mark.parametrize(
    ("text", "message"), [("w1 w2", "5 words and a question, got 2"), ("w1 w2 w3 w4 w99", "w99"), ("", "got 0 words")]
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(WorkbenchError, match=message):
        Skills(skill="tone", **SMALL).prompt(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skill": "tones"}, "Did you mean 'tone'"),
        ({"length": 4}, "must be odd"),
        ({"n_words": 8}, "at least twice the length"),
        ({"size": 0}, "size must be at least 1"),
    ],
)
def test_worlds_that_cannot_be_are_refused(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        Skills(**fields)


def test_a_recipe_rebuilds_it():
    recipe = find_recipe("skills-smoke").override(["seed=3"])
    assert Recipe.from_json(recipe.to_json()) == recipe
