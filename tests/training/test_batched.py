"""Many runs as one model: each is what it would be alone, in its numbers and in its folder."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from workbench.models.config import BIASES, ModelConfig
from workbench.models.fast import ReadPlan, read_logits
from workbench.models.stacked import StackedTransformer
from workbench.models.transformer import Transformer
from workbench.store import RunFolder
from workbench.training import batched
from workbench.training.batched import Stack, batch_key, train_together
from workbench.training.checkpoints import Run
from workbench.training.engines import train_members
from workbench.training.loop import Interrupted, Trainer, train
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe
from workbench.training.sweeps import Member, members_to_train, plan_sweep

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "evaluate_every=10", "stop_when_clean=false", "steps=50"]
SMALL = ModelConfig(n_layers=2, d_model=6, n_heads=2, d_head=3, d_mlp=5, n_ctx=4, d_vocab=5, d_vocab_out=4)


def plan(*settings: str, seeds: Sequence[int] = (0, 1), **alternatives: Sequence[str]) -> tuple[Member, ...]:
    recipe = find_recipe("modular-smoke").override([*TINY, *settings])
    varied = alternatives or {"weight_decay": ("0.1", "1"), "learning_rate": ("1e-2", "3e-3")}
    return plan_sweep(recipe, seeds=seeds, alternatives=varied, name="t")


def in_turn(members: Sequence[Member], runs: Path) -> list[Run]:
    for member in members:
        member.run(runs).folder.path.mkdir(parents=True)
    return [train(each.recipe, each.run(runs).folder) for each in members]


def close(one: Run, other: Run) -> None:
    assert [row["step"] for row in one.log.rows] == [row["step"] for row in other.log.rows]
    for ours, theirs in zip(one.log.rows, other.log.rows, strict=True):
        assert set(ours) == set(theirs)
        for name in set(ours) - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (name, ours["step"])
    assert [each.step for each in one.checkpoints] == [each.step for each in other.checkpoints]
    assert [each.reasons for each in one.checkpoints] == [each.reasons for each in other.checkpoints]
    for ours, theirs in zip(one.checkpoints, other.checkpoints, strict=True):
        for name, tensor in theirs.tensors().items():
            torch.testing.assert_close(ours.tensors()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_member_is_the_run_alone_over_50_steps(tmp_path: Path) -> None:
    members = plan()
    alone = in_turn(members, tmp_path / "alone")
    told: list[tuple[float, str]] = []
    failed = train_members(
        members, runs=tmp_path / "together", engine="batched", on_progress=lambda *each: told.append(each)
    )
    assert failed == {}
    for member, run in zip(members, alone, strict=True):
        ours = member.run(tmp_path / "together")
        close(ours, run)
        assert ours.status["reason"] == run.status["reason"] == "steps used up"
        assert not ours.status["repeatable"]
        assert ours.folder.recipe_json() == run.folder.recipe_json()
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert told[0][1].count("t-") == 8


def test_worlds_of_unequal_size_are_filled_up_and_count_for_nothing(tmp_path: Path) -> None:
    """The training splits of two seeds hold as many pairs, but not as many distinct rows."""
    members = plan("train_fraction=0.1", "p=11", seeds=range(4), weight_decay=["1"])
    trainers = [Trainer(each.recipe, each.run(tmp_path).folder, Accelerator(cpu=True)) for each in members]
    rows = {len(trainer.draw()[0].plan.at_first.example) for trainer in trainers}
    assert len(rows) > 1
    again = [Trainer(each.recipe, each.run(tmp_path).folder, Accelerator(cpu=True)) for each in members]
    stack = Stack(trainers)
    for _ in range(5):
        stack.step()
        for trainer in again:
            trainer.step()
    for ours, theirs in zip(trainers, again, strict=True):
        for (name, one), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "gpt2": {"normalization": "LN", "activation": "gelu_new", "biases": BIASES},
    "tied": {"tied": True, "d_vocab_out": 5},
    "shared": {"schedule": (0, 1, 0)},
    "padded": {"pad_token": 0, "normalization": "LN"},
    "both ways": {"causal": False, "pad_token": 0},
    "attention": {"d_mlp": 0},
    "one hot": {"embedding": "one_hot", "d_model": 9},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_every_gradient_are_the_members_own(name: str) -> None:
    config = replace(SMALL, **CONFIGS[name])
    draw = torch.Generator().manual_seed(0)
    models = [Transformer(config, generator=draw).double() for _ in range(3)]
    tokens = [torch.randint(0, 5, (batch, 4), generator=draw) for batch in (6, 9, 2)]
    reads = [torch.rand(each.shape, generator=draw) < 0.5 for each in tokens]
    # One query for all, which is looked up in a table; and the first position, which sees nothing else.
    tokens[0][:, -1], reads[0][:, -1] = 1, True
    plans = [ReadPlan.of(config, *each) for each in zip(tokens, reads, strict=True)]
    states = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in models]
    stacked = {name: torch.stack([state[name].detach() for state in states]).requires_grad_() for name in states[0]}
    logits = read_logits(StackedTransformer(config, stacked), ReadPlan.joined(plans)).unflatten(0, (3, -1))
    aims = [torch.randn(logits[0].shape, generator=draw).double() for _ in models]
    alone = [read_logits(*each) for each in zip(models, plans, strict=True)]
    for ours, theirs in zip(logits, alone, strict=True):
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-12, atol=1e-12)
    sum(
        (ours[: len(theirs)] * aim[: len(theirs)]).sum() for ours, theirs, aim in zip(logits, alone, aims, strict=True)
    ).backward()
    for at, (model, theirs, aim) in enumerate(zip(models, alone, aims, strict=True)):
        (theirs * aim[: len(theirs)]).sum().backward()
        for name, parameter in model.named_parameters():
            assert stacked[name].grad is not None
            torch.testing.assert_close(stacked[name].grad[at], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


def stop_after(members: Sequence[Member], runs: Path, step: int) -> Callable[..., None]:
    def on_progress(share: float, now: str) -> None:
        if members[-1].run(runs).log.rows[-1]["step"] >= step:
            raise KeyboardInterrupt

    return on_progress


def test_a_sweep_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    members = plan(weight_decay=["0.1", "1"])
    with pytest.raises(Interrupted, match="What was trained is saved; the same command goes on from there"):
        train_members(members, runs=tmp_path, engine="batched", on_progress=stop_after(members, tmp_path, 20))
    assert members_to_train(members, tmp_path) == members
    broken = [each.run(tmp_path).folder.lines("metrics.jsonl") for each in members]
    assert train_members(members, runs=tmp_path, engine="batched") == {}
    whole = tmp_path / "whole"
    for member, run, before in zip(members, in_turn(members, whole), broken, strict=True):
        ours = member.run(tmp_path)
        assert ours.folder.lines("metrics.jsonl")[: len(before)] == before
        close(ours, run)


def test_who_ends_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    """The first run had a lead when the others joined it."""
    members = plan(weight_decay=["0.1", "1"])
    with pytest.raises(Interrupted):
        train_together(members[:1], runs=tmp_path, on_progress=stop_after(members[:1], tmp_path, 20))
    assert train_members(members, runs=tmp_path, engine="batched") == {}
    whole = tmp_path / "whole"
    for member, run in zip(members, in_turn(members, whole), strict=True):
        close(member.run(tmp_path), run)


def test_any_other_engine_goes_on_with_a_member(tmp_path: Path) -> None:
    members = plan(seeds=[0], weight_decay=["0.1", "1"])
    with pytest.raises(Interrupted):
        train_members(members, runs=tmp_path, engine="batched", on_progress=stop_after(members, tmp_path, 20))
    run = train(members[0].recipe, members[0].run(tmp_path).folder, resume=True)
    [alone] = in_turn(members[:1], tmp_path / "whole")
    close(run, alone)


def test_stacks_are_no_larger_than_memory_admits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, sizes = plan(weight_decay=["0.1", "1"]), list[int]()
    monkeypatch.setattr(batched, "MOST_READS", 200)
    real = Stack.__init__

    def counted(self: Stack, trainers: Sequence[Trainer]) -> None:
        sizes.append(len(trainers))
        real(self, trainers)

    monkeypatch.setattr(Stack, "__init__", counted)
    assert train_members(members, runs=tmp_path, engine="batched") == {}
    # 84 answers each.
    assert sizes == [2, 2]


def test_a_member_that_cannot_begin_takes_no_other_with_it(tmp_path: Path) -> None:
    members = plan(weight_decay=["0.1", "1"])
    state = members[0].run(tmp_path).folder.path / "state"
    state.mkdir(parents=True)
    (state / "step_00000000.json").write_text("{}")
    found = train_members(members, runs=tmp_path, engine="batched")
    assert list(found) == [members[0].name]
    assert "has no whole state to resume from" in found[members[0].name]
    assert all(each.run(tmp_path).status["finished"] for each in members[1:])


def recipe(*settings: str) -> Recipe:
    return find_recipe("modular-smoke").override([*TINY, *settings])


@pytest.mark.parametrize(
    ("settings", "joins"),
    [
        (("learning_rate=1e-3",), True),
        (("weight_decay=0.3",), True),
        (("init_seed=7",), True),
        (("d_model=32", "d_head=8"), False),
        (("steps=60",), False),
        (("loss=stablemax",), False),
    ],
)
def test_who_is_trained_with_whom(settings: tuple[str, ...], joins: bool) -> None:
    assert (batch_key(recipe(*settings)) == batch_key(recipe())) is joins


@pytest.mark.parametrize(
    "setting",
    ["optimiser=muon", "decay=matrices", "batch_size=32", "dropout=0.1", "clip_norm=1", "grokfast=[0.9,2.0]",
     "orthogonal_gradient=true", "l1_to_start=0.1", "trained=blocks"],
)  # fmt: skip
def test_what_is_trained_with_nobody(setting: str) -> None:
    assert batch_key(recipe(setting)) is None


@pytest.mark.slow
def test_what_has_no_company_is_trained_in_turn_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = plan("steps=10", seeds=[0], optimiser=["adamw", "muon"])
    with caplog.at_level(logging.WARNING):
        assert train_members(members, runs=tmp_path, engine="batched") == {}
    assert "2 of 2 runs are trained in turn" in caplog.text
    assert all(each.run(tmp_path).status["finished"] for each in members)
    assert not list(RunFolder(path=tmp_path, reference="x").path.glob("*/.tmp*"))
