import os
import signal
from dataclasses import replace

import pytest
import torch

from workbench.runtime import WorkbenchError
from workbench.store import new_run
from workbench.training import loop, streaming
from workbench.training.loop import Interrupted, train
from workbench.training.recipe import TrainConfig
from workbench.training.recipes import find_recipe
from workbench.training.streaming import ExampleStream

TINY = ["steps=60", "batch_size=8", "test_size=20", "n_layers=1", "evaluate_every=10"]
CPU = torch.device("cpu")


def tiny(*settings):
    return find_recipe("search-smoke").override([*TINY, *settings])


def stream(**fields):
    return ExampleStream(tiny().task, TrainConfig(steps=1, batch_size=8, **fields), CPU)


def rows(*accuracies):
    return [{"next_batch_accuracy": accuracy} for accuracy in accuracies]


def test_no_step_sees_what_another_saw():
    drawn = stream()
    batches = [drawn.batch(step, []) for step in range(70)]
    assert {len(batch) for batch in batches} == {8}
    # Whole prompts: names, edges and their order. Few short graphs come twice by chance.
    prompts = [tuple(row) for batch in batches for row in batch.tokens.tolist()]
    assert len(set(prompts)) > 0.85 * len(prompts)
    assert not torch.equal(batches[0].tokens, batches[32].tokens)


@pytest.mark.parametrize("step", [0, 31, 32, 50])
def test_a_step_has_its_examples_whatever_was_drawn_before(step):
    drawn = stream()
    in_turn = [drawn.batch(each, []).tokens for each in range(step + 1)][-1]
    assert torch.equal(in_turn, stream().batch(step, []).tokens)
    assert not torch.equal(in_turn, stream(batch_seed=1).batch(step, []).tokens)


def test_a_curriculum_goes_up_with_each_batch_that_is_answered():
    drawn = stream(curriculum=0.9)
    assert drawn.level([]) == 1
    assert drawn.level(rows(0.5, 0.9, 0.89, 1.0)) == 3
    assert drawn.level(rows(*[1.0] * 9)) == tiny().task.hardest == 3
    assert stream().level(rows(1.0)) is None
    task = tiny().task
    for log, most in (([], 1), (rows(0.9), 2), (rows(1, 1), 3), (rows(1, 1, 1, 1, 1), 3)):
        found = [task.graphs(drawn.batch(step, log)).lookahead().max() for step in range(20)]
        assert max(found) == most


@pytest.mark.parametrize("settings", [(), ("curriculum=0.1", "batch_size=32", "learning_rate=0.01")])
def test_a_streamed_run_resumes_bit_identical(tmp_path, settings):
    recipe = tiny(*settings)
    unbroken = train(recipe, new_run("whole", tmp_path))
    folder = new_run("broken", tmp_path)

    def interrupt(step, steps, row):
        if step == 40:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 4[01] is saved"):
        train(recipe, folder, on_progress=interrupt)
    resumed = train(recipe, folder, resume=True)
    first, second = (run.checkpoint().tensors() for run in (unbroken, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [[{**row, "seconds": 0} for row in run.log.rows] for run in (unbroken, resumed)]
    assert logs[0] == logs[1]
    if settings:
        assert unbroken.log.rows[-1]["level"] > 1


def test_the_check_of_resuming_can_fail(tmp_path, monkeypatch):
    recipe, seeds = tiny("steps=3"), iter(range(1000))
    # Mutant: examples from a stream of whichever number comes.
    monkeypatch.setattr(streaming, "generator", lambda *given: torch.Generator().manual_seed(next(seeds)))
    first, second = (train(recipe, new_run(name, tmp_path)).checkpoint().tensors() for name in "ab")
    assert not all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("search-smoke", "batch_size=null", r"task 'graph_search' streams its examples: .* Set train\.batch_size"),
        (
            "modular-smoke",
            "curriculum=0.9",
            r"task 'modular' has no levels for a curriculum\. Set train\.curriculum=null",
        ),
        ("search-smoke", "curriculum=0", r"curriculum must be an accuracy above 0, or null for none, got 0\.0"),
    ],
)
def test_what_cannot_be_streamed_is_refused(recipe, settings, message):
    with pytest.raises(WorkbenchError, match=message):
        find_recipe(recipe).override([settings])


def test_padding_follows_the_task():
    recipe = find_recipe("search-smoke")
    longer = replace(recipe.model, n_ctx=29, d_model=80)
    assert replace(recipe, model=longer).override(["size=29"]).model.pad_token == 12


def test_parts_of_a_split_are_measured_as_the_whole(tmp_path, monkeypatch):
    whole = train(tiny("steps=1"), new_run("whole", tmp_path)).log.rows[-1]
    monkeypatch.setattr(loop, "EVALUATION_TOKENS", 7 * 26)
    parts = train(tiny("steps=1"), new_run("parts", tmp_path)).log.rows[-1]
    assert {**parts, "seconds": 0} == pytest.approx({**whole, "seconds": 0}, rel=1e-6)
