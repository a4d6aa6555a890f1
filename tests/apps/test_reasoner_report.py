"""What a report says of a reasoner: its sections, its claims, and what it does not show."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from apps.claims import Claim, claims_tables
from apps.evidence import Evidence, claims, gather
from apps.reasoner_evidence import (
    LAST,
    ReasonerEvidence,
    compared_checkpoints,
    delay_of,
    gather_reasoner,
    reasoner_claims,
)
from apps.reasoner_rows import answered
from apps.reasoner_sections import describe_scale, reasoner_sections
from apps.references import REFERENCES
from apps.report_sections import sections_of
from apps.sections import Section
from workbench import load
from workbench.intervals import Estimate
from workbench.tasks.composition import Composition
from workbench.training.checkpoints import Run

MODULAR_ALONE = {"Progress measures", "Fourier circuit", "Controls", "The MLP, split by frequency"}
CHAINS_ALONE = {"Redirecting the second hop", "Which hop is missing", "Two calls"}
REASONERS_ALL = {
    "From memorising to generalising",
    "Data",
    "Reference lines",
    "Latents in the lens, through training",
    "Causal tracing",
    "Efficiency",
    "All measures",
}


def grokked_folder(source: Path, target: Path, *, memorised: int, generalised: int) -> Run:
    """A copy of a run whose log says that it memorised and generalised at these steps."""
    shutil.copytree(source, target)
    log = target / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        row["train_accuracy"] = float(row["step"] >= memorised)
        row["test_accuracy"] = float(row["step"] >= generalised)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(str(target))


@pytest.fixture(scope="module")
def chains(reasoners_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ReasonerEvidence:
    """A run on composition that memorised early and generalised later, or so its log says."""
    target = tmp_path_factory.mktemp("grokked") / "chains"
    return gather_reasoner(grokked_folder(reasoners_folder / "chains", target, memorised=30, generalised=60))


@pytest.fixture(scope="module")
def values(reasoners_folder: Path) -> ReasonerEvidence:
    return gather_reasoner(load("values", runs=reasoners_folder))


@pytest.fixture(scope="module")
def looped(reasoners_folder: Path) -> ReasonerEvidence:
    return gather_reasoner(load("looped", runs=reasoners_folder))


def titled(sections: tuple[Section, ...]) -> dict[str, Section]:
    return {section.title: section for section in sections}


def statements(evidence: ReasonerEvidence) -> dict[str, Claim]:
    return {claim.statement: claim for claim in reasoner_claims(evidence)}


def test_the_checkpoints_that_are_compared(chains: ReasonerEvidence, values: ReasonerEvidence) -> None:
    [memorised, last] = chains.checkpoints.items()
    assert memorised == ("memorised", min(chains.found.steps, key=lambda step: abs(step - 30)))
    assert last == (LAST, chains.run.checkpoint().step)
    assert delay_of(chains.run) == 2.0
    # No landmark: nothing to compare with.
    assert compared_checkpoints(values.run, values.found) == {LAST: 60}
    assert values.first is None
    assert delay_of(values.run) is None


def test_accuracies_are_those_of_whole_splits(chains: ReasonerEvidence) -> None:
    row = chains.accuracy("test")
    assert row is not None
    whole = answered(chains.run.model(), chains.run.task.examples("test"))
    assert (row["value"], row["low"], row["high"]) == (whole.mean, whole.low, whole.high)
    assert row["n"] == len(chains.run.task.examples("test"))
    assert {each["split"] for each in chains.accuracies} == set(chains.run.task.splits)


def test_claims_on_chains(chains: ReasonerEvidence) -> None:
    found = statements(chains)
    free = {name for name, claim in found.items() if claim.free}
    assert free == {
        "MRR of the bridge at r1, L1.resid_post, test",
        "MRR of the bridge at r1, L1.resid_post, ood",
        "two calls, test",
        "two calls, ood",
        "MRR of r2 at r2 before the first layer, test",
    }
    ood = found["accuracy on ood, at the end"]
    row = chains.accuracy("ood")
    assert row is not None
    assert (ood.found, ood.n, ood.wanted, ood.holds) == (row["value"], row["n"], "≤ 0.05", row["value"] <= 0.05)
    assert ood.interval == Estimate(mean=row["value"], low=row["low"], high=row["high"])
    assert found["steps until generalised, as a multiple of those until memorised"].found == 2.0
    redirect = found["redirect rate at L0.resid_post, test, when memorised"]
    measured = chains.one("redirect", "memorised", split="test")
    assert measured is not None
    assert redirect.found == measured["value"]
    rise = found["rise of the MRR of the second relation at r2, L0.resid_post, test, from memorised to the end"]
    early, late = (chains.one("mrr_relation", name, split="test", site="L0.resid_post") for name in ("memorised", LAST))
    assert early is not None
    assert late is not None
    assert rise.found == late["value"] - early["value"]
    assert rise.holds == (late["low"] > early["high"])


def test_without_a_landmark_nothing_is_made_up(reasoners_folder: Path, tmp_path: Path) -> None:
    run = grokked_folder(reasoners_folder / "chains", tmp_path / "chains", memorised=1000, generalised=1000)
    found = statements(gather_reasoner(run))
    for name in (
        "redirect rate at L0.resid_post, test, when memorised",
        "rise of the MRR of the second relation at r2, L0.resid_post, test, from memorised to the end",
        "steps until generalised, as a multiple of those until memorised",
    ):
        assert (found[name].found, found[name].holds) == (None, False)


def test_claims_on_comparisons(values: ReasonerEvidence) -> None:
    found = statements(values)
    assert {"accuracy on test (ID), at the end", "accuracy on ood, at the end"} <= set(found)
    assert found["accuracy on ood, at the end"].wanted == "≥ 0.97"
    assert not any("redirect" in name or "bridge" in name for name in found)


def test_shared_blocks_are_expected_to_reach_ood(looped: ReasonerEvidence) -> None:
    claim = next(claim for name, claim in statements(looped).items() if name.startswith("accuracy on ood"))
    row = looped.accuracy("ood")
    assert row is not None
    assert "with shared blocks" in claim.statement
    assert (claim.found, claim.holds) == (row["low"], row["low"] > 0.05)


def test_told_second_hops_are_expected_to_reach_ood(chains: ReasonerEvidence) -> None:
    task = chains.run.task
    assert isinstance(task, Composition)
    covered = replace(chains.run, recipe=replace(chains.run.recipe, task=replace(task, role_coverage=0.5)))
    found = statements(replace(chains, run=covered))
    assert any("with OOD facts told as a second hop" in name for name in found)


def test_tables_of_claims_keep_counts_whole() -> None:
    found = [
        Claim(statement="a", wanted="> 1", found=2.0, holds=True),
        Claim(
            statement="b", wanted="≥ 0.9", found=0.5, holds=False, interval=Estimate(mean=0.5, low=0.4, high=0.6), n=9
        ),
        Claim(statement="c", wanted="≥ 0.9", found=1.0, holds=True, free=True),
    ]
    claimed, sanity = claims_tables(found)
    assert claimed.csv().splitlines() == [
        "finding,expected,found,low,high,n,holds",
        "a,> 1,2.0,,,,True",
        "b,≥ 0.9,0.5,0.4,0.6,9,False",
    ]
    assert sanity.csv().splitlines() == ["finding,expected,found,holds", "c,≥ 0.9,1.0,True"]
    assert "nearly free" in sanity.caption


def test_sections_on_chains(chains: ReasonerEvidence) -> None:
    sections = titled(reasoner_sections(chains))
    assert set(sections) == REASONERS_ALL | CHAINS_ALONE
    story = sections["From memorising to generalising"].text
    assert "the delay here is about 2.0-fold, not the paper's" in story
    assert "entities 20, relations 5, out degree 4, phi 2.0" in story
    [data] = sections["Data"].tables
    assert dict(zip(data.frame["split"], data.frame["prompts"], strict=True)) == {
        split: len(chains.run.task.examples(split)) for split in chains.run.task.splits
    }
    assert data.frame["what"].all()
    assert "skipped" in sections["All measures"].tables[0].frame
    for section in sections.values():
        assert set(section.references) <= set(REFERENCES)
        for table in section.tables:
            if table.name not in ("reasoning_data",):
                assert {"n", "low", "high"} <= set(table.frame), table.name
                assert table.kind == "table" or "n = " in table.caption


def test_sections_on_comparisons_and_on_loops(values: ReasonerEvidence, looped: ReasonerEvidence) -> None:
    sections = titled(reasoner_sections(values))
    assert set(sections) == REASONERS_ALL
    assert "There is no delay to speak of: this run never memorised nor generalised." in (
        sections["From memorising to generalising"].text
    )
    assert "comparison" in sections["From memorising to generalising"].text
    [loops] = titled(reasoner_sections(looped))["More and fewer loops"].tables
    assert sorted(set(loops.frame["loops"])) == [1, 2, 3, 4]
    assert "run as 0 1 0 1" in describe_scale(looped.run.task, looped.run.recipe.model)


def test_a_run_that_generalised_first_has_no_delay(reasoners_folder: Path, tmp_path: Path) -> None:
    run = grokked_folder(reasoners_folder / "chains", tmp_path / "chains", memorised=60, generalised=30)
    evidence = gather_reasoner(run)
    assert evidence.first == "generalised"
    assert "There is no delay: the run generalised at step 30, and memorised all of training at step 60." in (
        titled(reasoner_sections(evidence))["From memorising to generalising"].text
    )


@pytest.fixture(scope="module")
def whole(chains: ReasonerEvidence) -> Evidence:
    return gather(chains.run)


@pytest.mark.slow
def test_the_report_has_what_is_general_and_what_is_its_own(whole: Evidence) -> None:
    sections = titled(sections_of(whole))
    assert list(sections)[:3] == ["Summary", "Training", "From memorising to generalising"]
    assert set(sections) >= {"Activation patching", "Logit lens", "Circuit", *REASONERS_ALL, *CHAINS_ALONE}
    assert not MODULAR_ALONE & set(sections)
    assert not any("Fourier" in name for name in whole.left_out)
    assert [table.name for table in sections["Summary"].tables] == ["claims", "claims_sanity"]
    findings = [claim for claim in claims(whole) if not claim.free]
    assert f"Of {len(findings)} findings" in sections["Summary"].text
    names = [table.name for section in sections.values() for table in section.tables]
    assert len(names) == len(set(names))


def test_every_paper_on_reasoners_is_cited(chains: ReasonerEvidence, looped: ReasonerEvidence) -> None:
    sections = (*reasoner_sections(chains), *reasoner_sections(looped))
    cited = {key for section in sections for key in section.references}
    assert cited >= {"wang2024grokked", "varma2023explaining", "press2023measuring", "dehghani2019universal"}


@pytest.mark.slow
def test_a_run_that_was_not_measured_is_measured_for_its_report(reasoners_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(reasoners_folder / "looped", tmp_path / "looped")
    (tmp_path / "looped" / "measures.jsonl").unlink()
    evidence = gather_reasoner(load("looped", runs=tmp_path))
    kept = gather_reasoner(load("looped", runs=reasoners_folder))
    assert evidence.found.steps == kept.found.steps
    assert [row["value"] for row in evidence.accuracies] == [row["value"] for row in kept.accuracies]
    assert not (tmp_path / "looped" / "measures.jsonl").exists()
