import json
import math

import pytest
import torch

from probes.fourier import ablate_frequencies, fourier, neuron_grid
from workbench.runtime import WorkbenchError
from workbench.tasks.modular import Modular

KEY = (2, 5, 7)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div"])
def test_planted_frequencies_are_found(planted, operation):
    task = Modular(operation=operation, p=17)
    found = fourier(planted(task, KEY), task)
    summary = found.summary()
    assert found.key_frequencies == KEY
    assert summary["neurons_explained"] == 1.0
    assert summary["neurons_explained_of_all"] == 1.0
    assert summary["live_neurons"] == 15
    assert summary["logits_explained"] == pytest.approx(1.0, abs=1e-5)
    pairs = task.examples("test").tokens[:, :2]
    assert summary["n"] == (len(pairs) if found.order == 17 else int((pairs != 0).all(1).sum()))
    assert found.losses["loss_without_other_frequencies"].mean == pytest.approx(found.losses["loss"].mean, rel=1e-4)
    assert found.losses["loss_without_key_frequencies"].mean == pytest.approx(math.log(found.order), abs=0.01)
    # Only the planted frequencies carry the embedding, and logits in the planted amount.
    others = [k - 1 for k in range(1, found.order // 2 + 1) if k not in KEY]
    assert found.embedding_norm[others].max() < 1e-5
    assert [round(found.logits.coefficient[k - 1].item(), 3) for k in KEY] == [20.0] * 3


def test_multiplication_is_addition_of_logarithms(planted):
    # The residues modulo 17 but 0 are a cyclic group of 16, as are those modulo 16 under addition.
    sums, products = Modular(operation="add", p=16), Modular(operation="mul", p=17)
    added, multiplied = (fourier(planted(task, KEY), task) for task in (sums, products))
    assert torch.equal(added.neurons.frequency, multiplied.neurons.frequency)
    torch.testing.assert_close(added.neurons.explained, multiplied.neurons.explained)
    torch.testing.assert_close(added.logits.coefficient, multiplied.logits.coefficient)
    torch.testing.assert_close(added.embedding_norm, multiplied.embedding_norm)


@pytest.mark.parametrize("operation", ["add", "mul"])
def test_shuffled_residues_show_nothing(planted, operation):
    task = Modular(operation=operation, p=17)
    model = planted(task, KEY)
    blind = fourier(model, task, shuffle_seed=0)
    assert blind.key_frequencies == ()
    assert blind.summary()["neurons_explained"] == 0.0
    assert blind.logits_explained == 0.0
    assert blind.summary()["shuffle_seed"] == 0
    # Nor do the frequencies of the real analysis mean anything then.
    forced = fourier(model, task, key_frequencies=KEY, shuffle_seed=0)
    assert forced.logits_explained < 0.1
    assert forced.losses["loss_without_other_frequencies"].mean > 2.0
    assert forced.losses["loss_without_key_frequencies"].mean < 0.1


def test_the_wrong_operations_basis_shows_nothing(planted):
    # Mutant: a model that adds, analysed as one that subtracts: its logits are no function of a - b.
    adds = Modular(operation="add", p=17)
    found = fourier(planted(adds, KEY), Modular(operation="sub", p=17))
    assert found.logits_explained < 1e-6


def test_knowing_by_heart_shows_nothing(by_heart):
    task = Modular(p=13)
    found = fourier(by_heart(task), task)
    assert found.losses["loss"].mean < 0.1
    assert found.key_frequencies == ()
    assert found.summary()["neurons_explained"] == 0.0
    # Only what all right answers share is a function of a + b, and it is spread over all frequencies.
    assert found.logits.explained.max() < 0.2
    assert found.losses["loss_without_key_frequencies"].mean == found.losses["loss"].mean


def test_without_neurons_the_logits_name_the_key_frequencies(planted):
    task = Modular(p=17)
    found = fourier(planted(task, KEY, mlp=False), task)
    assert found.key_frequencies == KEY
    summary = found.summary()
    assert summary["neurons_explained"] is None
    assert summary["neurons_explained_of_all"] is None
    assert summary["live_neurons"] is None
    assert found.neurons_of(2) == []
    assert {table.name for table in found.tables()}.isdisjoint({"neuron_frequencies", "neurons_explained"})


def test_key_frequencies_can_come_from_elsewhere(planted):
    task = Modular(p=17)
    found = fourier(planted(task, KEY), task, key_frequencies=[2])
    assert found.key_frequencies == (2,)
    assert found.logits_explained == pytest.approx(1 / 3, abs=1e-4)
    with pytest.raises(WorkbenchError, match="Frequencies go from 1 to 8"):
        fourier(planted(task, KEY), task, key_frequencies=[9])


def test_a_transformer_is_read_through(transformer, foreign):
    task = Modular(p=11)
    model = transformer(task)
    own, seen = fourier(model, task).summary(), fourier(foreign(model), task).summary()
    weights = ("gini_W_L", "sum_squared_weights")
    assert all(own[name] > 0 for name in weights)
    assert all(seen[name] is None for name in weights)
    for name in ("loss", "gini_W_E", "gradient_symmetricity", "distance_irrelevance"):
        assert own[name] == pytest.approx(seen[name], abs=1e-5)


def test_losses_come_with_intervals(transformer):
    task = Modular(p=11)
    summary = fourier(transformer(task), task).summary()
    for name in ("loss", "loss_without_other_frequencies", "loss_without_key_frequencies"):
        low, high = summary["intervals"][name]
        assert low < summary[name] < high


def test_summary_is_json_and_tables_print(planted):
    task = Modular(p=17)
    found = fourier(planted(task, KEY), task)
    assert json.loads(json.dumps(found.summary()))["key_frequencies"] == list(KEY)
    tables = {table.name: table for table in found.tables()}
    assert list(tables) == [
        "embedding_spectrum",
        "logit_spectrum",
        "frequency_ablation",
        "fourier_summary",
        "neuron_frequencies",
        "neurons_explained",
    ]
    assert tables["neuron_frequencies"].frame.to_dict("list") == {"frequency": list(KEY), "neurons": [5, 5, 5]}
    assert tables["neurons_explained"].frame["neurons"].tolist() == [0] * 19 + [15]
    assert "2, 5, 7" in tables["embedding_spectrum"].caption
    assert all(table.csv() and table.latex() for table in tables.values())


def test_neurons_of_a_frequency(planted):
    task = Modular(p=17)
    found = fourier(planted(task, KEY), task)
    phases = 5
    # The planted neurons lie frequency by frequency.
    assert sorted(found.neurons_of(5)) == list(range(phases, 2 * phases))
    assert found.neurons_of(3) == []


def test_ablating_a_frequency_takes_away_what_it_carries(planted):
    task = Modular(p=17)
    model = planted(task, [2, 5], scale=4.0)
    idle, one, all_of_them = (ablate_frequencies(model, task, chosen) for chosen in ([3], [2], [2, 5]))
    assert idle["test_loss_ablated"] == pytest.approx(idle["test_loss"], rel=1e-4)
    assert one["test_loss"] < one["test_loss_ablated"] < all_of_them["test_loss_ablated"]
    assert all_of_them["train_loss_ablated"] == pytest.approx(math.log(17), abs=0.01)
    with pytest.raises(WorkbenchError, match="each once"):
        ablate_frequencies(model, task, [2, 2])


@pytest.mark.parametrize(("operation", "ordered"), [("add", False), ("mul", True)])
def test_activation_of_a_neuron_on_every_pair(planted, operation, ordered):
    task = Modular(operation=operation, p=7)
    table = neuron_grid(planted(task, [1, 2]), task, 5)
    # Neuron 5 is the first of the second frequency, with phase 0.
    frame = table.frame
    row = frame[(frame.a == "3") & (frame.b == "1")].iloc[0]
    x, y, order = (1, 0, 6) if ordered else (3, 1, 7)
    cos_x, cos_y = (math.cos(2 * math.pi * 2 / order * exponent) for exponent in (x, y))
    assert row.activation == pytest.approx(cos_x * cos_y + cos_x / 2, abs=1e-6)
    assert ("discrete logarithms" in table.caption) == ordered
    assert frame.a.unique().tolist() == (["1", "3", "2", "6", "4", "5"] if ordered else [str(a) for a in range(7)])


@pytest.mark.parametrize(("mlp", "neuron", "count"), [(True, 10, 10), (True, -1, 10), (False, 0, 0)])
def test_a_neuron_that_is_not_there(planted, mlp, neuron, count):
    task = Modular(p=7)
    with pytest.raises(WorkbenchError, match=f"No neuron {neuron}: the last layer has {count}"):
        neuron_grid(planted(task, [1, 2], mlp=mlp), task, neuron)
