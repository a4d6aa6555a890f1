import pytest
import torch
from torch import nn

from circuits.graft_judgement import JUDGEMENT, Judged, judge, overlaps, read_judgement, relative_gain
from circuits.graft_masks import METHODS, Labelled, find_graft, largest, matched
from circuits.grafting import Delta, Graft, elected, overlap, place_of, union
from workbench.calibration import fitted_temperature
from workbench.runtime import WorkbenchError
from workbench.store import Provenance

DIM, HIDDEN, USED = 32, 64, 8
OF_THEIR_OWN_SIZE = {"biases", "layer_norms", "relaxed", "heads", "neurons", "layers", "task_arithmetic", "ties"}
QUIET = slice(10, 40)
"""Neurons that the answer hardly hears."""


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.W_in = nn.Parameter(0.05 * torch.randn(HIDDEN, DIM, generator=rng))
        self.W_out = nn.Parameter(0.05 * torch.randn(2, HIDDEN, generator=rng))

    def forward(self, x):
        return torch.relu(x @ self.W_in.T) @ self.W_out.T


def planted(*, distractors: float = 1.0):
    """A base, and a donor in whose 16 planted weights the whole skill lies, among 60 that changed as much."""
    net = Net()
    with torch.no_grad():
        net.W_out[:, QUIET] *= 0.02
        net.W_out[1, 0], net.W_out[0, 1] = 1.0, 1.0
    base = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    donor = {name: tensor.clone() for name, tensor in base.items()}
    region = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in base.items()}
    region["W_in"][:2, :USED] = True
    donor["W_in"][0, :USED] += 1.0
    donor["W_in"][1, :USED] -= 1.0
    rng = torch.Generator().manual_seed(1)
    spread = torch.zeros_like(base["W_in"])
    spread[QUIET, :2] = distractors * (2.0 * torch.randint(2, (30, 2), generator=rng) - 1)
    donor["W_in"] += spread
    return net, Delta.between(base, donor, base), region


def labelled(net, n=800, seed=0):
    x = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))
    y = (x[:, :USED].sum(1) > 0).long()
    return Labelled(module=net, batches=[(x[: n // 3], y[: n // 3]), (x[n // 3 :], y[n // 3 :])], read=lambda out: out)


def filled(delta, value):
    return {name: torch.full(tensor.shape, value) for name, tensor in delta.change.items()}


def parts(net):
    return labelled(net, seed=0), labelled(net, seed=1), labelled(net, n=2000, seed=2)


def judged(graft, net, **options):
    return judge(graft, *parts(net), provenance=Provenance(code_version="test"), **options)


@pytest.mark.parametrize("one", [True, 1.0])
def test_all_of_the_change_is_the_donor_and_none_of_it_the_base(one):
    net, delta, _ = planted()
    donor = {name: delta.base[name] + delta.change[name] for name in delta.base}
    examples = labelled(net)
    for name, tensor in delta.weights(filled(delta, one)).items():
        assert torch.allclose(tensor, donor[name], atol=1e-6)
    assert torch.allclose(examples.logits(delta.weights(filled(delta, one))), examples.logits(donor), atol=1e-5)
    for name, tensor in delta.weights(filled(delta, type(one)(0))).items():
        assert torch.equal(tensor, delta.base[name])


def test_gradients_are_those_of_finite_differences():
    net, delta, _ = planted()
    net = net.double()
    x, y = labelled(net).batches[0]
    examples = Labelled(
        module=net, batches=[(x.double()[:40], y[:40]), (x.double()[40:90], y[40:90])], read=lambda out: out
    )
    weights = {name: tensor.double() for name, tensor in delta.base.items()}
    loss, gradient = examples.gradient(weights)
    rng = torch.Generator().manual_seed(3)
    for _ in range(20):
        place = int(torch.randint(HIDDEN * DIM, (1,), generator=rng))
        moved = {name: tensor.clone() for name, tensor in weights.items()}
        moved["W_in"].view(-1)[place] += 1e-6
        slope = (examples.gradient(moved)[0] - loss) / 1e-6
        assert slope == pytest.approx(float(gradient["W_in"].view(-1)[place]), rel=1e-2, abs=1e-7)


def test_a_planted_region_is_found_among_changes_as_large():
    net, delta, region = planted()
    test = labelled(net, n=2000, seed=2)
    size = int(region["W_in"].sum())
    density = size / len(delta)

    def gain(weights):
        accuracy = [
            float((test.logits(each).argmax(1) == test.answers).double().mean())
            for each in (delta.base, weights, delta.uniform(1.0))
        ]
        return (accuracy[1] - accuracy[0]) / (accuracy[2] - accuracy[0])

    distractors = {name: (delta.change[name] != 0) & ~mask for name, mask in region.items()}
    assert gain(delta.weights(region)) >= 0.98
    assert abs(gain(delta.weights(distractors))) <= 0.1
    found = find_graft(delta, labelled(net), density=density)
    assert len(found) == size
    assert (found.mask["W_in"] & region["W_in"]).sum() >= 0.8 * size
    assert gain(found.weights()) >= 0.95
    # What changed most does not find it: all 76 changed alike, and the first 16 are taken in order.
    shuffled = Delta(base=delta.base, change={name: tensor * _jitter(tensor) for name, tensor in delta.change.items()})
    largest_changes = find_graft(shuffled, labelled(net), method="magnitude", density=density)
    assert (largest_changes.mask["W_in"] & region["W_in"]).sum() <= 0.5 * size
    assert gain(find_graft(delta, labelled(net), method="random", density=density).weights()) <= 0.15


def _jitter(tensor):
    return 1 + 1e-3 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(5))


def test_a_judgement_separates_the_planted_region_from_its_controls():
    net, delta, region = planted()
    foreign = Delta(base=delta.base, change={name: tensor.roll(1, -1) for name, tensor in delta.change.items()})
    density = int(region["W_in"].sum()) / len(delta)
    found = judged(find_graft(delta, labelled(net), density=density), net, foreign=foreign)
    rows = found.rows.set_index("weights_of")
    assert rows.loc["base", "relative_gain"] == 0
    assert rows.loc["donor", "relative_gain"] == 1
    assert rows.loc["donor", "agreement"] == 1
    assert rows.loc["graft", "relative_gain"] >= 0.95
    assert rows.loc["donor without it", "relative_gain"] <= 0.1
    assert rows.loc["matched random", "relative_gain"] <= 0.3
    assert 0.1 <= rows.loc["random among changed", "relative_gain"] <= 0.8
    assert rows.loc["donor, temperature", "accuracy"] == rows.loc["donor", "accuracy"]
    assert rows.loc["donor, temperature", "nll"] <= rows.loc["donor", "nll"] + 1e-3
    assert {"permuted", "foreign", "magnitude"} < set(rows.index)
    # What is chosen is chosen on examples that are not judged.
    _, val, test = parts(net)
    (uniform,) = (name for name in rows.index if name.startswith("uniform"))
    share, wanted = float(uniform.split()[1]), val.accuracy(found.graft.weights())
    assert val.accuracy(delta.uniform(share)) >= wanted > val.accuracy(delta.uniform(share - 0.05))
    donor = delta.uniform(1.0)
    assert found.temperature == fitted_temperature(val.logits(donor), val.answers)
    assert found.temperature != fitted_temperature(test.logits(donor), test.answers)
    summary = found.summary()
    assert {"weights", "density", "accuracy", "relative_gain", "agreement", "ece", "nll", "controls", "n"} < set(
        summary
    )
    assert [table.name for table in found.tables()] == ["graft_gain", "graft_places", "reliability"]


def test_a_judgement_is_read_as_it_was_kept():
    net, delta, _ = planted()
    found = judged(find_graft(delta, labelled(net), method="dare", density=0.05), net)
    again = read_judgement(found.files()[JUDGEMENT], delta, method="dare", provenance=found.provenance)
    assert again.summary() == found.summary()
    assert again.graft.scale == found.graft.scale == pytest.approx(20, rel=0.02)
    assert all(torch.equal(mask, found.graft.mask[name]) for name, mask in again.graft.mask.items())
    assert [each.name for each in again.judged] == [each.name for each in found.judged]


def test_what_learns_from_noise_too_is_not_called_localised():
    net, delta, region = planted()
    density = int(region["W_in"].sum()) / len(delta)
    graft = find_graft(delta, labelled(net), density=density)
    assert judged(graft, net).objection is None
    # The donor's own change under another name: a control that has all of the gain.
    found = judged(graft, net, foreign=delta)
    assert not found.localised
    assert "control 'foreign' has 1.00 of the gain" in str(found.objection)
    random = judged(find_graft(delta, labelled(net), method="random", density=density), net)
    assert "lower end of the relative gain" in str(random.objection)


def test_a_donor_that_gained_little_localises_nothing():
    net, delta, region = planted()
    weak = Delta(base=delta.base, change={name: 1e-3 * tensor for name, tensor in delta.change.items()})
    assert "fine-tuning gained" in str(judged(Graft(delta=weak, mask=region, method="learned"), net).objection)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in OF_THEIR_OWN_SIZE])
def test_sizes_are_exact(method):
    net, delta, _ = planted()
    assert len(find_graft(delta, labelled(net), method=method, density=0.01)) == round(0.01 * len(delta))


def test_the_relaxation_comes_near_its_size():
    net, delta, region = planted()
    found = find_graft(delta, labelled(net), method="relaxed", density=16 / len(delta))
    assert 8 <= len(found) <= 32
    assert (found.mask["W_in"] & region["W_in"]).sum() >= 0.8 * len(found)


def test_named_sets_are_taken_by_their_names():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    base = {f"{name}": tensor.detach() for name, tensor in net.state_dict().items()}
    delta = Delta.between(base, {name: tensor + 1 for name, tensor in base.items()}, base)
    examples = Labelled(module=net, batches=[(torch.ones(2, 3), torch.tensor([0, 1]))], read=lambda out: out)
    found = find_graft(delta, examples, method="biases")
    assert {name for name, mask in found.mask.items() if mask.any()} == {"0.bias", "1.bias", "2.bias"}
    with pytest.raises(WorkbenchError, match="no such weights"):
        find_graft(delta, examples, method="layer_norms")


def two_tensors():
    change = {"a.0.w": torch.tensor([[1.0, -4.0], [3.0, 2.0]]), "a.1.w": torch.tensor([0.5, -0.25, 8.0, 0.125])}
    base = {name: torch.zeros_like(tensor) for name, tensor in change.items()}
    return Delta.between(base, change, base)


def told(gains):
    """Examples whose gradient makes these the gains of switching a change of `two_tensors`."""
    delta = two_tensors()

    class Told(Labelled):
        def gradient(self, weights):
            return 0.0, {name: -torch.tensor(gains[name]) / tensor for name, tensor in delta.change.items()}

    return Told(module=nn.Module(), batches=[(torch.zeros(1), torch.tensor([0]))], read=lambda out: out)


def test_ties_takes_the_largest_changes_of_each_tensor():
    found = find_graft(two_tensors(), told({}), method="ties", density=0.5)
    assert found.mask["a.0.w"].tolist() == [[False, True], [True, False]]
    assert found.mask["a.1.w"].tolist() == [True, False, True, False]
    assert found.weights()["a.0.w"].tolist() == [[0, -4], [3, 0]]


def test_dare_drops_at_random_and_keeps_the_mean_change():
    delta = two_tensors()
    drawn = [find_graft(delta, told({}), method="dare", density=0.25, seed=seed).weights() for seed in range(200)]
    for name, change in delta.change.items():
        each = torch.stack([weights[name] for weights in drawn])
        assert set((each / change).unique().tolist()) == {0.0, 4.0}
        error = each.std(0) / len(drawn) ** 0.5
        assert ((each.mean(0) - change).abs() <= 3.5 * error).all()
    everything = find_graft(delta, told({}), method="dare", density=1.0).weights()
    assert all(torch.equal(everything[name], change) for name, change in delta.change.items())


def test_task_arithmetic_adds_a_share_of_all_changes():
    delta = two_tensors()
    found = find_graft(delta, told({}), method="task_arithmetic")
    assert found.density == 1
    for name, tensor in found.weights().items():
        assert torch.allclose(tensor, 0.4 * delta.change[name])


def test_one_layer_is_the_one_that_promises_most():
    gains = {"a.0.w": [[1.0, 9.0], [0.0, 0.0]], "a.1.w": [6.0, -1.0, 5.0, 0.0]}
    found = find_graft(two_tensors(), told(gains), method="one_layer", density=0.25)
    assert not found.mask["a.0.w"].any()
    assert found.mask["a.1.w"].tolist() == [True, False, True, False]
    found = find_graft(two_tensors(), told(gains), method="one_layer", density=1 / 8)
    assert found.mask["a.0.w"].tolist() == [[False, True], [False, False]]


class Scripted(Labelled):
    """Examples that give gradients from a script, and remember the weights that were asked about."""

    def gradient(self, weights):
        """The loss of the weights, and the next gradient."""
        asked = [round(float(value), 1) for value in weights["w"]]
        self.module.asked.append(asked)
        return float(4 - sum(asked)), {"w": torch.tensor(self.module.script[len(self.module.asked) - 1])}


def test_a_region_is_learned_by_gains_that_add_up():
    module = nn.Module()
    # First gains 3, 2, 0; then 1.5, 2, 1: summed the first weight leads, the second alone by the last of them.
    module.asked, module.script = [], [[-3.0, -2.0, 0.0], [-1.5, -2.0, -1.0], [0.0, 0.0, 0.0]]
    delta = Delta.between({"w": torch.zeros(3)}, {"w": torch.ones(3)}, ["w"])
    examples = Scripted(module=module, batches=[(torch.zeros(1), torch.tensor([0]))], read=lambda out: out)
    found = find_graft(delta, examples, density=1 / 3, steps=2)
    assert module.asked == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert found.mask["w"].tolist() == [True, False, False]


def test_what_is_redundant_loses_its_place():
    # Both of the first weights answer the first example, the third alone the second.
    module = nn.Linear(3, 1, bias=False)
    base, donor = {"weight": torch.zeros(1, 3)}, {"weight": torch.tensor([[8.0, 8.0, 6.0]])}
    x = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    examples = Labelled(
        module=module,
        batches=[(x, torch.tensor([1, 0, 1, 0]))],
        read=lambda out: torch.cat([torch.zeros_like(out), out], 1),
    )
    delta = Delta.between(base, donor, ["weight"])
    density = 2 / 3
    alone = find_graft(delta, examples, method="saliency", density=density)
    assert alone.mask["weight"].tolist() == [[True, True, False]]
    assert find_graft(delta, examples, density=density).mask["weight"].tolist() == [[True, False, True]]


def test_the_largest_changes_are_those_of_either_sign():
    delta = Delta.between({"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -3.0, 2.0, 0.0])}, ["w"])
    examples = Labelled(module=nn.Module(), batches=[(torch.zeros(1), torch.tensor([0]))], read=lambda out: out)
    assert find_graft(delta, examples, method="magnitude", density=0.5).mask["w"].tolist() == [0, 1, 1, 0]


def test_the_largest_scores_are_kept_over_all_tensors():
    kept = largest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[2.0], [3.0]])}, 3)
    assert kept["a"].tolist() == [True, False]
    assert kept["b"].tolist() == [[True], [True]]


def test_a_matched_mask_has_as_many_in_each_tensor():
    mask = {"a": torch.arange(30).reshape(5, 6) < 7, "b": torch.zeros(4, dtype=torch.bool)}
    none = {name: torch.zeros_like(tensor) for name, tensor in mask.items()}
    drawn = matched(mask, none, torch.Generator().manual_seed(0))
    assert drawn["a"].sum() == 7
    assert drawn["b"].sum() == 0
    assert not torch.equal(drawn["a"], mask["a"])
    first = {"a": torch.arange(30).reshape(5, 6) >= 20, "b": none["b"]}
    among = matched(mask, first, torch.Generator().manual_seed(0))
    assert among["a"].sum() == (among["a"] & first["a"]).sum() == 7
    few = {"a": torch.arange(30).reshape(5, 6) >= 26, "b": none["b"]}
    among = matched(mask, few, torch.Generator().manual_seed(0))
    assert among["a"].sum() == 7
    assert (among["a"] & few["a"]).sum() == 4


def test_grafts_unite_and_overlap_as_worked_by_hand():
    base = {"w": torch.zeros(4)}
    one = Graft(
        delta=Delta.between(base, {"w": torch.tensor([1.0, 1, 1, 1])}, base), mask={"w": mask(1, 1, 0, 0)}, method="m"
    )
    two = Graft(
        delta=Delta.between(base, {"w": torch.tensor([3.0, 3, 3, 3])}, base), mask={"w": mask(0, 1, 1, 0)}, method="m"
    )
    assert union([one, two])["w"].tolist() == [1, 2, 3, 0]
    assert overlap(one.mask, two.mask) == (0.5, 0.5)
    assert one.removed()["w"].tolist() == [0, 0, 1, 1]
    assert one.density == 0.5
    assert len(one.without(["w"])) == 0
    assert overlaps({"one": one, "two": two}).frame["overlap"].tolist() == [1, 0.5, 0.5, 1]
    other = Graft(delta=Delta.between({"w": torch.ones(4)}, {"w": torch.zeros(4)}, ["w"]), mask=one.mask, method="m")
    with pytest.raises(WorkbenchError, match="different bases"):
        union([one, other])
    with pytest.raises(WorkbenchError, match="empty region"):
        overlap(one.mask, {"w": mask(0, 0, 0, 0)})


def test_grafts_that_disagree_elect_a_sign():
    base = {"w": torch.zeros(5)}
    rows = ([4.0, 1.0, -2.0, 5.0, 0.0], [2.0, -3.0, -1.0, 7.0, 1.0], [-1.0, -1.0, 3.0, 9.0, 1.0])
    kept = (mask(1, 1, 1, 1, 1), mask(1, 1, 1, 0, 0), mask(1, 1, 1, 0, 1))
    grafts = [
        Graft(delta=Delta.between(base, {"w": torch.tensor(row)}, base), mask={"w": each}, method="ties")
        for row, each in zip(rows, kept, strict=True)
    ]
    # Sums 5, -3, 0, 5, 1: the mean of 4 and 2; of -3 and -1; of none; 5 alone; 1 alone.
    assert elected(grafts)["w"].tolist() == [3, -2, 0, 5, 1]
    assert torch.equal(elected([grafts[0]] * 3)["w"], grafts[0].weights()["w"])
    half = Graft(delta=grafts[0].delta, mask={"w": kept[0]}, method="task_arithmetic", scale=0.5)
    assert elected([half])["w"].tolist() == half.weights()["w"].tolist() == [2, 0.5, -1, 2.5, 0]
    assert union([half])["w"].tolist() == [2, 0.5, -1, 2.5, 0]


def mask(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_places_are_layers_and_components():
    assert place_of("weights.2.attn.W_Q") == ("2", "attn.W_Q")
    assert place_of("embed.W_E") == ("-", "embed.W_E")


def test_relative_gain_is_that_of_the_counts():
    answers = torch.tensor([1] * 10)

    def right(n):
        logits = torch.zeros(10, 2)
        logits[:n, 1], logits[n:, 0] = 1.0, 1.0
        return Judged(name="x", weights=0, logits=logits, answers=answers)

    found = relative_gain(right(7), right(5), right(9))
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.low <= 0.5 <= found.high
    assert relative_gain(right(7), right(5), right(5)) is None


@pytest.mark.parametrize(
    ("donor", "message"),
    [
        ({"w": torch.zeros(3)}, "one shape and one vocabulary"),
        ({}, "donor has no tensor 'w'"),
        ({"w": torch.tensor([torch.nan, 0])}, "not finite"),
        ({"w": torch.zeros(2)}, "nothing to graft"),
    ],
)
def test_what_cannot_be_grafted_is_refused(donor, message):
    with pytest.raises(WorkbenchError, match=message):
        Delta.between({"w": torch.zeros(2)}, donor, ["w"])


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_is_a_share(density):
    net, delta, _ = planted()
    with pytest.raises(WorkbenchError, match="density must be above 0"):
        find_graft(delta, labelled(net), density=density)


def test_steps_are_needed():
    net, delta, _ = planted()
    with pytest.raises(WorkbenchError, match="steps must be at least 1"):
        find_graft(delta, labelled(net), steps=0)


def test_unknown_methods_and_wrong_masks_are_refused():
    net, delta, _ = planted()
    with pytest.raises(WorkbenchError, match="Did you mean 'magnitude'"):
        find_graft(delta, labelled(net), method="magnitud")
    with pytest.raises(WorkbenchError, match="one value for each weight"):
        Graft(delta=delta, mask={"W_in": torch.zeros(2, dtype=torch.bool)}, method="m")
