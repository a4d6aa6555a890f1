"""The measures of a reasoner: what they are on models that are known, and that rows, tables and files say the same."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hops import REGISTER, WORLD, Hops, reasoner_run

from apps.analyses import measure
from apps.reasoner_rows import Row, draw_prompts, find_middle, marginals_of, rows_of
from apps.reasoning import (
    ReasoningMeasures,
    kept_reasoning,
    loops_of,
    measured_steps,
    reasoning_of,
    reasoning_through,
)
from circuits.causal_tracing import causal_tracing
from probes.reasoning import latent_ranks, leads, two_calls
from workbench.figures import figure
from workbench.instrument.sites import Site
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.complex_comparison import ComplexComparison
from workbench.training.checkpoints import load, thin

MIDDLE = Site.parse("L0.resid_post")


def value(rows: list[Row], measure: str, split: str, site: str | None = None, cause: str | None = None) -> float | None:
    found = [
        row
        for row in rows
        if (row["measure"], row["split"], row["site"], row["cause"]) == (measure, split, site, cause)
    ]
    assert len(found) == 1
    return found[0]["value"]


def known_rows(n: int = 40, **knows: bool) -> list[Row]:
    """The rows of a model wired by hand."""
    model, prompts = Hops(WORLD, **knows), draw_prompts(WORLD, n)
    return rows_of(model, prompts, MIDDLE)


def test_a_model_that_goes_by_hops_has_every_sign_of_it() -> None:
    rows = known_rows()
    for split in ("train_inferred", "test"):
        assert value(rows, "redirect", split, "L0.resid_post") == 1
        assert value(rows, "control", split, "L0.resid_post") == 0
        assert value(rows, "mrr_bridge", split, "L0.resid_post") == 1
        # The answer's logit leads by 1; the weights are 3 and 4.
        assert value(rows, "efficiency", split) == pytest.approx(1 / 5)
    assert value(rows, "redirected", "test", "L0.resid_post", "first") == 1
    assert value(rows, "strength", "ood", "L0.resid_post", "head") == 0
    assert {row["value"] for row in rows if row["measure"] in ("accuracy", "two_calls")} == {1}


def test_a_model_that_memorises_has_none() -> None:
    rows = known_rows(memorises=True)
    assert value(rows, "accuracy", "test") == 1
    assert value(rows, "redirect", "test", "L0.resid_post") == 0
    assert value(rows, "redirected", "test", "L0.resid_post", "first") == 0


def test_rows_say_which_hop_is_missing() -> None:
    first, second = known_rows(first_ood=False), known_rows(second_ood=False)
    assert value(first, "transplant_before", "ood_id") == 0
    assert value(first, "transplant", "ood_id", "L0.resid_post") == 1
    assert value(second, "transplant", "id_ood", "L0.resid_post") == 0
    assert value(second, "transplant", "ood_id", "L0.resid_post") == 1
    assert value(second, "two_calls", "id_ood") == 1
    assert value(second, "accuracy", "id_ood") == 0


def test_what_has_nothing_to_count_is_none_with_n_0_and_nothing_is_lost() -> None:
    prompts = draw_prompts(WORLD, 40)
    rows = rows_of(Hops(WORLD, first_ood=False, second_ood=False), prompts, MIDDLE)
    empty = [row for row in rows if row["n"] == 0]
    assert {(row["measure"], row["split"]) for row in empty} == {("altered", "ood"), ("redirected", "ood")}
    for row in rows:
        assert (row["value"] is None) == (row["low"] is None) == (row["n"] == 0)
        assert row["n"] + row["skipped"] == len(prompts.splits[row["split"]])
    assert Counter(map(key, rows)).most_common(1)[0][1] == 1


def key(row: Row) -> tuple[object, ...]:
    return tuple(row.get(name) for name in ("step", "measure", "split", "site", "cause"))


def test_the_middle_is_where_training_chains_are_redirected_most() -> None:
    prompts = draw_prompts(WORLD, 40)
    middle, candidates = find_middle(Hops(WORLD), prompts)
    assert middle == MIDDLE
    assert [(row["site"], row["value"], row["split"]) for row in candidates] == [("L0.resid_post", 1, "train_inferred")]
    # Nothing is right: there is nothing to choose by.
    middle, candidates = find_middle(Hops(WORLD, first_ood=False, second_ood=False), prompts)
    assert middle == MIDDLE
    untrained = reasoner_run("composition").model(0)
    middle, candidates = find_middle(untrained, prompts)
    assert middle is None
    assert [(row["value"], row["n"], row["skipped"]) for row in candidates] == [(None, 0, 40)]
    assert find_middle(reasoner_run("comparison").model(), draw_prompts(REGISTER, 10)) == (None, [])


@pytest.mark.slow
def test_the_middle_of_three_layers_is_the_better_of_two() -> None:
    run = reasoner_run("composition", "model.n_layers=3")
    middle, candidates = find_middle(run.model(), draw_prompts(WORLD, 60))
    best = max(candidates, key=lambda row: row["value"])
    assert [row["site"] for row in candidates] == ["L0.resid_post", "L1.resid_post"]
    assert candidates[0]["value"] != candidates[1]["value"]
    assert str(middle) == best["site"]


def test_one_layer_has_no_place_between_hops() -> None:
    config = replace(reasoner_run("composition").recipe.model, n_layers=1)
    model = Transformer(config, generator=torch.Generator().manual_seed(0)).eval()
    prompts = draw_prompts(WORLD, 20)
    assert find_middle(model, prompts) == (None, [])
    rows = rows_of(model, prompts, None)
    assert {(row["value"], row["n"], row["skipped"]) for row in rows if row["measure"] == "redirect"} == {(None, 0, 20)}
    assert not [row for row in rows if row["measure"].startswith("transplant")]


def test_rows_are_what_the_analyses_find() -> None:
    run = reasoner_run("composition")
    model, prompts = run.model(), draw_prompts(WORLD, 30)
    rows, batch = rows_of(model, prompts, MIDDLE), prompts.splits["test"]
    ranks = latent_ranks(model, batch, "relation", sites="L1.resid_post", among=True)
    assert value(rows, "mrr_relation_among", "test", "L1.resid_post") == pytest.approx(float(ranks.mean()))
    assert value(rows, "two_calls", "test") == pytest.approx(float(two_calls(model, WORLD, batch).double().mean()))
    norm = sum(float(weight.detach().square().sum()) for weight in model.parameters()) ** 0.5
    assert value(rows, "efficiency", "test") == pytest.approx(float(leads(model, batch).mean()) / norm, rel=1e-5)
    for cause in causal_tracing(model, WORLD, batch, split="test").causes:
        assert cause.strength is not None
        assert value(rows, "strength", "test", str(cause.site), cause.name) == pytest.approx(cause.strength.mean)


def test_prompts_are_drawn_once_from_a_seed() -> None:
    first, again, other = (draw_prompts(WORLD, 10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.splits["test"].tokens, again.splits["test"].tokens)
    assert not torch.equal(first.splits["test"].tokens, other.splits["test"].tokens)
    assert {split: len(batch) for split, batch in first.splits.items()} == {
        "test": 10, "ood": 8, "train_inferred": 10, "id_ood": 10, "ood_id": 10
    }  # fmt: skip
    pairs = first.pairs["test", "bridge"]
    assert len(pairs) + pairs.dropped == 10


def test_comparison_looks_at_both_values_and_the_label_space() -> None:
    found = reasoning_of(reasoner_run("comparison"), n=20)
    measures = {row["measure"] for row in found.rows}
    assert {"mrr_v1", "mrr_v1_among", "mrr_v2", "mrr_v2_among", "label_recall", "strength", "efficiency"} <= measures
    assert not {"redirect", "two_calls", "transplant"} & measures
    assert {row["cause"] for row in found.find("altered")} == {"attr", "e1", "e2"}
    assert {row["split"] for row in found.find("label_recall")} == {"train_inferred", "test", "ood"}
    assert {row["cause"] for row in found.find("marginal_loss")} == {"attr", "attr e1", "attr e2"}
    assert found.middle is None


def test_hard_questions_are_looked_at_too() -> None:
    task = ComplexComparison(
        entities=30, attributes=3, values=4, ood_fraction=0.3, pair_fraction=0.05, questions_per_label=2
    )
    config = replace(reasoner_run("comparison").recipe.model, d_vocab=len(task.vocab), d_vocab_out=len(task.vocab))
    model = Transformer(config, generator=torch.Generator().manual_seed(0)).eval()
    rows = rows_of(model, draw_prompts(task, 6), None)
    assert {"train_inferred", "test", "hard"} == {row["split"] for row in rows if row["measure"] == "mrr_v1"}
    assert [marginal.positions for marginal in marginals_of(task)] == [(0,), (0, 2), (0, 4)]


@pytest.mark.slow
def test_through_training_each_checkpoint_is_measured_as_it_is_alone() -> None:
    run, told = reasoner_run("composition"), []
    found = reasoning_through(run, n=12, count=5, on_step=lambda: told.append(1))
    assert found.steps == measured_steps(run, 5) == tuple(checkpoint.step for checkpoint in thin(run, 5))
    assert {0, 250} <= set(found.steps)
    assert len(told) == len(found.steps)
    for step in (found.steps[1], 250):
        alone = reasoning_of(run, step, n=12)
        assert [row for row in found.rows if row["step"] in (None, step)] == list(alone.rows)
        assert alone.middle == found.middle
    assert Counter(map(key, found.rows)).most_common(1)[0][1] == 1
    assert {row["step"] for row in found.find("redirect_candidate")} == {250}
    assert set(found.provenance.parents) == {run.checkpoint(step).sha256 for step in found.steps}
    assert [row["step"] for row in found.find("accuracy", split="test")] == list(found.steps)


def test_an_early_checkpoint_rests_on_the_last_one_too() -> None:
    run = reasoner_run("composition")
    found = reasoning_of(run, 8, n=12)
    assert found.steps == (8,)
    assert set(found.provenance.parents) == {run.checkpoint(8).sha256, run.checkpoint().sha256}


@pytest.mark.parametrize("kind", ["composition", "comparison"])
def test_tables_can_be_drawn_and_hold_the_rows(kind: str) -> None:
    found = reasoning_through(reasoner_run(kind), n=12, count=3)
    tables = {table.name: table for table in found.tables()}
    assert len(tables) == len(found.tables())
    for table in tables.values():
        figure(table)
        assert "n = " in table.caption
        assert table.frame["value"].notna().all()
    assert tables["reasoning_accuracy"].kind == "curve"
    assert set(tables["reasoning_accuracy"].frame["step"]) == set(found.steps)
    heat = tables["reasoning_strength_test"]
    assert (heat.kind, set(heat.frame["step"])) == ("heatmap", {250})
    assert len(heat.frame) == 3 * 6
    assert tables["reasoning_marginal_accuracy"].kind == "bar"
    assert ("reasoning_redirect" in tables) == (kind == "composition")
    lens = tables[f"reasoning_mrr_{'bridge' if kind == 'composition' else 'v1'}"]
    assert "test L0.resid_post" in set(lens.frame["series"])
    assert json.loads(json.dumps(found.summary()))["rows"] == [dict(row) for row in found.rows]


@pytest.mark.slow
def test_measuring_writes_rows_beside_the_log_that_are_read_again(tmp_path: Path) -> None:
    shutil.copytree(reasoner_run("composition").folder.path, tmp_path / "run")
    run, told = load(str(tmp_path / "run")), []
    assert kept_reasoning(run) is None
    written = measure(run, told.append)
    assert isinstance(written, ReasoningMeasures)
    assert told == sorted(told)
    assert told[-1] == 1
    read = kept_reasoning(run)
    assert read is not None
    assert read.rows == list(written.rows)
    assert (read.middle, read.steps) == (written.middle, written.steps)
    assert set(read.provenance.parents) == set(written.provenance.parents)


def test_a_task_without_measures_is_left_alone() -> None:
    assert measure(SimpleNamespace(task=object())) is None  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_going_round_more_often() -> None:
    run = reasoner_run("composition", "schedule=[0,1,0,1]")
    found = loops_of(run, n=30)
    assert found.trained == 2
    model = run.model()
    for (split, loops), share in found.accuracy.items():
        # By hand: the blocks one after another, as often as asked.
        batch = draw_prompts(WORLD, 30).splits[split]
        with torch.no_grad():
            x = model.start(batch.tokens, {})
            for step in [0, 1] * loops:
                x = model.advance(step, x, batch.tokens, {})
            right = model.finish(x, {})[:, 2].argmax(1) == batch.targets[:, 2]
        assert share.mean == float(right.double().mean())
    assert set(found.accuracy) == {(split, loops) for split in ("test", "ood") for loops in (1, 2, 3, 4)}
    [table] = found.tables()
    figure(table)
    assert "trained with 2. n = 30 of test, 8 of ood" in table.caption
    assert found.summary()["rows"] == table.frame.to_dict("records")


def test_what_cannot_be_measured() -> None:
    modular = load("gallery:modular")
    with pytest.raises(WorkbenchError, match="need a run on composition or comparison; 'gallery:modular' learnt"):
        reasoning_of(modular)
    with pytest.raises(WorkbenchError, match="need a run on composition or comparison"):
        kept_reasoning(modular)
    with pytest.raises(WorkbenchError, match="at least 1 prompt of each split, got n = 0"):
        reasoning_of(reasoner_run("composition"), n=0)
    with pytest.raises(
        WorkbenchError, match=r"goes round its blocks once, schedule \(0, 1\): there is nothing to loop"
    ):
        loops_of(reasoner_run("composition"))
