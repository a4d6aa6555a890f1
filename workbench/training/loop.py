"""The training loop: one path for one process or many, resumable bit by bit.

    train(recipe, folder) = dataset on the device -> for each step: learning rate, gradients, update -> evaluations,
                            checkpoints for analysis, states for resuming -> the run, once it has cleaned up

The loss is computed inside the module that `accelerate` wraps, so that with several processes its gradients are
synchronised; the rows of a batch are dealt out among the processes, none twice. Weights are float32.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from workbench.kernels.dispatch import kernels_for
from workbench.metrics import is_right
from workbench.models.kinds import Model, build, logits_at
from workbench.models.program import Gumbel, TransformerProgram
from workbench.runtime import WorkbenchError, derive_seed, generator, has_bfloat16, thread_count
from workbench.store import RunFolder, load_tensors, save_tensors, write_json, writing
from workbench.tasks.base import Batch, Streamed
from workbench.training.acceleration import LOSSES, amplify_slow, orthogonal_to
from workbench.training.answer_loss import AnswerLoss, Dataset, Reading, filled_reads
from workbench.training.capture import Captured, Inputs, hindrance, launch_on
from workbench.training.checkpoints import METRICS, STATUS, Run, add_reason, list_checkpoints, save_checkpoint
from workbench.training.curves import TrainLog
from workbench.training.dropout import Masks, draw_masks
from workbench.training.finetune import begin, pull_back
from workbench.training.optimisers import filters_itself, optimisers_of
from workbench.training.recipe import Recipe, TrainConfig
from workbench.training.streaming import NEXT_BATCH, ExampleStream

STATE_SECONDS = 5.0
STATES_KEPT = 2
EVALUATION_TOKENS = 2**14
"""Tokens of a pass that measures. On search, 26 positions, one core: a fifth less time than splits of 2,500 whole."""
PROBES = 3_000
log = logging.getLogger(__name__)

OnProgress = Callable[[int, int, Mapping[str, Any]], None]
"""Called with step, most steps, and the latest evaluation."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""


@dataclass(kw_only=True, slots=True)
class Position:
    """Where training stands: all of it, beside weights, moments and generators, that a state holds."""

    step: int = 0
    seconds: float = 0.0
    repeatable: bool = True
    """Whether the same threads and processes computed all of it, so that it can be repeated bit by bit."""
    rows: list[dict[str, Any]] = field(default_factory=list)


def train(recipe: Recipe, folder: RunFolder, *, resume: bool = False, on_progress: OnProgress | None = None) -> Run:
    """Train a recipe into a run folder, or go on with the run that is there.

    Args:
        recipe: what to train; when resuming, the run's own.
        folder: where the run lives; held locked for as long as this runs.
        resume: go on from the last good state instead of starting.
        on_progress: told of every evaluation.

    Raises:
        WorkbenchError: another process writes the run, or there is no state to resume from.
        Interrupted: the process was asked to stop; the state is saved.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(folder.lock())
        stop = stack.enter_context(stop_requests())
        trainer = Trainer(recipe, folder, accelerator)
        trainer.resume() if resume else trainer.start()
        trainer.run(stop, on_progress)
    return Run(folder=folder, recipe=recipe)


class Trainer:
    """The state of one training, and how it is saved and found again."""

    def __init__(self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator) -> None:
        """Build model, optimiser and data; nothing is written."""
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.config, self.position = recipe.trainable(), Position()
        config, device = self.config, accelerator.device
        self.kernels = kernels_for(device).name
        if config.precision == "bfloat16" and not has_bfloat16(device):
            raise WorkbenchError(
                f"Recipe {recipe.name!r} multiplies in bfloat16, which this {device.type} device does not have. "
                "Set train.precision=float32."
            )
        self.launch = launch_on(device, hindrance(config, accelerator.num_processes))
        self.model = build(recipe.model, generator=generator(config.init_seed, "init"))
        begin(self.model, recipe, folder)
        dtype, precision = (getattr(torch, name) for name in (config.loss_dtype, config.precision))
        loss = AnswerLoss(self.model, LOSSES[config.loss], dtype, precision)
        self.wrapped, *self.optimisers = accelerator.prepare(loss, *optimisers_of(self.model, config))
        self.slow_gradients: dict[str, Tensor] = {}
        self.started = [p.detach().clone() for p in self.model.parameters()] if config.l1_to_start else []
        # Where each step is a graph, the processor draws its batch meanwhile.
        drawn_on = torch.device("cpu") if self.launch == "graph" and config.batch_size is not None else device
        self.train_split = recipe.task.examples(recipe.task.splits[0]).to(drawn_on)
        self.splits = {
            name: [Dataset.of(recipe, part) for part in _chunks(self._measured(name).to(device))]
            for name in recipe.task.measured
        }
        self.own_rows = self._dealt(self.train_split) if config.batch_size is None else None
        self.own_reads = int(self.train_split.read.sum())
        self.batch_generator = generator(config.batch_seed, "batches")
        # On the device, so that a program's choices are drawn there.
        self.noise_generator = torch.Generator(device)
        self.captured = Captured(self._update_by, device, [self.noise_generator])
        task: object = recipe.task
        self.stream = ExampleStream(task, config, drawn_on) if isinstance(task, Streamed) else None

    def start(self) -> None:
        """Begin a new run."""
        if self.accelerator.is_main_process:
            write_json(self.folder.path / "recipe.json", self.recipe.to_json())
        self.evaluate(force_checkpoint=True)
        self.save_state()

    def resume(self) -> None:
        """Go on from the newest state that is whole, and cut away what the run wrote after it."""
        for path in sorted((self.folder.path / "state").glob("step_*.safetensors"), reverse=True):
            try:
                tensors, card = load_tensors(path)
            except WorkbenchError as error:
                log.warning("%s Falling back to the state before it.", error)
                continue
            self._restore(tensors, card)
            self.accelerator.wait_for_everyone()
            return
        raise WorkbenchError(
            f"Run {self.folder.reference!r} has no whole state to resume from. Train it anew under another --run."
        )

    def run(self, stop: threading.Event, on_progress: OnProgress | None) -> None:
        """Steps until the run has cleaned up, its steps are used up, or it is asked to stop."""
        config, position = self.config, self.position
        clock = saved = time.monotonic()
        reason = self.reason_to_end()
        while reason is None:
            if self._everyone_agrees(stop.is_set()):
                position.seconds += time.monotonic() - clock
                self.save_state()
                raise Interrupted(f"The state at step {position.step} is saved; go on with --resume.")
            self.step()
            now = time.monotonic()
            position.seconds, clock = position.seconds + now - clock, now
            if is_evaluation(position.step, config):
                evaluation = self.evaluate()
                # Nothing else that ends a run changes in between.
                reason = self.reason_to_end()
                if on_progress is not None and self.accelerator.is_main_process:
                    on_progress(position.step, config.steps, evaluation)
            if now - saved > STATE_SECONDS and self.accelerator.is_main_process:
                self.save_state()
                saved = time.monotonic()
        self.finish(reason)

    def step(self) -> None:
        """One update of the weights."""
        rate = self.config.rate(self.position.step)
        if self.launch == "graph":
            self.captured(self._inputs(rate))
        else:
            own, count = self.draw()
            # Gradients of several processes are averaged: each gives its share times their number.
            self._update(own, count / self.accelerator.num_processes, self._draw_noise(own.plan.tokens), rate)
        self.position.step += 1

    def _inputs(self, rate: float) -> dict[str, Tensor]:
        """All that is this step's own, in tensors of the shapes that every step's have."""
        scalars: dict[str, float | Tensor] = {"rate": rate}
        batch = None if self.own_rows is not None else self._draw_batch()
        noise = self._draw_noise(self.train_split.tokens)
        if isinstance(noise, Gumbel):
            scalars["temperature"] = noise.temperature
        numbers = {name: torch.as_tensor(value) for name, value in scalars.items()}
        return numbers if batch is None else numbers | filled_reads(self.recipe, batch)

    def _update_by(self, inputs: Inputs) -> None:
        """One update by what a step takes in tensors."""
        own = self.own_rows or Reading.filled(self.recipe.model, inputs)
        noise = {}
        if "temperature" in inputs:
            noise = Gumbel(temperature=inputs["temperature"], generator=self.noise_generator)
        self._update(own, inputs.get("total", float(self.own_reads)), noise, inputs["rate"])

    def _update(self, own: Reading, total: float | Tensor, noise: Masks | Gumbel, rate: float | Tensor) -> None:
        """One update by what the loss looks at, on the device."""
        config = self.config
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        loss = self.wrapped(own, total, noise)
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        self.accelerator.backward(loss)
        self._change_gradients()
        if config.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        if config.l1_to_start:
            pull_back(self.model.parameters(), self.started, rate * config.l1_to_start)

    def _change_gradients(self) -> None:
        """Grokfast, then what is orthogonal to the weights, so that what Grokfast adds is so too."""
        grokfast = None if filters_itself(self.config) else self.config.grokfast
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            if grokfast is not None:
                mean = self.slow_gradients.get(name)
                parameter.grad, mean = amplify_slow(parameter.grad, mean, *grokfast)
                # In place, for a graph repeats what it does to the tensor that was there.
                self.slow_gradients.setdefault(name, mean).copy_(mean)
            if self.config.orthogonal_gradient:
                parameter.grad = orthogonal_to(parameter.detach(), parameter.grad)

    def save_state(self) -> None:
        """Write what resuming needs, and drop all but the last two states."""
        if not self.accelerator.is_main_process:
            return
        folder, step = self.folder.path / "state", self.position.step
        tensors = {f"weights.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for place, optimiser in enumerate(self.optimisers):
            for index, moments in optimiser.state_dict()["state"].items():
                prefix = f"optimiser.{place}.{index}"
                # Copies: several parameters may count their steps in one tensor.
                tensors |= {f"{prefix}.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
        tensors |= {f"slow.{name}": mean for name, mean in self.slow_gradients.items()}
        tensors["generator.batches"] = self.batch_generator.get_state()
        metrics = self.folder.path / METRICS
        card = {
            "step": step,
            "seconds": self.position.seconds,
            "log_offset": metrics.stat().st_size,
            "threads": thread_count(),
            "processes": self.accelerator.num_processes,
            "repeatable": self.position.repeatable,
        }
        save_tensors(folder / f"step_{step:08d}.safetensors", tensors, card)
        for old in sorted(folder.glob("step_*.safetensors"))[:-STATES_KEPT]:
            # The card goes first: tensors without one do not count as a state.
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)

    def _restore(self, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
        same = (card["threads"], card["processes"]) == (thread_count(), self.accelerator.num_processes)
        if not same:
            log.warning(
                "The state was written with %s threads in %s processes, now there are %s in %s: "
                "the run goes on, but will not be bit-identical to an unbroken one.",
                card["threads"],
                card["processes"],
                thread_count(),
                self.accelerator.num_processes,
            )
        self.model.load_state_dict(_under(tensors, "weights."))
        for place, optimiser in enumerate(self.optimisers):
            state = optimiser.state_dict()
            state["state"] = {}
            for name, value in _under(tensors, f"optimiser.{place}.").items():
                index, _, moment = name.partition(".")
                state["state"].setdefault(int(index), {})[moment] = value
            optimiser.load_state_dict(state)
        device = self.accelerator.device
        self.slow_gradients = {name: mean.to(device) for name, mean in _under(tensors, "slow.").items()}
        self.batch_generator.set_state(tensors["generator.batches"])
        repeatable = same and card.get("repeatable", True)
        self.position = Position(step=card["step"], seconds=card["seconds"], repeatable=repeatable)
        if self.accelerator.is_main_process:
            self._cut_after(card["log_offset"])
        self.accelerator.wait_for_everyone()
        self.position.rows = self.folder.lines(METRICS)

    def _cut_after(self, log_offset: int) -> None:
        with (self.folder.path / METRICS).open("r+b") as handle:
            handle.truncate(log_offset)
        (self.folder.path / STATUS).unlink(missing_ok=True)
        for checkpoint in list_checkpoints(self.folder):
            if checkpoint.step > self.position.step:
                checkpoint.path.with_suffix(".json").unlink()
                checkpoint.path.unlink(missing_ok=True)

    def draw(self) -> tuple[Dataset, int]:
        """This process's rows of the next batch, and the answers of all of it."""
        if self.own_rows is not None:
            return self.own_rows, self.own_reads
        batch = self._draw_batch()
        return self._dealt(batch.to(self.accelerator.device)), int(batch.read.sum())

    def _draw_batch(self) -> Batch:
        """The next batch, of all processes."""
        assert self.config.batch_size is not None
        if self.stream is not None:
            return self.stream.batch(self.position.step, self.position.rows)
        rows = torch.randint(len(self.train_split), (self.config.batch_size,), generator=self.batch_generator)
        return self.train_split.select(rows.to(self.train_split.tokens.device))

    def _draw_noise(self, tokens: Int[Tensor, "batch pos"]) -> Masks | Gumbel:
        """This step's dropout for these prompts, or what a program's choices are drawn with.

        Every step has a stream of its own for every process, so that a state has none to hold.
        """
        config, step = self.config, self.position.step
        if isinstance(self.model, TransformerProgram):
            # Processes with as many rows each draw the same program.
            return Gumbel(
                temperature=config.temperature_at(step),
                generator=self.noise_generator.manual_seed(derive_seed(config.batch_seed, "gumbel", step)),
            )
        if not config.dropout:
            return {}
        rng = generator(config.batch_seed, "dropout", step, self.accelerator.process_index)
        return draw_masks(self.model, tokens, config.dropout, rng)

    def _dealt(self, batch: Batch) -> Dataset:
        """This process's rows of a batch."""
        own = batch.select(slice(self.accelerator.process_index, None, self.accelerator.num_processes))
        return Dataset.of(self.recipe, own)

    def _measured(self, split: str) -> Batch:
        """The examples of a split whose loss is logged.

        All of them where every step takes the whole training split, so that measuring costs about a step. Where a step
        takes a batch, a large split is thinned to `PROBES` examples, the same ones in every run.
        """
        examples = self.recipe.task.examples(split)
        if self.config.batch_size is None or len(examples) <= PROBES:
            return examples
        return examples.select(torch.randperm(len(examples), generator=generator(0, "probes", split))[:PROBES])

    def evaluate(self, *, force_checkpoint: bool = False) -> Mapping[str, Any]:
        """Measure the task's splits, log it, keep a checkpoint where the schedule says so."""
        row: dict[str, Any] = {"step": self.position.step}
        with torch.no_grad():
            for name, parts in self.splits.items():
                row |= _losses(self.model, name, parts)
            if self.stream is not None and self.config.curriculum is not None:
                coming = self._draw_batch().to(self.accelerator.device)
                row |= {"level": self.stream.level(self.position.rows)}
                row |= _losses(self.model, NEXT_BATCH, [Dataset.of(self.recipe, coming)])
            row["sum_squared_weights"] = sum(float(p.double().square().sum()) for p in self.model.parameters())
        row["seconds"] = round(self.position.seconds, 3)
        self.position.rows.append(row)
        if self.accelerator.is_main_process:
            # Before the log, so that whoever reads there which step was the best finds its weights.
            if force_checkpoint or self._keeps_checkpoint(row):
                self._checkpoint("schedule")
            _append_line(self.folder, row)
        return row

    def _keeps_checkpoint(self, row: Mapping[str, Any]) -> bool:
        """Log-spaced until the training split is learnt, then every evaluation: the transition lies there.

        And every evaluation that is the best so far, where the run keeps that.
        """
        if self.config.keep == "best" and self._log().step_best == row["step"]:
            return True
        step, threshold = row["step"], self.recipe.task.memorised_accuracy
        learnt = any(earlier["train_accuracy"] >= threshold for earlier in self.position.rows)
        return learnt or step & (step - 1) == 0

    def _checkpoint(self, reason: str) -> None:
        save_checkpoint(self.folder, self.position.step, self.model.state_dict(), [reason], dtype=torch.float32)

    def reason_to_end(self) -> str | None:
        """Why the run has come to its end; None if it has not. It does so where it is evaluated."""
        config, progress = self.config, self._log()
        if config.stop_when_clean and progress.cleaned_up:
            return "generalised and cleaned up"
        return "steps used up" if self.position.step >= config.steps else None

    def finish(self, reason: str) -> None:
        """Keep the last checkpoint and state, and write down how the run ended."""
        if not self.accelerator.is_main_process:
            return
        if self.position.rows[-1]["step"] != self.position.step:
            self.evaluate()
        self._checkpoint("final")
        best = {"best": self._log().step_best} if self.config.keep == "best" else {}
        for name, step in (self._log().landmarks() | best).items():
            add_reason(self.folder, step, name)
        self.save_state()
        position = self.position
        how = {"threads": thread_count(), "kernels": self.kernels, "launch": self.launch}
        ended = {"finished": True, "reason": reason, "seconds": round(position.seconds, 3)}
        write_json(self.folder.path / STATUS, {**ended, **how, "repeatable": position.repeatable})

    def _log(self) -> TrainLog:
        return TrainLog.of(self.recipe.task, self.position.rows)

    def _everyone_agrees(self, stop: bool) -> bool:
        """Whether any process was asked to stop, so that all leave at the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor([float(stop)], device=self.accelerator.device)
        return bool(cast(Tensor, self.accelerator.reduce(flag, "sum")) > 0)


def is_evaluation(step: int, config: TrainConfig) -> bool:
    """Whether a step is evaluated: at regular steps, and at powers of two, where the log-spaced checkpoints are."""
    return step % config.evaluate_every == 0 or step & (step - 1) == 0 or step == config.steps


def _losses(model: Model, split: str, parts: list[Dataset]) -> dict[str, float]:
    loss = correct = reads = 0.0
    for part in parts:
        logits = logits_at(model, part.plan).double()
        loss += float(functional.cross_entropy(logits, part.answers, reduction="sum"))
        correct += float(is_right(logits.argmax(1), part.batch).sum())
        reads += len(part.answers)
    return {f"{split}_loss": loss / reads, f"{split}_accuracy": correct / reads}


def _chunks(batch: Batch) -> Iterator[Batch]:
    # What a pass holds stays small; splits of small tasks are one chunk.
    rows = max(1, EVALUATION_TOKENS // batch.tokens.shape[1])
    for first in range(0, len(batch), rows):
        yield batch.select(slice(first, first + rows))


def _append_line(folder: RunFolder, row: Mapping[str, Any]) -> None:
    path = folder.path / METRICS
    with writing(path), path.open("a") as handle:
        handle.write(json.dumps(row) + "\n")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination sets, so that a step is never cut in half; a second Ctrl-C cuts."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; elsewhere training runs to its end.
        yield requested
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        requested.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
