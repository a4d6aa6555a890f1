import json

import pytest

from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.training.recipes import RECIPES, Recipe, TrainConfig, find_recipe

OWN = """
from dataclasses import dataclass, replace

from workbench.tasks.modular import Modular
from workbench.training.recipes import modular_smoke


def division():
    recipe = modular_smoke()
    return replace(recipe, name="division", task=replace(recipe.task, operation="div"))


@dataclass(frozen=True, kw_only=True)
class Doubled(Modular):
    def answer(self, a, b):
        return (2 * a + b) % self.p


def doubled():
    recipe = modular_smoke()
    return replace(recipe, name="doubled", task=Doubled(p=recipe.task.p))


def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_recipes.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_build_and_survive_json(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert recipe.shows
    Transformer(recipe.model, generator=None)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_published_setting():
    recipe = find_recipe("modular-paper")
    assert (recipe.task.p, recipe.task.train_fraction, recipe.train.steps) == (113, 0.3, 40_000)
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.batch_size) == (1e-3, 1.0, None)
    assert recipe.train.loss_dtype == "float64"
    assert (recipe.model.d_model, recipe.model.n_heads, recipe.model.d_mlp) == (128, 4, 512)
    assert recipe.model.normalization is None
    assert not recipe.train.stop_when_clean


def test_settings_by_full_and_by_short_name():
    recipe = find_recipe("modular").override(
        ["train.steps=7", "weight_decay=2", "betas=[0.8,0.9]", "batch_size=null", "operation=mul", "schedule=[0,0]"]
    )
    assert recipe.train.steps == 7
    assert recipe.train.weight_decay == 2.0
    assert recipe.train.betas == (0.8, 0.9)
    assert recipe.task.operation == "mul"
    assert recipe.model.n_steps == 2
    # The recipe that was overridden is untouched.
    assert find_recipe("modular").train.steps != 7


def test_the_vocabulary_follows_the_task():
    recipe = find_recipe("modular").override(["p=17"])
    assert (recipe.model.d_vocab, recipe.model.d_vocab_out) == (18, 17)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stes=3", "Unknown setting 'stes' for recipe 'modular'. Did you mean 'train.steps'"),
        ("train.d_model=3", "Unknown setting 'train.d_model'"),
        ("steps", "must be key=value"),
        ("steps=many", "steps=many is not of the kind int"),
        ("steps=1.5", "is not of the kind int"),
        ("causal=1", "causal=1 is not of the kind bool"),
        ("betas=[0.9]", "is not of the kind"),
        ("loss_dtype=float16", "is not of the kind"),
        ("d_vocab=200", "the task has 114 tokens, the model 200"),
        ("n_ctx=2", "prompts have 3 positions, the model reads 2"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("steps=-5", "steps must be at least 1, got -5"),
        ("evaluate_every=0", "evaluate_every must be at least 1"),
        ("warmup_steps=-1", "warmup_steps must be at least 0"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("learning_rate=0", "learning_rate must be above 0"),
        ("weight_decay=-1", "weight_decay at least 0"),
        ("clip_norm=0", "clip_norm must be above 0"),
        ("betas=[0.9,1.0]", "betas must lie in \\[0, 1\\)"),
    ],
)
def test_bad_settings_are_one_clear_error(setting, message):
    with pytest.raises(WorkbenchError, match=message):
        find_recipe("modular").override([setting])


def test_one_seed_for_everything():
    recipe = find_recipe("modular").with_seed(5)
    assert (recipe.task.seed, recipe.train.init_seed, recipe.train.batch_seed) == (5, 5, 5)
    with pytest.raises(WorkbenchError, match="at least 0, got -1"):
        recipe.with_seed(-1)


def test_unknown_loss_precision_is_refused_where_types_are_not_checked():
    with pytest.raises(Exception, match="loss_dtype"):
        TrainConfig(steps=1, loss_dtype="float16")


def test_own_recipe_with_a_shipped_task(own):
    recipe = find_recipe(f"{own}:division")
    assert recipe.task.operation == "div"
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_own_task_is_found_again_while_its_file_is_unchanged(own):
    recipe = find_recipe(f"{own}:doubled")
    content = json.loads(json.dumps(recipe.to_json()))
    again = Recipe.from_json(content)
    assert again.task.examples("all").targets[5].tolist() == recipe.task.examples("all").targets[5].tolist()
    assert again.with_seed(3).override(["p=11"]).task.p == 11
    own.write_text(OWN + "\n# changed\n")
    with pytest.raises(WorkbenchError, match="gone or changed since"):
        Recipe.from_json(content)


@pytest.mark.parametrize(
    ("function", "message"),
    [("absent", "has no function 'absent'"), ("nothing", "returned a int; it must return a workbench Recipe")],
)
def test_own_functions_that_make_no_recipe(own, function, message):
    with pytest.raises(WorkbenchError, match=message):
        find_recipe(f"{own}:{function}")


def test_files_that_cannot_be_recipes(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(WorkbenchError, match="broken.py cannot be imported: ZeroDivisionError"):
        find_recipe(f"{broken}:x")
    with pytest.raises(WorkbenchError, match="No Python file"):
        find_recipe(f"{tmp_path}/none.py:x")
    with pytest.raises(WorkbenchError, match="Unknown recipe 'modulr'. Did you mean 'modular'"):
        find_recipe("modulr")


@pytest.mark.parametrize("content", [{}, {"name": "x", "task": {"name": "modular", "q": 3}}])
def test_foreign_json_is_no_recipe(content):
    with pytest.raises(WorkbenchError, match="not a recipe that this version reads"):
        Recipe.from_json(content)
