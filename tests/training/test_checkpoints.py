import json

import pytest
import torch

import workbench
from workbench.runtime import WorkbenchError
from workbench.store import RunFolder, new_run, write_json
from workbench.training.checkpoints import Run, export, load, save_checkpoint, thin
from workbench.training.loop import train
from workbench.training.recipes import find_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = find_recipe("modular-smoke").override(["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=40"])
    return train(recipe, new_run("a", tmp_path_factory.mktemp("runs")))


def test_load_finds_the_run_by_name_and_by_path(run):
    root = run.folder.path.parent
    for found in (workbench.load("a", runs=root), load(str(run.folder.path))):
        assert found.recipe == run.recipe
        assert [each.step for each in found.checkpoints] == [0, 1, 2, 4, 8, 16, 32, 40]


def test_model_at_a_step_computes_what_was_logged_and_knows_where_it_comes_from(run):
    batch = run.task.examples("test")
    for row in run.log.rows:
        if row["step"] in (0, 4, 40):
            model = run.model(row["step"])
            logits = model(batch.tokens)[batch.read]
            accuracy = (logits.argmax(1) == batch.targets[batch.read]).double().mean()
            assert accuracy.item() == pytest.approx(row["test_accuracy"])
    assert run.model().provenance.parents == (run.checkpoint().sha256,)
    assert run.model().provenance.recipe == "modular-smoke"
    assert not run.model().training


def test_unknown_step_names_the_nearest(run):
    with pytest.raises(WorkbenchError, match="no checkpoint at step 39; the nearest is 40. It has 8, from 0 to 40"):
        run.model(39)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"\xff"])
def test_damaged_checkpoint_is_named_by_file_and_hash(run, tmp_path, damage):
    copy = RunFolder(path=tmp_path, reference="copy")
    export(run, copy, count=99, dtype=torch.float32)
    path = Run(folder=copy, recipe=run.recipe).checkpoint().path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WorkbenchError, match=rf"{path.name} is damaged: its SHA-256 is [0-9a-f]{{16}}"):
        Run(folder=copy, recipe=run.recipe).model()


def test_checkpoint_without_its_card_does_not_count(run, tmp_path):
    copy = RunFolder(path=tmp_path, reference="copy")
    export(run, copy, count=99, dtype=torch.float32)
    (tmp_path / "checkpoints" / "step_00000040.json").unlink()
    assert Run(folder=copy, recipe=run.recipe).checkpoint().step == 32


def test_weights_of_another_architecture_are_refused(run, tmp_path):
    copy = RunFolder(path=tmp_path, reference="copy")
    save_checkpoint(copy, 0, {"embed.W_E": torch.zeros(2, 2)}, ["schedule"], dtype=torch.float32)
    with pytest.raises(WorkbenchError, match="does not hold this recipe's model"):
        Run(folder=copy, recipe=run.recipe).model()


def test_export_keeps_log_and_story_in_the_precision_asked_for(run, tmp_path):
    copy = RunFolder(path=tmp_path, reference="copy")
    export(run, copy, count=4, dtype=torch.float16)
    small = load(str(tmp_path))
    assert small.log.rows == run.log.rows
    assert {each.dtype for each in small.checkpoints} == {"float16"}
    assert small.checkpoint().step == run.checkpoint().step
    whole, half = run.checkpoint().tensors(), small.checkpoint().tensors()
    for name, tensor in half.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole[name].half().float())


def story(folder, *, memorised, generalised):
    """A run of 3,000 steps with its two moments."""
    recipe = find_recipe("modular-smoke").override(["p=13", "d_model=16", "d_head=4", "d_mlp=32"])
    lines = []
    for step in range(0, 3001, 50):
        save_checkpoint(folder, step, {"w": torch.zeros(1)}, ["schedule"], dtype=torch.float32)
        accuracy = {"train_accuracy": float(step >= memorised), "test_accuracy": float(step >= generalised)}
        lines.append(json.dumps({"step": step, **accuracy}))
    (folder.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return Run(folder=folder, recipe=recipe)


# A run may also generalise first.
@pytest.mark.parametrize(("memorised", "generalised"), [(500, 2000), (2000, 500)])
def test_thinning_puts_half_between_memorising_and_generalising(tmp_path, memorised, generalised):
    run = story(new_run("story", tmp_path), memorised=memorised, generalised=generalised)
    steps = [each.step for each in thin(run, 16)]
    assert len(steps) == 16
    assert len([step for step in steps if 500 <= step <= 2000]) == 8
    assert {0, 500, 2000, 3000} <= set(steps)


def test_export_of_a_measured_run_keeps_measured_checkpoints(tmp_path):
    run = story(new_run("story", tmp_path), memorised=500, generalised=2000)
    measured = [each.step for each in thin(run, 12)]
    rows = "".join(json.dumps({"step": step, "measure": "accuracy"}) + "\n" for step in [None, *measured])
    (run.folder.path / "measures.jsonl").write_text(rows)
    write_json(run.folder.path / "recipe.json", run.recipe.to_json())
    copy = RunFolder(path=tmp_path / "copy", reference="copy")
    export(run, copy, count=6, dtype=torch.float16)
    steps = [each.step for each in load(str(copy.path)).checkpoints]
    assert len(steps) == 6
    assert {0, 500, 2000, 3000} <= set(steps) <= set(measured)


def test_thinning_spends_all_its_checkpoints(tmp_path):
    run = story(new_run("story", tmp_path), memorised=50, generalised=9999)
    steps = [each.step for each in thin(run, 16)]
    assert len(steps) == 16
    assert {0, 50, 3000} <= set(steps)


@pytest.mark.parametrize(("memorised", "generalised"), [(500, 2000), (2000, 500), (50, 100)])
def test_four_checkpoints_are_the_moments_and_the_ends(tmp_path, memorised, generalised):
    run = story(new_run("story", tmp_path), memorised=memorised, generalised=generalised)
    assert [each.step for each in thin(run, 4)] == sorted({0, memorised, generalised, 3000})
    three = [each.step for each in thin(run, 3)]
    assert len(three) == 3
    assert {0, 3000} < set(three)


def test_run_without_checkpoints_says_so(tmp_path):
    folder = new_run("empty", tmp_path)
    with pytest.raises(WorkbenchError, match="has no checkpoints yet"):
        Run(folder=folder, recipe=find_recipe("modular-smoke")).model()


def test_status_before_the_end(run, tmp_path):
    empty = Run(folder=RunFolder(path=tmp_path, reference="x"), recipe=run.recipe)
    assert empty.status == {"finished": False, "reason": "not finished", "seconds": None}
    assert empty.measures.empty
    assert run.status["finished"]
