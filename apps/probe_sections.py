"""What a report says of a run's latents: probes of each at its own place, layer by layer, and the tuned lens.

Only latents that no token of the prompt names are looked at, where they are first determined; all places are what
`workbench probe` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from apps.analyses import tuned_lens_of
from apps.probing import PROMPTS, TRAINED, UNTRAINED, draw_prompts, hidden_latents, probes_of
from apps.sections import Section
from probes.tuned_lens import TunedLens
from workbench.runtime import WorkbenchError
from workbench.tables import Table
from workbench.training.checkpoints import Run

LAST = "at the end"
LENS_PROMPTS = 400
MEASURES = {
    "accuracy": ("accuracy", "accuracy of a linear probe on prompts of groups held out, 95 % score intervals"),
    "amnesic": (
        "accuracy",
        "answers lost when the directions that tell the latent are taken out, beyond what as many random directions "
        "cost, 95 % paired bootstrap intervals",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeEvidence:
    """Hidden latents of a run at their own places, and both lenses."""

    rows: tuple[Mapping[str, Any], ...]
    """One a latent, site and model: a checkpoint's name, or `untrained`."""
    forgotten: tuple[Mapping[str, Any], ...]
    """The amnesic projection's numbers, likewise, for each set of prompts."""
    sizes: tuple[Mapping[str, Any], ...]
    """Classes, groups and prompts of each latent."""
    steps: Mapping[str, int]
    split: str
    lens: TunedLens


def gather_probes(run: Run, *, split: str) -> ProbeEvidence:
    """Probes of the hidden latents where training memorised and at the end, and the tuned lens at the end.

    Raises:
        WorkbenchError: there is no latent to probe, or none that can be.
    """
    batch = draw_prompts(run.task, PROMPTS, split)
    steps = compared_steps(run)
    rows: list[Mapping[str, Any]] = []
    forgotten: list[Mapping[str, Any]] = []
    sizes: dict[str, Mapping[str, Any]] = {}
    for latent in hidden_latents(batch):
        for name, step in steps.items():
            found = probes_of(run, step, latent=latent, positions=(batch.latents[latent].position,), split=split)
            own, before = {TRAINED: name}, {TRAINED: name, UNTRAINED: UNTRAINED}
            models = before if name == LAST else own
            rows += [row for cell in found.cells for row in _apart(cell, models)]
            forgotten += [{**row, "model": models[row["model"]]} for row in found.forgotten if row["model"] in models]
            sizes[latent] = found.sizes[0]
    if not rows:
        raise WorkbenchError(f"Prompts of split {split!r} have no latents to probe.")
    return ProbeEvidence(
        rows=tuple(rows),
        forgotten=tuple(forgotten),
        sizes=tuple(sizes.values()),
        steps=steps,
        split=split,
        lens=tuned_lens_of(run, n=LENS_PROMPTS, split=split),
    )


def compared_steps(run: Run) -> dict[str, int]:
    """The checkpoint nearest to the moment of memorising, if that is not the last, and the last."""
    last, memorised = run.checkpoint().step, run.log.step_memorised
    if memorised is None:
        return {LAST: last}
    near = min((checkpoint.step for checkpoint in run.checkpoints), key=lambda step: abs(step - memorised))
    return {**({} if near == last else {"memorised": near}), LAST: last}


def probe_sections(evidence: ProbeEvidence) -> tuple[Section, ...]:
    """Probes, then the lenses."""
    return _probes(evidence), _lenses(evidence)


def _apart(cell: Mapping[str, Any], models: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A row for each model of a cell, with the same columns."""
    place = {name: cell[name] for name in ("latent", "site", "at")}
    measures = [name for name in cell if f"{name}_{UNTRAINED}" in cell]
    for which, name in models.items():
        suffix = "" if which == TRAINED else f"_{UNTRAINED}"
        yield {**place, "model": name, **{measure: cell[f"{measure}{suffix}"] for measure in measures}}


def _probes(evidence: ProbeEvidence) -> Section:
    told = "; ".join(
        f"{row['latent']}, {row['n_classes']} classes, {row['n_train']} prompts to fit and n = {row['n_test']} of "
        f"other groups to judge, most common class {row['majority']:.3g}"
        for row in evidence.sizes
    )
    steps = ", ".join(f"{name}: step {step}" for name, step in evidence.steps.items())
    frame = pd.DataFrame(evidence.rows)
    frame["series"] = frame["latent"] + ", " + frame["model"]
    maps = [
        Table(
            name=f"latents_by_site_{measure}",
            frame=frame,
            kind="curve",
            axes={"x": "site", "y": measure, "series": "series", "low": f"{measure}_low", "high": f"{measure}_high"},
            unit=unit,
            caption=f"By site, each latent at its own position: {says}.",
        )
        for measure, (unit, says) in MEASURES.items()
    ]
    everything = {
        "latents_probes": (frame.drop(columns="series"), "Probes and codes at each latent's own position."),
        "latents_amnesic": (
            pd.DataFrame(evidence.forgotten),
            "Answers before, after, and with as many random directions taken out: prompts of the groups held out and, "
            "where there are any, OOD prompts. Told: what a line tells of the latent, before and after.",
        ),
    }
    return Section(
        title="Probes of the latents",
        text=f"Split {evidence.split!r} ({steps}): {told}. No group that judges a probe has a prompt that it was "
        "fitted on. Selectivity is accuracy less that of the control task, in which each group has a random label; "
        "compression is the uniform code's length by the online code's, 1 being no gain. What can be read need not be "
        "used: the amnesic effect takes the directions that tell the latent out of the state, at most a quarter of its "
        "width, and counts the answers that this costs beyond as many random directions.",
        tables=(
            *maps,
            *(
                Table(name=name, frame=rows, kind="table", axes={}, unit="", caption=caption)
                for name, (rows, caption) in everything.items()
            ),
        ),
        references=(
            "alain2016understanding",
            "hewitt2019designing",
            "voita2020information",
            "elazar2021amnesic",
            "belrose2023leace",
            "wilson1927probable",
            "efron1979bootstrap",
        ),
    )


def _lenses(evidence: ProbeEvidence) -> Section:
    lens = evidence.lens
    return Section(
        title="Tuned lens beside the logit lens",
        text="The logit lens reads a state as if nothing followed; the tuned lens puts an affine map before it, fitted "
        "at each site to what the model says in the end, never to the right answers. Where the two part, the state "
        f"holds the prediction in another basis. Last checkpoint, {lens.n_train} prompts to fit, n = {lens.n_test} to "
        "judge.",
        tables=tuple(lens.tables()),
        references=("nostalgebraist2020logit", "belrose2023eliciting", "efron1979bootstrap"),
    )
