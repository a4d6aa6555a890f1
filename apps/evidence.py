"""All that a report looks at in a run, and which of the expected findings it shows.

`gather` runs the standard analyses once. One that does not apply (Fourier analysis of imported pairs, say) or that the
run refuses (no headroom) is left out with its reason. `claims` then holds what was found against what the literature
leads one to expect of a grokked network; what fails is reported like what holds. Runs on composition, comparison and
graph search, Transformer Programs and donors have evidence and claims of their own, in `apps.reasoner_evidence`,
`apps.search_evidence`, `apps.program_evidence` and `apps.graft_sections`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from apps.agreements_of_runs import FinderCircuits, finders_of
from apps.analyses import (
    PAIRS,
    SEED,
    attribution_of,
    fourier_of,
    lens_of,
    measures_of,
    pairs_of,
    patch_of,
    shuffled_fourier_of,
)
from apps.circuits_of_runs import circuit_of, clusters_of, history_of
from apps.claims import Claim, at_least, at_most
from apps.graft_pairs import is_donor
from apps.graft_sections import GraftEvidence, gather_graft, graft_claims
from apps.probe_sections import ProbeEvidence, gather_probes
from apps.program_evidence import ProgramEvidence, gather_program, program_claims
from apps.reasoner_evidence import ReasonerEvidence, gather_reasoner, reasoner_claims
from apps.reasoner_rows import Reasoner
from apps.search_evidence import SearchEvidence, gather_search, search_claims
from circuits.clusters import ClusterShares
from circuits.faithfulness import Evaluation
from circuits.moments import CircuitHistory
from circuits.patching import PatchMap
from probes.attribution import Attribution, direct_logit_attribution
from probes.fourier import FourierResult
from probes.logit_lens import Trajectory
from probes.progress import ProgressMeasures
from workbench.models.program_config import ProgramConfig
from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import MEASURES, Run

Found = TypeVar("Found")

MEMORISED_LOSS = 1e-4
TEST_LOSS = 1e-2
KEY_FREQUENCIES = (3, 6)
NEURONS_EXPLAINED = 0.8
LOGITS_EXPLAINED = 0.9
NEAR_NOTHING = 0.1
LEAD = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the analyses of a run found; None where one was left out."""

    run: Run
    final: FourierResult | None = None
    memorised: FourierResult | None = None
    """The control: the checkpoint of memorising, with the final one's key frequencies."""
    shuffled: FourierResult | None = None
    """The control: the final checkpoint with its residues relabelled at random."""
    progress: ProgressMeasures | None = None
    patches: PatchMap | None = None
    lens: Trajectory | None = None
    attribution: Attribution | None = None
    """By component."""
    heads: Attribution | None = None
    """The same with attention split into heads."""
    circuit: Evaluation | None = None
    """The smallest circuit that does the task."""
    finders: FinderCircuits | None = None
    """Whether other finders, and other pairs, give the same circuit."""
    clusters: ClusterShares | None = None
    """What the neurons of each key frequency carry."""
    history: CircuitHistory | None = None
    """The circuit of that size at every checkpoint."""
    reasoner: ReasonerEvidence | None = None
    """What a run on composition or comparison has formed; None of another run."""
    probing: ProbeEvidence | None = None
    """Probes of the latents, and the tuned lens."""
    search: SearchEvidence | None = None
    """What a run on graph search does and holds; None of another run."""
    program: ProgramEvidence | None = None
    """What a Transformer Program does and says; None of another run."""
    graft: GraftEvidence | None = None
    """The few weights that carry a donor's skill; None of a run that is no donor."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why an analysis is not there, by its name."""


def gather(run: Run, on_part: Callable[[str], None] = lambda part: None) -> Evidence:
    """Run the standard analyses, and tell the name of each as it begins."""
    left_out: dict[str, str] = {}

    def attempt(name: str, analyse: Callable[[], Found | None]) -> Found | None:
        on_part(name)
        try:
            return analyse()
        except WorkbenchError as error:
            left_out[name] = str(error)
            return None

    split, n = pairs_to_look_at(run)
    if isinstance(run.recipe.model, ProgramConfig):
        # Its variables are patched like any others; what reads a residual stream finds none.
        patches = attempt("activation patching", lambda: patch_of(run, n=n, split=split))
        program = attempt("decompiling", lambda: gather_program(run))
        left_out |= {} if program is None else program.left_out
        return Evidence(run=run, patches=patches, program=program, left_out=left_out)
    is_reasoner, is_search = isinstance(run.task, Reasoner), isinstance(run.task, GraphSearch)
    final = None if is_reasoner or is_search else attempt("Fourier analysis", lambda: fourier_of(run))
    # The circuit of a search is one of positions, which its trace is.
    circuit = None if is_search else attempt("circuit", lambda: circuit_of(run, n=n, split=split))
    if is_search:
        on_part("path merging")
    search = gather_search(run) if is_search else None
    left_out |= {} if search is None else search.left_out
    return Evidence(
        run=run,
        final=final,
        memorised=None if final is None else attempt("memorised control", lambda: _memorised(run)),
        shuffled=None if final is None else attempt("shuffled control", lambda: shuffled_fourier_of(run)),
        progress=None if final is None else attempt("progress measures", lambda: _progress(run, final)),
        patches=attempt("activation patching", lambda: patch_of(run, n=n, split=split)),
        lens=attempt("logit lens", lambda: lens_of(run, n=n, split=split)),
        attribution=attempt("direct logit attribution", lambda: attribution_of(run, n=n, split=split)),
        heads=attempt(
            "direct logit attribution by head",
            lambda: direct_logit_attribution(run.model(), pairs_of(run, n, split), by="head"),
        ),
        circuit=circuit,
        finders=None if circuit is None else attempt("agreement of finders", lambda: _finders(run, circuit, n, split)),
        clusters=None if final is None else attempt("clusters", lambda: clusters_of(run, n=n, split=split)),
        history=None
        if circuit is None
        else attempt("circuit through training", lambda: _history(run, circuit, n, split)),
        reasoner=attempt("measures of reasoning", lambda: gather_reasoner(run)) if is_reasoner else None,
        probing=attempt("probes of the latents", lambda: gather_probes(run, split=split)),
        search=search,
        graft=attempt("graft", lambda: gather_graft(run)) if is_donor(run) else None,
        left_out=left_out,
    )


def pairs_to_look_at(run: Run) -> tuple[str, int]:
    """The split and how many of its pairs: as many as usual, or all that there are."""
    split = "test" if "test" in run.task.splits else run.task.splits[0]
    with_headroom = len(run.task.contrast(run.task.examples(split), seed=SEED))
    return split, max(1, min(PAIRS, with_headroom))


def _memorised(run: Run) -> FourierResult | None:
    """The checkpoint at the moment of memorising, if that was kept and is not the last."""
    step = run.log.step_memorised
    kept = {checkpoint.step for checkpoint in run.checkpoints}
    return fourier_of(run, step) if step in kept and step != run.checkpoint().step else None


def _finders(run: Run, circuit: Evaluation, n: int, split: str) -> FinderCircuits:
    """Other finders' circuits of the same size."""
    size = circuit.circuit.requested
    assert size is not None
    return finders_of(run, edges=size, n=n, split=split)


def _history(run: Run, circuit: Evaluation, n: int, split: str) -> CircuitHistory | None:
    """The circuit at every checkpoint, if there is more than one."""
    if len(run.checkpoints) < 2:
        return None
    return history_of(run, edges=circuit.circuit.requested, n=n, split=split)


def _progress(run: Run, final: FourierResult) -> ProgressMeasures:
    """What was measured after training, or else measured now."""
    rows = run.folder.lines(MEASURES)
    if not rows:
        return measures_of(run)
    return ProgressMeasures(rows=rows, key_frequencies=final.key_frequencies, provenance=final.provenance)


def claims(evidence: Evidence) -> tuple[Claim, ...]:
    """The expected findings that the evidence can speak to."""
    if evidence.reasoner is not None:
        return reasoner_claims(evidence.reasoner)
    if evidence.search is not None:
        return search_claims(evidence.search)
    if evidence.graft is not None:
        return graft_claims(evidence.graft)
    if isinstance(evidence.run.recipe.model, ProgramConfig):
        return () if evidence.program is None else program_claims(evidence.program)
    return (*_training_claims(evidence.run), *_fourier_claims(evidence), *_progress_claims(evidence))


def _training_claims(run: Run) -> Iterator[Claim]:
    rows = run.log.rows
    if not rows:
        return
    memorised, generalised = run.log.step_memorised, run.log.step_generalised
    delay = None if memorised is None or generalised is None else generalised - memorised
    yield Claim(
        statement="steps between memorising and generalising",
        wanted="> 0",
        found=delay,
        holds=delay is not None and delay > 0,
    )
    halved = _row_where_test_loss_halves(rows)
    loss_then = None if halved is None else halved["train_loss"]
    yield at_most("train loss when the test loss has halved from its peak", loss_then, MEMORISED_LOSS)
    yield at_most("test loss at the end", rows[-1]["test_loss"], TEST_LOSS)


def _row_where_test_loss_halves(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    losses = [row["test_loss"] for row in rows]
    peak = losses.index(max(losses))
    return next((row for row in rows[peak:] if row["test_loss"] <= losses[peak] / 2), None)


def _fourier_claims(evidence: Evidence) -> Iterator[Claim]:
    final = evidence.final
    if final is None:
        return
    count = len(final.key_frequencies)
    low, high = KEY_FREQUENCIES
    yield Claim(statement="key frequencies", wanted=f"{low} to {high}", found=float(count), holds=low <= count <= high)
    if final.neurons is not None:
        share = final.neurons.share_explained
        yield at_least("share of live neurons that one frequency explains", share, NEURONS_EXPLAINED)
    yield at_least("share of the logits that the key frequencies explain", final.logits_explained, LOGITS_EXPLAINED)
    whole, kept = (final.losses[name].mean for name in ("loss", "loss_without_other_frequencies"))
    yield at_most("test loss with the key frequencies alone", kept, whole)
    without = final.losses["loss_without_key_frequencies"].mean
    yield at_least("test loss without the key frequencies (guessing costs the bound)", without, math.log(final.order))
    for control, result in (("residues shuffled", evidence.shuffled), ("memorised checkpoint", evidence.memorised)):
        if result is not None:
            neurons = {} if result.neurons is None else {"live neurons": result.neurons.share_explained}
            for part, share in {"logits": result.logits_explained, **neurons}.items():
                yield at_most(f"control, {control}: share of the {part} explained", share, NEAR_NOTHING)


def _progress_claims(evidence: Evidence) -> Iterator[Claim]:
    if evidence.progress is None:
        return
    log = evidence.run.log
    found = evidence.progress.landmarks.summary(memorised=log.step_memorised, generalised=log.step_generalised)
    for name, change in (("excluded", "doubles"), ("restricted", "halves")):
        statement = f"lead of the {name} loss, which {change} before the test loss halves (share of the delay)"
        lead = found[f"{name}_lead"]
        assert lead is None or isinstance(lead, float)
        yield at_least(statement, lead, LEAD)
