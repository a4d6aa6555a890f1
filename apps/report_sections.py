"""The sections of a report, from the summary to the last analysis.

A section is text and tables; how it looks on the page is not its business. What only a run on composition or comparison
has is in `apps.reasoner_sections`, what only a run on graph search has in `apps.search_sections`, what only a
Transformer Program has in `apps.program_sections`, and what only a donor has in `apps.graft_sections`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from apps.claims import Claim, claims_tables
from apps.evidence import Evidence, claims
from apps.graft_sections import PANIGRAHI, SKILL, GraftEvidence, describe_graft, graft_claims, graft_sections
from apps.probe_sections import probe_sections
from apps.program_sections import FRIEDMAN, describe_program, program_sections
from apps.reasoner_sections import WANG, reasoner_sections
from apps.search_sections import SAPAROV, search_sections
from apps.sections import Section
from apps.shipped_card import shipped_card
from apps.training_section import training_section
from probes.fourier import LOSS_LABELS, FourierResult
from workbench.intervals import Estimate
from workbench.models.program_config import ProgramConfig
from workbench.tables import Table
from workbench.training.checkpoints import Run
from workbench.training.recipe import Recipe

MOST_BARS = 60
"""Bars of a picture."""


def sections_of(evidence: Evidence) -> tuple[Section, ...]:
    """What a report of a run says, from the summary to the last analysis."""
    found = (
        _summary(evidence),
        training_section(evidence.run),
        *(() if evidence.reasoner is None else reasoner_sections(evidence.reasoner)),
        *(() if evidence.search is None else search_sections(evidence.search)),
        *(() if evidence.program is None else program_sections(evidence.program)),
        *(() if evidence.graft is None else graft_sections(evidence.graft)),
        _progress(evidence),
        _fourier(evidence),
        _controls(evidence),
        _patching(evidence),
        _lens(evidence),
        *(() if evidence.probing is None else probe_sections(evidence.probing)),
        _attribution(evidence),
        _circuit(evidence),
        _finders(evidence),
        _card(evidence),
        _clusters(evidence),
        _history(evidence),
    )
    return tuple(section for section in found if section is not None)


def sections_of_donor(evidence: GraftEvidence, story: str) -> tuple[Section, ...]:
    """What a report of a real model's donor says."""
    summary = _summary_of([story, describe_graft(evidence)], graft_claims(evidence), SKILL, (PANIGRAHI,))
    return (summary, *graft_sections(evidence))


def _summary(evidence: Evidence) -> Section:
    run = evidence.run
    paragraphs = [f"{_name(run)} {_describe(run.recipe)} {_story(run)}"]
    if evidence.final is not None:
        keys = ", ".join(map(str, evidence.final.key_frequencies)) or "none"
        paragraphs.append(f"Key frequencies of the final checkpoint: {keys}.")
    if evidence.graft is not None:
        paragraphs.append(describe_graft(evidence.graft))
    paragraphs += [f"Left out: {name}. {reason}" for name, reason in evidence.left_out.items()]
    return _summary_of(paragraphs, claims(evidence), *_expected(evidence))


def _summary_of(
    paragraphs: Sequence[str], found: Sequence[Claim], network: str, literature: tuple[str, ...]
) -> Section:
    """The summary, with the findings that one expects of such a network."""
    held = [claim for claim in found if not claim.free]
    if held:
        paragraphs = [*paragraphs, f"Of {len(held)} findings that one expects of {network}, {_verdict(held)}"]
    return Section(
        title="Summary",
        text="\n\n".join(paragraphs),
        tables=claims_tables(found) if held else (),
        references=literature if held else (),
    )


def _expected(evidence: Evidence) -> tuple[str, tuple[str, ...]]:
    """What network the findings are expected of, and the papers that say so."""
    if evidence.reasoner is not None:
        return "a grokked network", ("power2022grokking", WANG)
    if evidence.search is not None:
        return "a network that searches by merging paths", (SAPAROV,)
    if evidence.graft is not None:
        return SKILL, (PANIGRAHI,)
    if isinstance(evidence.run.recipe.model, ProgramConfig):
        return "a program that was read off a model", (FRIEDMAN,)
    return "a grokked network", ("power2022grokking", "nanda2023progress")


def _verdict(held: Sequence[Claim]) -> str:
    failed = [claim for claim in held if not claim.holds]
    if not failed:
        return "this run shows all."
    names = "; ".join(claim.statement for claim in failed)
    return f"this run shows {len(held) - len(failed)}. It does not show: {names}."


def _name(run: Run) -> str:
    return f"Run {run.reference!r} of recipe {run.recipe.name!r}."


def _describe(recipe: Recipe) -> str:
    facts = {name: value for name, value in recipe.task.to_json().items() if isinstance(value, int | float | str)}
    task = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if name != "name")
    about = f"Task: {recipe.task.name}{f' ({task})' if task else ''}. "
    if isinstance(recipe.model, ProgramConfig):
        return about + describe_program(recipe.model)
    model = recipe.transformer
    mlp = f"{model.d_mlp} neurons ({model.activation})" if model.d_mlp else "no MLP"
    layers = f"{model.n_layers} layer{'s' if model.n_layers > 1 else ''}"
    return f"{about}Model: {layers}, d_model {model.d_model}, {model.n_heads} heads of {model.d_head}, {mlp}."


def _story(run: Run) -> str:
    if not run.log.rows:
        return "It came trained: there is no log."
    last, marks, steps = run.last, run.log.landmarks(), run.log.rows[-1]["step"]
    reached = [
        f"{name} at step {marks[name]}" if name in marks else f"never {name}" for name in ("memorised", "generalised")
    ]
    seconds = run.status["seconds"]
    took = "" if seconds is None else f" after {seconds:.0f} s"
    best = "" if last["step"] == steps else f", and is kept as it was at step {last['step']}, best on the split val"
    return (
        f"It {' and '.join(reached)}, and ended at step {steps}{took} ({run.status['reason']}){best}: "
        f"test loss {last['test_loss']:.3g}, test accuracy {last['test_accuracy']:.4g}."
    )


def _progress(evidence: Evidence) -> Section | None:
    progress, log = evidence.progress, evidence.run.log
    if progress is None:
        return None
    marks = progress.landmarks.summary(memorised=log.step_memorised, generalised=log.step_generalised)
    events = [
        ("the excluded loss doubles from its minimum", marks["excluded_doubles"], marks["excluded_lead"]),
        ("the restricted loss halves from its peak", marks["restricted_halves"], marks["restricted_lead"]),
        ("the test loss halves from its peak", marks["test_halves"], None),
    ]
    said = "; ".join(f"{what} {_when(step)}{_ahead(lead)}" for what, step, lead in events)
    return Section(
        title="Progress measures",
        text=f"At each of {len(progress.rows)} checkpoints, with the key frequencies of the final one, on every pair "
        f"of the splits: {said}.\n\nThe circuit forms while the test loss still says nothing, and the network then "
        "drops what it memorised: where that is so, excluded and restricted loss move before the test loss does.",
        tables=tuple(progress.tables()),
        landmarks=log.landmarks(),
        references=("nanda2023progress", "zhong2023clock"),
    )


def _when(step: object) -> str:
    return "never" if step is None else f"at step {step}"


def _ahead(lead: object) -> str:
    return f", {lead:.2f} of the delay ahead of the test loss" if isinstance(lead, float) else ""


def _fourier(evidence: Evidence) -> Section | None:
    final = evidence.final
    if final is None:
        return None
    whole, kept, without = (final.losses[name] for name in LOSS_LABELS)
    return Section(
        title="Fourier circuit",
        text=f"The final checkpoint (step {evidence.run.checkpoint().step}) in the Fourier basis of its operation, on "
        f"all {final.order**2} pairs; losses on the {final.n} pairs of the test split, with 95 % bootstrap intervals. "
        f"A frequency is key if it owns at least 2 % of the live neurons.\n\n"
        f"The key frequencies explain {final.logits_explained:.3f} of the logits. The test loss is {whole.mean:.3g}; "
        f"with the key frequencies alone {kept.mean:.3g} ({kept.low:.3g} to {kept.high:.3g}), without them "
        f"{without.mean:.3g} ({without.low:.3g} to {without.high:.3g}). Gradient symmetricity "
        f"{final.gradient_symmetricity:.3f}, distance irrelevance {final.distance_irrelevance:.3f}: a Clock has a low "
        "first and a high second, a Pizza the other way round.",
        tables=tuple(final.tables()),
        references=("nanda2023progress", "zhong2023clock", "efron1979bootstrap"),
    )


def _controls(evidence: Evidence) -> Section | None:
    shown = {"final": evidence.final, "memorised": evidence.memorised, "residues shuffled": evidence.shuffled}
    results = {name: result for name, result in shown.items() if result is not None}
    if len(results) < 2:
        return None
    return Section(
        title="Controls",
        text="The same analysis where it must find next to nothing: on the checkpoint of the moment of memorising, "
        "with the key frequencies of the final one, and on the final checkpoint with its residues relabelled at "
        f"random, where it looks for key frequencies anew{_finds(evidence.shuffled)}.",
        tables=(_control_shares(results), _control_losses(results)),
        references=("nanda2023progress",),
    )


def _finds(shuffled: FourierResult | None) -> str:
    if shuffled is None:
        return ""
    return f" and finds {', '.join(map(str, shuffled.key_frequencies)) or 'none'}"


def _control_shares(results: Mapping[str, FourierResult]) -> Table:
    rows = [
        {"part": part, "explained": share, "analysis": name}
        for name, result in results.items()
        for part, share in (
            ("live neurons", None if result.neurons is None else result.neurons.share_explained),
            ("logits", result.logits_explained),
        )
        if share is not None
    ]
    return Table(
        name="control_explained",
        frame=pd.DataFrame(rows),
        kind="bar",
        axes={"x": "part", "y": "explained", "series": "analysis"},
        unit="fraction",
        caption="Share explained: of the live neurons by one frequency each, of the logits by the key frequencies.",
    )


def _control_losses(results: Mapping[str, FourierResult]) -> Table:
    rows = [
        {"logits": label, "loss": loss.mean, "low": loss.low, "high": loss.high, "analysis": name}
        for name, result in results.items()
        for key, label in LOSS_LABELS.items()
        for loss in (result.losses[key],)
    ]
    n = next(iter(results.values())).n
    return Table(
        name="control_losses",
        frame=pd.DataFrame(rows),
        kind="bar",
        axes={"x": "logits", "y": "loss", "low": "low", "high": "high", "series": "analysis"},
        unit="nats",
        caption=f"Test loss with frequencies removed from the logits; n = {n} pairs, 95 % bootstrap interval.",
        log_y=True,
    )


def _patching(evidence: Evidence) -> Section | None:
    patches = evidence.patches
    if patches is None:
        return None
    apart = int(patches.disagree.sum())
    agreement = (
        "Denoising and noising agree within their intervals everywhere."
        if apart == 0
        else f"Denoising and noising disagree beyond their intervals in {apart} of {len(patches.cells)} cells: what "
        "suffices is there not what is needed."
    )
    return Section(
        title="Activation patching",
        text=f"One cell at a time is replaced by its activation in the other run of the pair: clean into corrupt "
        f"(denoise), corrupt into clean (noise). {patches.n} pairs of the final checkpoint"
        f"{f', {patches.dropped} more without headroom left out' if patches.dropped else ''}; metric {patches.metric} "
        f"(higher: {patches.higher}), clean {patches.clean:.4g}, corrupt {patches.corrupt:.4g}; 95 % paired bootstrap "
        "intervals, and sign-flip tests at a false-discovery rate of 5 % in the column “significant”.\n\n"
        f"{agreement}",
        tables=tuple(patches.tables()),
        references=(
            "vig2020investigating",
            "meng2022locating",
            "heimersheim2024how",
            "efron1979bootstrap",
            "phipson2010permutation",
            "benjamini1995controlling",
        ),
    )


def _lens(evidence: Evidence) -> Section | None:
    lens = evidence.lens
    if lens is None:
        return None
    return Section(
        title="Logit lens",
        text="What the model would answer if it stopped here: the residual stream at each site and position, through "
        f"the final norm and the unembedding. {lens.n} prompts, 95 % bootstrap intervals in the tables.",
        tables=tuple(lens.tables()),
        references=("nostalgebraist2020logit", "efron1979bootstrap"),
    )


def _attribution(evidence: Evidence) -> Section | None:
    attribution, heads = evidence.attribution, evidence.heads
    if attribution is None or heads is None:
        return None
    by_head = (replace(table, name=f"{table.name}_heads") for table in heads.tables())
    return Section(
        title="Direct logit attribution",
        text=f"The {attribution.metric} as a sum of what each part writes into the last residual stream, by component "
        f"and by head; what a part does through later layers is not seen here. {attribution.n} pairs, 95 % bootstrap "
        "intervals.",
        tables=(*attribution.tables(), *by_head),
        references=("elhage2021mathematical", "efron1979bootstrap"),
    )


def _circuit(evidence: Evidence) -> Section | None:
    found = evidence.circuit
    if found is None:
        return None
    circuit = found.circuit
    band = (
        ""
        if found.random_95 is None
        else (
            f" Of {len(found.controls)} random connected circuits of {found.controls_size} edges 95 % stay below "
            f"{found.random_95:.3g}."
        )
    )
    return Section(
        title="Circuit",
        text=f"The smallest circuit from the top of the {circuit.method} ranking that keeps 90 % of the metric and of "
        f"the accuracy on the pairs that it was found on: {circuit.size} of {len(circuit.graph.edges)} edges, "
        f"{found.live_edges} of which are live: with all others ablated every answer is the model's. All edges "
        f"but the circuit's carry the counterfactual run's values ({circuit.terms.ablation} ablation). Judged on "
        f"another draw of n = {found.n} pairs: faithfulness "
        f"{_with_interval(found.faithfulness)}, accuracy over the whole vocabulary {_with_interval(found.accuracy)} "
        f"(the model's own: {found.model_accuracy:.3g}).{band} With the circuit ablated and all else kept, "
        f"{_with_interval(found.necessity)} of the metric is lost. Of the parts that were "
        "taken out of both the circuit and the model, the worst drives the two apart by "
        f"{_with_interval(found.completeness)}; as it was chosen as the worst, this is biased upward.",
        tables=tuple(found.tables()),
        references=("wang2023interpretability", "hanna2024have", "mueller2025mib", "efron1979bootstrap"),
    )


def _finders(evidence: Evidence) -> Section | None:
    found = evidence.finders
    if found is None:
        return None
    agreement, stability = found.agreement, found.stability
    votes, labels = agreement.votes, agreement.labels
    apart = min(agreement.pairs.to_dict("records"), key=lambda pair: pair["jaccard"])
    dear = f" On a graph of this size {' and '.join(found.left_out)} would take too long." if found.left_out else ""
    tested = found.significance.summary()
    return Section(
        title="Do the finders agree?",
        text=f"{', '.join(labels[:-1])} and {labels[-1]} rank the edges by the same n = {agreement.terms.n} pairs "
        f"({agreement.terms.metric}, {agreement.terms.ablation} ablation), and each keeps {agreement.edges}, as many "
        f"as the circuit above.{dear} Of {int((votes > 0).sum())} edges that any of them keeps, "
        f"{len(agreement.shared)} are kept by all. The least alike are {apart['result']} and {apart['other']}: they "
        f"share {apart['jaccard']:.3g} of the edges that either has (Jaccard index), where random sets as large share "
        f"{apart['chance']:.3g}.\n\n"
        f"With the pairs drawn anew {len(stability.jaccard)} times, {stability.circuit.method} finds circuits that "
        f"share {stability.mean_jaccard:.3g} of the edges with its own on average, and "
        f"{float(stability.jaccard.min()):.3g} at least.\n\n"
        f"Of {tested['tested']} edges that were tested, {len(found.significance.edges)} have a mean effect by "
        f"{tested['method']} that is not 0 at a false-discovery rate of {found.significance.rate:.0%} (n = "
        f"{tested['n']} pairs, two-sided sign-flip test). An effect that is surely there can still be small.",
        tables=tuple(map(_drawn_if_short, found.tables())),
        references=(
            "syed2024attribution",
            "hanna2024have",
            "meloux2025mechanistic",
            "efron1979bootstrap",
            "phipson2010permutation",
            "benjamini1995controlling",
        ),
    )


def _drawn_if_short(table: Table) -> Table:
    """The table without a picture where bars would fill pages."""
    long = table.kind == "bar" and len(table.frame) > MOST_BARS
    return replace(table, kind="table", axes={}) if long else table


def _card(evidence: Evidence) -> Section | None:
    if evidence.circuit is None:
        return None
    card = shipped_card()
    return Section(
        title="How far the circuit finders can be believed",
        text=f"Every finder was run on models whose circuit is known: wired by hand, trained to hold a circuit, or "
        f"compiled from RASP programs (frozen set, version {card.version}, digest {card.digest[:12]}, n = {card.n} "
        "pairs each). Nothing in this section is about the run of this report.",
        # The pictures; all numbers of all rows are what `workbench scorecard` prints.
        tables=tuple(table for table in card.tables() if table.kind != "table"),
        references=("lindner2023tracr", "conmy2023towards", "gupta2024interpbench"),
    )


def _with_interval(share: Estimate) -> str:
    return f"{share.mean:.3g} [{share.low:.3g}, {share.high:.3g}]"


def _clusters(evidence: Evidence) -> Section | None:
    clusters = evidence.clusters
    if clusters is None:
        return None
    return Section(
        title="The MLP, split by frequency",
        text="Each live neuron belongs to the key frequency that explains it; a cluster is ablated by ablating every "
        f"edge out of its neurons. n = {clusters.terms.n} pairs, 95 % paired bootstrap intervals.",
        tables=tuple(clusters.tables()),
        references=("nanda2023progress", "efron1979bootstrap"),
    )


def _history(evidence: Evidence) -> Section | None:
    history = evidence.history
    if history is None:
        return None
    return Section(
        title="The circuit through training",
        text="The same method, size and pairs at every checkpoint. Where the model does not tell the pairs apart, "
        "there is no circuit to find.",
        tables=tuple(history.tables()),
        references=("hanna2024have", "efron1979bootstrap"),
    )
