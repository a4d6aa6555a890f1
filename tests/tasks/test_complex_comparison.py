import resource
import sys
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Task
from workbench.tasks.complex_comparison import ComplexComparison

SMALL = {
    "entities": 30,
    "attributes": 3,
    "values": 4,
    "ood_fraction": 0.3,
    "test_fraction": 0.1,
    "pair_fraction": 0.05,
    "questions_per_label": 2,
}
SEEDS = st.sampled_from(range(8))
SIGNS = "<=>"


@cache
def small(**fields):
    return ComplexComparison(**(SMALL | fields))


def words(task, split):
    """Prompts with their answers, as a person reads them."""
    batch = task.examples(split)
    answers = [task.vocab[answer] for answer in batch.targets[batch.read].tolist()]
    return dict(zip(map(task.decode, batch.tokens.tolist()), answers, strict=True))


def facts(task, split):
    """attribute -> entity -> value, by name."""
    found = {f"attr{attribute}": {} for attribute in range(task.attributes)}
    for prompt, value in words(task, split).items():
        entity, attribute = prompt.split()
        found[attribute][entity] = int(value)
    return found


def comparisons(task, split):
    """attribute -> (e1, e2) -> sign, by name."""
    found = {f"attr{attribute}": {} for attribute in range(task.attributes)}
    for prompt, label in words(task, split).items():
        attribute, _, e1, _, e2 = prompt.split()
        assert label[:-1] == attribute
        found[attribute][e1, e2] = label[-1]
    return found


def reachable(steps, start):
    """Every entity that a chain of steps leads to, by a walk."""
    seen, waiting = set(), [start]
    while waiting:
        for further in steps.get(waiting.pop(), ()):
            if further not in seen:
                seen.add(further)
                waiting.append(further)
    return seen


def solve(told, entities):
    """(e1, e2) -> sign for all that chains of `at least` decide, as in the paper's appendix F."""
    steps = {}
    for (e1, e2), sign in told.items():
        if sign in ">=":
            steps.setdefault(e1, set()).add(e2)
        if sign in "<=":
            steps.setdefault(e2, set()).add(e1)
    reached = {entity: reachable(steps, entity) for entity in entities}
    solved = {}
    for e1 in entities:
        for e2 in entities:
            more, less = e2 in reached[e1], e1 in reached[e2]
            if e1 != e2 and (more or less):
                solved[e1, e2] = "=" if more and less else ">" if more else "<"
    return solved


def sign_of(v1, v2):
    return "<" if v1 < v2 else "=" if v1 == v2 else ">"


def hard_by_loops(task):
    """attribute -> (e1, e2) -> sign of every hard question."""
    known, ood, told = facts(task, "atomic_id"), facts(task, "atomic_ood"), comparisons(task, "train_inferred")
    found = {}
    for attribute, pairs in told.items():
        values = known[attribute]
        by_value = {(e1, e2): sign_of(values[e1], values[e2]) for e1 in values for e2 in values if e1 != e2}
        cross = {pair: sign for pair, sign in pairs.items() if not set(pair) <= values.keys()}
        easy = solve(pairs, ood[attribute])
        found[attribute] = {
            pair: sign for pair, sign in solve(cross | by_value, ood[attribute]).items() if pair not in easy
        }
    return found


def test_is_a_task():
    task = ComplexComparison()
    assert isinstance(task, Task)
    assert set(task.measured) <= set(task.splits)
    assert {"train", "test"} <= set(task.measured)
    assert (task.solved_accuracy, task.memorised_accuracy) == (0.97, 0.99)
    assert len(task.examples("hard")) == 150


@given(SEEDS)
def test_training_is_told_id_values_and_shares_of_the_comparisons(seed):
    task = small(seed=seed)
    known, ood, told = facts(task, "atomic_id"), facts(task, "atomic_ood"), comparisons(task, "train_inferred")
    held_out = comparisons(task, "test")
    n_cross = 0
    for attribute in told:
        assert len(ood[attribute]) == 9
        assert len(known[attribute]) == 21
        every = known[attribute] | ood[attribute]
        assert len(every) == 30
        for (e1, e2), sign in (told[attribute] | held_out[attribute]).items():
            assert sign == sign_of(every[e1], every[e2])
            # Never two OOD entities.
            assert {e1, e2} & known[attribute].keys()
        for e1, e2 in held_out[attribute]:
            assert {e1, e2} <= known[attribute].keys()
            assert (e2, e1) in held_out[attribute]
            assert (e1, e2) not in told[attribute]
        n_cross += sum(not set(pair) <= known[attribute].keys() for pair in told[attribute])
    assert n_cross == round(0.05 * 3 * 21 * 9 * 2)
    n_id = len(task.examples("train_inferred")) - n_cross
    assert n_id == round(0.05 * (3 * 21 * 20 - len(task.examples("test"))))
    train = task.examples("train")
    assert torch.equal(train.tokens[:63], task.examples("atomic_id").tokens)
    assert torch.equal(train.tokens[63:], task.examples("train_inferred").tokens)
    assert not train.latents


@given(SEEDS)
def test_hard_questions_are_those_of_the_loops(seed):
    task = small(seed=seed)
    ood, wanted = facts(task, "atomic_ood"), hard_by_loops(task)
    for attribute, pairs in wanted.items():
        for (e1, e2), sign in pairs.items():
            # What can be solved is solved rightly.
            assert sign == sign_of(ood[attribute][e1], ood[attribute][e2])
    n = min(sum(sign == each for pairs in wanted.values() for each in pairs.values()) for sign in SIGNS)
    # All of the scarcest label, so that the sets are compared and not only drawn from.
    whole = small(seed=seed, questions_per_label=n)
    found = comparisons(whole, "hard")
    for attribute, pairs in found.items():
        assert pairs.items() <= wanted[attribute].items()
    for sign in SIGNS:
        drawn = sum(each == sign for pairs in found.values() for each in pairs.values())
        assert drawn == n
    assert any(
        sum(sign == each for pairs in wanted.values() for each in pairs.values())
        == sum(sign == each for pairs in found.values() for each in pairs.values())
        for sign in SIGNS
    )
    with pytest.raises(WorkbenchError, match=rf"This world has {n} hard questions answered by .*{n + 1} are wanted"):
        small(seed=seed, questions_per_label=n + 1).examples("hard")


def test_hard_questions_are_balanced_and_not_of_one_attribute():
    batch = ComplexComparison().examples("hard")
    task = ComplexComparison()
    labels = [task.vocab[answer] for answer in batch.targets[:, 4].tolist()]
    assert [label[-1] for label in labels] == ["<"] * 50 + ["="] * 50 + [">"] * 50
    assert len({label[:-1] for label in labels}) == 10
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 150


def test_the_seed_draws_the_world_and_json_rebuilds_it():
    task = ComplexComparison(**SMALL, seed=3)
    fields = task.to_json()
    assert fields.pop("name") == "complex-comparison"
    assert type(task)(**fields) == task
    for split in task.splits:
        assert torch.equal(task.examples(split).tokens, type(task)(**fields).examples(split).tokens)
        assert not torch.equal(task.examples(split).targets, small(seed=4).examples(split).targets) or split == "hard"


def test_prompts_latents_and_pairs_are_those_of_comparison():
    task = small()
    batch = task.sample(4, split="hard")
    assert {name: latent.position for name, latent in batch.latents.items()} == {"v1": 2, "v2": 4, "answer": 4}
    assert (batch.distractor != batch.targets).any(1).all()
    # A counterfactual's new entity has a value that was told.
    known = facts(task, "atomic_id")
    for tokens in batch.corrupt.tolist():
        attribute, _, e1, _, _ = task.decode(tokens).split()
        assert e1 in known[attribute]
    assert torch.equal(task.with_latent(batch, "v1", batch.latents["v1"].value), batch.targets)
    assert torch.equal(task.prompt(task.decode(batch.tokens[0].tolist())).targets, batch.targets[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entities": 2}, "at least 4 entities"),
        ({"pair_fraction": 0.0}, "pair_fraction must lie between 0 and 1, both excluded, got 0.0"),
        ({"questions_per_label": 0}, "questions_per_label must be at least 1, got 0"),
        ({"test_fraction": 1e-9}, "leaves split 'test' empty"),
        ({"pair_fraction": 1e-7}, "leaves split 'train_inferred' empty"),
        ({"pair_fraction": 0.5}, "This world has 0 hard questions answered by '<', and 50 are wanted. Lower questions"),
        ({"questions_per_label": 10_000}, "10000 are wanted. Lower questions_per_label, enlarge the world, or change"),
    ],
)
def test_worlds_that_cannot_be(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        ComplexComparison(**fields).examples("train")


def test_unknown_splits():
    with pytest.raises(WorkbenchError, match="Unknown split 'ood'"):
        small().examples("ood")


@pytest.mark.slow
def test_the_papers_world():
    task = ComplexComparison(entities=1000, attributes=20, values=20)
    size = {split: len(task.examples(split)) for split in task.splits}
    assert (size["atomic_id"], size["atomic_ood"], size["hard"]) == (18_000, 2_000, 150)
    assert abs(size["test"] - 1_618_200) <= 10_000
    assert abs(size["train"] - 563_000) <= 1_000
    assert size["train_inferred"] == round(0.03 * (20 * 900 * 899 - size["test"])) + 108_000
    # In kilobytes, on a Mac in bytes; of all tests so far in this process.
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 4 * 2**30
