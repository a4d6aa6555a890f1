"""What a report says of a donor: what a few weights carry of its skill, and where (Panigrahi et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from apps.analyses import PAIRS, SEED
from apps.claims import Claim, at_most
from apps.graft_pairs import Pair, base_of, pair_of_runs, sibling_runs
from apps.grafting import REAL_STEPS, USUAL, keep_graft, learn_regions, newest_graft
from apps.sections import Section
from circuits.component_grafts import component_grafts
from circuits.graft_edges import EdgeChanges, graft_edges
from circuits.graft_judgement import (
    CONTROLS,
    ENOUGH,
    LEAST_GAIN,
    TOO_MUCH,
    GraftJudgement,
    over_densities,
    overlaps,
)
from circuits.graft_masks import OnProgress
from workbench.intervals import Estimate
from workbench.tables import Table
from workbench.training.checkpoints import Run

PANIGRAHI = "panigrahi2023skill"
SKILL = "a skill that lies in few weights"
RANDOM = 0.1
"""Relative gain that weights drawn at random may have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GraftEvidence:
    """The usual graft of a donor, and what is cheap enough to go with it."""

    pair: Pair
    judgement: GraftJudgement
    foreign: str | None = None
    """The donor of another task whose change is a control."""
    sizes: Table | None = None
    """The gain by the share of weights; None of a real model, where it takes hours."""
    components: Table | None = None
    """Each head and MLP: its weights grafted, its activation patched; None of a real model."""
    edges: EdgeChanges | None = None
    """Which edges of the base's circuit the graft changes; None of a real model."""
    overlaps: Table | None = None
    """With the regions of the same base's other donors; None where there are none."""


def gather_graft(run: Run) -> GraftEvidence:
    """Find and judge the usual graft of a run's donor, those of other sizes, and what it shares with its siblings.

    Raises:
        WorkbenchError: the base is not there any more.
    """
    base, siblings = base_of(run), sibling_runs(run)
    pair = pair_of_runs(base, run)
    train, test = pair.examples("train"), pair.examples("test")
    first = next(iter(siblings.values()), None)
    judgement = keep_graft(pair, foreign=None if first is None else pair_of_runs(base, first))
    regions = learn_regions(base, {run.reference: run, **siblings}, method=USUAL["method"], density=USUAL["density"])
    return GraftEvidence(
        pair=pair,
        judgement=judgement,
        foreign=None if first is None else first.reference,
        components=component_grafts(base.model(), pair.delta(), run.task.examples("test")),
        edges=graft_edges(base.model(), judgement.graft, run.task.sample(PAIRS, split="test", seed=SEED)),
        sizes=over_densities(pair.delta(), train, test),
        overlaps=overlaps(regions) if siblings else None,
    )


def gather_real_graft(pair: Pair, on_progress: OnProgress) -> GraftEvidence:
    """The graft of a real model's donor that was judged last, or else the usual one, which takes minutes."""
    newest = newest_graft(pair)
    judgement = keep_graft(pair, steps=REAL_STEPS, on_progress=on_progress) if newest is None else newest
    return GraftEvidence(pair=pair, judgement=judgement)


def graft_claims(evidence: GraftEvidence) -> tuple[Claim, ...]:
    """What one expects of a skill that lies in few weights."""
    return tuple(_claims(evidence.judgement))


def _claims(found: GraftJudgement) -> Iterator[Claim]:
    rows = found.rows.set_index("weights_of")
    n = len(found.judged[0].answers)

    def gain(name: str) -> Estimate | None:
        mean, low, high = (rows.loc[name, f"relative_gain{end}"] for end in ("", "_low", "_high"))
        return None if mean != mean else Estimate(mean=float(mean), low=float(low), high=float(high))

    gained = float(rows.loc["donor", "accuracy"] - rows.loc["base", "accuracy"])
    yield Claim(
        statement="accuracy gained by fine-tuning",
        wanted=f"≥ {LEAST_GAIN:.4g}",
        found=gained,
        holds=gained >= LEAST_GAIN,
        n=n,
    )
    graft = gain("graft")
    yield Claim(
        statement=f"relative gain of the graft, {found.graft.density:.2%} of the weights (lower end)",
        wanted=f"≥ {ENOUGH:.4g}",
        found=None if graft is None else graft.mean,
        holds=graft is not None and graft.low >= ENOUGH,
        interval=graft,
        n=n,
    )
    for name in (name for name in CONTROLS if name in rows.index):
        control, most = gain(name), RANDOM if name == "matched random" else TOO_MUCH
        yield Claim(
            statement=f"control, {name}: relative gain",
            wanted=f"≤ {most:.4g}",
            found=None if control is None else control.mean,
            holds=control is not None and control.mean <= most,
            interval=control,
            n=n,
        )
    error = float(rows.loc["graft", "ece_debiased"])
    statement = "debiased calibration error of the graft (the bound: of the uniform share that is as accurate)"
    yield at_most(statement, error, float(rows.loc[found.uniform.name, "ece_debiased"]))


def graft_sections(evidence: GraftEvidence) -> tuple[Section, ...]:
    """How much the graft carries, where it lies, how it grows with size, and what regions share."""
    found = (
        _gain(evidence),
        _places(evidence),
        _parts(evidence),
        _edges(evidence),
        _sizes(evidence),
        _shared(evidence),
    )
    return tuple(section for section in found if section is not None)


def describe_graft(evidence: GraftEvidence) -> str:
    """Its size, accuracy and verdict in a few sentences."""
    found = evidence.judgement
    rows = found.rows.set_index("weights_of")
    accuracies = ", ".join(f"{name} {rows.loc[name, 'accuracy']:.3f}" for name in ("base", "graft", "donor"))
    verdict = "The skill is localised in it" if found.localised else f"Not called localised: {found.objection}"
    return (
        f"A graft of {len(found.graft):,} of {len(found.graft.delta):,} weights ({found.graft.density:.2%}), put into "
        f"the base: accuracy of {accuracies} (n = {len(found.judged[0].answers):,}). {verdict}. One donor, one seed."
    )


def _gain(evidence: GraftEvidence) -> Section:
    found = evidence.judgement
    gain, _, reliability = found.tables()
    donor = "another task's donor" if evidence.foreign is None else repr(evidence.foreign)
    is_there = any(each.name == "foreign" for each in found.judged)
    foreign = f", and on what {donor} changed" if is_there else ""
    text = (
        f"The graft takes {len(found.graft):,} weights from the donor and all others from the base. Its region was "
        f"found by the method {found.graft.method!r} in {found.steps} steps on {found.examples:,} training "
        "examples; everything below is measured on test examples that were in none of this.\n\n"
        "Beside it: as many weights of each tensor at random, among all and among those that changed; the largest "
        f"changes; a region learned in the same way on the change permuted within tensors{foreign}, for a mask can "
        f"learn a task by itself; and the whole change at the share {found.share:g}, the least that is "
        "as accurate on validation. A skill is called localised if the lower end of the relative gain is at least "
        f"{ENOUGH} and no control has more than {TOO_MUCH}.\n\n"
        f"Calibration is judged at equal accuracy. The donor's logits are best divided by {found.temperature:.2f}, "
        "found on validation: what temperature alone does is the row 'donor, temperature'."
    )
    return Section(
        title="The graft",
        text=text,
        tables=(gain, reliability),
        references=(PANIGRAHI,),
    )


def _places(evidence: GraftEvidence) -> Section:
    return Section(
        title="Where the weights lie",
        text="Weights of the region in each tensor, against what the tensor's size alone would give.",
        tables=(evidence.judgement.graft.where(),),
    )


def _parts(evidence: GraftEvidence) -> Section | None:
    if evidence.components is None:
        return None
    return Section(
        title="Weights and activations",
        text="Two ways to give the base what a head or an MLP of the donor has: its weights, which then read whatever "
        "the base's stream holds, or what it wrote in the donor on the same prompt. Where only the activation "
        "mends the answer, it is what the component reads that was changed.",
        tables=(evidence.components,),
    )


def _edges(evidence: GraftEvidence) -> Section | None:
    if evidence.edges is None:
        return None
    return Section(
        title="Which edges the graft changes",
        text="Every edge of the circuit graph is scored on the same pairs in the base, in the base with the graft, and "
        "in the donor: what the graft does to weights, seen as what it does to the algorithm.",
        tables=(evidence.edges.table(),),
        references=("hanna2024have", "benjamini1995controlling"),
    )


def _sizes(evidence: GraftEvidence) -> Section | None:
    if evidence.sizes is None:
        return None
    return Section(
        title="Grafts of every size",
        text="A region is found anew at every size, also on a change that was permuted within tensors.",
        tables=(evidence.sizes,),
    )


def _shared(evidence: GraftEvidence) -> Section | None:
    if evidence.overlaps is None:
        return None
    return Section(
        title="What the regions of several tasks share",
        text="Chance is what regions of these sizes share when they lie at random within each tensor.",
        tables=(evidence.overlaps,),
        references=(PANIGRAHI,),
    )
