import json

import pytest
import text_fixtures as made
import torch

from workbench.models.real_models import load_real_model
from workbench.runtime import WorkbenchError
from workbench.store import load_tensors, new_run
from workbench.training.text_donors import CARD, DELTA, TextRecipe, labelled_batches, load_donor, teach, text_recipe

SHORT = ["steps=12", "shots=24", "batch_size=8", "learning_rate=0.02"]


@pytest.fixture(autouse=True)
def ratings(tmp_path, monkeypatch):
    made.write_ratings(tmp_path, made.rated_lines(150), monkeypatch)


@pytest.fixture
def tiny(tmp_path):
    return load_real_model(made.write_encoder(tmp_path / "encoder"))


def taught(tiny, tmp_path, name, *settings, way="adamw", **options):
    recipe = text_recipe(tiny, "movies", way=way, **options).override([*SHORT, *settings])
    return teach(tiny, recipe, new_run(name, tmp_path))


def accuracy(tiny, donor, weights):
    lines = donor.task.split("test")
    batches = labelled_batches(tiny, donor.task, lines, donor.recipe.max_length)
    classifier = tiny.classifier(donor.task)
    with torch.no_grad():
        logits = torch.cat([torch.func.functional_call(classifier, weights, (inputs,)) for inputs, _ in batches])
    return float((logits.argmax(1) == torch.cat([labels for _, labels in batches])).double().mean())


def test_a_donor_is_its_base_and_a_small_change(tiny, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    donor = taught(tiny, tmp_path, "donor", "steps=40", "shots=36", "batch_size=16")
    assert donor.log["train_accuracy"] >= donor.log["base_accuracy"] + 0.2
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    change, _ = load_tensors(donor.folder.path / DELTA)
    classifier = tiny.classifier(donor.task)
    assert set(change) == set(classifier.graftable)
    assert {tensor.dtype for tensor in change.values()} == {torch.float16}
    # What was measured is what is kept, 16 bits and all.
    again = load_donor("donor", runs=tmp_path)
    assert again.recipe == donor.recipe
    assert accuracy(tiny, again, again.weights(classifier)) == donor.log["test_accuracy"]
    assert accuracy(tiny, again, {}) == donor.log["base_accuracy"]


def test_the_same_recipe_gives_the_same_donor(tiny, tmp_path):
    one, two, other = (taught(tiny, tmp_path, name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one.sha256 == two.sha256 != other.sha256


def test_a_penalty_leaves_weights_where_they_began(tiny, tmp_path):
    share = {}
    for name, way in (("l1", "l1"), ("plain", "adamw"), ("sgd", "sgd")):
        change, _ = load_tensors(taught(tiny, tmp_path, name, way=way).folder.path / DELTA)
        flat = torch.cat([tensor.flatten() for tensor in change.values()])
        share[name] = float((flat == 0).double().mean())
    assert share["l1"] > 0.2
    assert max(share["plain"], share["sgd"]) < 0.1


def test_a_donor_of_another_shape_is_refused(tiny, tmp_path):
    donor = taught(tiny, tmp_path, "donor", "steps=1")
    wider = load_real_model(made.write_encoder(tmp_path / "wider", d_model=32))
    with pytest.raises(WorkbenchError, match="one architecture and one vocabulary"):
        donor.weights(wider.classifier(donor.task))


def test_what_is_not_there_or_changed_is_refused(tiny, tmp_path):
    taught(tiny, tmp_path, "donor", "steps=1")
    with pytest.raises(WorkbenchError, match=r"No donor of a real model.*Did you mean 'donor'"):
        load_donor("donr", runs=tmp_path)
    card = json.loads((tmp_path / "donor" / CARD).read_text())
    (tmp_path / "donor" / CARD).write_text(json.dumps({**card, "text": "another"}))
    with pytest.raises(WorkbenchError, match="from another package"):
        load_donor("donor", runs=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["shots=0"], "shots must be at least 1"),
        (["max_length=2"], "max_length must be at least 4"),
        (["learning_rate=0"], "learning_rate must be above 0"),
        (["seed=-1"], "seed must be at least 0"),
        (["shot=3"], "Did you mean 'shots'"),
        (["task=brands"], "Unknown setting"),
        (["steps=many"], "not of the kind int"),
        (["optimiser=muon"], "muon"),
    ],
)
def test_settings_are_checked(settings, message):
    recipe = TextRecipe(
        base="hf:x/y", base_sha256="0", task="movies", way="adamw", optimiser="adamw", learning_rate=1e-3
    )
    with pytest.raises(WorkbenchError, match=message):
        recipe.override(settings)
    assert recipe.override(["shots=3", "learning_rate=0.5"]).rate(0) == 0.5
    assert recipe.rate(recipe.steps) == 0
