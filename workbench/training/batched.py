"""Runs of one architecture trained as one model: their weights stacked, one forward and one backward pass for all.

    Stack(trainers) -> weights and moments in rows of large tensors -> step() -> the trainers evaluate, save, end

Every member keeps its `Trainer`: its recipe, log, checkpoints and states are what they would be alone, and only the
step is taken together. What it sees as its weights and moments are parts of those rows. A member's gradients do not
depend on who is with it, but for rounding: products of a batch add up in another order.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from workbench.models.config import ModelConfig
from workbench.models.fast import ReadPlan, filled_up, read_logits
from workbench.models.stacked import StackedTransformer
from workbench.runtime import WorkbenchError
from workbench.training.acceleration import LOSSES
from workbench.training.answer_loss import Dataset
from workbench.training.loop import Interrupted, Trainer, is_evaluation, stop_requests
from workbench.training.recipe import Recipe
from workbench.training.sweeps import Member
from workbench.training.workers import prepare

OWN = ("task.seed", *(f"train.{name}" for name in ("init_seed", "batch_seed", "learning_rate", "weight_decay")))
"""Settings in which the members of a stack may differ."""
PLAIN = {
    "optimiser": "adamw", "decay": "all", "trained": "all", "batch_size": None, "dropout": 0.0, "clip_norm": None,
    "grokfast": None, "orthogonal_gradient": False, "l1_to_start": 0.0, "precision": "float32",
}  # fmt: skip
"""What a step must be to be taken together: AdamW of all weights, on the whole training split."""
MOST_READS = 20_000
"""Answers in a stack, which bounds its memory; alone a member may have more."""
STATE_SECONDS = 30.0
"""Between two states of a stack, whose members each write one."""

OnSweep = Callable[[float, str], None]
"""Called with the share of all steps that is done, and what is trained now."""


def batch_key(recipe: Recipe) -> str | None:
    """What recipes that can be trained as one have in common; None for one that cannot be trained with any other."""
    train = recipe.trainable()
    plain = all(getattr(train, name) == value for name, value in PLAIN.items())
    if not (plain and isinstance(recipe.model, ModelConfig)):
        return None
    return json.dumps({name: value for name, value in recipe.settings().items() if name not in OWN}, sort_keys=True)


def train_together(
    members: Sequence[Member], *, runs: Path | None = None, on_progress: OnSweep | None = None
) -> dict[str, str]:
    """Train members with one `batch_key`, as many in a stack as its memory admits.

    Returns:
        Name of each run that could not be begun -> why.

    Raises:
        Interrupted: it was asked to stop; every state is saved.
    """
    failed: dict[str, str] = {}
    left = list(members)
    most = sum(member.recipe.trainable().steps for member in members)

    def tell(going: Sequence[Trainer]) -> None:
        to_do = sum(member.recipe.trainable().steps for member in left)
        to_do += sum(trainer.config.steps - trainer.position.step for trainer in going)
        if on_progress is not None:
            on_progress(1 - to_do / most, ", ".join(trainer.folder.reference for trainer in going))

    with stop_requests() as stop:
        while left:
            with contextlib.ExitStack() as locks:
                trainers: list[Trainer] = []
                while left and _fits(trainers):
                    member = left.pop(0)
                    try:
                        trainers.append(_begun(member, runs, locks))
                    except Exception as error:
                        # Of one member alone: its world, or what is in its folder.
                        kind = "" if isinstance(error, WorkbenchError) else f"{type(error).__name__}: "
                        failed[member.name] = " ".join(f"{kind}{error}".split())
                _train_stack(trainers, stop.is_set, tell)
    return failed


def _fits(trainers: Sequence[Trainer]) -> bool:
    """Whether one more of their size may join them."""
    return not trainers or (len(trainers) + 1) * int(trainers[0].train_split.read.sum()) <= MOST_READS


def _begun(member: Member, runs: Path | None, locks: contextlib.ExitStack) -> Trainer:
    folder = member.run(runs).folder
    resume = prepare(folder)
    locks.enter_context(folder.lock())
    trainer = Trainer(member.recipe, folder, Accelerator(cpu=not torch.cuda.is_available()))
    trainer.resume() if resume else trainer.start()
    # Rounding depends on who is trained with it.
    trainer.position.repeatable = False
    trainer.launch = "pieces"
    return trainer


def _train_stack(going: list[Trainer], stopped: Callable[[], bool], tell: Callable[[Sequence[Trainer]], None]) -> None:
    """Steps of all until each has ended; who has ended leaves."""
    with _saved(going):
        while going:
            for trainer in tuple(going):
                if (reason := trainer.reason_to_end()) is not None:
                    going.remove(trainer)
                    trainer.finish(reason)
            tell(going)
            if going:
                _advance(Stack(going), stopped, tell)


def _advance(stack: Stack, stopped: Callable[[], bool], tell: Callable[[Sequence[Trainer]], None]) -> None:
    """Steps, evaluations and states, until a member has ended."""
    trainers = stack.trainers
    clock = saved = time.monotonic()
    while True:
        if stopped():
            raise Interrupted
        stack.step()
        now = time.monotonic()
        for trainer in trainers:
            trainer.position.seconds += (now - clock) / len(trainers)
        looked = [each for each in trainers if is_evaluation(each.position.step, each.config)]
        for trainer in looked:
            trainer.evaluate()
        clock = now
        if now - saved > STATE_SECONDS:
            saved = now
            for trainer in trainers:
                trainer.save_state()
        # What ends a run is seen where it is evaluated, its last step among them.
        if any(trainer.reason_to_end() is not None for trainer in looked):
            return
        if looked:
            tell(trainers)


@contextlib.contextmanager
def _saved(going: Sequence[Trainer]) -> Iterator[None]:
    """Save the states of those that are still going when they are interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        for trainer in going:
            trainer.save_state()
        raise Interrupted("What was trained is saved; the same command goes on from there.") from error


class Stack:
    """Trainers whose steps are taken together; they differ in seeds, learning rates, weight decays and steps alone."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        """Move the trainers' weights and moments into tensors that all share."""
        self.trainers = tuple(trainers)
        first = trainers[0]
        self.shape = {name: parameter.shape for name, parameter in first.model.named_parameters()}
        self.sizes = [shape.numel() for shape in self.shape.values()]
        self.fixed = {
            name: torch.stack([dict(each.model.named_buffers())[name] for each in trainers])
            for name, _ in first.model.named_buffers()
        }
        self.weights = torch.stack([_flat(list(each.model.parameters())) for each in trainers]).requires_grad_()
        self.rows = [nn.Parameter(row) for row in self.weights.detach()]
        self.optimiser = AdamW(self._groups(), lr=0.0, betas=first.config.betas, fused=True)
        for row, trainer in self._pairs():
            self._adopt(row, trainer)
        own = [trainer.draw() for trainer in trainers]
        self.plan = ReadPlan.joined([_plan(data) for data, _ in own])
        reads = len(self.plan.example) // len(trainers)
        self.answers = filled_up([data.answers for data, _ in own], reads)
        self.shares = torch.cat(
            [nn.functional.pad(data.weights / total, (0, reads - len(data.weights))) for data, total in own]
        )
        self.loss = LOSSES[first.config.loss]
        self.loss_dtype = getattr(torch, first.config.loss_dtype)

    def step(self) -> None:
        """One update of every member's weights."""
        parts = self.weights.split(self.sizes, dim=1)
        weights = {
            name: part.unflatten(1, shape) for (name, shape), part in zip(self.shape.items(), parts, strict=True)
        }
        config = self.trainers[0].recipe.transformer
        logits = read_logits(StackedTransformer(config, {**self.fixed, **weights}), self.plan)
        self.weights.grad = None
        # A sum over members whose gradients are apart.
        (self.shares * self.loss(logits.to(self.loss_dtype), self.answers)).sum().backward()
        assert self.weights.grad is not None
        for row, gradient in zip(self.rows, self.weights.grad, strict=True):
            row.grad = gradient
        for group in self.optimiser.param_groups:
            one = group["like"]
            group["lr"] = one.config.rate(one.position.step)
        for trainer in self.trainers:
            trainer.position.step += 1
        self.optimiser.step()

    def gradients(self) -> Iterator[dict[str, Tensor]]:
        """Each member's, of the last step, by the names of its parameters."""
        for row in self.rows:
            assert row.grad is not None
            parts = zip(self.shape.items(), row.grad.split(self.sizes), strict=True)
            yield {name: part.view(shape) for (name, shape), part in parts}

    def _pairs(self) -> zip[tuple[nn.Parameter, Trainer]]:
        return zip(self.rows, self.trainers, strict=True)

    def _groups(self) -> list[dict[str, Any]]:
        """The rows whose updates have one learning rate and weight decay, with a trainer that is like all of theirs."""
        groups: dict[tuple[float, float, int], dict[str, Any]] = {}
        for row, each in self._pairs():
            decay = each.config.weight_decay
            key = (each.config.learning_rate, decay, each.position.step)
            groups.setdefault(key, {"params": [], "weight_decay": decay, "like": each})["params"].append(row)
        return list(groups.values())

    def _adopt(self, row: nn.Parameter, trainer: Trainer) -> None:
        """Make a trainer's weights and moments parts of the row, and of the moments that the row has."""
        [theirs] = trainer.optimisers
        parameters = list(trainer.model.parameters())
        moments = {}
        for name in ("exp_avg", "exp_avg_sq"):
            begun = [
                theirs.state[each][name] if each in theirs.state else torch.zeros_like(each) for each in parameters
            ]
            moments[name] = _flat(begun)
        step = torch.tensor(float(trainer.position.step), device=row.device)
        self.optimiser.state[row] = {"step": step, **moments}
        split = {name: moment.split(self.sizes) for name, moment in moments.items()}
        for at, (parameter, part) in enumerate(zip(parameters, row.detach().split(self.sizes), strict=True)):
            parameter.data = part.view_as(parameter)
            own = {name: parts[at].view_as(parameter) for name, parts in split.items()}
            theirs.state[parameter] = {"step": step, **own}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _plan(data: Dataset) -> ReadPlan:
    assert isinstance(data.plan, ReadPlan)
    return data.plan
