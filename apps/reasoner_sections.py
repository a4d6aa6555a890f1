"""The sections of a report that only a run on composition or comparison has (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from apps.reasoner_evidence import LAST, MOST, ReasonerEvidence, delay_of
from apps.reasoning import CAUSAL
from apps.reasoning_tables import all_rows, bar_table, causal_table, counted, curve_tables
from apps.sections import Section
from workbench.models.config import ModelConfig
from workbench.tables import Table
from workbench.tasks.base import Task
from workbench.tasks.composition import Composition
from workbench.training.checkpoints import Run

WANG = "wang2024grokked"
SPLITS = {
    "train": "told in training: all facts, and the inferred facts of train_inferred",
    "train_inferred": "inferred facts that are told",
    "test": "held out: inferred from two ID facts",
    "ood": "inferred from two OOD facts",
    "hard": "comparisons of two OOD entities that follow only through others",
    "atomic_id": "single facts that training infers from, told",
    "atomic_ood": "single facts that training never infers from",
    "id_ood": "chains whose second hop alone is an OOD fact",
    "ood_id": "chains whose first hop alone is an OOD fact",
    "mixed": "comparisons of an ID entity with an OOD one",
}
WORLD = ("entities", "relations", "out_degree", "attributes", "values", "phi", "role_coverage", "seed")
PAPER = {
    "composition": "In the paper's world (40,000 facts, 8 layers of width 768) answering nearly all held-out chains "
    "takes about fifty times as many steps as memorising",
    "comparison": "In the paper's world (1,000 entities, 20 attributes, 8 layers of width 768) held-out comparisons "
    "stay near 0.9 for tens of thousands of steps after training is memorised",
}


def reasoner_sections(evidence: ReasonerEvidence) -> tuple[Section, ...]:
    """What was told, and what formed: from the data to the loops."""
    found = (
        _story(evidence),
        _data(evidence.run.task),
        _reference_lines(evidence),
        _lens(evidence),
        _causes(evidence),
        _redirection(evidence),
        _missing_hop(evidence),
        _two_calls(evidence),
        _efficiency(evidence),
        _loops(evidence),
        _everything(evidence),
    )
    return tuple(section for section in found if section is not None)


def describe_scale(task: Task, model: ModelConfig) -> str:
    """The world and the model in numbers, since what is found depends on them."""
    fields = task.to_json()
    world = ", ".join(f"{name.replace('_', ' ')} {fields[name]}" for name in WORLD if name in fields)
    blocks = f"{model.n_layers} layers"
    if model.schedule is not None:
        blocks += f" run as {' '.join(map(str, model.schedule))}"
    return f"{world}; {blocks}, width {model.d_model}"


def _story(evidence: ReasonerEvidence) -> Section:
    run, train = evidence.run, evidence.run.recipe.train
    steps = "" if train is None else f", {train.steps:,} steps at most"
    scale = f"Scale: {describe_scale(run.task, run.recipe.transformer)}{steps}."
    return Section(
        title="From memorising to generalising",
        text=f"{_delay(run)} {scale}\n\nAccuracies of whole splits, or of {MOST:,} prompts where a split has more, at "
        f"{_named(evidence.checkpoints)}. One seed of the world and one of the weights.",
        tables=(_accuracy_table(evidence),),
        references=(WANG, "wilson1927probable"),
    )


def _delay(run: Run) -> str:
    paper = PAPER.get(run.task.name)
    beside = "" if paper is None else f" {paper}; this small world does not show that."
    memorised, generalised, delay = run.log.step_memorised, run.log.step_generalised, delay_of(run)
    if delay is None:
        reached = {"memorised": memorised, "generalised": generalised}
        never = " nor ".join(name for name, step in reached.items() if step is None)
        return f"There is no delay to speak of: this run never {never}.{beside}" if never else beside
    if delay <= 1:
        return (
            f"There is no delay: the run generalised at step {generalised}, and memorised all of training at step "
            f"{memorised}.{beside}"
        )
    return (
        f"The run had memorised at step {memorised} and generalised (accuracy {run.log.solved_accuracy:g} on test, for "
        f"ten evaluations) at step {generalised}: the delay here is about {delay:.1f}-fold, not the paper's.{beside}"
    )


def _accuracy_table(evidence: ReasonerEvidence) -> Table:
    columns = ["split", "checkpoint", "step", "value", "low", "high", "n"]
    return Table(
        name="reasoning_accuracies",
        frame=pd.DataFrame(evidence.accuracies, columns=columns),
        kind="bar",
        axes={"x": "split", "y": "value", "low": "low", "high": "high", "series": "checkpoint"},
        unit="accuracy",
        caption=f"Accuracy on every split; {counted(evidence.accuracies)}, 95 % score intervals.",
    )


def _data(task: Task) -> Section:
    rows = [
        {"split": split, "what": SPLITS.get(split, ""), "prompts": len(task.examples(split))} for split in task.splits
    ]
    return Section(
        title="Data",
        text="A fact is OOD if no inferred fact of training rests on it, whether or not it is told by itself. What is "
        "inferred from OOD facts asks whether the model has learnt to infer, or only what "
        "follows from the facts that it saw used.",
        tables=(
            Table(
                name="reasoning_data",
                frame=pd.DataFrame(rows),
                kind="table",
                axes={},
                unit="",
                caption="Prompts in each split of this world.",
            ),
        ),
        references=(WANG,),
    )


def _reference_lines(evidence: ReasonerEvidence) -> Section | None:
    lines = evidence.found.find("marginal_accuracy")
    if not lines:
        return None
    loss = {row["cause"]: row["value"] for row in evidence.found.find("marginal_loss")}
    best = max(lines, key=lambda row: row["value"])
    own = evidence.accuracy("test")
    assert own is not None
    return Section(
        title="Reference lines",
        text=f"The test split answered from some of the tokens alone, by training's answers to prompts with the same "
        f"tokens there. The best looks at {best['cause']}: accuracy {_share(best)}, loss {loss[best['cause']]:.3g} "
        f"nats. The model reaches {_share(own)}.",
        tables=(
            bar_table(
                "reasoning_marginals",
                lines,
                x="cause",
                caption="The test split answered from the tokens at these places alone.",
            ),
        ),
        references=(WANG, "wilson1927probable"),
    )


def _lens(evidence: ReasonerEvidence) -> Section:
    names = ("bridge", "relation", "v1", "v2", "labels")
    curves = _curves(evidence, *names)
    if isinstance(evidence.run.task, Composition):
        text = (
            "The bridge at r1 is decoded early and, at the last layer, by construction: h r1 alone is a fact that is "
            "told. With tied weights so is r2 before the first layer. What forms with generalisation is the second "
            "relation in the layers between: while chains are memorised the state at r2 turns into an answer at once; "
            "once it waits for the bridge, r2 can still be read there."
        )
    else:
        text = (
            "Where both values are looked up in parallel, v1 can be read at e1 and v2 at e2; a label can be read at "
            "attr once the answers that are possible at all are prepared there. A value need not be written as the "
            "token that names it: what the lens does not read may be there all the same."
        )
    return Section(
        title="Latents in the lens, through training",
        text=f"{text}\n\nRanks are among the whole vocabulary; those among the tokens that could stand there are in "
        "the last section's table, as measures that end in “_among”.",
        tables=curves,
        landmarks=evidence.run.log.landmarks(),
        references=("nostalgebraist2020logit", WANG, "efron1979bootstrap"),
    )


def _causes(evidence: ReasonerEvidence) -> Section:
    tables = tuple(causal_table(evidence.found, measure, evidence.checkpoints) for measure in CAUSAL)
    return Section(
        title="Causal tracing",
        text="One token of a prompt is changed so that its answer is no longer right, and the state that the changed "
        "prompt has there is put into the run of the prompt itself, at one site. Strength is the paper's measure, "
        "the share of answers that are then not right: prompts that were answered wrongly before count in it, so that "
        "on OOD chains, or early, every cause is strong. Altered counts only answers that were right before, and "
        "redirected only pairs of which both prompts are answered rightly: it asks for the changed prompt's answer. "
        "Attention and MLP stand beside the stream after each layer.",
        tables=(*tables, *_curves(evidence, "strength")),
        landmarks=evidence.run.log.landmarks(),
        references=(WANG, "vig2020investigating", "meng2022locating", "wilson1927probable"),
    )


def _redirection(evidence: ReasonerEvidence) -> Section | None:
    found = evidence.found
    candidates = found.find("redirect_candidate")
    if not candidates:
        return None
    rows = {
        name: (evidence.one("redirect", name, split="test"), evidence.one("control", name, split="test"))
        for name in evidence.checkpoints
    }
    said = "; ".join(
        f"{name} (step {evidence.checkpoints[name]}): {_share(redirect)}, control {_share(control)}"
        for name, (redirect, control) in rows.items()
    )
    chosen = bar_table(
        "reasoning_candidates",
        candidates,
        x="site",
        caption="Redirect rate by site on chains of training, at the last checkpoint: the highest is the middle site.",
    )
    return Section(
        title="Redirecting the second hop",
        text=f"The state at r1 comes from a chain with another bridge, both chains answered rightly: does the answer "
        f"become the other's? The control is a chain from another fact with the same bridge: the answer must stay. "
        f"The site, {found.middle}, was chosen on chains of training; on test, {said}.\n\nEarly on, the few held-out "
        "chains that count are those that are answered rightly already, which is why the rate on them may be above "
        "that on chains of training.",
        tables=(*_curves(evidence, "redirect"), *((chosen,) if not chosen.frame.empty else ())),
        landmarks=evidence.run.log.landmarks(),
        references=(WANG, "vig2020investigating", "wilson1927probable"),
    )


def _missing_hop(evidence: ReasonerEvidence) -> Section | None:
    step = evidence.checkpoints[LAST]
    rows = [*evidence.found.find("transplant_before", step=step), *evidence.found.find("transplant", step=step)]
    if not any(row["value"] is not None for row in rows):
        return None
    labelled = [{**row, "state": row["site"] or "left alone"} for row in rows if row["value"] is not None]
    columns = ["split", "state", "value", "low", "high", "n", "skipped"]
    table = Table(
        name="reasoning_transplants",
        frame=pd.DataFrame(labelled, columns=columns),
        kind="bar",
        axes={"x": "split", "y": "value", "series": "state", "low": "low", "high": "high"},
        unit="accuracy",
        caption=f"Accuracy left alone, and with the state at r1 of an ID fact with the same bridge at a site, at the "
        f"last checkpoint; {counted(rows)}, 95 % score intervals. Prompts without such a fact are skipped.",
    )
    return Section(
        title="Which hop is missing",
        text="A chain over an OOD fact gets the state at r1 from an ID fact with the same bridge. Where that mends the "
        "answer (ood_id), the first hop was missing; where it does not (id_ood, ood), the second hop is: the model "
        f"knows the fact, but not where the second hop would look it up. At the last checkpoint: {_mended(rows)}.",
        tables=(table, *_curves(evidence, "transplant")),
        landmarks=evidence.run.log.landmarks(),
        references=(WANG, "wilson1927probable"),
    )


def _mended(rows: list[Mapping[str, object]]) -> str:
    said = []
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split and row["value"] is not None]
        before = next((row for row in own if row["measure"] == "transplant_before"), None)
        after = [row for row in own if row["measure"] == "transplant"]
        if before is not None and after:
            best = max(after, key=lambda row: float(str(row["value"])))
            said.append(f"{split} {_share(before)} before, {_share(best)} with the state at {best['site']}")
    return "; ".join(said)


def _two_calls(evidence: ReasonerEvidence) -> Section | None:
    curves = _curves(evidence, "two_calls")
    if not curves:
        return None
    row = evidence.one("two_calls", LAST, split="ood")
    once = evidence.accuracy("ood")
    return Section(
        title="Two calls",
        text=f"The model is asked for the bridge (h r1), and its own answer is put in as the head of the second "
        f"fact. Nearly free once the facts are known, and a sign that they are: on ood, {_share(row)} in two calls and "
        f"{_share(once)} in one.",
        tables=curves,
        landmarks=evidence.run.log.landmarks(),
        references=("press2023measuring", WANG, "wilson1927probable"),
    )


def _efficiency(evidence: ReasonerEvidence) -> Section:
    return Section(
        title="Efficiency",
        text="By how much the answer's logit leads every other, for each unit of the weights' norm. Weight decay "
        "favours the circuit that buys its lead with the smaller norm: where generalising is the more efficient, the "
        "lead on test catches up with that on train_inferred.",
        tables=_curves(evidence, "efficiency"),
        landmarks=evidence.run.log.landmarks(),
        references=("varma2023explaining", WANG, "efron1979bootstrap"),
    )


def _loops(evidence: ReasonerEvidence) -> Section | None:
    loops = evidence.loops
    if loops is None:
        return None
    return Section(
        title="More and fewer loops",
        text=f"The blocks are shared between {loops.trained} rounds, so that what the first hop looks up is there for "
        "the second. Without another step of training the model goes round them once and up to four times.",
        tables=tuple(loops.tables()),
        references=("dehghani2019universal", WANG, "wilson1927probable"),
    )


def _everything(evidence: ReasonerEvidence) -> Section:
    return Section(
        title="All measures",
        text="Every number behind the sections above; every checkpoint was asked the same prompts, drawn once.",
        tables=(all_rows(evidence.found),),
        references=("wilson1927probable", "efron1979bootstrap"),
    )


def _curves(evidence: ReasonerEvidence, *names: str) -> tuple[Table, ...]:
    tables = curve_tables(evidence.found)
    return tuple(tables[f"reasoning_{name}"] for name in names if f"reasoning_{name}" in tables)


def _named(checkpoints: Mapping[str, int]) -> str:
    return " and ".join(f"{name} (step {step})" for name, step in checkpoints.items())


def _share(row: Mapping[str, object] | None) -> str:
    """A share with its interval and n, as it stands in a sentence."""
    if row is None or row["value"] is None:
        return "nothing that counts"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] (n = {row['n']})"
