import json
import math

import pytest
import torch

from probes.description_length import code_blocks, description_length
from probes.linear import probe_task
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Latent

N, N_CLASSES, N_GROUPS = 640, 4, 40


@pytest.fixture
def labels():
    return torch.randint(0, N_CLASSES, (N,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batch(labels):
    tokens = torch.stack([torch.arange(N) % N_GROUPS, torch.zeros(N, dtype=torch.long)], 1)
    latents = {"kind": Latent(value=labels, position=0)}
    return Batch(tokens=tokens, targets=tokens, read=torch.ones_like(tokens).bool(), latents=latents)


def noise(width):
    return torch.randn(N, 2, width, generator=torch.Generator().manual_seed(1))


def test_what_is_not_there_does_not_compress_and_a_one_hot_does(shown, batch, labels):
    states = noise(N_CLASSES)
    states[:, 1] = torch.eye(N_CLASSES)[labels]
    found = description_length(shown(states), batch, "kind", sites="embed")
    absent, shown = found.frame.to_dict("records")
    assert found.uniform == 480 * 2
    assert 0.85 < absent["compression"] < 1.02
    # The first block of 30 labels costs 60 bits whatever the probe; the other 450 labels cost little.
    assert 60 < shown["codelength"] < 100
    assert shown["compression"] > 9.6
    assert shown["last_block"] < 15
    assert 0.85 < shown["control_compression"] < 1.05


def test_by_heart_costs_bits(shown, batch):
    # The group's one-hot sends the control's labels cheaply: they follow the group.
    states = torch.eye(N_GROUPS)[batch.tokens]
    (code,) = description_length(shown(states), batch, "kind", sites="embed", positions=[0]).frame.to_dict("records")
    assert code["control_compression"] > 2
    assert code["compression"] < 1


def test_blocks_by_hand():
    # One class alone: of n past labels the next costs log2 of (n + 1) / (n + 1/2) bits.
    blocks = code_blocks(torch.zeros(16, 1), torch.zeros(16).long(), 2)
    expected = [1.0, *(n * math.log2((n + 1) / (n + 0.5)) for n in (1, 2, 4, 8))]
    assert blocks == pytest.approx(expected)
    # A class that the past lacks costs its share of the one example more.
    surprise = code_blocks(torch.zeros(16, 1), torch.tensor([0, 1, *[0] * 14]), 2)
    assert surprise[1] == pytest.approx(2.0)
    # Where nothing tells the classes apart, half and half costs a bit each.
    even = code_blocks(torch.zeros(64, 1), torch.arange(64) % 2, 2)
    assert sum(even) == pytest.approx(64.0, abs=1e-6)


def test_the_training_part_of_the_probe_is_sent(shown, batch, labels):
    model = shown(noise(2))
    groups = torch.arange(N) // 4
    first, again, other, grouped = (
        description_length(model, batch, "kind", sites="embed", positions=[1], **options)
        for options in ({}, {}, {"seed": 1}, {"groups": groups})
    )
    assert first.codes == again.codes
    assert first.codes != other.codes
    assert first.codes != grouped.codes
    assert first.n == len(probe_task(batch, "kind", groups=None, seed=0).train)


def test_tables_and_summary(shown, batch):
    found = description_length(shown(noise(2)), batch, "kind", sites="embed")
    heat, whole = found.tables()
    assert heat.axes["value"] == "compression"
    assert "480 labels of 4 classes, 960 bits" in whole.caption
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert [cell["position"] for cell in summary["cells"]] == [0, 1]
    assert found.provenance.parents == ("shown",)


def test_too_few_prompts_are_an_error(shown, batch):
    few = batch.select(slice(0, 16))
    with pytest.raises(WorkbenchError, match="The training part has 12 prompts; blocks of 1/16 need 16"):
        description_length(shown(noise(2)[:16]), few, "kind", sites="embed")
