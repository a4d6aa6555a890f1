"""What a report says of a run on graph search: its sections, its claims, and what was left out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apps import search_evidence
from apps.evidence import Evidence, claims, gather
from apps.probing import reachability_of
from apps.references import REFERENCES
from apps.report_sections import sections_of
from apps.search_evidence import (
    MUST_FAIL,
    SOLVED,
    SearchEvidence,
    gather_search,
    lookahead_curves,
    search_claims,
)
from apps.search_sections import describe_scale, search_sections
from workbench import load
from workbench.runtime import WorkbenchError

TITLES = [
    "Who looks how far ahead",
    "Each lookahead in turn",
    "What the stream knows of reachability",
    "Path merging",
    "Are the explained operations what answers?",
]


@pytest.fixture(scope="module", autouse=True)
def few_inputs() -> Iterator[None]:
    """Tracing is what takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_evidence, "TRACED", 3)
        yield


@pytest.fixture(scope="module")
def evidence(searches_folder: Path) -> Evidence:
    return gather(load("searching", runs=searches_folder))


@pytest.fixture(scope="module")
def found(evidence: Evidence) -> SearchEvidence:
    assert evidence.search is not None
    return evidence.search


@pytest.fixture(scope="module")
def doubling(searches_folder: Path) -> SearchEvidence:
    return gather_search(load("doubling", runs=searches_folder))


def test_a_search_run_has_its_sections(evidence: Evidence, found: SearchEvidence) -> None:
    sections = sections_of(evidence)
    titles = [section.title for section in sections]
    assert [title for title in titles if title in TITLES] == TITLES
    assert not {"Circuit", "Fourier circuit", "The circuit through training"} & set(titles)
    names = [table.name for section in sections for table in section.tables]
    assert len(names) == len(set(names))
    assert {key for section in sections for key in section.references} <= set(REFERENCES)
    assert "of a network that searches by merging paths" in sections[0].text
    assert sections[0].references == ("saparov2025transformers",)
    assert not found.left_out
    assert evidence.circuit is None
    # One of modular arithmetic or of chains has none of these.
    assert "grokked network" not in sections[0].text


def test_accuracies_are_those_of_the_log(found: SearchEvidence) -> None:
    rows = {row["split"]: row for row in found.accuracies}
    assert list(rows) == ["test_0", "test_1", "test_2", "test_3", "test_naive", "test_star"]
    last = found.run.log.rows[-1]
    for split in ("test_0", "test_3"):
        assert rows[split]["accuracy"] == pytest.approx(last[f"{split}_accuracy"])
    for row in rows.values():
        assert row["n"] == 60
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert 0 < row["chance"] <= 1


def test_chance_is_a_child_at_random(found: SearchEvidence) -> None:
    task = found.task
    batch = task.examples("test_2")
    graphs = task.graphs(batch)
    shares = []
    for row in range(len(batch)):
        children = [child for child in range(64) if int(graphs.first[row]) >> child & 1]
        useful = [child for child in children if int(graphs.useful()[row]) >> child & 1]
        shares.append(len(useful) / len(children))
    rows = {row["split"]: row for row in found.accuracies}
    assert rows["test_2"]["chance"] == pytest.approx(np.mean(shares))


def test_an_unfinished_search_fails_its_claims(evidence: Evidence, found: SearchEvidence) -> None:
    made = {claim.statement: claim for claim in claims(evidence)}
    for lookahead in range(4):
        claim = made[f"accuracy at lookahead {lookahead}"]
        assert not claim.holds
        assert claim.wanted == f"≥ {SOLVED:g}"
        assert claim.n == 60
    assert not made["share of inputs of lookahead 2 or more that path merging explains, strict merge"].holds
    assert made["control, the same of a model wired to merge"].found == 1
    for claim in made.values():
        assert claim.interval is not None
        assert claim.interval.low <= claim.interval.mean <= claim.interval.high


def test_a_model_wired_to_merge_keeps_them(doubling: SearchEvidence) -> None:
    made = {claim.statement: claim for claim in search_claims(doubling)}
    explained = made["share of inputs of lookahead 2 or more that path merging explains, strict merge"]
    assert explained.holds
    assert explained.n == 6
    assert set(MUST_FAIL) == {"untrained", "random_operations", "wrong_graph"}
    assert made["control, random operations"].holds
    assert made["accuracy at lookahead 2"].holds
    # It came without a training: there are no curves of one.
    assert lookahead_curves(doubling.run) is None
    assert TITLES[1] not in [section.title for section in search_sections(doubling)]


def test_what_cannot_be_measured_is_left_out_with_its_reason(searches_folder: Path, found: SearchEvidence) -> None:
    bare = replace(found, reached=None, traces=None, left_out={"path merging": "One head a layer is wanted."})
    titles = [section.title for section in search_sections(bare)]
    assert titles == TITLES[:2]
    assert all(claim.statement.startswith("accuracy at lookahead") for claim in search_claims(bare))


def test_the_scale_is_told(found: SearchEvidence) -> None:
    said = describe_scale(found.task, found.run.recipe.model)
    assert said == (
        "graphs of up to 7 edges in 26 tokens, lookaheads 0 to 3, balanced in training; 3 layers of width 55"
    )
    text = search_sections(found)[0].text
    assert said in text
    assert "2,560 examples at most" in text


def test_reachability_is_of_searches_alone() -> None:
    with pytest.raises(WorkbenchError, match="'gallery:modular' learnt 'modular'. Train one: `workbench train search`"):
        reachability_of(load("gallery:modular"))
