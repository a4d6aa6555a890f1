"""Splits by group: nothing on both sides, and the groups that the tasks name."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Latent, join
from workbench.tasks.comparison import Comparison
from workbench.tasks.composition import Composition
from workbench.tasks.groups import in_several_groups, split_by_group
from workbench.tasks.modular import Modular

WORLD = Composition(entities=20, relations=6, out_degree=4, ood_fraction=0.2, test_fraction=0.2, phi=2.0)


def prompts(value, group=None, tokens=None):
    value = torch.tensor(value)
    tokens = torch.zeros(len(value), 2, dtype=torch.long) if tokens is None else tokens
    latent = Latent(value=value, position=0, group=None if group is None else torch.tensor(group))
    return Batch(tokens=tokens, targets=tokens, read=torch.ones_like(tokens).bool(), latents={"kind": latent})


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=40, max_size=80), st.integers(0, 3)
)  # fmt: skip
def test_no_group_is_on_both_sides_and_no_value_is_in_the_test_alone(rows, seed):
    value, group = zip(*rows, strict=True)
    batch = prompts(value, group)
    batch = batch.select(in_several_groups(batch, "kind"))
    if len(batch.latents["kind"].value.unique()) < 2:
        return
    split = split_by_group(batch, "kind", seed=seed)
    given_groups = batch.latents["kind"].group
    assert not set(given_groups[split.train].tolist()) & set(given_groups[split.test].tolist())
    assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(len(batch)))
    assert torch.equal(split.values[split.labels], batch.latents["kind"].value)
    assert set(split.labels[split.train].tolist()) == set(range(len(split.values)))
    assert split.n_groups == len(given_groups.unique())


def test_values_in_several_groups_by_hand():
    batch = prompts([5, 5, 7, 7, 9], [0, 1, 2, 2, 3])
    assert in_several_groups(batch, "kind").tolist() == [True, True, False, False, False]
    # The groups of the call come first.
    given_groups = torch.tensor([0, 0, 1, 2, 3])
    assert in_several_groups(batch, "kind", groups=given_groups).tolist() == [False, False, True, True, False]


def test_without_a_group_it_is_the_token_at_the_position_of_the_latent():
    tokens = torch.stack([torch.arange(40) % 4, torch.zeros(40, dtype=torch.long)], 1)
    split = split_by_group(prompts([n % 2 for n in range(40)], tokens=tokens), "kind", seed=0)
    assert torch.equal(split.group, tokens[:, 0])


def test_groups_follow_their_prompts():
    first, second = prompts([1, 2, 3], [4, 5, 6]), prompts([7, 8], [9, 10])
    rows = torch.tensor([2, 0])
    assert first.select(rows).latents["kind"].group.tolist() == [6, 4]
    assert join([first, second]).latents["kind"].group.tolist() == [4, 5, 6, 9, 10]
    assert join([first, prompts([7, 8])]).latents["kind"].group is None


def test_a_chain_is_grouped_by_the_head_of_the_fact_that_is_looked_up():
    batch = WORLD.examples("test")
    head, bridge = batch.tokens[:, 0], batch.latents["bridge"].value
    assert torch.equal(WORLD.fact(head, batch.tokens[:, 1]), bridge)
    assert torch.equal(batch.latents["bridge"].group, head)
    assert torch.equal(batch.latents["relation"].group, head)
    assert torch.equal(batch.latents["answer"].group, bridge)
    fact = WORLD.examples("atomic_id")
    assert torch.equal(fact.latents["answer"].group, fact.tokens[:, 0])


def test_a_value_is_grouped_by_its_entity():
    batch = Comparison(entities=20, values=4, ood_fraction=0.2, phi=5.0).examples("test")
    groups = {name: latent.group.tolist() for name, latent in batch.latents.items()}
    e1, e2 = batch.tokens[:, 2].tolist(), batch.tokens[:, 4].tolist()
    assert groups == {"v1": e1, "v2": e2, "answer": e1}


def test_an_operand_is_grouped_by_the_other():
    batch = Modular(p=7).examples("all")
    a, b = batch.tokens[:, 0].tolist(), batch.tokens[:, 1].tolist()
    assert {name: latent.group.tolist() for name, latent in batch.latents.items()} == {"a": b, "b": a, "answer": a}


def test_errors():
    with pytest.raises(WorkbenchError, match="Unknown latent 'kin'"):
        in_several_groups(prompts([1, 2]), "kin")
    with pytest.raises(WorkbenchError, match="has one value in all 3 prompts"):
        split_by_group(prompts([1, 1, 1]), "kind", seed=0)
    with pytest.raises(WorkbenchError, match=r"1 of its 2 values \(2\) are in one group only"):
        split_by_group(prompts([1, 1, 2], [0, 1, 0]), "kind", seed=0)
