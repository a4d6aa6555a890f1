import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from kill_and_resume import final_weights, finish, kill_and_resume, log_without_seconds
from safetensors.torch import load_file
from torch.nn import functional

from workbench.kernels.dispatch import kernels_for
from workbench.runtime import WorkbenchError
from workbench.store import digest, new_run
from workbench.tasks.modular import Modular
from workbench.tasks.pairs import Pairs
from workbench.training import loop
from workbench.training.checkpoints import load
from workbench.training.loop import Interrupted, Trainer, is_evaluation, train
from workbench.training.recipe import TrainConfig
from workbench.training.recipes import find_recipe

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=60", "stop_when_clean=false"]


def tiny(*settings):
    return find_recipe("modular-smoke").override([*TINY, *settings])


def weights(run):
    return run.checkpoint().tensors()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_recipe_log_checkpoints_states_and_status(tmp_path):
    seen = []
    run = train(tiny(), new_run("a", tmp_path), on_progress=lambda step, steps, row: seen.append((step, steps, row)))
    assert [row["step"] for row in run.log.rows] == [0, *(step for step, _, _ in seen)]
    assert seen[-1][:2] == (60, 60)
    assert set(seen[-1][2]) == {
        "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "sum_squared_weights", "seconds",
    }  # fmt: skip
    assert [checkpoint.step for checkpoint in run.checkpoints if checkpoint.step <= 32] == [0, 1, 2, 4, 8, 16, 32]
    assert run.checkpoint().reasons == ("final",)
    assert len(list((run.folder.path / "state").glob("*.safetensors"))) == loop.STATES_KEPT
    assert run.status["finished"]
    assert run.status["reason"] == "steps used up"
    assert run.log.rows[-1]["train_loss"] < 0.5 * run.log.rows[0]["train_loss"]


def test_kernels_that_are_refused_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_KERNELS", "cutlass")
    folder = new_run("refused", tmp_path)
    with pytest.raises(WorkbenchError, match="WORKBENCH_KERNELS=cutlass names no kernels"):
        train(tiny(), folder)
    assert [path.name for path in folder.path.iterdir() if path.name != ".lock"] == []


def test_logged_losses_are_those_of_the_hooked_forward(tmp_path):
    run = train(tiny(), new_run("a", tmp_path))
    for split in ("train", "test"):
        batch = run.task.examples(split)
        logits = run.model()(batch.tokens)[batch.read].double()
        loss = functional.cross_entropy(logits, batch.targets[batch.read])
        assert run.log.rows[-1][f"{split}_loss"] == pytest.approx(loss.item(), rel=1e-5)
    squared = sum(float(p.double().square().sum()) for p in weights(run).values())
    assert run.log.rows[-1]["sum_squared_weights"] == pytest.approx(squared, rel=1e-6)


def test_first_step_is_decoupled_adamw_by_hand(tmp_path):
    recipe = tiny("steps=1", "warmup_steps=4", "learning_rate=0.01", "weight_decay=0.5")
    run = train(recipe, new_run("a", tmp_path))
    start = run.model(0)
    batch = run.task.examples("train")
    loss = functional.cross_entropy(start(batch.tokens)[batch.read].double(), batch.targets[batch.read])
    loss.backward()
    rate = 0.01 / 4
    for (name, before), after in zip(start.named_parameters(), run.model(1).parameters(), strict=True):
        gradient = before.grad
        by_hand = before * (1 - rate * 0.5) - rate * gradient / (gradient.abs() + 1e-8)
        # Where a gradient is itself rounding noise, its sign is too.
        clear = gradient.abs() > 1e-6
        assert torch.allclose(after[clear], by_hand[clear], atol=1e-6), name


def test_the_learning_rate_rises_stays_and_falls_by_hand():
    config = tiny("steps=8", "warmup_steps=2", "learning_rate=0.4", "cooldown=0.5").train
    assert [config.rate(step) for step in range(8)] == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1])


OPTIONS = ["batch_size=32", "clip_norm=0.01", "loss_dtype=float32", "init_seed=1", "weight_decay=0", "warmup_steps=0",
           "decay=matrices", "dropout=0.1", "init=gpt2", "cooldown=0.5"]  # fmt: skip


@pytest.mark.parametrize("setting", [*OPTIONS, "betas=[0.5,0.9]", "learning_rate=0.003"])
def test_every_training_option_changes_the_weights(tmp_path, setting):
    steps = "steps=20"
    plain = train(tiny(steps), new_run("plain", tmp_path))
    changed = train(tiny(steps, setting), new_run("changed", tmp_path))
    assert not same(weights(plain), weights(changed))


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_biases_and_norms_are_not_decayed_where_only_matrices_are(tmp_path, decay):
    biased = ["normalization=LN", 'biases=["attn","mlp","unembed"]', "learning_rate=0.1", "weight_decay=0.5"]
    trainer = Trainer(tiny(*biased, f"decay={decay}"), new_run("a", tmp_path), Accelerator(cpu=True))
    # Ones without a gradient: decay alone moves them.
    for parameter in trainer.model.parameters():
        parameter.data.fill_(1)
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimisers[0].step()
    for name, parameter in trainer.model.named_parameters():
        decayed = decay == "all" or name.rsplit(".", 1)[-1].startswith("W_")
        assert torch.allclose(parameter, torch.tensor(0.95 if decayed else 1.0)), name


def test_a_model_of_matrices_alone_has_nothing_to_spare(tmp_path):
    runs = [train(tiny("biases=[]", f"decay={decay}"), new_run(decay, tmp_path)) for decay in ("all", "matrices")]
    assert same(*map(weights, runs))


def test_batch_seed_matters_only_for_mini_batches_and_dropout(tmp_path):
    dropped = [
        train(tiny(f"batch_seed={seed}", "steps=5", "dropout=0.1"), new_run(f"d{seed}", tmp_path)) for seed in (0, 1)
    ]
    assert not same(weights(dropped[0]), weights(dropped[1]))
    full = [train(tiny(f"batch_seed={seed}", "steps=5"), new_run(f"f{seed}", tmp_path)) for seed in (0, 1)]
    mini = [
        train(tiny(f"batch_seed={seed}", "steps=5", "batch_size=16"), new_run(f"m{seed}", tmp_path)) for seed in (0, 1)
    ]
    assert same(weights(full[0]), weights(full[1]))
    assert not same(weights(mini[0]), weights(mini[1]))


def test_stops_by_itself_once_generalised_and_clean(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.training.curves.SETTLED_STEPS", 20)
    monkeypatch.setattr("workbench.training.curves.SETTLED_CHANGE", 0.5)
    # So small a world is never learnt to 99 %; what is tested is the rule, not the network.
    monkeypatch.setattr(Modular, "memorised_accuracy", 0.4)
    monkeypatch.setattr(Modular, "solved_accuracy", 0.4)
    recipe = tiny("steps=5000", "stop_when_clean=true", "train_fraction=0.8", "evaluate_every=5")
    run = train(recipe, new_run("a", tmp_path))
    assert run.status["reason"] == "generalised and cleaned up"
    assert run.log.rows[-1]["step"] < 5000
    generalised = run.log.step_generalised
    assert generalised is not None
    assert "generalised" in run.checkpoint(generalised).reasons
    assert "memorised" in run.checkpoint(run.log.step_memorised).reasons


def test_checkpoints_are_dense_once_the_training_split_is_learnt(tmp_path):
    run = train(tiny("steps=200", "evaluate_every=5", "p=7", "train_fraction=0.5"), new_run("a", tmp_path))
    learnt = next(row["step"] for row in run.log.rows if row["train_accuracy"] >= run.task.memorised_accuracy)
    kept = {checkpoint.step for checkpoint in run.checkpoints}
    assert {row["step"] for row in run.log.rows if row["step"] >= learnt} <= kept
    assert all(step & (step - 1) == 0 for step in kept if step < learnt)


def test_evaluations_are_regular_and_at_powers_of_two():
    config = TrainConfig(steps=70, evaluate_every=30)
    assert [step for step in range(1, 71) if is_evaluation(step, config)] == [1, 2, 4, 8, 16, 30, 32, 60, 64, 70]


@dataclass(frozen=True, kw_only=True)
class ThreeSplits(Modular):
    """Modular arithmetic that also logs how it does on all pairs, the training pairs among them."""

    measured = ("train", "test", "all")


def measured(*settings):
    recipe = tiny(*settings)
    return replace(recipe, task=ThreeSplits(p=recipe.task.p, train_fraction=recipe.task.train_fraction))


def exact_loss(run, split):
    batch = run.task.examples(split)
    logits = run.model()(batch.tokens)[batch.read].double()
    return functional.cross_entropy(logits, batch.targets[batch.read]).item()


@pytest.mark.parametrize("batch", [(), ("batch_size=32", "dropout=0.1")])
def test_every_measured_split_is_logged_without_dropout(tmp_path, batch):
    run = train(measured("steps=5", *batch), new_run("a", tmp_path))
    for split in ("train", "test", "all"):
        assert run.log.rows[-1][f"{split}_loss"] == pytest.approx(exact_loss(run, split), rel=1e-5)
        assert 0 <= run.log.rows[-1][f"{split}_accuracy"] <= 1
    assert run.log.tables()[0].frame["split"].unique().tolist() == ["train", "test", "all"]


def test_large_splits_are_thinned_where_training_goes_by_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PROBES", 30)
    sizes = {}
    for name, settings in {
        "full": (),
        "batches": ("batch_size=32",),
        "other": ("batch_size=16", "batch_seed=1"),
    }.items():
        trainer = Trainer(measured(*settings), new_run(name, tmp_path), Accelerator(cpu=True))
        assert all(len(parts) == 1 for parts in trainer.splits.values())
        sizes[name] = {split: parts[0].batch.tokens.tolist() for split, parts in trainer.splits.items()}
    assert [len(rows) for rows in sizes["full"].values()] == [84, 85, 169]
    assert [len(rows) for rows in sizes["batches"].values()] == [30, 30, 30]
    # The same ones in every run, without repeats, and not only the first.
    assert sizes["other"] == sizes["batches"]
    assert all(len({tuple(row) for row in rows}) == 30 for rows in sizes["batches"].values())
    assert sizes["batches"]["all"] != sizes["full"]["all"][:30]


def test_without_dropout_no_mask_is_drawn(tmp_path, monkeypatch):
    asked = []
    draw = loop.draw_masks
    monkeypatch.setattr(loop, "draw_masks", lambda *given: asked.append(given) or draw(*given))
    train(tiny("steps=3"), new_run("plain", tmp_path))
    assert not asked
    train(tiny("steps=3", "dropout=0.25"), new_run("dropped", tmp_path))
    assert [rate for _, _, rate, _ in asked] == [0.25] * 3


def test_a_task_without_a_training_split_cannot_be_trained(tmp_path):
    task = Pairs(vocab=("a", "b"), clean=((0,),), corrupt=((1,),), answer=(0,), distractor=(1,))
    model = replace(tiny().model, d_vocab=2, d_vocab_out=2)
    with pytest.raises(WorkbenchError, match="Task 'pairs' measures test: a task that is trained needs the splits"):
        train(replace(tiny(), task=task, model=model), new_run("a", tmp_path))


@pytest.mark.parametrize("settings", [(), ("dropout=0.1", "decay=matrices", "normalization=LN")])
def test_interruption_saves_a_state_that_resumes_bit_identical(tmp_path, settings):
    recipe = tiny("batch_size=32", "steps=120", *settings)
    unbroken = train(recipe, new_run("whole", tmp_path))
    folder = new_run("broken", tmp_path)

    def interrupt(step, steps, row):
        if step == 50:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 5[01] is saved; go on with --resume"):
        train(recipe, folder, on_progress=interrupt)
    assert not load("broken", runs=tmp_path).status["finished"]
    resumed = train(recipe, folder, resume=True)
    assert same(weights(unbroken), weights(resumed))
    without = [[{**row, "seconds": 0} for row in run.log.rows] for run in (unbroken, resumed)]
    assert without[0] == without[1]
    # Signals are handed back.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_went_on_with_other_threads_is_not_repeatable_and_says_so(tmp_path, monkeypatch, caplog):
    def interrupt(step, steps, row):
        if step == 40:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = find_recipe("composition-smoke").override(["d_model=16", "d_head=4", "d_mlp=16", "steps=80"])
    unbroken = train(recipe, new_run("whole", tmp_path))
    folder = new_run("broken", tmp_path)
    with pytest.raises(Interrupted):
        train(recipe, folder, on_progress=interrupt)
    assert not caplog.records
    monkeypatch.setattr(loop, "thread_count", lambda: 7)
    resumed = train(recipe, folder, resume=True)
    assert "now there are 7 in 1: the run goes on, but will not be bit-identical" in caplog.text
    assert (unbroken.status["repeatable"], resumed.status["repeatable"]) == (True, False)
    # Once and for all: a state of such a run is not one of an unbroken run either.
    again = train(recipe, folder, resume=True)
    assert (again.status["threads"], again.status["repeatable"]) == (7, False)
    assert again.status["kernels"] == kernels_for(torch.device("cpu")).name
    # Recipe, and with it world and splits, are the same; so are the batches, whose sizes and order the log shows.
    assert resumed.recipe == unbroken.recipe
    assert [row["step"] for row in resumed.log.rows] == [row["step"] for row in unbroken.log.rows]


def test_data_and_splits_do_not_depend_on_threads():
    def digests(threads):
        torch.set_num_threads(threads)
        task = find_recipe("composition-smoke").task
        return {split: digest(task.examples(split).tokens.numpy().tobytes()) for split in task.splits}

    before = torch.get_num_threads()
    try:
        one, two = digests(1), digests(2)
    finally:
        torch.set_num_threads(before)
    assert one == two
    assert len(set(one.values())) == len(one)


def test_training_off_the_main_thread_leaves_signals_alone(tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(tiny("steps=3"), new_run("a", tmp_path))))
    thread.start()
    thread.join()
    assert runs[0].status["finished"]


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    run = train(tiny(), new_run("a", tmp_path))
    again = train(run.recipe, run.folder, resume=True)
    assert same(weights(run), weights(again))
    assert len(again.log.rows) == len(run.log.rows)


@pytest.mark.parametrize("settings", [(), ("batch_size=32", "dropout=0.1", "decay=matrices")])
def test_damaged_state_is_named_and_the_one_before_it_used(tmp_path, monkeypatch, caplog, settings):
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)
    recipe = tiny(*settings)
    run = train(recipe, new_run("a", tmp_path))
    newest = sorted((run.folder.path / "state").glob("*.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(bytes(content))
    again = train(recipe, run.folder, resume=True)
    assert newest.name in caplog.text
    assert "SHA-256" in caplog.text
    assert "Falling back" in caplog.text
    assert same(weights(run), weights(again))


def test_resume_without_a_whole_state_is_refused(tmp_path):
    run = train(tiny(), new_run("a", tmp_path))
    for state in (run.folder.path / "state").glob("*.safetensors"):
        state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(WorkbenchError, match="no whole state to resume from"):
        train(run.recipe, run.folder, resume=True)


def test_second_training_of_a_live_run_is_refused(tmp_path):
    folder = new_run("a", tmp_path)
    with folder.lock(), pytest.raises(WorkbenchError, match="being written by another process"):
        train(tiny(), folder)


def test_imported_run_cannot_be_trained(tmp_path):
    with pytest.raises(WorkbenchError, match="was imported"):
        train(replace(tiny(), train=None), new_run("a", tmp_path))


@pytest.mark.slow
def test_killed_runs_end_bit_identical_to_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(whole)
    hits = kill_and_resume(broken, kills=3, seed=1)
    assert hits > 0
    assert final_weights(broken) == final_weights(whole)
    assert log_without_seconds(broken) == log_without_seconds(whole)


# Without biases: these start at 0 and lie along their first gradient, so that what is orthogonal is nearly rounding.
ACCELERATED = ("grokfast=[0.9,2]", "loss=stablemax", "orthogonal_gradient=true", "biases=[]")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("batch_size=33", "clip_norm=0.1"), ACCELERATED])
def test_two_processes_compute_the_gradients_of_one(tmp_path, settings):
    script = str(Path(__file__).with_name("two_processes.py"))
    alone = [sys.executable, script]
    # A free port, or two test workers would meet on the default one.
    group = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
             "--rdzv_endpoint=localhost:0", script]  # fmt: skip
    for command in (alone, group):
        done = subprocess.run([*command, str(tmp_path), *TINY, *settings], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        scale = one[name].abs().max().clamp(min=1e-30)
        assert float((one[name] - two[name]).abs().max() / scale) < 1e-6, name


@pytest.mark.slow
def test_command_line_refuses_a_live_run_and_resumes_after_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "apps.cli", "train", "modular-smoke", "--run", "live", "--runs", str(tmp_path)]
    settings = [part for setting in [*TINY, "steps=100000"] for part in ("--set", setting)]
    child = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "live" / "metrics.jsonl").exists():
        assert child.poll() is None
        time.sleep(0.05)
    second = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "being written by another process" in second.stderr
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    # Shorten the rest: what is resumed is the run's own recipe.
    path = tmp_path / "live" / "recipe.json"
    recipe = json.loads(path.read_text())
    recipe["train"]["steps"] = load("live", runs=tmp_path).log.rows[-1]["step"] + 50
    path.write_text(json.dumps(recipe))
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reason"] == "steps used up"
