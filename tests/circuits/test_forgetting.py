import pytest
import torch
from torch import nn

from circuits.forgetting import WAYS, Lesson, learn_in_sequence
from circuits.graft_masks import Labelled
from workbench.runtime import WorkbenchError


class Net(nn.Module):
    """Two inputs, two labels, no bias."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(2, 2))

    def forward(self, inputs):
        return inputs.float() @ self.W


NET = Net()


def lesson(first, second, region, *, n=40, **options):
    """The label is the sign of the second input where there is one, turned round; else that of the first."""
    sign = 2 * torch.tensor([0, 1] * (n // 2)) - 1
    inputs = torch.stack([first * sign, second * sign], 1)
    labels = (sign > 0).long() if second == 0 else (sign < 0).long()
    test = Labelled(module=NET, batches=[(inputs, labels)], read=lambda logits: logits)
    return Lesson(
        inputs=inputs,
        labels=labels,
        test=test,
        region={"W": torch.tensor(region)},
        **{"steps": 60, "batch_size": 8, "learning_rate": 0.1, "optimiser": "sgd", "l1_to_start": 0.0, **options},
    )


ONE = lesson(1, 0, [[True, True], [False, False]])
TWO = lesson(1, 1, [[False, False], [True, True]], steps=200)


def taught(lessons, **options):
    return learn_in_sequence(NET, lessons, read=lambda logits: logits, **options)


def test_a_later_task_undoes_an_earlier_one_unless_its_region_is_kept():
    """The second task turns the first one's answer round, through either input; its own region is the second input."""
    found = taught({"one": ONE, "two": TWO}, seeds=(0, 1))
    assert torch.equal(NET.W, torch.zeros(2, 2))
    right = {way: each.double().mean((0, 3)).tolist() for way, each in found.right.items()}
    assert set(right) == set(WAYS)
    assert all(each[1][0] == 1 and each[2][1] == 1 for each in right.values())
    assert right["all weights"][2][0] == 0
    assert right["own region"][2][0] == right["outside earlier regions"][2][0] == 1
    rows = found.summary_rows.set_index("way")
    assert rows.loc["all weights", ["just_learnt", "at_the_end", "forgotten"]].tolist() == [1, 0.5, 1]
    assert rows.loc["own region", ["just_learnt", "at_the_end", "forgotten"]].tolist() == [1, 1, 0]
    steps, _ = found.tables()
    assert len(steps.frame) == 3 * 3 * 2
    assert found.summary()["seeds"] == 2


def test_a_weight_of_two_regions_belongs_to_the_earlier_task():
    everywhere = lesson(1, 1, [[True, True], [True, True]], steps=200)
    found = taught({"one": ONE, "two": everywhere})
    assert found.summary_rows.set_index("way").loc["own region", "forgotten"] == 0


def test_one_task_or_tests_of_two_sizes_are_refused():
    with pytest.raises(WorkbenchError, match="from the second task on; got 1"):
        taught({"one": ONE})
    with pytest.raises(WorkbenchError, match="as many examples each"):
        taught({"one": ONE, "two": lesson(1, 1, [[True, True], [True, True]], n=20)})
