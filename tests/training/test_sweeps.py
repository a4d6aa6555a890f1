"""What runs a sweep has, how they are called, and what is refused before the first of them starts."""

import json
import shutil
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.runtime import WorkbenchError
from workbench.store import check_run_name, new_run, write_json
from workbench.tasks.modular import Modular
from workbench.training.loop import train
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe
from workbench.training.sweeps import (
    members_to_train,
    plan_sweep,
    read_alternatives,
    read_seeds,
    read_variants,
    split_outside_brackets,
)

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=10"]


def tiny(*settings: str) -> Recipe:
    return find_recipe("modular-smoke").override([*TINY, *settings])


# What people type -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"), [("0..2", (0, 1, 2)), ("0,3,7", (0, 3, 7)), ("5", (5,)), ("0..1, 7", (0, 1, 7)), ("3..1", ())]
)
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "one", "0..", "..2", "-1", "0,,1", "0...2", "1.5"])
def test_what_are_no_seeds(text: str) -> None:
    with pytest.raises(WorkbenchError, match=r"Seeds are listed as 0\.\.2 or as 0,3,7, got"):
        read_seeds(text)


def test_values_part_at_commas_outside_of_brackets() -> None:
    found = read_alternatives(["train.grokfast=[0.98,2.0],null", "decay = all, matrices", 'biases=["attn","mlp"]'])
    assert found == {
        "train.grokfast": ("[0.98,2.0]", "null"),
        "decay": ("all", "matrices"),
        "biases": ('["attn","mlp"]',),
    }


@pytest.mark.parametrize("setting", ["steps", "steps=", "steps=1,", "steps=,1", "=,"])
def test_a_setting_without_a_value(setting: str) -> None:
    with pytest.raises(WorkbenchError, match="must be key=value or key=value,value"):
        read_alternatives([setting])


def test_a_key_comes_once() -> None:
    with pytest.raises(WorkbenchError, match="Setting 'steps' comes twice: list all of its values in one"):
        read_alternatives(["steps=1", "steps=2"])


def test_variants() -> None:
    found = read_variants(["adamw", "fast : train.grokfast=[0.98, 2.0]  loss=stablemax", "bare:"])
    assert found == {"adamw": (), "fast": ("train.grokfast=[0.98, 2.0]", "loss=stablemax"), "bare": ()}


@pytest.mark.parametrize("text", ["", ": steps=1", "steps=1", "  "])
def test_a_variant_has_a_name(text: str) -> None:
    with pytest.raises(WorkbenchError, match="must be 'NAME: KEY=VALUE KEY=VALUE', or a name alone"):
        read_variants([text])


def test_a_variants_name_comes_once() -> None:
    with pytest.raises(WorkbenchError, match="Variant 'a' comes twice"):
        read_variants(["a: steps=1", "a: steps=2"])


bracketed = st.recursive(
    st.text(string.ascii_letters + "0123456789.", min_size=1, max_size=4),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
    max_leaves=6,
)


@given(st.lists(bracketed, min_size=1, max_size=5))
def test_what_is_joined_is_split_again(values: list[str]) -> None:
    assert split_outside_brackets(",".join(values), ",") == values


@given(st.text("ab,[](){} ", max_size=20))
def test_splitting_loses_nothing(text: str) -> None:
    assert ",".join(split_outside_brackets(text, ",")) == text


# The product ------------------------------------------------------------------------------------------------------

NUMBERS = st.lists(st.integers(1, 10_000), min_size=1, max_size=3, unique=True)


@settings(max_examples=25)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    steps=NUMBERS,
    warmup=NUMBERS,
    variants=st.lists(st.text("abcXYZ019 _-.é/", min_size=1, max_size=60), max_size=2, unique=True),
    name=st.text(string.ascii_letters, min_size=1, max_size=99),
)
def test_a_sweep_is_the_product_and_every_run_has_a_name(
    seeds: list[int], steps: list[int], warmup: list[int], variants: list[str], name: str
) -> None:
    bundles = {each: [f"weight_decay={place}"] for place, each in enumerate(variants)}
    alternatives = {"steps": [*map(str, steps)], "train.warmup_steps": [*map(str, warmup)]}
    try:
        members = plan_sweep(tiny(), seeds=seeds, variants=bundles, alternatives=alternatives, name=name)
    except WorkbenchError as error:
        # Names as odd as these may become the same once they are safe.
        assert "runs of the sweep would be called" in str(error)  # noqa: PT017
        return
    found = [(m.recipe.train.init_seed, m.recipe.train.steps, m.recipe.train.warmup_steps) for m in members]
    wanted = [(seed, *each) for seed in seeds for _ in variants or [""] for each in product(steps, warmup)]
    assert found == wanted
    assert len({member.name for member in members}) == len(members)
    for member in members:
        check_run_name(member.name)
    by_setting: dict[str, list[int]] = {}
    for member in members:
        by_setting.setdefault(member.setting, []).append(member.recipe.train.init_seed)
    assert [*by_setting.values()] == [seeds] * (len(members) // len(seeds))


def product(*lists: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for each in lists:
        found = [(*before, value) for before in found for value in each]
    return found


def test_names_and_settings_tell_what_varies() -> None:
    members = plan_sweep(
        tiny(),
        seeds=[0, 7],
        variants={"adamw": [], "fast": ["grokfast=[0.98,2]"]},
        alternatives={"decay": ["all"], "weight_decay": ["0.1", "1"]},
        name="mine",
    )
    assert [(member.name, member.setting) for member in members[:4]] == [
        ("mine-adamw-weight_decay-0.1-s0", "adamw weight_decay=0.1"),
        ("mine-adamw-weight_decay-1-s0", "adamw weight_decay=1"),
        ("mine-fast-weight_decay-0.1-s0", "fast weight_decay=0.1"),
        ("mine-fast-weight_decay-1-s0", "fast weight_decay=1"),
    ]
    assert members[4].name == "mine-adamw-weight_decay-0.1-s7"
    assert members[3].recipe.train.grokfast == (0.98, 2.0)


def test_one_variant_and_no_variant() -> None:
    [plain] = plan_sweep(tiny(), seeds=[3])
    assert (plain.name, plain.setting) == ("modular-smoke-s3", "modular-smoke")
    [only] = plan_sweep(tiny(), seeds=[3], variants={"fast": ["grokfast=[0.98,2]"]})
    assert (only.name, only.setting) == ("modular-smoke-s3", "fast")


def test_a_member_is_what_train_makes_of_seed_and_settings() -> None:
    """A setting has the last word: `--set seed=5` keeps the world while weights and batches vary."""
    members = plan_sweep(tiny(), seeds=[1, 2], alternatives={"task.seed": ["5"], "p": ["11"]})
    assert [member.recipe for member in members] == [
        tiny().with_seed(seed).override(["task.seed=5", "p=11"]) for seed in (1, 2)
    ]
    assert [(m.recipe.task.seed, m.recipe.train.init_seed) for m in members] == [(5, 1), (5, 2)]


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    variants = {"x" * 120 + end: [] for end in "ab"}
    names = [member.name for member in plan_sweep(tiny(), seeds=[0], variants=variants)]
    assert [len(name) for name in names] == [100, 100]
    assert names[0] != names[1]


@pytest.mark.parametrize(("name", "run"), [("../out", "out-s0"), ("///", "s0"), ("a..b", "a.b-s0"), ("é", "s0")])
def test_what_no_folder_may_be_called_is_made_safe(name: str, run: str) -> None:
    [member] = plan_sweep(tiny(), seeds=[0], name=name)
    assert member.name == run


@dataclass(frozen=True, kw_only=True)
class Untestable(Modular):
    measured = ("train",)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"seeds": []}, "The sweep is empty"),
        ({"alternatives": {"steps": []}}, "The sweep is empty"),
        ({"seeds": [1, 1]}, "2 runs of the sweep would be called 'modular-smoke-s1'"),
        ({"alternatives": {"weight_decay": ["1", "1"]}}, "would be called 'modular-smoke-weight_decay-1-s0'"),
        ({"alternatives": {"weight_dekay": ["1"]}}, r"Unknown setting 'weight_dekay'.*weight_decay"),
        ({"alternatives": {"weight_decay": ["1", "lots"]}}, "Setting train.weight_decay=lots is not of the kind float"),
        ({"variants": {"a": ["stepz=1"]}}, r"Unknown setting 'stepz'"),
        (
            {"variants": {"a": ["weight_decay=1"]}, "alternatives": {"train.weight_decay": ["1"]}},
            "Variant 'a' sets train.weight_decay, which --set sets, too",
        ),
        ({"alternatives": {"p": ["13", "2"]}}, "Modulus p must be at least 3, got 2"),
        ({"alternatives": {"train_fraction": ["0.5", "0.0001"]}}, "train"),
    ],
)
def test_refused_before_anything_starts(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(WorkbenchError, match=says):
        plan_sweep(tiny(), **{"seeds": [0], **asked})


def test_a_recipe_that_cannot_be_trained_is_refused() -> None:
    recipe = replace(tiny(), task=Untestable(p=13, train_fraction=0.5))
    with pytest.raises(WorkbenchError, match="needs the splits train and test"):
        plan_sweep(recipe, seeds=[0])


# What is there already --------------------------------------------------------------------------------------------


def test_only_what_is_not_finished_is_trained(tmp_path: Path) -> None:
    members = plan_sweep(tiny(), seeds=[0, 1, 2])
    assert members_to_train(members, tmp_path) == members
    train(members[0].recipe, new_run(members[0].name, tmp_path))
    shutil.copytree(members[0].run(tmp_path).folder.path, members[1].run(tmp_path).folder.path)
    broken = members[1].run(tmp_path).folder.path
    write_json(broken / "recipe.json", members[1].recipe.to_json())
    (broken / "status.json").unlink()
    assert members_to_train(members, tmp_path) == members[1:]
    assert members[2].run(tmp_path).log.rows == []


def test_a_run_of_an_older_version_is_the_same_recipe(tmp_path: Path) -> None:
    """A field that recipes had not yet has its default."""
    [member] = plan_sweep(tiny(), seeds=[0])
    train(member.recipe, new_run(member.name, tmp_path))
    path = tmp_path / member.name / "recipe.json"
    content = json.loads(path.read_text())
    del content["train"]["grokfast"]
    content["minutes"] = 77.0
    path.write_text(json.dumps(content))
    assert members_to_train([member], tmp_path) == ()


def test_a_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    [member] = plan_sweep(tiny("weight_decay=0.5"), seeds=[0])
    write_json(new_run(member.name, tmp_path).path / "recipe.json", tiny().to_json())
    with pytest.raises(
        WorkbenchError,
        match=r"Run 'modular-smoke-s0' at .* made by another recipe: it has train.weight_decay 1.0, not 0.5\. Choose",
    ):
        members_to_train([member], tmp_path)
    write_json(tmp_path / member.name / "recipe.json", tiny("p=11", "d_mlp=8", "steps=3").to_json())
    with pytest.raises(WorkbenchError, match=r"task.p 11, not 13; .*, and \d more\."):
        members_to_train([member], tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    [member] = plan_sweep(tiny(), seeds=[0])
    folder = new_run(member.name, tmp_path)
    (folder.path / "thesis.tex").touch()
    with pytest.raises(WorkbenchError, match="is not a run, but holds files"):
        members_to_train([member], tmp_path)


def test_a_run_that_is_being_written_is_refused(tmp_path: Path) -> None:
    [member] = plan_sweep(tiny(), seeds=[0])
    folder = new_run(member.name, tmp_path)
    write_json(folder.path / "recipe.json", member.recipe.to_json())
    with folder.lock(), pytest.raises(WorkbenchError, match="is being written by another process"):
        members_to_train([member], tmp_path)
