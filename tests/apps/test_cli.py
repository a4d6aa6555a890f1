"""The command line: one JSON object on standard output, and a user's mistake in one line that leaves nothing behind."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from apps import analysis_commands, commands
from apps.cli import build_parser, main
from apps.printing import part_line
from workbench.runtime import WorkbenchError
from workbench.training.checkpoints import load

# TransformerLens, a browser's engine or whole commands are started here: seconds each.
pytestmark = pytest.mark.slow

WAIT = 120.0
TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=300"]
TINY_FLAGS = [flag for setting in TINY for flag in ("--set", setting)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder that holds one finished run, `tiny`; nobody writes to it."""
    runs = tmp_path_factory.mktemp("finished")
    code = main(["train", "modular-smoke", "--run", "tiny", "--runs", str(runs), *TINY_FLAGS])
    assert code == 0
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to play with."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def brought(finished: Path, tmp_path: Path) -> Path:
    """A model and pairs as somebody else would bring them: `a b =` modulo 13, where `=` is 13."""
    folder = tmp_path / "brought"
    folder.mkdir()
    run = load("tiny", runs=finished)
    save_file(run.model().state_dict(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(run.recipe.model.to_json()))
    (folder / "pairs.csv").write_text("clean,corrupt,answer,distractor\n1 2 13,1 4 13,3,5\n7 7 13,8 7 13,1,2\n")
    return folder


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a command with --json that must go well; what standard output held."""

    def ask(*arguments: str, runs: Path) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*arguments, "--runs", str(runs), "--json"]) == 0
        return json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))

    return ask


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused: its one line, once it is known that no file has changed."""

    def ask(*arguments: str, runs: Path) -> str:
        capsys.readouterr()
        before = contents(runs)
        assert main([*arguments, "--runs", str(runs), "--json"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert contents(runs) == before
        return one_line(err, arguments[0])

    return ask


def contents(folder: Path) -> Mapping[str, bytes | None]:
    """Every file below a folder, but for the empty ones that locks live in."""
    files = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(file): file.read_bytes() if file.is_file() else None for file in files if file.name != ".lock"}


def one_line(err: str, command: str) -> str:
    assert "Traceback" not in err
    [line] = err.splitlines()
    assert line.startswith(f"workbench {command}: ")
    return line


def workbench(*arguments: str, runs: Path, before: str = "") -> subprocess.Popen[str]:
    """The command as a process of its own, some lines of Python before it."""
    code = f"import sys; from apps.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "WORKBENCH_RUNS": str(runs)},
    )


# Every command that finds something -------------------------------------------------------------------------------


def test_train(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("train", "modular-smoke", "--run", "mine", "--seed", "3", *TINY_FLAGS, runs=tmp_path)
    keys = "run steps seconds train_loss test_loss train_accuracy test_accuracy step_memorised step_generalised"
    assert set(keys.split()) <= set(found)
    assert (found["run"], found["steps"]) == ("mine", 300)
    assert 0 <= found["test_accuracy"] <= 1
    run = load("mine", runs=tmp_path)
    assert (run.recipe.train.init_seed, run.recipe.train.batch_seed, run.task.seed) == (3, 3, 3)
    assert run.task.p == 13
    assert len(run.measures) == len(run.checkpoints)


def test_train_without_measures(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    answer("train", "modular-smoke", "--no-measures", *TINY_FLAGS, "--set", "train.steps=20", runs=tmp_path)
    assert load("modular-smoke", runs=tmp_path).measures.empty


def test_train_a_recipe_of_ones_own(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from workbench.training.recipes import modular_smoke\n"
        f"def small():\n    return replace(modular_smoke(), name='small').override({[*TINY, 'steps=20']})\n"
    )
    found = answer("train", f"{file}:small", "--no-measures", runs=tmp_path / "runs")
    assert (found["run"], found["steps"]) == ("small", 20)


def test_recipes(finished: Path, answer: Callable[..., dict[str, Any]]) -> None:
    rows = answer("recipes", runs=finished)["recipes"]
    assert {"modular-smoke", "modular", "modular-paper"} <= {row["name"] for row in rows}
    assert all(row["parameters"] > 0 and row["shows"] for row in rows)


def test_runs_and_show(finished: Path, answer: Callable[..., dict[str, Any]]) -> None:
    rows = {row["run"]: row for row in answer("runs", runs=finished)["runs"]}
    assert rows["tiny"]["recipe"] == "modular-smoke"
    assert rows["tiny"]["status"] == "steps used up"
    shown = answer("show", "tiny", runs=finished)
    assert rows["tiny"].items() <= shown.items()
    assert shown["settings"]["task"]["p"] == 13
    assert shown["checkpoints"][0]["step"] == 0
    assert all(len(each["sha256"]) == 64 for each in shown["checkpoints"])


def test_runs_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(commands, "gallery_names", list)
    for folder in (tmp_path, tmp_path / "not there"):
        assert main(["runs", "--runs", str(folder)]) == 0
        assert "Train one: `workbench train modular-smoke`" in capsys.readouterr().out
    assert not (tmp_path / "not there").exists()


def test_lens(runs: Path, answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("lens", "tiny", "--n", "16", "--checkpoint", "8", runs=runs)
    assert (found["run"], found["step"]) == ("tiny", 8)
    assert found["seconds"] >= 0


def test_fourier(runs: Path, answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("fourier", "tiny", runs=runs)
    keys = (
        "key_frequencies neurons_explained logits_explained loss loss_without_other_frequencies "
        "loss_without_key_frequencies gradient_symmetricity distance_irrelevance step"
    )
    assert set(keys.split()) <= set(found)
    assert found["step"] == 300


def test_patch(runs: Path, answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("patch", "tiny", "--n", "16", "--sites", "resid_pre,z", "--direction", "both", runs=runs)
    assert {"cells", "n", "metric", "direction", "clean", "corrupt"} <= set(found)
    assert found["n"] == 16
    keys = {"site", "layer", "head", "position", "dest", "src", "direction", "effect", "low", "high"}
    assert all(keys <= set(cell) for cell in found["cells"])
    assert {cell["direction"] for cell in found["cells"]} == {"denoise", "noise"}


def test_patch_is_kept_and_found_again(runs: Path, answer: Callable[..., dict[str, Any]], monkeypatch: Any) -> None:
    arguments = ("patch", "tiny", "--n", "8", "--sites", "resid_pre", "--direction", "noise")
    first = answer(*arguments, runs=runs)
    monkeypatch.setattr("apps.analyses.patch_each", lambda *a, **k: pytest.fail("computed again"))
    second = answer(*arguments, runs=runs)
    clock = {"seconds", "cpu_seconds"}
    assert {k: v for k, v in first.items() if k not in clock} == {k: v for k, v in second.items() if k not in clock}


def test_all_checkpoints(runs: Path, answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("lens", "tiny", "--n", "8", "--checkpoint", "all", runs=runs)
    assert [each["step"] for each in found["checkpoints"]] == [
        each.step for each in load("tiny", runs=runs).checkpoints
    ]


def test_import(runs: Path, brought: Path, answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("import", str(brought / "model.safetensors"), "--pairs", str(brought / "pairs.csv"), runs=runs)
    assert (found["run"], found["pairs"], found["dropped"]) == ("model", 2, 0)
    patched = answer("patch", "model", "--n", "2", "--sites", "resid_pre", runs=runs)
    assert patched["n"] == 2


def test_doctor(finished: Path, answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("doctor", runs=finished)
    assert found["collisions"] == {}
    assert found["libraries"]["torch"].startswith("2.")


@pytest.mark.parametrize(
    "arguments",
    [("recipes",), ("runs",), ("show", "tiny"), ("lens", "tiny"), ("fourier", "tiny"), ("patch", "tiny"), ("doctor",)],
)
def test_without_json_people_get_text(
    arguments: tuple[str, ...], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) >= 2
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(out)


def test_progress_goes_to_standard_error(tmp_path: Path) -> None:
    process = workbench("train", "modular-smoke", "--json", *TINY_FLAGS, "--set", "train.steps=50", runs=tmp_path)
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert json.loads(out)["steps"] == 50
    bar = next(line for line in err.splitlines() if line.startswith("train modular-smoke"))
    assert re.search(r"50/50 +train \d\.\de.\d\d +[\d.]+%  test \d\.\de.\d\d +[\d.]+%", bar)


# What people get wrong --------------------------------------------------------------------------------------------

TRAIN = ("train", "modular-smoke", "--run", "new")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(("train", "modula"), r"Unknown recipe 'modula'\. Did you mean 'modular'\?", id="recipe"),
        pytest.param(("train", "no.py:f"), r"No Python file 'no\.py'", id="own recipe's file"),
        pytest.param((*TRAIN, "--seed", "-1"), "A seed must be at least 0, got -1", id="seed"),
        pytest.param((*TRAIN, "--set", "stepz=3"), r"Unknown setting 'stepz'.*Did you mean 'train\.steps'", id="key"),
        pytest.param((*TRAIN, "--set", "steps"), "must be key=value", id="no value"),
        pytest.param((*TRAIN, "--set", "steps=many"), "Setting steps=many is not of the kind int", id="kind"),
        pytest.param((*TRAIN, "--set", "p=1"), "Modulus p must be at least 3, got 1", id="p=1"),
        pytest.param((*TRAIN, "--set", "steps=-5"), "steps must be at least 1, got -5", id="negative steps"),
        pytest.param((*TRAIN, "--set", "train_fraction=0"), "train_fraction must lie between 0 and 1", id="fraction 0"),
        pytest.param((*TRAIN, "--set", "train_fraction=1"), "train_fraction must lie between 0 and 1", id="fraction 1"),
        pytest.param((*TRAIN, "--set", "operation=pow"), "pow", id="operation"),
        pytest.param((*TRAIN, "--set", "n_heads=0"), "n_heads", id="no heads"),
        pytest.param(
            ("train", "modular-smoke", "--run", "../out"), r"Run name '\.\./out' must be letters", id="run .."
        ),
        pytest.param(("train", "modular-smoke", "--run", "a/b"), "Run name 'a/b' must be letters", id="run /"),
        pytest.param(("train", "modular-smoke", "--run", "a..b"), r"Run name 'a\.\.b' must be letters", id="run a..b"),
        pytest.param(("train", "modular-smoke", "--run", ""), "Run name '' must be letters", id="run empty"),
        pytest.param(("train", "modular-smoke", "--run", "tiny"), "Run 'tiny' exists at .*--resume", id="run taken"),
        pytest.param(("train", "modular-smoke", "--run", "no", "--resume"), "No run 'no'", id="nothing to resume"),
        pytest.param(
            ("train", "modular-smoke", "--run", "tiny", "--resume", "--set", "steps=9"),
            "leave --set and --seed out",
            id="resume with settings",
        ),
        pytest.param(("show", "tinny"), r"No run 'tinny' at .*Did you mean 'tiny'\?", id="run"),
        pytest.param(("show", "gallery:modulas"), "No run 'modulas' in the gallery", id="gallery"),
        pytest.param(("show", "/"), "/ is not a run: it has no recipe.json", id="no run's folder"),
        pytest.param(("lens", "nobody"), "No run 'nobody'", id="lens run"),
        pytest.param(("fourier", "nobody"), "No run 'nobody'", id="fourier run"),
        pytest.param(("report", "nobody"), "No run 'nobody'", id="report run"),
        pytest.param(
            ("lens", "tiny", "--checkpoint", "299"), "no checkpoint at step 299; the nearest is 300", id="step"
        ),
        pytest.param(("lens", "tiny", "--checkpoint", "-1"), "takes a step or 'all', got '-1'", id="negative step"),
        pytest.param(("lens", "tiny", "--checkpoint", "last"), "takes a step or 'all', got 'last'", id="step's kind"),
        pytest.param(("patch", "tiny", "--sites", "resid_prr"), "resid_prr.*resid_pre", id="site"),
        pytest.param(("patch", "tiny", "--sites", "blocks.9.hook_z"), "blocks.9.hook_z", id="layer"),
        pytest.param(("patch", "tiny", "--sites", ""), "site", id="no site"),
        pytest.param(("patch", "tiny", "--metric", "beauty"), "Unknown metric 'beauty'", id="metric"),
        pytest.param(("patch", "tiny", "--n", "0"), "Asked for 0 examples", id="n=0"),
        pytest.param(("patch", "tiny", "--n", "1000000"), "Asked for 1000000 examples of split 'test'", id="n"),
        pytest.param(("lens", "tiny", "--split", "validation"), "Unknown split 'validation'", id="split"),
        pytest.param(("rerun", "/nonexistent/manifest.json"), "Cannot read /nonexistent/manifest.json", id="manifest"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], says: str, finished: Path, refusal: Callable[..., str]) -> None:
    assert re.search(says, refusal(*arguments, runs=finished))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian", "modular"),
        ("train",),
        ("train", "modular", "--seed", "one"),
        ("patch", "tiny", "--direction", "sideways"),
        ("import", "--pairs", "pairs.csv"),
        ("app", "--port", "eighty"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_too(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.endswith("--help`.")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"name": "x"}', b"\xff\xfe\x00binary"])
def test_a_foreign_recipe_file(content: bytes, runs: Path, refusal: Callable[..., str]) -> None:
    (runs / "tiny" / "recipe.json").write_bytes(content)
    assert "rec" in refusal("show", "tiny", runs=runs)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        pytest.param({"model.safetensors": b"\x89PNG not weights"}, "model.safetensors", id="foreign weights"),
        pytest.param({"model.safetensors": b""}, "model.safetensors", id="empty weights"),
        pytest.param({"model.json": None}, "model.json", id="no config"),
        pytest.param({"model.json": b'{"n_layers": 1}'}, "d_model", id="foreign config"),
        pytest.param({"pairs.csv": None}, "pairs.csv", id="no pairs"),
        pytest.param({"pairs.csv": b""}, "pairs.csv", id="empty pairs"),
        pytest.param({"pairs.csv": b"a,b\n1,2\n"}, "clean, corrupt, answer, distractor", id="foreign columns"),
        pytest.param({"pairs.csv": b"\xff\xfe\x00\x01"}, "pairs.csv", id="binary pairs"),
        pytest.param({"pairs.csv": b"clean,corrupt,answer,distractor\n1 2 13,1 99 13,3,5\n"}, "99", id="token outside"),
        pytest.param(
            {"pairs.csv": b"clean,corrupt,answer,distractor\n1 2 13,1 13,3,5\n"}, "line 2", id="lengths differ"
        ),
    ],
)
def test_a_foreign_import_leaves_nothing(
    break_it: dict[str, bytes | None], says: str, brought: Path, runs: Path, refusal: Callable[..., str]
) -> None:
    for name, content in break_it.items():
        if content is None:
            (brought / name).unlink()
        else:
            (brought / name).write_bytes(content)
    arguments = ("import", str(brought / "model.safetensors"), "--pairs", str(brought / "pairs.csv"))
    assert says in refusal(*arguments, "--run", "brought", runs=runs)


@pytest.mark.parametrize(
    ("name", "says"), [("tiny", "Run 'tiny' exists"), ("../out", "must be letters"), ("", "must be")]
)
def test_the_name_of_an_import_is_checked(
    name: str, says: str, brought: Path, runs: Path, refusal: Callable[..., str]
) -> None:
    arguments = ("import", str(brought / "model.safetensors"), "--pairs", str(brought / "pairs.csv"), "--run", name)
    assert says in refusal(*arguments, runs=runs)


def test_a_report_never_replaces_what_is_no_report(runs: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    assert "precious" in refusal("report", "tiny", "--out", str(tmp_path / "precious"), runs=runs)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years"


def test_one_unreadable_run_does_not_hide_the_others(runs: Path, answer: Callable[..., dict[str, Any]]) -> None:
    shutil.copytree(runs / "tiny", runs / "broken")
    (runs / "broken" / "recipe.json").write_text("{")
    rows = {row["run"]: row for row in answer("runs", runs=runs)["runs"]}
    assert rows["broken"]["status"].startswith("unreadable: Cannot read")
    assert rows["tiny"]["steps"] == 300
    assert rows["tiny"].keys() == rows["broken"].keys() == set(commands.RUN_COLUMNS)


def test_a_foreign_log(runs: Path, refusal: Callable[..., str]) -> None:
    (runs / "tiny" / "metrics.jsonl").write_text("step,loss\n0,1\n")
    assert "is not a log of the workbench" in refusal("show", "tiny", runs=runs)


def test_a_flipped_byte_is_named_by_file_and_hash(runs: Path, refusal: Callable[..., str]) -> None:
    checkpoint = load("tiny", runs=runs).checkpoint()
    content = bytearray(checkpoint.path.read_bytes())
    content[-1] ^= 1
    checkpoint.path.write_bytes(content)
    line = refusal("lens", "tiny", runs=runs)
    assert f"{checkpoint.path} is damaged" in line
    assert checkpoint.sha256[:16] in line


def test_a_recipe_of_ones_own_that_fails(tmp_path: Path, refusal: Callable[..., str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def broken(:\n")
    assert "SyntaxError" in refusal("train", f"{file}:broken", runs=tmp_path / "runs")
    file.write_text("def number():\n    return 3\n")
    assert "returned a int; it must return a workbench Recipe" in refusal(
        "train", f"{file}:number", runs=tmp_path / "r"
    )
    assert "no function 'other'" in refusal("train", f"{file}:other", runs=tmp_path / "r")


def test_a_runs_folder_that_is_a_file(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "file").touch()
    assert "Cannot write" in refusal(*TRAIN, *TINY_FLAGS, runs=tmp_path / "file")


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    # No file may grow above 12 kB, which a state does: to the process that is a disk without space.
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, {resource.RLIM_INFINITY}))"
    process = workbench("train", "modular-smoke", "--run", "new", *TINY_FLAGS, "--json", runs=tmp_path, before=full)
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (2, "")
    assert one_line(err.strip().splitlines()[-1], "train").endswith("free space or choose another --runs.")
    leftovers = [path.name for path in (tmp_path / "new").rglob(".*") if path.name != ".lock"]
    assert not leftovers, "temporary files stay behind"
    for checkpoint in load("new", runs=tmp_path).checkpoints:
        checkpoint.tensors()


@pytest.mark.slow
def test_a_run_that_is_being_written_is_left_alone(runs: Path, refusal: Callable[..., str]) -> None:
    with load("tiny", runs=runs).folder.lock():
        line = refusal("train", "modular-smoke", "--run", "tiny", "--resume", runs=runs)
    assert "is being written by another process" in line


def test_only_the_users_mistakes_are_hidden(finished: Path, monkeypatch: Any) -> None:
    def broken(options: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(commands, "doctor", broken)
    with pytest.raises(KeyError, match="ours"):
        main(["doctor"])


def test_a_mistake_told_over_several_lines_is_one(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(options: object) -> None:
        raise WorkbenchError("first\n  second")

    monkeypatch.setattr(commands, "doctor", wrong)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "workbench doctor: first second\n"


def test_a_taken_name_is_told_before_anything_of_ours_is_imported(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("apps.cli.intruders", lambda: {"circuits": "/elsewhere/circuits/__init__.py"})
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err.startswith("workbench: 'circuits' imports from /elsewhere/circuits/__init__.py")


# Interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_from_there(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    long = [*TINY_FLAGS, "--set", "train.steps=100000", "--set", "stop_when_clean=false", "--no-measures"]
    process = workbench("train", "modular-smoke", "--run", "cut", "--json", *long, runs=tmp_path)
    log = tmp_path / "cut" / "metrics.jsonl"
    end = time.monotonic() + WAIT
    while not (log.exists() and len(log.read_bytes().splitlines()) > 12):
        assert time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert "workbench train: interrupted." in err.splitlines()[-1]
    run = load("cut", runs=tmp_path)
    assert not run.status["finished"]
    # Training on to 100,000 steps is not the point: it must start from the state and not from nothing.
    recipe = tmp_path / "cut" / "recipe.json"
    stopped_at = run.log.rows[-1]["step"]
    recipe.write_text(recipe.read_text().replace('"steps": 100000', f'"steps": {stopped_at + 20}'))
    found = answer("train", "modular-smoke", "--run", "cut", "--resume", "--no-measures", runs=tmp_path)
    assert found["steps"] == stopped_at + 20
    steps = [row["step"] for row in load("cut", runs=tmp_path).log.rows]
    assert steps == sorted(set(steps))


# The parser -------------------------------------------------------------------------------------------------------


def test_every_command_exists_and_takes_json_and_runs() -> None:
    [subparsers] = [action for action in build_parser()._actions if action.dest == "command"]
    wanted = "app recipes train runs show lens fourier patch import report rerun doctor"
    assert set(wanted.split()) <= set(subparsers.choices)
    for name, command in subparsers.choices.items():
        options = {option for action in command._actions for option in action.option_strings}
        assert {"--json", "--runs"} <= options, name
        room = {"commands": commands, "analysis_commands": analysis_commands}[command.get_default("room")]
        assert callable(getattr(room, command.get_default("function"))), name


def test_what_a_report_does_is_told_as_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with part_line("report small") as on_part:
        on_part("circuit")
    captured = capsys.readouterr()
    assert captured.err == "report small: circuit\n"
    assert not captured.out
