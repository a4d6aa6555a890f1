"""The sections of a report that only a run on graph search has (Saparov et al. 2025)."""

from __future__ import annotations

import pandas as pd

from apps.search_evidence import SearchEvidence, lookahead_curves
from apps.sections import Section
from circuits.path_traces import JUDGED
from workbench.models.config import ModelConfig
from workbench.tables import Table
from workbench.tasks.graph_search import GraphSearch

SAPAROV = "saparov2025transformers"


def search_sections(evidence: SearchEvidence) -> tuple[Section, ...]:
    """Who is right and how far ahead, when that was learnt, what the stream knows, and whether paths are merged."""
    found = (_accuracy(evidence), _training(evidence), _reachability(evidence), *_path_merging(evidence))
    return tuple(section for section in found if section is not None)


def describe_scale(task: GraphSearch, model: ModelConfig) -> str:
    """Graphs and model in numbers, since what is found depends on them."""
    return (
        f"graphs of up to {task.layout.n_edges} edges in {task.size} tokens, lookaheads 0 to {task.levels[-1]}, "
        f"{task.distribution} in training; {model.n_layers} layers of width {model.d_model}"
    )


def _accuracy(evidence: SearchEvidence) -> Section:
    run, train = evidence.run, evidence.run.recipe.train
    examples = ""
    if train is not None and train.batch_size is not None:
        examples = f", {train.steps * train.batch_size:,} examples at most"
    return Section(
        title="Who looks how far ahead",
        text="The lookahead is how many levels one must follow the children of the start, side by side, to tell the "
        "right one from the wrong: at 0 there is no wrong one, at 1 the goal is a child or the wrong ones lead "
        f"nowhere, from {JUDGED} on there is something to search. None of the test graphs was in training. Chance is a "
        "child at random.\n\n"
        f"Scale: {describe_scale(evidence.task, run.recipe.transformer)}{examples}. The paper's models have 6 layers, "
        "read up to 41 edges and were given 883 million examples, with a sign-momentum optimiser at a learning rate of "
        "0.00001: what is found here is found at this scale. One seed.",
        tables=(_accuracy_table(evidence),),
        references=(SAPAROV, "wilson1927probable"),
    )


def _accuracy_table(evidence: SearchEvidence) -> Table:
    return Table(
        name="search_accuracy",
        frame=pd.DataFrame(evidence.accuracies),
        kind="bar",
        axes={"x": "split", "y": "accuracy", "low": "accuracy_low", "high": "accuracy_high"},
        unit="accuracy",
        caption="Accuracy at the last checkpoint on balanced graphs of each lookahead, and on naive and star graphs; "
        "95 % score intervals over n graphs.",
    )


def _training(evidence: SearchEvidence) -> Section | None:
    curves = lookahead_curves(evidence.run)
    if curves is None:
        return None
    log = evidence.run.log
    solved = {lookahead: log.step_solved(f"test_{lookahead}") for lookahead in evidence.task.levels}
    said = "; ".join(
        f"{lookahead} {'never' if step is None else f'at step {step}'}" for lookahead, step in solved.items()
    )
    return Section(
        title="Each lookahead in turn",
        text=f"From which evaluation on the accuracy at a lookahead stays at {log.solved_accuracy:g} or above for ten "
        f"evaluations: {said}.",
        tables=(curves,),
        references=(SAPAROV,),
    )


def _reachability(evidence: SearchEvidence) -> Section | None:
    reached = evidence.reached
    if reached is None:
        return None
    return Section(
        title="What the stream knows of reachability",
        text="At the source and at the target of every edge a linear probe reads which vertices can be reached from "
        "there, and which reach it. Distance 1 stands in the edge; what is two or more edges away is known only where "
        "something was merged. A row that holds what is near, and no more, orders what is farther by chance, 0.5. But "
        "rows that count how often a vertex is named do better without any search, since the start is named often "
        "and reaches much: the line to beat is the model before training. What a probe reads need not be used."
        "\n\nThe control gives every edge and vertex a random distance, the same in all prompts: where the stream "
        "names the edge, a probe learns that by heart, so that a high control warns "
        "of a strong probe.",
        tables=tuple(reached.tables()),
        references=("hewitt2019designing", SAPAROV, "efron1979bootstrap"),
    )


def _path_merging(evidence: SearchEvidence) -> tuple[Section, ...]:
    traces = evidence.traces
    if traces is None:
        return ()
    tables = {table.name: table for table in traces.tables()}
    causal = tuple(table for name, table in tables.items() if name == "ablated_operations")
    rest = tuple(table for name, table in tables.items() if name != "ablated_operations")
    found = [
        Section(
            title="Path merging",
            text="Every entry of every attention pattern is edited; those that the answer hangs on are operations, and "
            "perturbed prompts say why each is there. An input is explained if along operations with a cause the sets "
            "of vertices that rows hold are merged into one that holds a path from start to goal. The strict merge "
            "asks every operation for a cause, the published one only the first that arrives at a place. Judged are "
            f"lookaheads from {JUDGED} on.\n\nControls, by the same rule: a model wired to merge paths must be "
            "explained; the model before training with as many operations, random operations, and a graph with its "
            "vertices exchanged must not; `one_hop` is the rival by which a layer takes one hop. Thresholds are "
            f"halved, doubled, and the published absolute ones.\n\n{len(traces.inputs)} inputs are few; "
            f"`workbench trace {evidence.run.reference}` traces more. Circuits of whole components, without positions, "
            "say little of a search and are left to `workbench circuit`.",
            tables=rest,
            references=(SAPAROV, "wilson1927probable"),
        )
    ]
    if causal:
        found.append(
            Section(
                title="Are the explained operations what answers?",
                text="If so, the answers stay with these operations alone, fall to chance without them, and stay "
                "without as many others.",
                tables=causal,
                references=(SAPAROV, "wilson1927probable"),
            )
        )
    return tuple(found)
