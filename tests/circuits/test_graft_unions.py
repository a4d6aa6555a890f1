import pytest
import torch
from torch import nn

from circuits.graft_masks import Labelled
from circuits.graft_unions import judge_union
from circuits.grafting import Delta, Graft

# Two tasks of one weight each: the logits are the weights' product with one-hot inputs, a row a label.
BASE = {"weight": torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])}


def teaching(column):
    """The graft of one weight: inputs of one column are answered 1 where the base says 0."""
    donor = {"weight": BASE["weight"].clone()}
    donor["weight"][1, column] = 2.0
    delta = Delta.between(BASE, donor, ["weight"])
    return Graft(delta=delta, mask={"weight": delta.change["weight"] != 0}, method="by hand")


def asking(column, label):
    inputs = torch.nn.functional.one_hot(torch.full((10,), column), 3).float()
    module = nn.Linear(3, 2, bias=False)
    return Labelled(module=module, batches=[(inputs, torch.full((10,), label))], read=lambda logits: logits)


def test_what_a_union_keeps_and_what_it_leaves_alone():
    found = judge_union(
        {"one": teaching(0), "two": teaching(1)},
        {"one": asking(0, 1), "two": asking(1, 1)},
        {"other": asking(2, 0)},
    )
    assert (found.weights, found.density) == (2, pytest.approx(2 / 6))
    kept, elsewhere, overlap = (table.frame for table in found.tables())
    assert kept["base_accuracy"].tolist() == [0, 0]
    assert kept["union_gain"].tolist() == kept["graft_gain"].tolist() == [1, 1]
    assert elsewhere[["base", "union", "change"]].to_numpy().tolist() == [[1, 1, 0]]
    assert overlap.set_index(["region", "also_in"]).loc[("one", "two"), "overlap"] == 0


def test_what_a_union_loses_is_told():
    found = judge_union(
        {"one": teaching(0), "same": teaching(0)},
        {"one": asking(0, 1), "same": asking(0, 1)},
        {"other": asking(0, 0)},
    )
    assert found.weights == 1
    assert found.elsewhere.frame[["base", "union", "change", "change_low"]].to_numpy().tolist() == [[1, 0, -1, -1]]
    assert set(found.summary()) == {"weights", "density", "kept", "elsewhere", "overlap"}
