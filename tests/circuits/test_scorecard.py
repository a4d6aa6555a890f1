"""Finders scored against known circuits: the frozen set, ACDC's promise, hand-worked rows, and EAP's failures."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from circuits import finders, truths
from circuits.acdc import acdc
from circuits.attribution import exact_scores
from circuits.components import inputs_of, run_parts, weighted
from circuits.discovery import METHODS
from circuits.finders import THRESHOLDS, acdc_ranking, part_of, rank_edges
from circuits.ranking import judge
from circuits.scorecard import ScoreCard, scorecard
from circuits.truths import (
    SET,
    SET_DIGEST,
    SET_N,
    SET_SEED,
    SET_VERSION,
    ablations_of,
    causal_edges,
    experiment_on,
    fingerprint,
    load_known,
    set_digest,
)
from workbench.figures import figure
from workbench.models.planted import PLANTED, copy
from workbench.models.tracr import tracr_names
from workbench.runtime import WorkbenchError, generator
from workbench.store import to_json


@pytest.fixture(scope="module")
def card() -> ScoreCard:
    return scorecard(["exact", "eap", "eap-ig", "ifr"], ["induction", "or_gate", "tracr-hist", "tracr-reverse"])


def one_edge_at_a_time(name: str, ablation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The metric without each edge minus the whole model's, a circuit a pass; and what counts as a change."""
    known = load_known(name)
    plan = experiment_on(known, known.pairs(SET_N, SET_SEED), ablation)  # pyright: ignore[reportArgumentType]
    n_edges, effects = len(plan.graph.edges), []
    with torch.no_grad():
        inputs = inputs_of(plan.model, plan.graph, plan.batch.tokens)
        for edge in range(n_edges):
            keep = torch.ones(1, n_edges)
            keep[0, edge] = 0
            mix = weighted(plan.graph, keep, plan.ablated)
            stream = run_parts(plan.model, plan.graph, plan.batch.tokens, inputs, mix)[1]
            effects.append(plan.measure(plan.model.finish(stream[plan.batch.read], {})) - plan.full)
    return torch.stack(effects), torch.tensor(1e-3 * abs(plan.headroom))


@pytest.mark.parametrize(
    ("name", "ablation"), [("induction", "resample"), ("or_gate", "zero"), ("copy", "mean"), ("tracr-hist", "zero")]
)
def test_exact_scores_and_the_causal_truth_are_brute_force(name: str, ablation: str) -> None:
    known = load_known(name)
    plan = experiment_on(known, known.pairs(SET_N, SET_SEED), ablation)  # pyright: ignore[reportArgumentType]
    effects, change = one_edge_at_a_time(name, ablation)
    torch.testing.assert_close(exact_scores(plan).score, -effects.mean(1), rtol=1e-5, atol=1e-5 * abs(plan.headroom))
    assert torch.equal(causal_edges(plan), effects.abs().amax(1) > change)


@pytest.mark.parametrize(("name", "causal"), [("hist", 6), ("frac_prevs", 5), ("reverse", 11)])
@pytest.mark.parametrize("threshold", [1e-3, 1e-2])
def test_acdc_finds_what_changes_an_output_and_nothing_outside_the_program(
    name: str, causal: int, threshold: float
) -> None:
    known = load_known(f"tracr-{name}")
    plan = experiment_on(known, known.pairs(64, 0), "zero")
    kept = set(plan.graph.names(acdc(plan, threshold).keep))
    changing = set(plan.graph.names(causal_edges(plan)))
    assert len(changing) == causal
    assert changing <= kept <= known.structural | known.constants


def test_the_frozen_set_is_what_its_digest_says() -> None:
    assert set(SET) == {*PLANTED, *(f"tracr-{name}" for name in tracr_names())}
    prints, counts = {}, {}
    for name in SET:
        known = load_known(name)
        assert known.name == name
        batch = known.pairs(SET_N, SET_SEED)
        plans = [experiment_on(known, batch, ablation) for ablation in ablations_of(known)]
        found = {plan.ablation: truths.truths(known, plan) for plan in plans}
        prints[name] = fingerprint(known, batch, found)
        counts[name] = [tuple(int(edges.sum()) for edges in both.values()) for both in found.values()]
    assert set_digest(prints) == set_digest(dict(reversed(prints.items()))) == SET_DIGEST
    assert counts["or_gate"] == [(7, 1), (9, 1)]
    assert counts["copy"] == [(4, 2), (4, 2), (4, 4)]
    assert counts["tracr-shuffle_dyck2"] == [(57, 37)]
    assert counts["trained_xor"][0] == (5, 101)


def test_a_digest_sees_weights_prompts_and_truths_but_no_rounding() -> None:
    known = copy()
    batch = known.pairs(4, 0)
    found = {"resample": truths.truths(known, experiment_on(known, batch, "resample"))}
    before = fingerprint(known, batch, found)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        known.model.embed.W_E += 1e-7
        assert fingerprint(known, batch, found) == before  # pyright: ignore[reportArgumentType]
        known.model.embed.W_E[0, 0] += 1e-3
    assert fingerprint(known, batch, found) != before  # pyright: ignore[reportArgumentType]
    other = copy()
    assert fingerprint(other, batch, found) == before  # pyright: ignore[reportArgumentType]
    assert fingerprint(other, other.pairs(4, 1), found) != before  # pyright: ignore[reportArgumentType]
    flipped = {"resample": {**found["resample"], "causal": ~found["resample"]["causal"]}}
    assert fingerprint(other, batch, flipped) != before  # pyright: ignore[reportArgumentType]


def test_a_part_of_the_set_is_not_the_set(card: ScoreCard, monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.version is None
    small = scorecard(["exact"], ["copy"], n=4)
    monkeypatch.setattr("circuits.scorecard.SET_DIGEST", small.digest)
    assert scorecard(["eap"], ["copy"], n=4).version == SET_VERSION
    assert scorecard(["exact"], ["copy"], n=4, seed=1).version is None
    assert scorecard(["exact"], ["copy"], ["zero"], n=4).version is None


def row(card: ScoreCard, circuit: str, ablation: str, finder: str, truth: str) -> dict[str, float]:
    chosen = card.frame.query("circuit == @circuit and ablation == @ablation and finder == @finder and truth == @truth")
    assert len(chosen) == 1
    return chosen.iloc[0].to_dict()


def test_the_or_gate_hides_its_bits_from_single_ablations(card: ScoreCard) -> None:
    causal = row(card, "or_gate", "resample", "exact", "causal")
    assert (causal["edges"], causal["live"], causal["true"]) == (29, 13, 1)
    assert [causal[name] for name in ("auroc", "auprc", "precision", "recall")] == [1, 1, 1, 1]
    structural = row(card, "or_gate", "resample", "exact", "structural")
    # Of seven true edges one is above the 22 false ones, and six tie with them.
    assert structural["auroc"] == pytest.approx((22 + 6 * 22 / 2) / (7 * 22))
    assert structural["auprc"] == pytest.approx(1 / 7 * 1 + 6 / 7 * 7 / 29)
    # Six more places are drawn from the other twelve live edges, of which four are true: two carry positions.
    assert structural["precision"] == structural["recall"] == pytest.approx((1 + 6 * 4 / 12) / 7)
    assert structural["density"] == pytest.approx(7 / 29)
    # Five of the seven are live, and eight of the 22: less than any edge's effect tells, this is better than effects.
    assert structural["live_auroc"] == pytest.approx((5 * (14 + 8 / 2) + 2 * 14 / 2) / (7 * 22))
    assert structural["live_auroc"] > structural["auroc"]


def test_what_saturates_is_invisible_to_a_single_gradient(card: ScoreCard) -> None:
    # The squared error from the clean run is flat there, so that the gradient is the ablated run's.
    blind = row(card, "tracr-reverse", "zero", "eap", "causal")
    assert blind["reference"] == "ablated run"
    assert blind["auroc"] == pytest.approx(0.59, abs=0.01)
    for finder in ("exact", "eap-ig"):
        assert row(card, "tracr-reverse", "zero", finder, "causal")["auroc"] > 0.99
    eap = card.means.query("ablation == 'zero' and truth == 'causal'").set_index("finder")
    assert eap.loc["eap", "auroc"] < eap.loc["exact", "auroc"] - 0.2
    # At the clean run, too, saturated attention has none through queries and keys.
    assert row(card, "induction", "resample", "eap", "causal")["reference"] == "clean run"
    assert row(card, "induction", "resample", "eap", "causal")["auroc"] == pytest.approx(0.7, abs=0.01)
    assert row(card, "induction", "resample", "exact", "causal")["auroc"] == 1


def test_rows_say_what_chance_reaches(card: ScoreCard) -> None:
    frame = card.frame
    assert len(frame) == (3 + 2 + 1 + 1) * 4 * 2
    assert not frame.duplicated(["circuit", "ablation", "truth", "finder"]).any()
    assert (frame["random_auroc"] - 0.5).abs().max() < 0.05
    # Live edges are fewer than all, and more of them are true.
    assert (frame["random_precision"] > frame["density"] - 0.05).all()
    assert (frame["random_precision"] > 1.3 * frame["density"]).any()
    assert (frame["random_auroc_low"] < 0.5).all()
    assert (frame["random_auroc_high"] > 0.5).all()
    assert (frame["forwards"] > 0).all()


@pytest.mark.parametrize("truth", ["structural", "causal"])
@pytest.mark.parametrize(("name", "ablation"), [("or_gate", "resample"), ("tracr-reverse", "zero")])
def test_a_random_score_is_at_the_chance_that_is_shown(name: str, ablation: str, truth: str, card: ScoreCard) -> None:
    known = load_known(name)
    plan = experiment_on(known, known.pairs(SET_N, SET_SEED), ablation)  # pyright: ignore[reportArgumentType]
    true, draw = truths.truths(known, plan)[truth], generator(0, "random scores")  # pyright: ignore[reportArgumentType]
    judged = [judge(torch.rand(len(true), generator=draw), true, plan.live) for _ in range(1000)]
    shown = row(card, name, ablation, "exact", truth)
    for measure in ("auroc", "auprc", "precision", "recall"):
        values = torch.tensor([getattr(quality, measure) for quality in judged])
        # Both means are over 1000 rankings.
        error = float(values.std()) * (2 / 1000) ** 0.5
        assert shown[f"random_{measure}"] == pytest.approx(float(values.mean()), abs=4 * error)


def test_acdc_ranks_by_the_largest_threshold_that_keeps_an_edge() -> None:
    known = load_known("or_gate")
    plan = experiment_on(known, known.pairs(16, 0), "resample")
    told: list[float] = []
    score = acdc_ranking(plan, on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    for share in THRESHOLDS:
        kept = acdc(plan, share * abs(plan.headroom)).keep
        assert (score[kept] >= share * abs(plan.headroom) * (1 - 1e-6)).all()
        assert torch.equal(kept, score > share * abs(plan.headroom) * (1 - 1e-6))
    # One way through the gate is dropped first and the other must then stay.
    assert sum(score[plan.graph.index[f"a0.h{head}->m0"]] > 0 for head in (0, 2)) == 1


def test_closed_gates_do_not_rank_as_strong() -> None:
    known = load_known("induction")
    plan = experiment_on(known, known.pairs(16, 0), "zero")
    size = len(known.structural)
    ranking = rank_edges(plan, "mask", size=size)
    assert ranking.score is not None
    found = judge(ranking.score, plan.graph.mask(known.structural), plan.live)
    assert found is not None
    assert found.auroc > 0.99
    assert found.precision == 1


def test_effects_below_rounding_tie() -> None:
    known = load_known("induction")
    plan = experiment_on(known, known.pairs(16, 0), "zero")
    score = rank_edges(plan, "eap", size=1).score
    assert score is not None
    assert float(score[score > 0].min()) > 1e-6 * abs(plan.headroom)
    assert float(score.min()) == 0


def test_a_finder_that_cannot_run_says_why() -> None:
    known = replace(copy(), metric="disagreement")
    card = scorecard(["eap", "mask", "exact"], [known], ["zero"], n=8)
    for finder in ("eap", "mask"):
        lost = row(card, "copy", "zero", finder, "structural")
        assert lost["auroc"] != lost["auroc"]
        assert "no gradient" in str(lost["reason"])
        assert lost["random_auroc"] == pytest.approx(0.5, abs=0.05)
    assert row(card, "copy", "zero", "exact", "structural")["auroc"] > 0.9
    assert set(card.means["finder"]) == {"exact"}


def test_a_truth_that_tells_nothing_apart_says_so() -> None:
    known = replace(copy(), structural=frozenset())
    lost = row(scorecard(["exact"], [known], ["resample"], n=8), "copy", "resample", "exact", "structural")
    assert lost["auroc"] is None or lost["auroc"] != lost["auroc"]
    assert lost["reason"] == "0 of 23 edges are true: there is nothing to tell apart"
    assert lost["density"] == 0


def test_means_compare_finders_on_the_same_circuits(card: ScoreCard) -> None:
    means = card.means.query("ablation == 'zero' and truth == 'causal'").set_index("finder")
    assert (means["circuits"] == 4).all()
    values = card.frame.query("ablation == 'zero' and truth == 'causal' and finder == 'eap'")["auroc"]
    assert means.loc["eap", "auroc"] == pytest.approx(values.mean())
    half = 3.182446 * values.std() / 4**0.5
    assert means.loc["eap", "low"] == pytest.approx(max(0, values.mean() - half), abs=1e-5)
    assert means.loc["eap", "high"] == pytest.approx(min(1, values.mean() + half), abs=1e-5)
    assert means.loc["eap", "high"] == 1
    free = card.frame.query("ablation == 'zero' and truth == 'causal' and finder == 'eap'")["live_auroc"]
    assert means.loc["exact", "live_auroc"] == means.loc["eap", "live_auroc"] == pytest.approx(free.mean())
    assert "n = 2 (resample, structural)" in card.tables()[-1].caption
    assert means.loc["exact", "low"] == means.loc["exact", "high"] == 1
    lacking = tuple(
        replace(one, quality=None) if (one.circuit, one.finder) == ("induction", "eap") else one for one in card.rows
    )
    without = replace(card, rows=lacking).means.query("ablation == 'zero' and truth == 'causal'")
    assert (without["circuits"] == 3).all()


def test_one_circuit_has_no_interval_over_circuits() -> None:
    alone = scorecard(["exact"], ["copy"], ["zero"], n=4)
    assert bool(alone.means[["low", "high"]].isna().all(axis=None))
    assert json.loads(to_json(alone.summary()))["means"][0]["low"] is None
    assert figure(alone.tables()[-1]) is not None


def test_time_is_counted_in_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(finders.time, "process_time", lambda: float(next(ticks)))
    card = scorecard(["exact", "acdc"], ["copy"], ["zero"], n=4)
    assert card.frame["cpu_seconds"].tolist() == [1.0] * 4
    assert card.frame["forwards"].tolist() == [1.0] * 4


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    scorecard(["exact", "acdc"], ["copy", "and_gate"], ["zero"], n=2, on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    assert part_of(None, 0, 2) is None


def test_tables_draw_and_the_summary_is_json(card: ScoreCard) -> None:
    for table in card.tables():
        assert figure(table) is not None
        assert card.digest[:12] in table.caption
    summary = json.loads(to_json(card.summary()))
    assert summary["circuits"] == ["induction", "or_gate", "tracr-hist", "tracr-reverse"]
    assert len(summary["rows"]) == len(card.rows)
    assert summary["causal_change"] == 1e-3


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(WorkbenchError, match=r"Unknown finder 'eap-gi'. Did you mean 'eap-ig'"):
        scorecard(["eap-gi"], ["copy"])
    with pytest.raises(WorkbenchError, match=r"has no 'tracr-histt'. Did you mean 'tracr-hist'"):
        scorecard(["exact"], ["tracr-histt"])
    with pytest.raises(WorkbenchError, match="Unknown ablation 'zeros'. Did you mean 'zero'"):
        scorecard(["exact"], ["copy"], ["zeros"])
    with pytest.raises(WorkbenchError, match="tracr-hist is meant for zero"):
        scorecard(["exact"], ["tracr-hist"], ["mean"])
    with pytest.raises(WorkbenchError, match="Nothing to score: 0 finders"):
        scorecard([], ["copy"])
    with pytest.raises(WorkbenchError, match="n = 0 pairs"):
        scorecard(["exact"], ["copy"], n=0)
    with pytest.raises(WorkbenchError, match="names of their own, got copy, copy"):
        scorecard(["exact"], ["copy", copy()])


def test_finders_are_all_methods_by_default() -> None:
    card = scorecard(circuits=["copy"], ablations=["zero"], n=4)
    assert list(card.frame["finder"].unique()) == list(METHODS)
    assert scorecard(["exact", "exact"], ["copy"], ["zero"], n=4).frame["finder"].tolist() == ["exact"] * 2
