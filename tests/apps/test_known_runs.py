"""Known circuits as runs: the model, its pairs, and the truth that circuits found in the run are held against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.analyses import kept, patch_of
from apps.circuits_of_runs import circuit_of, graph_of
from apps.cli import main
from apps.known_runs import GRANULARITY, import_known, known_ablations, known_circuit
from apps.ui.circuit_questions import Question
from circuits.attribution import terms_of
from circuits.experiment import experiment
from circuits.memoised import circuit_values
from circuits.truths import load_known
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch
from workbench.training.checkpoints import Run, load

FITTING = ("induction", "and_gate", "or_gate", "modular_addition", "trained_xor", "trained_two_hop")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with every known circuit that fits into a run."""
    runs = tmp_path_factory.mktemp("known")
    for name in FITTING:
        import_known(f"known:{name}", runs=runs)
    return runs


def prompt_pairs(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    corrupt, _ = batch.pairs()
    return list(zip(map(tuple, batch.tokens.tolist()), map(tuple, corrupt.tolist()), strict=True))


@pytest.mark.parametrize("name", FITTING)
def test_the_run_computes_what_the_known_model_does(name: str, folder: Path) -> None:
    run, known = load(name, runs=folder), load_known(name)
    batch = run.task.contrast(run.task.examples("test"))
    torch.testing.assert_close(run.model().forward(batch.tokens), known.model.forward(batch.tokens))
    answers = run.model().forward(batch.tokens)[batch.read].argmax(1)
    assert torch.equal(answers, batch.targets[batch.read])
    told, drawn = prompt_pairs(batch), prompt_pairs(known.pairs(256, 0))
    assert set(told) == set(drawn)
    assert len(set(told)) == len(told) > 15
    assert all(" " not in word for word in run.task.vocab)
    assert known.about in run.recipe.shows


@pytest.mark.parametrize("name", FITTING)
def test_the_truth_is_of_the_runs_own_graph(name: str, folder: Path) -> None:
    run, known = load(name, runs=folder), load_known(name)
    assert known_ablations(run) == list(known.ablations)
    batch = run.task.sample(16)
    graph = graph_of(run, run.model(), GRANULARITY, batch.tokens.shape[1])
    for ablation in known_ablations(run):
        plan = experiment(run.model(), batch, graph=graph, ablation=ablation)
        truth = known_circuit(run, graph, replace(terms_of(plan), metric="loss"))
        expected = known.structural | (known.constants if ablation == "zero" else set())
        assert set(truth.edges) == expected
        assert (truth.terms.ablation, truth.terms.metric) == (ablation, "loss")
        if name == "induction":
            # Nothing else takes part, so that the truth alone does the task.
            alone = circuit_values(plan, truth.keep[None])[0]
            torch.testing.assert_close(alone, plan.full, rtol=1e-3, atol=1e-3)


def test_a_model_without_mlps_is_patched_where_it_can_be(folder: Path) -> None:
    found = patch_of(load("induction", runs=folder), n=8)
    assert {cell.site.kind.name for cell in found.cells} == {"resid_pre", "attn_out", "z"}
    with pytest.raises(WorkbenchError, match="'mlp_out' is not in this model"):
        patch_of(load("induction", runs=folder), sites="mlp_out")


def test_other_runs_have_no_known_circuit(pairs_folder: Path) -> None:
    assert known_ablations(load("own", runs=pairs_folder)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("copy", "'copy' is read at several places of a prompt, and a run's pairs at one. `workbench scorecard "),
        ("tracr-hist", "--circuits tracr-hist` scores it"),
        ("inductoin", "Did you mean 'induction'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=message):
        import_known(f"known:{name}", runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--runs", str(tmp_path)])
        return code, *capsys.readouterr()

    code, out, _ = ask("import", "known:or_gate", "--run", "gate", "--json")
    found = json.loads(out)
    assert (code, found["run"], found["pairs"], found["accuracy"]) == (0, "gate", 16, 1.0)
    code, out, _ = ask("circuit", "gate", "--granularity", "inputs", "--edges", "7", "--ablation", "zero", "--json")
    assert (code, json.loads(out)["n"]) == (0, 16)
    assert json.loads(ask("show", "gate", "--json")[1])["status"] == "imported"
    for arguments, message in {
        ("import", "known:or_gate", "--run", "gate"): "Run 'gate' exists",
        ("import", "known:or_gate", "--pairs", "x.csv"): "leave --pairs and --vocab out",
        ("import", "mine.safetensors"): "needs --pairs FILE",
    }.items():
        code, out, err = ask(*arguments)
        assert (code, out) == (2, "")
        [line] = err.splitlines()
        assert message in line


def question_about(run: Run, **changes: Any) -> Question:
    asked: dict[str, Any] = {
        "reference": run.reference, "step": 0, "sha256": run.checkpoint().sha256, "method": "exact", "edges": 7,
        "ablation": "resample", "metric": "logit_difference", "granularity": GRANULARITY, "absolute": True, "n": 16,
        "split": "test", **changes,
    }  # fmt: skip
    return Question(**asked)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"ablation": "zero"}, {"metric": "loss"}], ids=str)
def test_the_page_lays_the_known_circuit_over_what_was_found(
    asked: dict[str, str], folder: Path, app_on: Callable[..., Any]
) -> None:
    run = load("induction", runs=folder)
    question = question_about(run, **asked)
    kept(run, "circuit", circuit_of, 0, question.arguments)
    options = {"method": "exact", "edges": "7", "granularity": GRANULARITY, "n": "16", "against": "the known circuit"}
    app = app_on("circuit", folder, run="induction", **options, **asked)
    assert not app.exception
    assert not app.error
    said = " ".join(each.value for each in app.caption)
    assert "Against the known circuit (7 edges): hit" in said
    assert ("can only be found by zero ablation" in said) == (question.ablation != "zero")
    table = next(frame.value for frame in app.dataframe if "status" in frame.value.columns)
    known = load_known("induction")
    assert set(table[table["status"] != "false alarm"]["edge"]) == known.structural | known.constants


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "choose"),
    [
        ({"granularity": "component"}, "choose granularity inputs in the sidebar"),
        ({"ablation": "mean"}, "choose ablation resample or zero in the sidebar"),
        ({"ablation": "mean", "granularity": "component"}, "choose granularity inputs and ablation resample or zero"),
    ],
)
def test_the_page_says_what_to_choose(
    asked: dict[str, str], choose: str, folder: Path, tmp_path: Path, app_on: Callable[..., Any]
) -> None:
    shutil.copytree(folder / "induction", tmp_path / "induction")
    (tmp_path / "induction" / "truth" / "mean.json").unlink()
    run = load("induction", runs=tmp_path)
    question = question_about(run, **asked)
    kept(run, "circuit", circuit_of, 0, question.arguments)
    options = {"method": "exact", "edges": "7", "granularity": GRANULARITY, "n": "16", "against": "the known circuit"}
    app = app_on("circuit", tmp_path, run="induction", **{**options, **asked})
    assert not app.exception
    assert any(choose in each.value for each in app.info)


@pytest.mark.slow
def test_the_page_offers_no_known_circuit_where_there_is_none(pairs_folder: Path, app_on: Callable[..., Any]) -> None:
    run = load("own", runs=pairs_folder)
    asked = {"method": "exact", "edges": 3, "n": 3, "granularity": "component", "ablation": "zero"}
    kept(run, "circuit", circuit_of, 0, question_about(run, **asked).arguments)
    shown = {name: str(value) for name, value in asked.items() if name != "n"}
    app = app_on("circuit", pairs_folder, run="own", **shown)
    assert not app.exception
    assert app.selectbox(key="against").options == ["nothing", "another method", "a file"]
