import json
from dataclasses import replace

import pytest
import torch

from probes.linear import ProbeTask, linear_probe, probe_task
from workbench.instrument.states import read_cells
from workbench.intervals import share_of
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Latent
from workbench.tasks.composition import Composition
from workbench.tasks.modular import Modular

N_CLASSES, N_GROUPS, N = 3, 40, 480


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.arange(N) % N_GROUPS, torch.zeros(N, dtype=torch.long)], 1)
    value = torch.randint(0, N_CLASSES, (N,), generator=rng) + 5
    latent = Latent(value=value, position=0)
    return Batch(tokens=tokens, targets=tokens, read=torch.ones_like(tokens).bool(), latents={"kind": latent})


def noise(width, *, seed=1):
    return torch.randn(N, 2, width, generator=torch.Generator().manual_seed(seed))


def test_a_latent_is_found_where_it_is_and_nowhere_else(shown, batch):
    states = noise(6)
    states[:, 1, :N_CLASSES] += 10 * torch.eye(N_CLASSES)[batch.latents["kind"].value - 5]
    found = linear_probe(shown(states), batch, "kind", sites="embed", untrained=shown(noise(6, seed=2)))
    before, there = found.probes
    assert (before.position, there.position) == (0, 1)
    assert there.accuracy.mean > 0.99
    for chance in (before.accuracy, there.control, there.untrained):
        assert 0.2 < chance.mean < 0.5
        assert chance.low < chance.mean < chance.high
    assert there.selectivity == there.accuracy.mean - there.control.mean
    assert there.accuracy.low < there.accuracy.mean
    assert (found.n_train, found.n_test, found.n_classes, found.n_groups) == (360, 120, N_CLASSES, N_GROUPS)


def test_a_probe_that_learns_groups_by_heart_is_not_selective(shown, batch):
    # The group's own one-hot, and a label that follows the group: by heart on known groups, nothing on new ones.
    group = batch.tokens[:, 0]
    value = torch.randint(0, N_CLASSES, (N_GROUPS,), generator=torch.Generator().manual_seed(3))[group]
    batch = replace(batch, latents={"kind": Latent(value=value, position=0)})
    states = torch.eye(N_GROUPS)[batch.tokens]
    (probe,) = linear_probe(shown(states), batch, "kind", sites="embed", positions=[0]).probes
    assert probe.control.mean > 0.95
    assert probe.accuracy.mean < 0.75
    assert probe.selectivity < -0.2
    # Mutant: a split that leaks, every prompt a group of its own, calls the same probe perfect.
    leaky = linear_probe(shown(states), batch, "kind", sites="embed", positions=[0], groups=torch.arange(N))
    assert leaky.probes[0].accuracy.mean > 0.95


@pytest.mark.parametrize("groups", [None, torch.arange(N) // 20])
def test_no_group_is_on_both_sides(batch, groups):
    task = probe_task(batch, "kind", groups=groups, seed=0)
    group = batch.tokens[:, 0] if groups is None else groups
    assert not set(group[task.train].tolist()) & set(group[task.test].tolist())
    assert sorted([*task.train.tolist(), *task.test.tolist()]) == list(range(N))
    assert sorted([*task.control_train.tolist(), *task.control_test.tolist()]) == list(range(N))
    # A group has one control label, and groups differ.
    per_group = torch.stack([group, task.control], 1).unique(dim=0)
    assert len(per_group) == len(group.unique()) == task.n_groups
    assert len(task.control.unique()) == N_CLASSES


def test_seeds_draw_other_splits_and_the_same_one_again(batch):
    first, again, other = (probe_task(batch, "kind", groups=None, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.test, again.test)
    assert torch.equal(first.control, again.control)
    assert not torch.equal(first.test, other.test)
    assert not torch.equal(first.control, other.control)


def test_the_majority_by_hand(shown, batch):
    found = linear_probe(shown(noise(2)), batch, "kind", sites="embed", positions=[1])
    task = probe_task(batch, "kind", groups=None, seed=0)
    most = task.labels[task.train].mode().values
    assert found.majority == share_of(task.labels[task.test] == most)
    assert found.probes[0].untrained is None


def test_tables_and_summary(shown, batch):
    found = linear_probe(shown(noise(2)), batch, "kind", sites="embed")
    heat, whole = found.tables()
    assert heat.kind == "heatmap"
    assert list(heat.frame["position"]) == [0, 1]
    assert {"control", "selectivity", "untrained", "majority"} <= set(whole.frame.columns)
    assert "fitted on 360 prompts and scored on 120 of other groups (40 in all)" in whole.caption
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["cells"][0]["untrained"] is None
    assert summary["n_test"] == 120
    assert found.provenance.parents == ("shown",)


def test_one_control_label_for_all_is_known_by_heart(shown, batch):
    # Two groups whose control labels are the same under this seed.
    groups = torch.arange(N) % 2
    seed = next(s for s in range(20) if len(probe_task(batch, "kind", groups=groups, seed=s).control.unique()) == 1)
    found = linear_probe(shown(noise(2)), batch, "kind", sites="embed", positions=[0], groups=groups, seed=seed)
    assert found.probes[0].control.mean == 1.0


def test_heads_and_neurons_of_a_transformer(transformer):
    task = Modular(p=7)
    model, batch = transformer(task), task.examples("all")
    cells = read_cells(model, batch.tokens, sites="L0.z,L0.post.n3,resid_post", positions=[2])
    widths = {str(site): states.shape[1] for (site, _), states in cells.items()}
    assert widths == {"L0.z.h0": 8, "L0.z.h1": 8, "L0.post.n3": 1, "L0.resid_post": 16}


def test_the_bridge_of_a_chain_by_its_head_or_its_first_relation(transformer):
    task = Composition(entities=12, relations=6, out_degree=4, test_fraction=0.2, phi=2.5)
    batch = task.examples("train_inferred")
    model = transformer(Modular(p=19), d_vocab_out=20)
    common = batch.latents["bridge"].value.bincount(minlength=12).topk(2).indices
    batch = batch.select(torch.isin(batch.latents["bridge"].value, common))
    found = linear_probe(model, batch, "bridge", sites="L0.resid_post", positions=[1])
    assert found.n_classes == 2
    assert found.n_groups == len(batch.tokens[:, 0].unique())
    by_relation = linear_probe(model, batch, "bridge", sites="L0.resid_post", positions=[1], groups=batch.tokens[:, 1])
    assert by_relation.n_groups == len(batch.tokens[:, 1].unique())


def test_a_class_of_one_group_is_an_error(batch):
    task = Modular(p=7)
    with pytest.raises(WorkbenchError, match=r"'a' cannot be split by group: 7 of its 7 values \(0, 1, 2, 3, 4, …\)"):
        probe_task(task.examples("all"), "a", groups=task.examples("all").tokens[:, 0], seed=0)
    # Two groups each: of 120 such pairs, some are always in the test part together.
    value = torch.arange(N) // 4
    crowded = replace(batch, latents={"kind": Latent(value=value, position=0)})
    with pytest.raises(WorkbenchError, match="in each of 100 random splits some of its 120 values lacks examples"):
        probe_task(crowded, "kind", groups=torch.arange(N) // 2, seed=0)


def test_errors(shown, batch, transformer):
    model = shown(noise(2))
    with pytest.raises(WorkbenchError, match="Unknown latent 'kin'"):
        linear_probe(model, batch, "kin", sites="embed")
    with pytest.raises(WorkbenchError, match="No position 2: prompts have positions 0 to 1"):
        linear_probe(model, batch, "kind", sites="embed", positions=[2])
    constant = replace(batch, latents={"kind": Latent(value=torch.ones(N).long(), position=0)})
    with pytest.raises(WorkbenchError, match="has one value in all 480 prompts"):
        linear_probe(model, constant, "kind", sites="embed")
    task = Modular(p=7)
    with pytest.raises(WorkbenchError, match=r"L0.pattern.h1 has source and destination"):
        read_cells(transformer(task), task.examples("all").tokens, sites="L0.pattern", positions=None)
    rows = torch.arange(3)
    with pytest.raises(WorkbenchError, match="cannot be in the training part and in the test part"):
        ProbeTask(
            labels=rows,
            control=rows,
            train=rows,
            test=rows,
            control_train=rows,
            control_test=rows,
            n_classes=3,
            n_groups=3,
        )
