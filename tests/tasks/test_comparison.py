import resource
import sys
from functools import cache
from itertools import permutations

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Task, join
from workbench.tasks.comparison import Comparison

SMALL = {
    "entities": 12,
    "attributes": 3,
    "values": 4,
    "ood_fraction": 0.25,
    "test_fraction": 0.2,
    "phi": 2.0,
}
COMPARISONS = ("train_inferred", "test", "ood", "mixed")
SEEDS = st.sampled_from(range(8))


@cache
def small(**fields):
    return Comparison(**(SMALL | fields))


def prompts(batch):
    return [tuple(row) for row in batch.tokens.tolist()]


def words(task, batch):
    """Prompts with their answers, as a person reads them."""
    answers = [task.vocab[answer] for answer in batch.targets[batch.read].tolist()]
    return dict(zip(map(task.decode, prompts(batch)), answers, strict=True))


@cache
def facts(task, *splits):
    """(entity, attribute) -> value of some splits of facts, by name."""
    return {
        tuple(prompt.split()): int(value)
        for split in splits or ("atomic_id", "atomic_ood")
        for prompt, value in words(task, task.examples(split)).items()
    }


def compared(first, second):
    """Prompt -> label of every comparison of two entities of these facts, by looping."""
    return {
        f"{attribute} <q> {e1} <mask> {e2}": f"{attribute}{'<' if v1 < v2 else '=' if v1 == v2 else '>'}"
        for (e1, attribute), v1 in first.items()
        for (e2, other), v2 in second.items()
        if attribute == other and e1 != e2
    }


@cache
def labels(task):
    return compared(facts(task), facts(task))


def flipped(prompt):
    attribute, asks, e1, mask, e2 = prompt.split()
    return " ".join((attribute, asks, e2, mask, e1))


def test_is_a_task():
    task = Comparison()
    assert isinstance(task, Task)
    assert set(task.measured) <= set(task.splits)
    assert {"train", "test"} <= set(task.measured)
    assert (task.solved_accuracy, task.memorised_accuracy) == (0.97, 0.99)
    assert len(task.vocab) == len(set(task.vocab)) == 200 + 4 + 10 + 12 + 3
    assert task.vocab[task.pad_token] == "<pad>"
    assert len(task.position_labels) == task.examples("test").tokens.shape[1]


@given(SEEDS)
def test_every_attribute_has_ood_entities_of_its_own(seed):
    task = small(seed=seed)
    known, ood = facts(task, "atomic_id"), facts(task, "atomic_ood")
    assert not known.keys() & ood.keys()
    assert len(known | ood) == 12 * 3
    assert set((known | ood).values()) <= set(range(4))
    for attribute in ("attr0", "attr1", "attr2"):
        assert sum(attribute == other for _, other in ood) == 3
    assert any(facts(small(seed=other), "atomic_ood").keys() != ood.keys() for other in range(3))


def test_attributes_draw_their_ood_entities_apart():
    ood = Comparison()._world.ood
    assert len({tuple(column) for column in ood.T.tolist()}) == 4


@given(SEEDS)
def test_every_split_is_that_of_the_loops(seed):
    task = small(seed=seed)
    known, ood = facts(task, "atomic_id"), facts(task, "atomic_ood")
    found = {}
    for split in COMPARISONS:
        batch = task.examples(split)
        found[split] = words(task, batch)
        assert len(found[split]) == len(batch)
        assert batch.read.tolist() == [[False] * 4 + [True]] * len(batch)
        assert not batch.targets[:, :4].any()
    assert found["ood"] == compared(ood, ood)
    assert found["mixed"] == compared(known, ood) | compared(ood, known)
    both_id = compared(known, known)
    assert found["test"].items() <= both_id.items()
    assert found["train_inferred"].items() <= both_id.items()
    assert len(found["train_inferred"]) == round(2.0 * len(known))
    assert {flipped(prompt) for prompt in found["test"]} == found["test"].keys()
    assert not found["test"].keys() & found["train_inferred"].keys()


@given(SEEDS)
def test_training_is_told_every_value_and_then_the_comparisons(seed):
    task = small(seed=seed)
    batch = task.examples("train")
    assert batch.read[:36].tolist() == [[False, True, False, False, False]] * 36
    assert {tuple(task.decode(prompt).split()) for prompt in prompts(batch)[:36]} == facts(task).keys()
    assert torch.equal(batch.tokens[36:], task.examples("train_inferred").tokens)
    assert not batch.latents


@given(SEEDS)
def test_training_sets_are_nested_in_phi_and_all_else_stays(seed):
    few, many = small(seed=seed, phi=1.0), small(seed=seed, phi=3.0)
    assert prompts(few.examples("train_inferred")) == prompts(many.examples("train_inferred"))[:27]
    for split in ("test", "ood", "mixed", "atomic_id", "atomic_ood"):
        assert torch.equal(few.examples(split).tokens, many.examples(split).tokens)


def test_the_largest_phi_tells_all_that_is_not_held_out():
    task = small(seed=1)
    with pytest.raises(WorkbenchError, match=r"Set phi to at most") as caught:
        small(seed=1, phi=100.0)
    n_pool = len(compared(*2 * [facts(task, "atomic_id")])) - len(task.examples("test"))
    assert f"this world holds {n_pool} for 27 ID atomic facts" in str(caught.value)
    assert len(small(seed=1, phi=n_pool / 27).examples("train_inferred")) == n_pool


def test_the_seed_draws_the_world_and_json_rebuilds_it():
    task = Comparison(**SMALL, seed=3)
    fields = task.to_json()
    assert fields.pop("name") == "comparison"
    assert type(task)(**fields) == task
    for split in task.splits:
        assert torch.equal(task.examples(split).tokens, type(task)(**fields).examples(split).tokens)
    assert facts(task) != facts(small(seed=4))


@given(SEEDS, st.sampled_from(COMPARISONS))
def test_latents_stand_where_they_are_determined(seed, split):
    task = small(seed=seed)
    every, batch = facts(task), task.examples(split)
    positions = {name: latent.position for name, latent in batch.latents.items()}
    assert positions == {"v1": 2, "v2": 4, "answer": 4}
    for tokens, v1, v2 in zip(
        prompts(batch), *(batch.latents[name].value.tolist() for name in ("v1", "v2")), strict=True
    ):
        attribute, _, e1, _, e2 = (task.vocab[token] for token in tokens)
        assert (task.vocab[v1], task.vocab[v2]) == (str(every[e1, attribute]), str(every[e2, attribute]))
    assert torch.equal(batch.latents["answer"].value, batch.targets[:, 4])


def counterfactuals(task, kind, prompt):
    """Every counterfactual of a prompt, with its answer, by looping over all entities and attributes."""
    known, every = facts(task, "atomic_id"), facts(task)
    entities, attributes = sorted({e for e, _ in every}), sorted({a for _, a in every})
    parts = prompt.split()
    if len(parts) == 2:
        e1, attribute = parts
        own = every[e1, attribute]
        if kind == "attr":
            return {f"{e1} {a}": str(every[e1, a]) for a in attributes if every[e1, a] != own}
        if kind == "e2":
            return {}
        return {f"{e} {a}": str(value) for (e, a), value in known.items() if a == attribute and value != own}
    attribute, _, e1, _, e2 = parts
    v1, v2 = every[e1, attribute], every[e2, attribute]
    every_label = labels(task)
    near_v1 = {v1 - 1, v1 + 1} if v1 == v2 else {v1}
    near_v2 = {v2 - 1, v2 + 1} if v1 == v2 else {v2}
    new = [e for e in entities if (e, attribute) in known and e not in (e1, e2)]
    firsts = {e: f"{attribute} <q> {e} <mask> {e2}" for e in new}
    seconds = {e: f"{attribute} <q> {e1} <mask> {e}" for e in new}
    others = {
        "e1": [firsts[e] for e in new if every[e, attribute] in near_v2],
        "e2": [seconds[e] for e in new if every[e, attribute] in near_v1],
        "attr": [f"{a} <q> {e1} <mask> {e2}" for a in attributes if a != attribute],
        "entity": [p for p in (*firsts.values(), *seconds.values()) if every_label[p] != every_label[prompt]],
    }[kind]
    return {other: every_label[other] for other in others}


@pytest.mark.parametrize("kind", Comparison.contrasts)
@pytest.mark.parametrize("split", Comparison.splits)
def test_a_counterfactual_changes_what_it_claims_and_is_missing_only_where_there_is_none(kind, split):
    task = small(seed=2)
    whole = task.examples(split)
    batch = task.contrast(whole, kind, seed=1)
    assert batch.dropped + len(batch) == len(whole)
    assert (batch.distractor != batch.targets).any(1).all()
    possible = {prompt: counterfactuals(task, kind, prompt) for prompt in words(task, whole)}
    kept = list(words(task, batch))
    if kind == "entity":
        # One of the two entities is drawn first; it may be the one that nothing can replace.
        assert set(kept) <= {prompt for prompt, others in possible.items() if others}
    else:
        assert kept == [prompt for prompt, others in possible.items() if others]
    for prompt, corrupt, read, distractor in zip(
        kept, prompts(batch), batch.read.tolist(), batch.distractor.tolist(), strict=True
    ):
        assert corrupt != prompt
        assert sum(distractor) == distractor[read.index(True)]
    for prompt, corrupt, distractor in zip(
        kept, map(task.decode, batch.corrupt.tolist()), batch.distractor[batch.read].tolist(), strict=True
    ):
        assert possible[prompt][corrupt] == task.vocab[distractor]


@pytest.mark.parametrize("kind", Comparison.contrasts)
def test_every_counterfactual_can_be_drawn(kind):
    task = small(seed=1)
    for split in ("test", "atomic_id"):
        one = task.examples(split).select(slice(4, 5))
        drawn = task.contrast(join([one] * 400), kind, seed=1)
        [prompt] = words(task, one)
        assert set(map(task.decode, drawn.corrupt.tolist())) == counterfactuals(task, kind, prompt).keys()


def test_both_entities_are_replaced():
    task = Comparison()
    batch = task.contrast(task.examples("test"), "entity")
    changed = (batch.tokens != batch.corrupt).double().mean(0)
    assert changed[[0, 1, 3]].tolist() == [0, 0, 0]
    assert 0.45 < changed[2] < 0.55


def test_one_attribute_has_no_other():
    task = small(attributes=1)
    assert len(task.contrast(task.examples("test"), "attr")) == 0


@given(SEEDS, st.sampled_from(COMPARISONS))
def test_answers_under_another_latent(seed, split):
    task = small(seed=seed)
    batch = task.examples(split)
    shuffled = batch.select(torch.randperm(len(batch)))
    for latent in ("v1", "v2", "answer"):
        values = shuffled.latents[latent].value
        found = task.with_latent(batch, latent, values)
        assert not found[:, :4].any()
        own = (batch.latents[name].value.tolist() for name in ("v1", "v2"))
        for tokens, value, v1, v2, new in zip(prompts(batch), values.tolist(), *own, found[:, 4].tolist(), strict=True):
            v1, v2 = {"v1": (value, v2), "v2": (v1, value)}.get(latent, (v1, v2))
            label = "<" if v1 < v2 else "=" if v1 == v2 else ">"
            assert task.vocab[new] == (task.vocab[value] if latent == "answer" else f"{task.vocab[tokens[0]]}{label}")
        assert torch.equal(task.with_latent(batch, latent, batch.latents[latent].value), batch.targets)


def test_another_latent_must_be_one_of_the_task():
    task = small()
    batch, fact = task.examples("test"), task.examples("atomic_id")
    zeros = torch.zeros(len(batch), dtype=torch.long)
    assert torch.equal(task.with_latent(fact, "answer", fact.targets[:, 1]), fact.targets)
    for given_batch, latent, values, message in (
        (batch, "v1", zeros, "'v1' takes tokens from 15 to 18, got 0 to 0"),
        (batch, "v2", zeros + 19, "'v2' takes tokens from 15 to 18, got 19 to 19"),
        (batch, "answer", zeros + 28, "'answer' takes tokens from 15 to 27, got 28 to 28"),
        (batch, "label", zeros, "Unknown latent 'label'"),
        (fact, "v1", fact.targets[:, 1], "Only a comparison has a latent 'v1'; 27 of 27 prompts are single facts"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            task.with_latent(given_batch, latent, values)


@given(SEEDS, st.sampled_from(["test", "ood", "atomic_id"]))
def test_prompts_read_back(seed, split):
    task = small(seed=seed)
    row = task.examples(split).select(slice(0, 1))
    batch = task.prompt(task.decode(row.tokens[0].tolist()))
    for name in ("tokens", "targets", "read"):
        assert torch.equal(getattr(batch, name), getattr(row, name))
    assert batch.latents.keys() == row.latents.keys()


def test_prompts_can_be_typed_short():
    task = small()
    assert torch.equal(task.prompt("attr2 e3 e5").tokens, task.prompt("attr2 <q> e3 <mask> e5").tokens)
    assert torch.equal(task.prompt("e3 attr2").tokens, task.prompt("e3 attr2 <pad>").tokens)
    assert task.decode(task.prompt("e3 attr2").tokens[0].tolist()) == "e3 attr2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attr0", "Cannot read 'attr0' as a prompt. Write a comparison like 'attr2 <q> e3 <mask> e1' or a fact like"),
        ("attr0 e1 e2 e3", "Cannot read"),
        ("attr9 e1 e2", "Unknown attribute 'attr9'. Did you mean 'attr"),
        ("attr0 e1 e22", "Unknown entity 'e22'. Did you mean 'e2'"),
        ("attr0 e1", "Unknown attribute 'e1'"),
        ("attr0 e1 e1", "e1 is compared with itself. Name two entities"),
    ],
)
def test_bad_prompts(text, message):
    with pytest.raises(WorkbenchError, match=message):
        small().prompt(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entities": 3}, "at least 4 entities, two of them OOD, and 2 values; got 3 entities and 10 values"),
        ({"values": 1}, "got 200 entities and 1 values"),
        ({"attributes": 0}, "attributes must be at least 1, got 0"),
        ({"ood_fraction": 1.0}, "ood_fraction must lie between 0 and 1, both excluded, got 1.0"),
        ({"test_fraction": 0.0}, "test_fraction must lie between 0 and 1, both excluded, got 0.0"),
        ({"ood_fraction": 0.005}, "ood_fraction 0.005 of 200 entities makes 1 OOD; comparing needs 2 of either kind"),
        ({"ood_fraction": 0.995}, "makes 199 OOD"),
        ({"phi": -1.0}, "phi must be above 0, got -1.0"),
        ({"phi": 200.0}, r"phi=200 asks for 144000 inferred facts in training; this world holds \d+ for 720 ID"),
        ({"phi": 1e-6}, "leaves split 'train_inferred' empty"),
        ({"test_fraction": 1e-9}, "leaves split 'test' empty"),
        ({"test_fraction": 1 - 1e-9}, "leaves split 'train_inferred' empty"),
    ],
)
def test_worlds_that_cannot_be(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        Comparison(**fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda task: task.examples("validation"), "Unknown split 'validation'"),
        (lambda task: task.contrast(task.examples("test"), "v1"), "Unknown contrast 'v1'"),
        (lambda task: task.sample(10_000, split="ood"), "Asked for 10000 examples of split 'ood', which has 18"),
        (lambda task: task.sample(0), "Ask for 1 to that"),
    ],
)
def test_bad_requests(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match=message):
        call(small())


def test_sample_is_seeded_and_of_the_default_kind():
    task = small(seed=2)
    first, again, other = (task.sample(9, split="test", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.corrupt, again.corrupt)
    assert not torch.equal(first.tokens, other.tokens)
    assert len(set(prompts(first))) == len(first) == 9
    assert (first.tokens != first.corrupt).sum(0).tolist() == [0, 0, 9, 0, 0]


@pytest.mark.slow
def test_the_papers_world():
    task = Comparison(entities=1000, attributes=20, values=20, phi=12.6)
    size = {split: len(task.examples(split)) for split in task.splits if split != "train"}
    assert (size["atomic_id"], size["atomic_ood"], size["ood"]) == (18_000, 2_000, 198_000)
    assert size["train_inferred"] == 226_800
    assert size["mixed"] == 20 * 900 * 100 * 2
    assert abs(size["test"] - 1_618_200) <= 10_000
    assert size["test"] + task._world.n_pool() == 20 * 900 * 899
    equal = [f"attr{attribute}=" for attribute in range(20)]
    tokens = torch.tensor([task.vocab.index(label) for label in equal])
    for split in ("test", "ood", "train_inferred"):
        assert abs(float(torch.isin(task.examples(split).targets[:, 4], tokens).double().mean()) - 0.05) <= 0.003
    assert len(task.sample(300, split="test")) == 300
    # In kilobytes, on a Mac in bytes; of all tests so far in this process.
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 4 * 2**30


def test_loops_would_see_a_wrong_label():
    every = labels(small())
    more = {label for prompt, label in every.items() if every[flipped(prompt)].endswith("<")}
    assert more == {f"attr{attribute}>" for attribute in range(3)}
    assert len(every) == 3 * len(list(permutations(range(12), 2)))
