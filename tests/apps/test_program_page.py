"""Programs in the command line and on their page: what is said of a typed sequence, changed, written and refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from apps import report
from apps.cli import main
from apps.evidence import gather
from apps.program_evidence import gather_program
from apps.program_sections import program_sections
from apps.programs import decompile_run, prove_run
from apps.report_sections import sections_of
from apps.static_figures import Drawn
from circuits.decompile.proof import Length, Verdict
from workbench.store import new_run
from workbench.training.checkpoints import load
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

AppOn = Callable[..., Any]


@pytest.fixture(scope="module")
def programs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a program that was trained until it counts."""
    folder = tmp_path_factory.mktemp("programs")
    settings = ["steps=400", "letters=3", "task.n_ctx=5", "size=60", "batch_size=64", "evaluate_every=200"]
    train(find_recipe("program-smoke").override(settings), new_run("counts", folder))
    return folder


def test_a_sequence_is_answered_and_its_variables_shown(app_on: AppOn, programs_folder: Path) -> None:
    app = app_on("program", programs_folder, run="counts", sequence="0 1 0")
    assert not app.exception
    assert not app.error
    said, variables = (each.value for each in app.dataframe[:2])
    assert said.loc["right"].tolist() == ["2", "1", "2"]
    assert list(variables.columns) == ["0: <s>", "1: 0", "2: 1", "3: 0"]
    assert variables.loc["tokens"].tolist() == ["<s>", "0", "1", "0"]
    assert variables.loc["ones"].tolist() == ["1"] * 4
    assert "def run(letters: Sequence[str])" in app.code[0].value


def test_a_variable_is_changed(app_on: AppOn, programs_folder: Path) -> None:
    app = app_on("program", programs_folder, run="counts", sequence="0 1 0")
    assert "changed" not in app.dataframe[0].value.index
    # A token that is another is another sequence.
    names = app.selectbox(key="variable").options
    app.selectbox(key="variable").set_value(names.index("tokens"))
    app.selectbox(key="position").set_value(1).run()
    app.selectbox(key="value").set_value(1).run()
    assert not app.exception
    said = app.dataframe[0].value
    other = app_on("program", programs_folder, run="counts", sequence="1 1 0").dataframe[0].value
    assert said.loc["changed"].tolist() == other.loc["program"].tolist() != said.loc["program"].tolist()


@pytest.mark.parametrize(("text", "message"), [("0 7", "Letter '7' is not in the alphabet"), ("0 0 0 0 0", "too many")])
def test_what_cannot_be_read_is_said(app_on: AppOn, programs_folder: Path, text: str, message: str) -> None:
    app = app_on("program", programs_folder, run="counts", sequence=text)
    assert not app.exception
    assert message in app.error[0].value


def test_another_run_is_no_program(app_on: AppOn, programs_folder: Path) -> None:
    app = app_on("program", programs_folder, run="gallery:modular")
    assert not app.exception
    assert "learnt no Transformer Program" in app.info[0].value


@pytest.mark.parametrize("view", ["runs", "explore", "dynamics", "circuit", "search", "report"])
def test_a_program_is_no_error_of_ours_on_another_page(app_on: AppOn, programs_folder: Path, view: str) -> None:
    assert not app_on(view, programs_folder, run="counts").exception


def test_a_module_is_written_and_runs_alone(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "counts.py"
    assert main(["decompile", "counts", "--runs", str(programs_folder), "--out", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"lines", "lines_unsimplified", "literals", "accuracy", "agreement", "exhaustive", "checked", "seconds"}
    assert wanted <= found.keys()
    assert (found["exhaustive"], found["checked"], found["agreement"]) == (True, 3 + 9 + 27 + 81, 1.0)
    assert found["lines"] == len(file.read_text().splitlines())
    run = [sys.executable, "-I", "-W", "error", str(file), "0", "1", "0"]
    assert len(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()) == 3


def test_every_form_is_written_by_its_ending(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = decompile_run(load("counts", runs=programs_folder), None, budget=0.1)
    for name, form, flags in (
        ("a.py", "python", []),
        ("b.py", "fast", ["--fast"]),
        ("c.rasp", "rasp", []),
        ("d.dot", "graph", []),
    ):
        file = tmp_path / name
        command = [
            "decompile",
            "counts",
            "--runs",
            str(programs_folder),
            "--out",
            str(file),
            "--budget",
            "0.1",
            "--json",
        ]
        assert main([*command, *flags]) == 0
        assert file.read_text() == wanted.forms[form]
        exact = Path(json.loads(capsys.readouterr().out)["exact"])
        assert exact.read_text() == wanted.exact[form]


def test_every_form_is_offered(app_on: AppOn, programs_folder: Path) -> None:
    app = app_on("program", programs_folder, run="counts", sequence="0 1 0")
    texts = []
    for form in ("Python", "Fast Python", "RASP", "Graph"):
        app.segmented_control(key="form").set_value(form).run()
        assert not app.exception
        texts.append(app.code[0].value)
    wanted = decompile_run(load("counts", runs=programs_folder), None, budget=0.0)
    assert texts == [text.strip() for text in wanted.forms.values()]


def test_beside_a_shortened_module_stands_the_exact_one(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "counts.py"
    flags = ["--runs", str(programs_folder), "--out", str(file), "--budget", "0.1", "--json"]
    assert main(["decompile", "counts", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    exact = tmp_path / "counts_exact.py"
    assert found["exact"] == str(exact)
    lengths = [len(each.read_text().splitlines()) for each in (file, exact)]
    assert lengths == [found["lines"], found["lines_unsimplified"]]
    assert lengths[0] < lengths[1]


def test_a_program_is_proved_or_refuted(programs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--runs", str(programs_folder), "--longest", "2", "--timeout", "30"]
    assert main(["prove", "counts", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = found["lengths"][-1]
    assert found["proved_to"] == last["length"] - (last["verdict"] != "proved")
    assert (found["counterexample"] is None) == (last["verdict"] == "proved")
    assert main(["prove", "counts", *flags]) == 0
    assert "verdict" in capsys.readouterr().out


def test_a_proof_without_the_solver_says_what_to_install(
    programs_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("apps.programs.find_spec", lambda name: None)
    assert main(["prove", "counts", "--runs", str(programs_folder)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'interp-workbench[prove]'" in line


def test_variables_are_patched(programs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--runs", str(programs_folder), "--n", "4", "--direction", "denoise", "--json"]
    assert main(["patch", "counts", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    sites = {cell["site"] for cell in found["cells"]}
    assert {"L0.z.h0", "L0.z.h1", "L0.codes.h0", "L0.codes.h1", "L0.sums.h0", "L0.sums.h1"} == sites


def test_the_graph_is_shown_and_written(
    app_on: AppOn, programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_on("program", programs_folder, run="counts", sequence="0 1 0")
    app.toggle(key="frontier").set_value(True).run()
    assert not app.exception
    file = tmp_path / "counts.dot"
    flags = ["--runs", str(programs_folder), "--out", str(file), "--json"]
    assert main(["decompile", "counts", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "exact" not in found
    lines = file.read_text().splitlines()
    assert lines[0] == "digraph program {"
    module = decompile_run(load("counts", runs=programs_folder), None, budget=0.0)
    # What the module computes are the graph's nodes.
    computed = set(re.findall(r"^    ((?:copy|sum|table|counts)_\d_\d) = ", module.text, re.MULTILINE))
    assert computed == set(re.findall(r'"((?:copy|sum|table|counts)_\d_\d)" \[', "\n".join(lines)))
    [frontier] = [each.value for each in app.dataframe if "lines" in each.value]
    assert frontier["budget"].tolist() == [0.0, 0.001, 0.01, 0.05]


def test_a_program_has_a_report(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw_static", lambda figures: Drawn(svg={}, missing="not asked"))
    flags = ["--runs", str(programs_folder), "--out", str(tmp_path / "report"), "--json"]
    assert main(["report", "counts", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sections"][2:] == ["The program", "What is proved", "Activation patching"]
    tables = {file.stem: pd.read_csv(file) for file in (tmp_path / "report" / "tables").glob("*.csv")}
    assert tables["claims"]["n"].tolist() == [6, 6]
    assert tables["program_sizes"]["budget"].tolist() == [0.0, 0.001, 0.01]
    assert tables["program_proof"]["length"].tolist() == list(range(1, 1 + len(tables["program_proof"])))


def test_a_report_without_the_solver_says_so(programs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.programs.find_spec", lambda name: None)
    evidence = gather(load("counts", runs=programs_folder))
    assert evidence.program is not None
    assert evidence.program.proof is None
    assert "Z3" in evidence.left_out["proof"]
    assert [section.title for section in sections_of(evidence)][2:] == ["The program", "Activation patching"]


@pytest.mark.parametrize(("before", "said"), [("proved", "A shortest sequence"), ("unknown", "A sequence")])
def test_a_counterexample_is_a_shortest_only_if_all_shorter_are_proved(
    programs_folder: Path, before: Verdict, said: str
) -> None:
    run = load("counts", runs=programs_folder)
    lengths = tuple(
        Length(length=at, verdict=verdict, counterexample=text, seconds=0.1)
        for at, (verdict, text) in enumerate([(before, ""), ("refuted", "0 0")], start=1)
    )
    evidence = gather_program(run)
    proof = replace(prove_run(run, None, longest=1), lengths=lengths)
    _, section = program_sections(replace(evidence, proof=proof))
    assert f"{said} with a wrong answer has length 2: 0 0." in section.text
    # A task whose sequences are listed has whole votes, and says so.
    [size, _] = program_sections(replace(evidence, proof=proof))
    assert "Votes are whole numbers" in size.text


def test_what_cannot_be_decompiled_is_one_line(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["decompile", "counts", "--runs", str(programs_folder)]
    for arguments, message in (
        (
            ["decompile", "gallery:modular", "--out", str(tmp_path / "a.py")],
            "learnt a transformer, no Transformer Program",
        ),
        ([*counts, "--out", "/proc/a.py"], "Cannot write /proc/a.py"),
        ([*counts, "--out", str(tmp_path / "a.txt")], "ends in one of .py, .rasp, .dot, got"),
        (
            [*counts, "--out", str(tmp_path / "a.rasp"), "--fast"],
            "Only a module can be fast: give a file that ends in .py",
        ),
        ([*counts, "--out", str(tmp_path / "a.py"), "--budget", "2"], "below 1, got 2.0"),
        ([*counts, "--out", str(tmp_path / "a.py"), "--checkpoint", "all"], "takes a step"),
        (["prove", "counts", "--runs", str(programs_folder), "--longest", "9"], "holds 1 to 4 letters"),
        (["prove", "gallery:modular"], "Programs are read on sequences; 'gallery:modular' learnt 'modular'"),
    ):
        assert main(arguments) != 0
        [line] = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert not (tmp_path / "a.py").exists()


def test_a_file_that_cannot_be_written_is_seen_before_the_work(
    programs_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("apps.programs.decompile_run", lambda *_, **__: pytest.fail("it was decompiled"))
    assert main(["decompile", "counts", "--runs", str(programs_folder), "--out", "/proc/a.py"]) == 2
    assert "Cannot write /proc/a.py" in capsys.readouterr().err


def test_training_says_both_accuracies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["steps=2", "size=60", "batch_size=16", "d_mlp=4"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    assert main(["train", "program-smoke", "--runs", str(tmp_path), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_accuracy"] == pytest.approx(found["test_accuracy"])
    assert found["sequence_accuracy_low"] <= found["sequence_accuracy"] <= found["token_accuracy"]
    assert found["n"] == 6
