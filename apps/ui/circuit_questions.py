"""What the page Circuit asks; answers are kept by the hash of the weights, the question and the size.

A circuit is found by `workbench circuit`, as a job, and read from where that keeps it. What is asked of the circuit
then (an edge, a node, the edges one by one) is measured here, on the pairs that the circuit was judged on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apps.analyses import key_of
from apps.circuits_of_runs import Granularity, graph_of
from apps.ui import jobs, state
from apps.ui.jobs import Job
from circuits.circuit import Circuit
from circuits.discovery import top_n
from circuits.exchange import load_circuit
from circuits.experiment import Experiment, experiment
from circuits.graph import Node
from circuits.memoised import circuit_values
from circuits.minimality import Minimality, minimality
from circuits.paths import path_patch
from probes.attention import AttentionPatterns, attention_patterns
from probes.attribution import direct_logit_attribution
from workbench.intervals import paired_bootstrap, ratio_bootstrap
from workbench.models.known import Ablation
from workbench.store import kept_result, read_json
from workbench.tables import Table
from workbench.tasks.base import Batch, Task

KEPT = 64
"""Results of each kind that are kept in memory."""
FEW = 8
"""Circuits and experiments that are, which are larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Which circuit of which checkpoint: what a result is kept under, and a key of caches."""

    reference: str
    step: int
    sha256: str
    method: str
    edges: int | None
    """How many to keep; None is the fewest that do the task."""
    ablation: Ablation
    metric: str
    granularity: Granularity
    absolute: bool
    n: int
    split: str
    seed: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """As `circuit_of` takes them and `workbench circuit` keeps them."""
        names = ("method", "edges", "ablation", "metric", "granularity", "absolute", "n", "split", "seed")
        return {**{name: getattr(self, name) for name in names}, "threshold": None, "select": "top"}

    @property
    def command(self) -> tuple[str, ...]:
        """What follows `workbench` on the command line."""
        told = {name: value for name, value in self.arguments.items() if value is not None and name != "absolute"}
        options = [part for name, value in told.items() for part in (f"--{name}", str(value))]
        signed = [] if self.absolute else ["--signed"]
        return ("circuit", self.reference, "--checkpoint", str(self.step), *options, *signed, "--json")

    @property
    def task(self) -> Task:
        """The run's task."""
        return state.open_run(self.reference).task

    @property
    def judged(self) -> Batch:
        """The pairs that the circuit is judged on: another draw than those that it is found on."""
        return self.task.sample(self.n, split=self.split, seed=self.seed + 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """A circuit, what it withstood, and faithfulness over sizes where it comes from a ranking."""

    circuit: Circuit
    summary: dict[str, Any]
    curve: pd.DataFrame | None

    @property
    def sizes(self) -> list[int]:
        """Sizes to choose among; none where nothing was ranked."""
        if self.circuit.absolute is None or self.circuit.requested is None:
            return []
        measured = [row["requested"] for row in self.summary.get("curve", [])]
        live = self.summary["live_edges"]
        return sorted({self.circuit.requested, *(size for size in measured if 1 <= size <= live)})

    @property
    def minimality(self) -> Minimality:
        """What each edge of the circuit as it was found is worth to it."""
        rows = self.summary["minimality"]
        cost, low, high = (torch.tensor([row[name] for row in rows]) for name in ("cost", "low", "high"))
        return Minimality(
            edges=tuple(row["edge"] for row in rows),
            cost=cost,
            low=low,
            high=high,
            partners=tuple(tuple(filter(None, row["redundant_with"].split(", "))) for row in rows),
            n=self.summary["n"],
        )

    def at(self, size: int | None) -> Circuit:
        """The circuit pruned to a size; as it was found where nothing was ranked."""
        if size in (None, self.circuit.requested) or self.circuit.absolute is None:
            return self.circuit
        assert self.circuit.scores is not None
        return top_n(self.circuit.scores, size, absolute=self.circuit.absolute)

    def measured(self, size: int | None) -> dict[str, float | None]:
        """Faithfulness with its interval, accuracy and the random band at a size."""
        if size in (None, self.circuit.requested):
            low, high = self.summary["faithfulness_interval"]
            return {
                **{name: self.summary[name] for name in ("faithfulness", "accuracy", "random_95")},
                "low": low,
                "high": high,
            }
        return next(row for row in self.summary["curve"] if row["requested"] == size)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Examined:
    """What a node or an edge does: shares of the headroom with their intervals, and the metric lost in each example."""

    effects: Table
    examples: pd.DataFrame
    """One row an example, the most affected first; `example` is its place among the pairs."""
    dead: bool
    """Whether nothing else is carried under ablation, so that effects of 0 say nothing."""


def found(question: Question) -> Found | None:
    """The circuit that is kept; None if it was not looked for yet."""
    run = state.open_run(question.reference)
    path = kept_result(run.folder, key_of(run, "circuit", question.step, question.arguments))
    return None if path is None else _read(str(path.resolve()), (path / "result.json").stat().st_mtime_ns)


def job_of(question: Question) -> Job | None:
    """The latest job that looked for it."""
    known = jobs.list_jobs(kind="circuit")
    return next((job for job in known if job.arguments == question.command), None)


@st.cache_data(max_entries=KEPT, show_spinner=False)
def edge_count(question: Question) -> int:
    """Edges of the graph in which the circuit is looked for.

    Raises:
        WorkbenchError: the model has no edges to intervene on.
    """
    run = state.open_run(question.reference)
    model = state.model_at(run, question.step)
    return len(graph_of(run, model, question.granularity, question.judged.tokens.shape[1]).edges)


@st.cache_data(max_entries=KEPT, show_spinner=False)
def pair_count(reference: str, sha256: str, split: str) -> int:
    """Pairs that a split has."""
    task = state.open_run(reference).task
    return len(task.contrast(task.examples(split)))


@st.cache_resource(max_entries=FEW, show_spinner="Running the model …")
def plan_of(question: Question) -> Experiment:
    """What the circuit was judged in."""
    held = found(question)
    assert held is not None
    model = state.model_at(state.open_run(question.reference), question.step)
    return experiment(
        model, question.judged, graph=held.circuit.graph, ablation=question.ablation, metric=question.metric
    )


@st.cache_resource(max_entries=KEPT, show_spinner="Taking out each edge …")
def minimal(question: Question, size: int | None) -> Minimality:
    """What each edge of the circuit is worth to it."""
    held = found(question)
    assert held is not None
    return minimality(plan_of(question), held.at(size).keep, seed=question.seed)


@st.cache_resource(max_entries=KEPT, show_spinner="Ablating …")
def examined_edge(question: Question, size: int | None, name: str) -> Examined:
    """An edge ablated alone, restored alone, and taken out of the circuit or put into it."""
    held, plan = found(question), plan_of(question)
    assert held is not None
    edge, keep = plan.graph.mask([name]), held.at(size).keep
    chosen = plan.graph.edges[plan.graph.index[name]]
    patched = path_patch(
        plan.model,
        plan.batch,
        senders=[chosen.source],
        receivers=[chosen.target],
        ablation=question.ablation,
        metric=plan.metric,
        direction="both" if question.ablation == "resample" else "noise",
        graph=plan.graph,
        seed=question.seed,
    )
    told = {
        "noise": "ablated alone in the whole model: what is lost",
        "denoise": "its clean value alone in the counterfactual run: what is gained",
    }
    rows = [
        {"measure": row.direction, "effect": row.effect, "low": row.low, "high": row.high, "what": told[row.direction]}
        for row in patched.frame.sort_values("direction", ascending=False).itertuples()
    ]
    return _examined(question, plan, edge, keep, rows, name)


@st.cache_resource(max_entries=KEPT, show_spinner="Ablating …")
def examined_node(question: Question, size: int | None, name: str) -> Examined:
    """A node whose edges are all ablated: in the whole model, and in the circuit."""
    held, plan = found(question), plan_of(question)
    assert held is not None
    writes = plan.graph.mask([edge.name for edge in plan.graph.edges if edge.source == name])
    lost = plan.full - circuit_values(plan, ~writes[None])[0]
    rows = [
        {
            "measure": "noise",
            **_share(plan, lost, question.seed),
            "what": "all that it writes ablated in the whole model",
        }
    ]
    return _examined(question, plan, writes, held.at(size).keep, rows, name)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def direct_contribution(question: Question, part: str) -> tuple[float, float, float] | None:
    """What a part adds directly to the answer's lead, with its interval; None where it is no part of the sum."""
    model = state.model_at(state.open_run(question.reference), question.step)
    attribution = direct_logit_attribution(model, question.judged, by="head")
    if part not in attribution.parts:
        return None
    values = attribution.values[:, attribution.parts.index(part)]
    low, high = paired_bootstrap(values, seed=question.seed)
    return float(values.mean()), float(low), float(high)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def attended(question: Question, example: int | None) -> AttentionPatterns:
    """Where each head looks: the mean over the pairs' clean prompts, or in one of them."""
    model = state.model_at(state.open_run(question.reference), question.step)
    batch = question.judged
    some = batch if example is None else batch.select(slice(example, example + 1))
    return attention_patterns(model, some, position_labels=position_labels(question, example))


def position_labels(question: Question, example: int | None) -> tuple[str, ...]:
    """What stands at each position: its role, or in one prompt the token."""
    batch, task = question.judged, question.task
    n_positions = batch.tokens.shape[1]
    known = task.position_labels
    roles = [*known, *(f"t{position}" for position in range(len(known), n_positions))][:n_positions]
    if example is None:
        return tuple(roles)
    tokens = [task.vocab[token] for token in batch.tokens[example].tolist()]
    return tuple(token if role == token else f"{role}={token}" for role, token in zip(roles, tokens, strict=True))


def part_of(node: Node) -> str | None:
    """The site through which a node writes; None where it is none of the model's own."""
    if node.part == "head":
        return f"L{node.step}.z.h{node.index}"
    if node.part == "mlp" and "." not in node.name:
        return f"L{node.step}.mlp_out"
    return {"embed": "embed", "pos": "pos_embed"}.get(node.name)


def _examined(
    question: Question,
    plan: Experiment,
    mask: Bool[Tensor, " edge"],
    keep: Bool[Tensor, " edge"],
    rows: list[dict[str, Any]],
    name: str,
) -> Examined:
    """The rows so far, what the circuit has of these edges, and the examples."""
    without, within, ablated = circuit_values(plan, torch.stack([keep & ~mask, keep | mask, ~mask]))
    there = bool((keep & mask).any())
    gained = circuit_values(plan, keep[None])[0] - without if there else within - circuit_values(plan, keep[None])[0]
    verb = "taken out of this circuit: what is lost" if there else "put into this circuit: what is gained"
    rows = [*rows, {"measure": "in the circuit", **_share(plan, gained, question.seed), "what": verb}]
    caption = (
        f"What {name} is worth as a share of the headroom; {question.metric} under {question.ablation} ablation, "
        f"n = {len(plan.batch)} examples, 95 % paired bootstrap intervals."
    )
    effects = Table(
        name="circuit_part",
        frame=pd.DataFrame(rows),
        kind="bar",
        axes={"x": "measure", "y": "effect", "low": "low", "high": "high"},
        unit="share of the headroom",
        caption=caption,
    )
    lost = plan.full - ablated
    return Examined(
        effects=effects, examples=_examples(question, plan, lost), dead=not bool((mask & plan.carrying).any())
    )


def _share(plan: Experiment, change: Float[Tensor, " batch"], seed: int) -> dict[str, float]:
    low, high = ratio_bootstrap(change, plan.full - plan.empty, seed=seed)
    return {"effect": float(change.mean()) / plan.headroom, "low": float(low), "high": float(high)}


def _examples(question: Question, plan: Experiment, lost: Float[Tensor, " batch"]) -> pd.DataFrame:
    """Prompt, counterfactual, answer and what is lost; the largest first."""
    task, batch = question.task, plan.batch
    order = lost.abs().argsort(descending=True, stable=True).tolist()
    rows = []
    for place in order:
        row = {"example": place, "prompt": task.decode(batch.tokens[place].tolist())}
        if batch.corrupt is not None:
            row["counterfactual"] = task.decode(batch.corrupt[place].tolist())
        answers = [task.vocab[token] for token in batch.targets[place][batch.read[place]].tolist()]
        rows.append({**row, "answer": " ".join(answers), f"{question.metric} lost": float(lost[place])})
    return pd.DataFrame(rows)


@st.cache_resource(max_entries=FEW, show_spinner=False)
def _read(path: str, changed: int) -> Found:
    # The moment tells a result from one that was computed again.
    folder = Path(path)
    curve = folder / "circuit_curve.csv"
    return Found(
        circuit=load_circuit(folder / "circuit.json"),
        summary=read_json(folder / "summary.json"),
        curve=pd.read_csv(curve) if curve.exists() else None,
    )
