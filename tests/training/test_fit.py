import pytest
import torch
from torch import nn

from workbench.training.finetune import fit


def taught(**options):
    """Two layers that learn the sign of the first input; the second layer's bias is not trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    inputs = torch.randn(40, 3)
    batches = [(inputs, (inputs[:, 0] > 0).long())] * 30
    fit(net, ["0.weight", "0.bias", "2.weight"], batches, rate=lambda step: 0.05, **options)
    right = (net(inputs).argmax(1) == batches[0][1]).double().mean()
    return before, net.state_dict(), float(right)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_only_weights_inside_the_region_change(optimiser):
    region = {
        "0.weight": torch.tensor([[True, False, False]] * 4),
        "0.bias": torch.zeros(4, dtype=torch.bool),
        "2.weight": torch.ones(2, 4, dtype=torch.bool),
    }
    before, after, right = taught(optimiser=optimiser, within=region)
    for name, mask in region.items():
        assert ((after[name] != before[name]) == mask).all()
    assert torch.equal(after["2.bias"], before["2.bias"])
    assert right > 0.8


def test_without_a_region_all_named_tensors_change_and_a_penalty_holds_them():
    before, free, _ = taught()
    assert all((free[name] != before[name]).all() for name in ("0.weight", "0.bias", "2.weight"))
    assert torch.equal(free["2.bias"], before["2.bias"])
    _, held, _ = taught(l1_to_start=1.0)
    moved = [sum(float((each[name] - before[name]).abs().sum()) for name in before) for each in (free, held)]
    assert moved[1] < 0.5 * moved[0]


def test_what_is_read_and_the_rate_are_the_callers():
    before, after, _ = taught(read=lambda logits: logits * 0)
    assert all(torch.equal(after[name], before[name]) for name in before)
    steps = []
    taught(on_step=steps.append)
    assert steps == list(range(1, 31))
