"""Training a model to hold a planted circuit: strict interchange-intervention training.

Interchange-intervention training (Geiger et al. 2022) asks of chosen nodes that they carry chosen variables of a
high-level program: where a node's output is taken from a run on another prompt, the model must answer what the program
answers when the node's variable is set to its value on that prompt. Its strict form (Gupta et al. 2024) asks too that
interchanging any other node changes nothing. Here it is stricter by one turn: what is cut are edges. A plan says which
edges between nodes there shall be, down to a head's query, key and value, and while the model trains, random sets of
all others are cut, under every ablation for which the circuit is meant. Cutting all edges that leave a node is
interchanging the node, so one mechanism serves both: it adds, to what a reader takes from the residual stream, the
writer's other contribution minus its own, through edits at the model's sites.

    model = train_planted(PLANS["xor"], seed=0)         # half a minute of CPU time
    report = measure(model, PLANS["xor"], seed=0)       # how well it holds the circuit
    save_planted("xor", seed=0)                         # trains, measures, writes the fixture that ships
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.models.config import ModelConfig
from workbench.models.high_level import FIXTURES, TWO_HOP, XOR, HighLevel
from workbench.models.known import ABLATIONS
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, code_version, generator, nearest
from workbench.store import Provenance, save_tensors
from workbench.tables import Table
from workbench.training.wires import Wires, contributions, cut_logits, filling

EXAMPLES = 2048
"""Prompts that a measurement looks at."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a model shall hold, and how it is trained to."""

    program: HighLevel
    alignment: Mapping[str, str]
    """Node (`a0.h1`, `m1`) -> variable that it carries."""
    edges: frozenset[str]
    """The circuit: all other edges are cut at random during training, so that nothing comes to depend on them."""
    constants: frozenset[str] = frozenset()
    """Further edges that are never cut: they carry the same on every prompt, so no interchange can tell whether the
    model needs them. A head that looks by position may learn a second way to, beside the one that is named here."""
    model: ModelConfig
    """Without LayerNorm, which would mix what each writer contributes."""
    steps: int
    batch: int = 128
    learning_rate: float = 3e-3
    ablations: tuple[str, ...] = ABLATIONS
    """With what a cut edge is filled; `mean` is over the batch at each position."""

    def __post_init__(self) -> None:
        if self.model.normalization is not None:
            raise WorkbenchError("A planted circuit needs a model without LayerNorm: set normalization to None.")
        self.wires.select(self.edges | self.constants)
        for node, variable in self.alignment.items():
            if node not in self.wires.writers[2:]:
                raise WorkbenchError(f"This model has no node {node!r}. {nearest(node, self.wires.writers[2:])}")
            if variable not in self.program.variables:
                raise WorkbenchError(
                    f"Program {self.program.name!r} has no variable {variable!r}. "
                    f"{nearest(variable, self.program.variables)}"
                )

    @cached_property
    def wires(self) -> Wires:
        """Writers and readers of the model."""
        return Wires.of(self.model)

    @property
    def outside(self) -> Bool[Tensor, "reader writer"]:
        """Edges that are not in the circuit."""
        return self.wires.edges & ~self.wires.select(self.edges | self.constants)

    @property
    def others(self) -> tuple[str, ...]:
        """Heads and MLPs that carry no variable."""
        return tuple(node for node in self.wires.writers[2:] if node not in self.alignment)

    def to_json(self) -> dict[str, object]:
        """The fields; the program by its name."""
        return {
            "program": self.program.name,
            "alignment": dict(self.alignment),
            "edges": sorted(self.edges),
            "constants": sorted(self.constants),
            "model": self.model.to_json(),
            "steps": self.steps,
            "batch": self.batch,
            "learning_rate": self.learning_rate,
            "ablations": list(self.ablations),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The parts of one training step's loss."""

    step: int
    behaviour: float
    interchange: float
    """Of the program's answer after an aligned node was interchanged."""
    strict: float
    """Of the unchanged answer after edges outside the circuit were cut."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlantingReport:
    """How well a model holds the circuit that it was trained to hold; accuracies over the same prompts."""

    program: str
    accuracy: float
    interchange: Mapping[str, float]
    """Aligned node -> how often the model answers as the program does when the node's variable is interchanged."""
    strictness: Mapping[str, float]
    """Any other node -> how often the answer is still right when the node is interchanged."""
    isolation: Mapping[str, float]
    """Ablation -> how often the answer is right when all edges outside the circuit are cut."""
    need: Mapping[str, float]
    """Edge of the circuit -> how often the answer is wrong when it alone is cut, under the worst ablation."""
    n: int
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """The measurements."""
        return {
            "program": self.program,
            "n": self.n,
            "accuracy": self.accuracy,
            "interchange": dict(self.interchange),
            "strictness": dict(self.strictness),
            "isolation": dict(self.isolation),
            "need": dict(self.need),
        }

    def tables(self) -> Sequence[Table]:
        """One row a measurement."""
        groups = {name: getattr(self, name) for name in ("interchange", "strictness", "isolation", "need")}
        rows = [
            {"measure": group, "of": of, "value": value}
            for group, values in groups.items()
            for of, value in values.items()
        ]
        return [
            Table(
                name="planting",
                frame=pd.DataFrame(rows),
                kind="table",
                axes={},
                unit="fraction",
                caption=f"How well the model holds the circuit of {self.program!r}, over {self.n} prompts.",
            )
        ]


def train_planted(plan: Plan, *, seed: int = 0, on_step: Callable[[Losses], None] | None = None) -> Transformer:
    """A model that holds the plan's circuit.

    Every step draws prompts and other prompts to take activations from. The loss adds up three: the model answers the
    prompts; it answers what the program answers when one aligned node, drawn at random, is interchanged; and it answers
    as before when edges outside the circuit are cut, a random share of them and half of the time all.
    """
    draw = generator(seed, "planted", plan.program.name, "train")
    model = Transformer(plan.model, generator=generator(seed, "planted", plan.program.name, "init"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_warm_then_down, plan.steps))
    for step in range(plan.steps):
        losses = _step_losses(model, plan, draw)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(Losses(step=step, **{name: float(loss.detach()) for name, loss in losses.items()}))
    return model


def measure(model: Transformer, plan: Plan, *, n: int = EXAMPLES, seed: int = 0) -> PlantingReport:
    """How well a model holds a plan's circuit, over `n` prompts each paired with another one.

    Every number is an accuracy against the program, none a loss: a model that answers right by another way than the
    circuit's fails in `interchange` or `isolation`, however sure it is of its answers.
    """
    draw = generator(seed, "planted", plan.program.name, "measure")
    (tokens, answers), (others, _) = (plan.program.prompts(n, draw) for _ in range(2))
    wires = plan.wires
    with torch.no_grad():
        clean, logits = contributions(model, tokens)
        source, _ = contributions(model, others)
        fillings = {ablation: filling(ablation, clean, source) for ablation in plan.ablations}

        def right(cut: Tensor, values: Tensor, wanted: Tensor) -> float:
            return _accuracy(cut_logits(model, tokens, cut, values), wanted)

        swapped = {node: _interchanged(plan, node, tokens, others) for node in plan.alignment}
        alone = {edge: wires.select([edge]) for edge in sorted(plan.edges)}
        return PlantingReport(
            program=plan.program.name,
            accuracy=_accuracy(logits, answers),
            interchange={node: right(wires.leaving(node), source, wanted) for node, wanted in swapped.items()},
            strictness={node: right(wires.leaving(node), source, answers) for node in plan.others},
            isolation={name: right(plan.outside, values, answers) for name, values in fillings.items()},
            need={
                edge: 1 - min(right(cut, values, answers) for values in fillings.values())
                for edge, cut in alone.items()
            },
            n=n,
            provenance=Provenance(code_version=code_version(), recipe=f"planted:{plan.program.name}", seed=seed),
        )


def save_planted(name: str, *, seed: int = 0, folder: Path = FIXTURES) -> PlantingReport:
    """Train the plan of this name and write its weights, with a card that says how well it holds the circuit.

    Raises:
        WorkbenchError: there is no such plan.
    """
    if name not in PLANS:
        raise WorkbenchError(f"Unknown plan {name!r}. {nearest(name, PLANS)}")
    plan = PLANS[name]
    model = train_planted(plan, seed=seed)
    report = measure(model, plan, seed=seed)
    card = {"seed": seed, "plan": plan.to_json(), "measured": report.summary(), "code_version": code_version()}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / f"{name}.safetensors", model.state_dict(), card)
    return report


def _step_losses(model: Transformer, plan: Plan, draw: torch.Generator) -> dict[str, Float[Tensor, ""]]:
    (tokens, answers), (others, _) = (plan.program.prompts(plan.batch, draw) for _ in range(2))
    node, ablation = _choose(list(plan.alignment), draw), _choose(plan.ablations, draw)
    share = 2 * torch.rand((), generator=draw)
    cut = plan.outside & (torch.rand(plan.outside.shape, generator=draw) < share)
    clean, logits = contributions(model, tokens)
    source, _ = contributions(model, others)
    interchanged = cut_logits(model, tokens, plan.wires.leaving(node), source)
    isolated = cut_logits(model, tokens, cut, filling(ablation, clean, source))
    return {
        "behaviour": _loss(logits, answers),
        "interchange": _loss(interchanged, _interchanged(plan, node, tokens, others)),
        "strict": _loss(isolated, answers),
    }


def _choose(items: Sequence[str], draw: torch.Generator) -> str:
    return items[int(torch.randint(len(items), (), generator=draw))]


def _interchanged(plan: Plan, node: str, tokens: Tensor, others: Tensor) -> Int[Tensor, " batch"]:
    """The program's answers when a node's variable has its value on the other prompts."""
    variable = plan.alignment[node]
    return plan.program.answer(tokens, {variable: plan.program.run(others)[variable]})


def _loss(logits: Float[Tensor, "batch pos vocab"], answers: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    return functional.cross_entropy(logits[:, -1], answers)


def _accuracy(logits: Float[Tensor, "batch pos vocab"], answers: Int[Tensor, " batch"]) -> float:
    return float((logits[:, -1].argmax(1) == answers).float().mean())


def _warm_then_down(steps: int, step: int) -> float:
    """Learning rate as a share of its peak: up during a twentieth of the steps, then linearly down."""
    return min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))


def _places(*heads: str) -> frozenset[str]:
    """Where these heads look, by position."""
    return frozenset(f"pos->{head}<{part}>" for head in heads for part in "qk")


def _shape(*, ctx: int, vocab: int, out: int) -> ModelConfig:
    return ModelConfig(n_layers=2, d_model=32, n_heads=4, d_head=8, d_mlp=32, n_ctx=ctx, d_vocab=vocab, d_vocab_out=out)


PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "xor": Plan(
            program=XOR,
            alignment={"a0.h1": "x", "a0.h2": "y", "m1": "differ"},
            edges=frozenset({"embed->a0.h1<v>", "embed->a0.h2<v>", "a0.h1->m1", "a0.h2->m1", "m1->logits"}),
            constants=_places("a0.h1", "a0.h2"),
            model=_shape(ctx=5, vocab=3, out=2),
            steps=500,
        ),
        "two_hop": Plan(
            program=TWO_HOP,
            alignment={"m0": "bridge", "a1.h2": "bridge", "m1": "answer"},
            edges=frozenset({"embed->m0", "m0->a1.h2<v>", "a1.h2->m1", "embed->m1", "m1->logits"}),
            constants=_places("a1.h2"),
            model=_shape(ctx=3, vocab=10, out=4),
            steps=500,
        ),
    }
)
"""The models that ship: `workbench.models.high_level.trained` loads them."""
