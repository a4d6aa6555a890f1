import resource
import sys
from collections import Counter
from functools import cache

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Task, join
from workbench.tasks.composition import Composition

SMALL = {"entities": 14, "relations": 5, "out_degree": 3, "ood_fraction": 0.3, "test_fraction": 0.2, "phi": 0.5}
CHAINS = ("train_inferred", "test", "ood", "id_ood", "ood_id")
KINDS = Composition.contrasts
WORLDS = st.builds(
    lambda seed, coverage: SMALL | {"seed": seed, "role_coverage": coverage},
    st.sampled_from(range(12)),
    st.sampled_from([0.0, 0.5]),
)


@cache
def small(**fields):
    return Composition(**(SMALL | fields))


def prompts(batch):
    return [tuple(row) for row in batch.tokens.tolist()]


def facts(task, *splits):
    """(head, relation) -> tail, as tokens, of some splits of facts."""
    return {
        (head, relation): tail
        for split in splits or ("atomic_id", "atomic_ood")
        for (head, relation, _), (_, tail, _) in zip(
            prompts(task.examples(split)), task.examples(split).targets.tolist(), strict=True
        )
    }


def chains(first, second):
    """(h, r1, r2) -> answer of every chain over these facts, by looping."""
    return {
        (head, r1, r2): answer
        for (head, r1), bridge in first.items()
        for (middle, r2), answer in second.items()
        if middle == bridge
    }


def test_is_a_task():
    task = Composition()
    assert isinstance(task, Task)
    assert set(task.measured) <= set(task.splits)
    assert {"train", "test"} <= set(task.measured)
    assert (task.solved_accuracy, task.memorised_accuracy) == (0.9, 0.99)
    assert task.vocab[task.pad_token] == "<pad>"
    assert len(task.vocab) == 121
    assert len(task.position_labels) == task.examples("test").tokens.shape[1]


@given(WORLDS)
def test_the_world_is_a_function_over_distinct_relations(fields):
    task = small(**fields)
    every = facts(task)
    assert len(every) == 14 * 3
    assert Counter(head for head, _ in every) == dict.fromkeys(range(14), 3)
    assert {relation for _, relation in every} <= set(range(14, 19))
    assert set(every.values()) <= set(range(14))
    assert len(task.examples("atomic_ood")) == round(0.3 * 42)


@given(WORLDS)
def test_every_split_is_that_of_the_loops(fields):
    task = small(**fields)
    known, ood = facts(task, "atomic_id"), facts(task, "atomic_ood")
    found = {}
    for split in CHAINS:
        batch = task.examples(split)
        found[split] = dict(zip(prompts(batch), batch.targets[:, 2].tolist(), strict=True))
        assert len(found[split]) == len(batch)
        assert batch.read.tolist() == [[False, False, True]] * len(batch)
        assert not batch.targets[:, :2].any()
    assert found["ood"] == chains(ood, ood)
    assert found["ood_id"] == chains(ood, known)
    told = found["train_inferred"]
    assert len(told) == round(0.5 * len(known))
    assert found["id_ood"] == {chain: answer for chain, answer in chains(known, ood).items() if chain not in told}
    both_id = chains(known, known)
    assert found["test"].items() <= both_id.items()
    assert not found["test"].keys() & told.keys()
    over_ood = told.keys() - both_id.keys()
    assert over_ood <= chains(known, ood).keys()
    assert told.items() <= (both_id | chains(known, ood)).items()
    if not task.role_coverage:
        assert not over_ood


@given(WORLDS)
def test_training_is_told_every_fact_and_then_the_chains(fields):
    task = small(**fields)
    batch = task.examples("train")
    n = len(facts(task))
    assert {prompt[:2] for prompt in prompts(batch)[:n]} == facts(task).keys()
    assert set(batch.tokens[:n, 2].tolist()) == {task.pad_token}
    assert batch.read[:n].tolist() == [[False, True, False]] * n
    assert torch.equal(batch.tokens[n:], task.examples("train_inferred").tokens)
    assert not batch.latents
    assert not set(prompts(batch)) & set(prompts(task.examples("test")))


def test_the_pool_is_everything_that_may_be_told():
    task = small(role_coverage=1.0, seed=3)
    known, ood = facts(task, "atomic_id"), facts(task, "atomic_ood")
    most = len(chains(known, known)) - len(task.examples("test")) + len(chains(known, ood))
    with pytest.raises(WorkbenchError, match=rf"this world holds {most} for {len(known)} ID atomic facts"):
        small(role_coverage=1.0, seed=3, phi=20.0)


def test_coverage_lets_a_share_of_the_ood_facts_be_second_hops():
    def seconds(coverage):
        task = small(role_coverage=coverage, seed=3)
        _, second = task._world.ends(task._world.pool)
        return {edge for edge in second.tolist() if task._world.ood[edge]}, prompts(task.examples("test"))

    (none, *_), (half, *_), (whole, *_) = found = [seconds(coverage) for coverage in (0.0, 0.5, 1.0)]
    assert not none
    assert 0 < len(half) <= 6
    assert half < whole
    assert len({tuple(test) for _, test in found}) == 1


@given(st.sampled_from(range(12)))
def test_training_sets_are_nested_in_phi_and_all_else_stays(seed):
    few, many = small(seed=seed, phi=0.4), small(seed=seed, phi=1.2)
    assert prompts(few.examples("train_inferred")) == prompts(many.examples("train_inferred"))[: round(0.4 * 29)]
    for split in ("test", "ood", "atomic_id", "atomic_ood", "id_ood", "ood_id"):
        assert torch.equal(few.examples(split).tokens, many.examples(split).tokens)


def test_the_seed_draws_the_world():
    same, other = Composition(**SMALL, seed=1), small(seed=2)
    for split in same.splits:
        assert torch.equal(same.examples(split).tokens, Composition(**SMALL, seed=1).examples(split).tokens)
    assert facts(same) != facts(other)
    assert prompts(same.examples("test")) != prompts(other.examples("test"))


def test_json_rebuilds_the_task():
    task = small(role_coverage=0.5, seed=4)
    fields = task.to_json()
    assert fields.pop("name") == "composition"
    assert type(task)(**fields) == task


@given(WORLDS)
def test_latents_stand_where_they_are_determined(fields):
    task = small(**fields)
    every = facts(task)
    for split in CHAINS:
        batch = task.examples(split)
        assert {name: latent.position for name, latent in batch.latents.items()} == {
            "bridge": 1,
            "relation": 2,
            "answer": 2,
        }
        for (head, r1, r2), bridge, relation, answer in zip(
            prompts(batch),
            *(batch.latents[name].value.tolist() for name in ("bridge", "relation", "answer")),
            strict=True,
        ):
            assert (bridge, relation, answer) == (every[head, r1], r2, every[every[head, r1], r2])
    batch = task.examples("atomic_ood")
    assert batch.latents["answer"].position == 1
    assert torch.equal(batch.latents["answer"].value, batch.targets[:, 1])


def counterfactuals(task, kind, prompt):
    """Every counterfactual of a prompt with its answer, by looping over all prompts of its length over ID facts."""
    known, every = facts(task, "atomic_id"), facts(task)
    head, r1, r2 = prompt
    bridge = every[head, r1]
    if r2 == task.pad_token:
        prompt_answer, worlds = bridge, {(h, r, r2): (b, b) for (h, r), b in known.items()}
    else:
        prompt_answer = every[bridge, r2]
        worlds = {chain: (known[chain[:2]], answer) for chain, answer in chains(known, known).items()}
    keeps = {
        "bridge": lambda h, r, s, b: s == r2 and b != bridge,
        "head": lambda h, r, s, b: (r, s) == (r1, r2),
        "first": lambda h, r, s, b: (h, s) == (head, r2),
    }
    if kind == "same_bridge":
        return {(*edge, r2): prompt_answer for edge, b in known.items() if b == bridge and edge != (head, r1)}
    if kind == "second":
        if r2 == task.pad_token:
            return {}
        return {
            (head, r1, r): answer
            for (middle, r), answer in known.items()
            if middle == bridge and answer != prompt_answer
        }
    return {
        other: answer for other, (b, answer) in worlds.items() if keeps[kind](*other, b) and answer != prompt_answer
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", Composition.splits)
@pytest.mark.parametrize("seed", [0, 5])
def test_a_counterfactual_changes_what_it_claims_and_is_missing_only_where_there_is_none(kind, split, seed):
    task = small(seed=seed)
    whole = task.examples(split)
    batch = task.contrast(whole, kind, seed=seed)
    assert batch.dropped + len(batch) == len(whole)
    possible = {prompt: counterfactuals(task, kind, prompt) for prompt in prompts(whole)}
    assert prompts(batch) == [prompt for prompt in prompts(whole) if possible[prompt]]
    for prompt, corrupt, read, distractor in zip(
        prompts(batch), batch.corrupt.tolist(), batch.read.tolist(), batch.distractor.tolist(), strict=True
    ):
        assert possible[prompt][tuple(corrupt)] == distractor[read.index(True)]
        assert sum(distractor) == distractor[read.index(True)]
    answers = (batch.distractor != batch.targets).any(1)
    assert not answers.any() if kind == "same_bridge" else answers.all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_counterfactual_can_be_drawn(kind):
    task = small(seed=1)
    one = task.examples("test").select(slice(2, 3))
    drawn = task.contrast(join([one] * 800), kind, seed=1)
    assert set(map(tuple, drawn.corrupt.tolist())) == counterfactuals(task, kind, prompts(one)[0]).keys()


def test_pairs_that_are_drawn_in_parts_are_none_the_less_right(monkeypatch):
    monkeypatch.setattr("workbench.tasks.facts.ROWS", 7)
    task = small(seed=0)
    whole = task.examples("train")
    batch = task.contrast(whole, "first")
    assert batch.dropped + len(batch) == len(whole)
    for prompt, corrupt in zip(prompts(batch), map(tuple, batch.corrupt.tolist()), strict=True):
        assert corrupt in counterfactuals(task, "first", prompt)
    assert len(task.contrast(whole.select(slice(0, 0)))) == 0


@given(WORLDS, st.sampled_from(sorted(Composition.causes)), st.sampled_from(CHAINS))
def test_a_perturbation_leaves_the_old_answer_wrong(fields, place, split):
    task = small(**fields)
    known, every = facts(task, "atomic_id"), facts(task)
    heads, relations = range(14), range(14, 19)
    whole = task.examples(split)
    found = task.perturbed(whole, place, seed=3)

    def answer(head, r1, r2):
        return every.get((every.get((head, r1)), r2))

    for prompt, tokens, defined, new, kept in zip(
        prompts(whole),
        map(tuple, found.tokens.tolist()),
        *(each.tolist() for each in (found.defined, found.answer, found.kept)),
        strict=True,
    ):
        head, r1, r2 = prompt
        others = {
            "head": [(h, r1, r2) for h in heads if any((h, r) in known for r in relations)],
            "first": [(head, r, r2) for r in relations if (head, r) in known],
            "second": [(head, r1, r) for r in relations if (every[head, r1], r) in known],
        }[place]
        possible = [other for other in others if answer(*other) != answer(*prompt)]
        assert kept == bool(possible)
        assert tokens in possible if kept else tokens == prompt
        assert defined == (kept and answer(*tokens) is not None)
        assert not defined or new == answer(*tokens)


def test_perturbations_are_seeded_and_may_lead_nowhere():
    task = Composition()
    batch = task.examples("test")
    first, again, other = (task.perturbed(batch, "first", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    # Half of the relations lead on from a bridge.
    assert 0.4 < first.defined.double().mean() < 0.6
    assert task.perturbed(batch, "second").defined.all()


def test_facts_are_looked_up_by_token():
    task = small(seed=2)
    every = facts(task)
    head, relation = torch.cartesian_prod(torch.arange(-1, 21), torch.arange(-1, 21)).unbind(1)
    found = task.fact(head, relation).tolist()
    assert found == [every.get(pair, -1) for pair in zip(head.tolist(), relation.tolist(), strict=True)]


def test_two_calls_answer_a_chain():
    batch = small(seed=2).examples("ood")
    head, r1, r2 = batch.tokens.unbind(1)
    task = small(seed=2)
    assert torch.equal(task.fact(task.fact(head, r1), r2), batch.targets[:, 2])


@given(WORLDS, st.sampled_from(CHAINS))
def test_answers_under_another_latent(fields, split):
    task = small(**fields)
    every, batch = facts(task), task.examples(split)
    shuffled = batch.select(torch.randperm(len(batch)))
    for latent in ("bridge", "relation", "answer"):
        values = shuffled.latents[latent].value
        found = task.with_latent(batch, latent, values)
        assert not found[:, :2].any()
        for (head, r1, r2), value, own, new in zip(
            prompts(batch), values.tolist(), batch.targets[:, 2].tolist(), found[:, 2].tolist(), strict=True
        ):
            asked = {"bridge": (value, r2), "relation": (every[head, r1], value)}.get(latent)
            # Where there is no such fact, the prompt's own target: an exchange drops and counts it.
            assert new == (value if asked is None else every.get(asked, own))
        assert torch.equal(task.with_latent(batch, latent, batch.latents[latent].value), batch.targets)


def test_another_latent_must_be_one_of_the_task():
    task = small()
    batch, fact = task.examples("test"), task.examples("atomic_id")
    zeros = torch.zeros(len(batch), dtype=torch.long)
    assert torch.equal(task.with_latent(fact, "answer", fact.targets[:, 1]), fact.targets)
    for given_batch, latent, values, message in (
        (batch, "bridge", zeros + 14, "'bridge' takes tokens from 0 to 13, got 14 to 14"),
        (batch, "relation", zeros, "'relation' takes tokens from 14 to 18, got 0 to 0"),
        (batch, "answer", zeros - 1, "got -1 to -1"),
        (batch, "head", zeros, "Unknown latent 'head'"),
        (fact, "bridge", fact.tokens[:, 0], "Only a chain has a latent 'bridge'; 29 of 29 prompts are single facts"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            task.with_latent(given_batch, latent, values)


@given(WORLDS, st.sampled_from(["test", "ood", "atomic_id"]))
def test_prompts_read_back(fields, split):
    task = small(**fields)
    row = task.examples(split).select(slice(0, 1))
    batch = task.prompt(task.decode(row.tokens[0].tolist()))
    for name in ("tokens", "targets", "read"):
        assert torch.equal(getattr(batch, name), getattr(row, name))
    assert {name: int(latent.value) for name, latent in batch.latents.items()} == {
        name: int(latent.value) for name, latent in row.latents.items()
    }


def test_prompts_are_written_without_padding():
    task = small()
    fact, chain = task.examples("atomic_id"), task.examples("test")
    assert len(task.decode(fact.tokens[0].tolist()).split()) == 2
    assert len(task.decode(chain.tokens[0].tolist()).split()) == 3
    written = task.decode(fact.tokens[0].tolist())
    assert torch.equal(task.prompt(f"{written} <pad>").tokens, fact.tokens[:1])


def test_bad_prompts():
    task = Composition()
    for text, message in (
        ("e3", "Cannot read 'e3' as a prompt. Write a chain like 'e3 r5 r7' or a fact 'e3 r5'"),
        ("e3 r5 r7 r9", "Cannot read"),
        ("e333 r5 r7", "Unknown entity 'e333'. Did you mean 'e33'"),
        ("r5 e3", "Unknown entity 'r5'"),
        ("e3 e5", "Unknown relation 'e5'"),
        ("e3 r55", "Unknown relation 'r55'. Did you mean 'r5'"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            task.prompt(text)


def test_prompts_about_facts_there_are_not_say_which_there_are():
    task = small(seed=2)
    every = facts(task)
    head, r1 = next(iter(every))
    bridge = every[head, r1]

    def listed(entity):
        return ", ".join(f"r{relation - 14}" for relation in sorted(r for h, r in every if h == entity))

    missing = next(r for r in range(14, 19) if (head, r) not in every)
    with pytest.raises(WorkbenchError, match=f"^e{head} has no relation r{missing - 14}; it has {listed(head)}. Ask"):
        task.prompt(f"e{head} r{missing - 14}")
    missing = next(r for r in range(14, 19) if (bridge, r) not in every)
    message = (
        f"^e{bridge}, where e{head} r{r1 - 14} leads, has no relation r{missing - 14}; it has {listed(bridge)}. Ask"
    )
    with pytest.raises(WorkbenchError, match=message):
        task.prompt(f"e{head} r{r1 - 14} r{missing - 14}")
    many = Composition(relations=30, out_degree=15, phi=5.0)
    absent = next(r for r in range(100, 130) if (0, r) not in facts(many))
    with pytest.raises(WorkbenchError, match=r"(r\d+, ){12}…\. Ask"):
        many.prompt(f"e0 r{absent - 100}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_degree": 30}, r"out_degree 30 asks for more relations of each entity than there are \(20\). Set"),
        ({"entities": 0}, "entities must be at least 1, got 0"),
        ({"out_degree": 0}, "out_degree must be at least 1, got 0"),
        ({"ood_fraction": 0.0}, "ood_fraction must lie between 0 and 1, both excluded, got 0.0"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1, both excluded, got 1.0"),
        ({"role_coverage": 1.5}, "role_coverage must lie between 0 and 1, got 1.5"),
        ({"role_coverage": float("nan")}, "role_coverage must lie between 0 and 1, got nan"),
        ({"phi": 0.0}, "phi must be above 0, got 0.0"),
        ({"phi": float("nan")}, "phi must be above 0, got nan"),
        ({"phi": 18.0}, r"phi=18 asks for 16200 inferred facts in training; this world holds \d+ for 900 ID"),
        ({"phi": 1e-6}, "leaves split 'train_inferred' empty"),
        ({"test_fraction": 1 - 1e-9}, "leaves split 'train_inferred' empty"),
        ({"ood_fraction": 1e-5}, "leaves split 'atomic_ood' empty"),
        ({"ood_fraction": 1 - 1e-5}, "leaves split 'atomic_id' empty"),
        ({"test_fraction": 1e-9}, "leaves split 'test' empty"),
        ({"ood_fraction": 0.001}, "leaves split 'ood' empty. Enlarge the world or its fractions, or try another seed"),
    ],
)
def test_worlds_that_cannot_be(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        Composition(**fields)


def test_the_largest_phi_that_an_error_names_is_possible():
    with pytest.raises(WorkbenchError) as caught:
        Composition(phi=100.0)
    largest = float(str(caught.value).rpartition(" ")[2].rstrip("."))
    assert len(Composition(phi=largest).examples("train_inferred")) > 7200
    with pytest.raises(WorkbenchError, match="Set phi to at most"):
        Composition(phi=largest + 0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda task: task.examples("validation"), "Unknown split 'validation'"),
        (lambda task: task.contrast(task.examples("test"), "tail"), "Unknown contrast 'tail'"),
        (lambda task: task.sample(10_000, split="ood"), "Asked for 10000 examples of split 'ood', which has"),
        (lambda task: task.sample(0), "Ask for 1 to that"),
        (
            lambda task: task.perturbed(task.examples("atomic_id"), "head"),
            "Only a chain has a perturbation; 900 of 900",
        ),
        (lambda task: task.perturbed(task.examples("test"), "tail"), "Unknown cause 'tail'"),
    ],
)
def test_bad_requests(call, message, monkeypatch):
    # The tests' type checker would be first with the place; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match=message):
        call(Composition())


def test_sample_is_seeded_distinct_and_counts_what_it_passed_over():
    task = small(seed=8)
    n = len(task.contrast(task.examples("id_ood")))
    first, again, other = (task.sample(n - 3, split="id_ood", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.corrupt, again.corrupt)
    assert not torch.equal(first.tokens, other.tokens)
    assert len(set(prompts(first))) == len(first) == n - 3
    assert first.dropped > 0
    with pytest.raises(WorkbenchError, match=f"of split 'id_ood'; only {n} have headroom"):
        task.sample(n + 1, split="id_ood")


@pytest.mark.parametrize(("phi", "told"), [(18.0, 684_000), (7.2, 273_600)])
def test_the_papers_world(phi, told):
    task = Composition(entities=2000, relations=200, out_degree=20, ood_fraction=0.05, test_fraction=0.005, phi=phi)
    size = {split: len(task.examples(split)) for split in task.splits}
    assert (size["atomic_id"], size["atomic_ood"], size["train_inferred"]) == (38_000, 2_000, told)
    assert size["train"] == 40_000 + told
    assert abs(size["test"] - 3_600) <= 200
    assert abs(size["ood"] - 2_000) <= 150
    assert abs(size["id_ood"] + size["ood_id"] - 76_000) <= 1_500
    assert abs(len(task._world.pool) - 718_500) <= 1_500
    chains = len(task._world.pool) + sum(size[split] for split in ("test", "ood", "id_ood", "ood_id"))
    assert chains == 800_000
    assert len(task.sample(300, split="train_inferred")) == 300
    # In kilobytes, on a Mac in bytes; of all tests so far in this process.
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 4 * 2**30
