import pytest
import torch

from workbench.runtime import WorkbenchError
from workbench.store import new_run
from workbench.training.checkpoints import load
from workbench.training.finetune import donor_recipe, pull_back
from workbench.training.loop import train
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe

BASE = ["steps=20", "size=400", "batch_size=32", "evaluate_every=10", "cooldown=0"]
DONOR = ["steps=20", "size=200", "batch_size=16", "evaluate_every=10"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skills")
    train(find_recipe("skills-smoke").override(BASE), new_run("base", folder))
    return folder


def donor(runs, name, *settings, **options):
    recipe = donor_recipe(load("base", runs=runs), "tone", **options).override([*DONOR, *settings])
    return train(recipe, new_run(name, runs))


@pytest.mark.parametrize("way", ["sgd", "adamw", "l1"])
def test_a_donor_begins_with_the_base_and_changes_its_blocks_alone(runs, way):
    found = donor(runs, f"tone-{way}", way=way)
    base, first, last = (run.checkpoint(step).tensors() for run, step in
                         ((load("base", runs=runs), None), (found, 0), (found, None)))  # fmt: skip
    assert all(torch.equal(first[name], tensor) for name, tensor in base.items())
    changed = {name for name, tensor in base.items() if not torch.equal(last[name], tensor)}
    assert changed
    assert all(name.startswith("weights.") for name in changed)
    assert Recipe.from_json(found.recipe.to_json()) == found.recipe


def test_the_penalty_leaves_weights_exactly_where_they_began(runs):
    def unmoved(run):
        first, last = run.checkpoint(0).tensors(), run.checkpoint().tensors()
        return sum(int((last[name] == first[name]).sum()) for name in first if name.startswith("weights."))

    assert unmoved(donor(runs, "strong", "l1_to_start=0.5")) > 5 * unmoved(donor(runs, "none", "l1_to_start=0"))


def test_a_step_back_is_the_one_worked_by_hand():
    weights = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.05, 2.0]))
    pull_back([weights], [torch.tensor([0.0, 0.0, 0.0, 2.0])], 0.1)
    assert weights.tolist() == pytest.approx([0.9, -0.9, 0.0, 2.0])
    assert weights[2] == 0


def test_a_base_that_became_another_is_noticed(runs, tmp_path):
    train(find_recipe("skills-smoke").override(BASE), new_run("base", tmp_path))
    recipe = donor_recipe(load("base", runs=tmp_path), "topic").override(DONOR)
    train(find_recipe("skills-smoke").override([*BASE, "train.init_seed=1"]), new_run("other", tmp_path))
    (tmp_path / "base").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "base")
    with pytest.raises(WorkbenchError, match="are not those that this run began with"):
        train(recipe, new_run("donor", tmp_path))


def test_only_a_base_of_skills_can_be_taught(runs):
    with pytest.raises(WorkbenchError, match="trained on their mixture"):
        donor_recipe(load("gallery:modular"), "tone")
    with pytest.raises(WorkbenchError, match="Did you mean 'topic'"):
        donor_recipe(load("base", runs=runs), "topics")
    with pytest.raises(WorkbenchError, match="Unknown way 'lora'"):
        donor_recipe(load("base", runs=runs), "tone", way="lora")


def test_a_program_has_no_blocks_to_train_alone(tmp_path):
    recipe = find_recipe("program-smoke").override(["train.trained=blocks"])
    with pytest.raises(WorkbenchError, match="no blocks to train alone"):
        train(recipe, new_run("program", tmp_path))
