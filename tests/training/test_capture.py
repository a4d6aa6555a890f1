"""A training step as one graph, with a stand-in for the card: it too repeats calls on the tensors that they had."""

import os
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.runtime import WorkbenchError
from workbench.store import new_run
from workbench.training import capture, loop
from workbench.training.capture import WARM_UP, Captured, hindrance, launch_on
from workbench.training.loop import Interrupted, train
from workbench.training.recipes import find_recipe

CUDA = torch.device("cuda")


class Tape(TorchDispatchMode):
    """Every operation with the tensors that it read and wrote, as a graph holds them."""

    def __init__(self):
        super().__init__()
        self.calls, self.recorded = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        """Recording took a step, as a card's does not: so the first call takes none."""
        if not self.recorded:
            self.recorded = True
            return
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    # What is a view, or was changed in place, is where it was.
                    if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """What trainers record, which take their steps as on a card."""
    found = []

    def recorded(step, generators):
        with Tape() as tape:
            step()
        found.append(tape)
        return tape.replay

    monkeypatch.setattr(capture, "recorded", recorded)
    monkeypatch.setattr(capture, "aside", lambda step: step())
    monkeypatch.setattr(loop, "launch_on", lambda device, hindrance: "pieces" if hindrance else "graph")
    return found


RECIPES = {
    "the whole training split": ("modular-smoke", "p=13", "normalization=LN"),
    "batches": ("composition-smoke", "batch_size=32"),
    "reads that differ in number": ("sequences-transformer", "batch_size=16", "average=prompts", "size=200"),
    "a curriculum of streamed graphs": ("search", "batch_size=16", "test_size=20", "curriculum=0.01"),
    "clipping after Grokfast": ("modular-smoke", "p=13", "grokfast=[0.9,2]", "clip_norm=0.1"),
    "an orthogonal gradient, Grokfast and StableMax": (
        "modular-smoke", "p=13", "grokfast=[0.9,2]", "orthogonal_gradient=true", "loss=stablemax",
    ),
    "Grokfast in the optimiser": ("modular-smoke", "p=13", "grokfast=[0.9,2]"),
    "a penalty on what changed": ("modular-smoke", "p=13", "l1_to_start=0.001", "cooldown=0.5"),
    "Muon": ("modular-smoke", "p=13", "optimiser=muon"),
    "Signum": ("modular-smoke", "p=13", "optimiser=signum", "learning_rate=0.001"),
}  # fmt: skip


def small(name, *settings):
    recipe = find_recipe(name)
    sizes = [] if name.startswith(("program", "search")) else ["d_model=16", "d_head=4", "d_mlp=16"]
    return recipe.override([*sizes, "steps=16", "evaluate_every=5", "stop_when_clean=false", *settings])


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_a_step_that_is_replayed_is_the_step(settings, tmp_path, tapes, monkeypatch):
    recipe = small(*settings)
    replayed = train(recipe, new_run("graph", tmp_path))
    assert tapes
    assert replayed.status["launch"] == "graph"
    monkeypatch.undo()
    plain = train(recipe, new_run("pieces", tmp_path))
    assert (len(tapes), plain.status["launch"]) == (len(tapes), "pieces")
    for one, other in zip(replayed.log.rows, plain.log.rows, strict=True):
        for name in ("train_loss", "test_loss", "sum_squared_weights"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
    assert plain.log.rows[-1]["train_loss"] < plain.log.rows[0]["train_loss"]


def test_a_graph_is_recorded_once_for_a_shape_after_the_first_steps(tapes):
    seen = []

    def step(inputs):
        seen.append(inputs["x"].shape)
        total.add_(inputs["x"].sum())

    total = torch.zeros(())
    captured = Captured(step, torch.device("cpu"))
    for size in (2, 3):
        for value in range(WARM_UP + 3):
            captured({"x": torch.full((size,), float(value))})
    # What is replayed does not come by again.
    assert seen == [torch.Size([2])] * (WARM_UP + 1) + [torch.Size([3])] * (WARM_UP + 1)
    assert len(tapes) == 2
    assert total == (2 + 3) * sum(range(WARM_UP + 3))


def test_a_run_that_is_resumed_draws_what_it_would_have(tmp_path, tapes):
    def interrupt(step, steps, row):
        if step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = small("program-smoke", "batch_size=16", "size=200")
    whole = train(recipe, new_run("whole", tmp_path))
    folder = new_run("broken", tmp_path)
    with pytest.raises(Interrupted):
        train(recipe, folder, on_progress=interrupt)
    resumed = train(recipe, folder, resume=True)
    assert resumed.log.rows[-1]["train_loss"] == whole.log.rows[-1]["train_loss"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [(["dropout=0.1"], "dropout is drawn by the processor"), (["optimiser=sgd"], "plain SGD takes its learning rate")],
)
def test_what_hinders_a_capture_is_said_and_the_step_launched_piece_by_piece(settings, why, caplog, monkeypatch):
    monkeypatch.delenv(capture.OVERRIDE, raising=False)
    said = hindrance(small("modular-smoke", *settings).trainable(), 1)
    assert launch_on(CUDA, said) == "pieces"
    assert f"not as one CUDA graph: {why}" in caplog.text
    monkeypatch.setenv(capture.OVERRIDE, "graph")
    with pytest.raises(WorkbenchError, match=f"WORKBENCH_LAUNCH=graph, but {why}.*: unset it"):
        launch_on(CUDA, said)


def test_several_processes_launch_piece_by_piece():
    assert "2 processes wait" in hindrance(small("modular-smoke").trainable(), 2)


def test_the_launch_is_chosen_by_the_device_and_can_be_overridden(monkeypatch, caplog):
    monkeypatch.delenv(capture.OVERRIDE, raising=False)
    plain = hindrance(small("modular-smoke").trainable(), 1)
    assert (launch_on(CUDA, plain), launch_on(torch.device("cpu"), plain)) == ("graph", "pieces")
    assert not caplog.text
    monkeypatch.setenv(capture.OVERRIDE, "pieces")
    assert launch_on(CUDA) == "pieces"
    monkeypatch.setenv(capture.OVERRIDE, "graph")
    with pytest.raises(WorkbenchError, match="needs a CUDA device, and this is 'cpu'"):
        launch_on(torch.device("cpu"))
    monkeypatch.setenv(capture.OVERRIDE, "stream")
    with pytest.raises(WorkbenchError, match="stream is no way to launch a step. Known: graph, pieces"):
        launch_on(CUDA)
