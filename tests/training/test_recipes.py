import json
import math
from dataclasses import replace

import jaxtyping
import pytest

from workbench.models.config import ModelConfig
from workbench.models.kinds import build
from workbench.runtime import WorkbenchError
from workbench.store import new_run
from workbench.tasks import complex_comparison
from workbench.tasks.pairs import Pairs
from workbench.training.checkpoints import load
from workbench.training.loop import train
from workbench.training.recipe import Recipe, TrainConfig, differing_settings, flat
from workbench.training.recipes import RECIPES, find_recipe

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


def fails():
    return modular_smoke().no_such_thing


# It can all that a task can, but is no dataclass.
class Plain:
    def __init__(self):
        task = Modular(p=59)
        vars(self).update({name: getattr(task, name) for name in dir(task) if not name.startswith("_")})


def plain():
    return replace(modular_smoke(), name="plain", task=Plain())


@dataclass(frozen=True, kw_only=True)
class Half:
    name = "half"


def half():
    return replace(modular_smoke(), name="half", task=Half())
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
    build(recipe.model, generator=None)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_world_that_takes_seconds_is_not_built_with_its_recipe():
    before = complex_comparison._questions.cache_info().misses
    recipe = find_recipe("complex-comparison-paper")
    assert complex_comparison._questions.cache_info().misses == before
    assert (recipe.task.entities, recipe.model.d_vocab) == (1000, len(recipe.task.vocab))


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-smoke")])
def test_smoke_recipes_train(name, tmp_path):
    model = find_recipe(name).model
    # One-hot embeddings need the width that they have; programs have no other.
    free = isinstance(model, ModelConfig) and model.embedding == "learned"
    narrow = ["d_model=16", "n_heads=1", "d_head=16"] if free else []
    recipe = find_recipe(name).override(["steps=3", "d_mlp=16", *narrow])
    run = train(recipe, new_run(name, tmp_path))
    assert [row["step"] for row in run.log.rows] == [0, 1, 2, 3]
    for row in run.log.rows:
        assert all(math.isfinite(row[f"{split}_loss"]) for split in recipe.task.measured)
    assert run.log.rows[-1]["train_loss"] < run.log.rows[0]["train_loss"]
    assert load(name, runs=tmp_path).recipe == recipe


@pytest.mark.parametrize(
    ("name", "task", "steps", "wanted"),
    [
        ("composition", "composition", (0, 1, 2), {"phi": 7.0}),
        ("composition-shared", "composition", (0, 1, 0, 1), {"phi": 7.0}),
        ("composition-depth1", "composition", (0,), {"phi": 7.0}),
        ("composition-phi-2", "composition", (0, 1, 2), {"phi": 2.0}),
        ("composition-phi-7.2", "composition", (0, 1, 2), {"phi": 7.2}),
        ("composition-covered", "composition", (0, 1, 2), {"role_coverage": 0.5}),
        ("composition-shared-paper", "composition", (0, 1, 2, 3) * 2, {"phi": 12.6, "entities": 2000}),
        ("comparison", "comparison", (0, 1, 2), {"phi": 40.0}),
    ],
)
def test_reasoners_differ_in_what_they_are_named_for(name, task, steps, wanted):
    recipe = find_recipe(name)
    assert (recipe.task.name, recipe.model.steps) == (task, steps)
    assert {field: getattr(recipe.task, field) for field in wanted} == wanted
    assert recipe.model.d_vocab == recipe.model.d_vocab_out == len(recipe.task.vocab)


def test_the_papers_training_of_reasoners():
    recipe = find_recipe("composition-paper")
    assert (recipe.task.relations, recipe.task.out_degree, recipe.task.phi) == (200, 20, 9.0)
    assert (recipe.model.n_layers, recipe.model.d_model, recipe.model.n_heads, recipe.model.d_mlp) == (8, 768, 12, 3072)
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.batch_size) == (1e-4, 0.1, 512)
    assert (recipe.train.dropout, recipe.train.betas, recipe.train.warmup_steps) == (0.1, (0.9, 0.999), 2_000)
    assert find_recipe("composition-shared-paper").train.weight_decay == 0.3


def test_a_world_of_another_size_brings_its_vocabulary():
    recipe = find_recipe("composition").override(["entities=50", "relations=15"])
    assert (recipe.model.d_vocab, recipe.model.d_vocab_out) == (66, 66)


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
        ("loss_dtype=float16", "loss_dtype=float16 is none of float32, float64"),
        ("=3", "Unknown setting ''"),
        ("learning_rate=NaN", "learning_rate must be above 0"),
        ("learning_rate=1e999", "learning_rate must be above 0"),
        ("weight_decay=NaN", "weight_decay at least 0"),
        ("weight_decay=Infinity", "weight_decay at least 0"),
        ("clip_norm=NaN", "clip_norm must be above 0"),
        ("betas=[NaN,0.9]", "betas must lie in"),
        ("train_fraction=NaN", "between 0 and 1, both excluded, got nan"),
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
        ("l1_to_start=-1", "l1_to_start must be at least 0"),
        ("l1_to_start=NaN", "l1_to_start must be at least 0"),
        ("trained=heads", "trained=heads is none of all, blocks"),
        ("dropout=1", "dropout must lie in \\[0, 1\\), got 1.0"),
        ("dropout=-0.1", "dropout must lie in"),
        ("dropout=NaN", "dropout must lie in"),
        ("cooldown=1.5", "cooldown must be a share of the steps from 0 to 1, got 1.5"),
        ("cooldown=NaN", "cooldown must be a share"),
        ("average=tokens", "is none of"),
        ("temperature=[3.0,0.01]", "train.temperature belongs to Transformer Programs"),
        ("decay=biases", "is none of"),
        ("init=zeros", "is none of"),
    ],
)
def test_bad_settings_are_one_clear_error(setting, message):
    with pytest.raises(WorkbenchError, match=message):
        find_recipe("modular").override([setting])


def test_a_run_from_before_an_option_was_there_is_what_it_was():
    content = load("gallery:modular").folder.recipe_json()
    assert "init" not in content["model"]
    assert not {"dropout", "decay", "cooldown"} & set(content["train"])
    recipe = Recipe.from_json(content)
    assert recipe.model.init == "fan_in"
    assert (recipe.train.dropout, recipe.train.decay) == (0.0, "all")


def test_one_seed_for_everything():
    recipe = find_recipe("modular").with_seed(5)
    assert (recipe.task.seed, recipe.train.init_seed, recipe.train.batch_seed) == (5, 5, 5)
    with pytest.raises(WorkbenchError, match="at least 0, got -1"):
        recipe.with_seed(-1)


def imported():
    task = Pairs(vocab=("a", "b"), clean=((0,),), corrupt=((1,),), answer=(0,), distractor=(1,))
    model = ModelConfig(n_layers=1, d_model=4, n_heads=1, d_head=4, d_mlp=0, n_ctx=1, d_vocab=2, d_vocab_out=2)
    return Recipe(name="imported", task=task, model=model, train=None, shows="pairs")


def test_a_seed_leaves_a_world_that_is_not_drawn_as_it_is():
    recipe = replace(imported(), train=TrainConfig(steps=1))
    assert recipe.with_seed(5) == replace(imported(), train=TrainConfig(steps=1, init_seed=5, batch_seed=5))


def test_a_name_that_two_parts_share_must_be_said_in_full():
    with pytest.raises(WorkbenchError, match="'pad_token' is ambiguous: say task.pad_token or model.pad_token"):
        imported().override(["pad_token=1"])
    assert imported().override(["model.pad_token=1"]).model.pad_token == 1


def test_a_recipe_without_training_survives_json_and_has_no_training_to_set():
    assert Recipe.from_json(json.loads(json.dumps(imported().to_json()))) == imported()
    assert imported().with_seed(3) == imported()
    with pytest.raises(WorkbenchError, match="Unknown setting 'train.steps'"):
        imported().override(["train.steps=3"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_dtype": "float16"}, "Unknown loss_dtype 'float16'. Known: float32, float64"),
        ({"decay": "biases"}, "Unknown decay 'biases'. Known: all, matrices"),
    ],
)
def test_unknown_words_are_refused_where_types_are_not_checked(monkeypatch, wrong, message):
    # The tests' type checker would be first; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match=message):
        TrainConfig(steps=1, **wrong)


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
    [
        ("absent", "has no function 'absent'"),
        ("nothing", "returned a int; it must return a workbench Recipe"),
        ("fails", "my_recipes.py:fails failed: AttributeError: .*no_such_thing"),
        ("plain", "'plain': its task, a Plain, must be a frozen dataclass"),
        ("half", "'half': its task, a Half, must be a frozen dataclass with all that workbench.tasks.base.Task asks"),
    ],
)
def test_own_functions_that_make_no_recipe(own, function, message, monkeypatch):
    # The tests' type checker would be first with the tasks; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
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


def test_own_task_of_a_file_named_from_here_is_found_from_elsewhere(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    content = json.loads(json.dumps(find_recipe("my_recipes.py:doubled").to_json()))
    monkeypatch.chdir("/")
    assert Recipe.from_json(content).task.p == 59


def test_an_unknown_task_is_named():
    content = {**find_recipe("modular").to_json(), "task": {"name": "modula"}}
    with pytest.raises(WorkbenchError, match="Unknown task 'modula'. Did you mean 'modular'"):
        Recipe.from_json(content)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"name": "x", "task": {"name": "modular", "q": 3}},
        {"name": "x", "task": "modular"},
        {"name": "x", "task": {"name": "modular", "p": "many"}},
        {**find_recipe("modular").to_json(), "model": 3},
        {**find_recipe("modular").to_json(), "train": {"steps": "many"}},
    ],
)
def test_foreign_json_is_no_recipe(content):
    with pytest.raises(WorkbenchError, match="not a recipe that this version reads"):
        Recipe.from_json(content)


def test_settings_that_differ():
    recipe = find_recipe("modular")
    assert differing_settings(recipe, recipe) == {}
    assert differing_settings(recipe, recipe.with_seed(5).override(["learning_rate=0.5", "betas=[0.5,0.9]"])) == {
        "task.seed": (0, 5),
        "train.learning_rate": (0.001, 0.5),
        "train.betas": ([0.9, 0.98], [0.5, 0.9]),
        "train.init_seed": (0, 5),
        "train.batch_seed": (0, 5),
    }


def test_a_setting_that_only_one_recipe_has_differs():
    imported = replace(find_recipe("modular"), train=None)
    assert differing_settings(imported, find_recipe("modular"))["train.steps"] == (None, 25_000)
    assert differing_settings(find_recipe("modular"), imported)["train.steps"] == (25_000, None)


def test_nested_settings_are_flat():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_a_key_in_full():
    recipe = find_recipe("modular")
    assert [recipe.full_key(key) for key in ("steps", "task.p", "model.d_model")] == [
        "train.steps",
        "task.p",
        "model.d_model",
    ]
    with pytest.raises(WorkbenchError, match="Unknown setting 'stepz'"):
        recipe.full_key("stepz")
