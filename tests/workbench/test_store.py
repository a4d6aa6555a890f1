"""The run folder: whole files or none, damage that is named, one writer at a time, names that stay inside."""

import errno
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench import store
from workbench.runtime import WorkbenchError
from workbench.store import (
    Provenance,
    RunFolder,
    digest,
    find_run,
    load_state_dict,
    load_summary,
    load_tensors,
    new_run,
    read_json,
    result_key,
    run_names,
    runs_root,
    save_result,
    save_tensors,
    to_json,
    write_atomic,
    write_json,
)
from workbench.tables import Table

HOLDER = """
import sys
from pathlib import Path
from workbench.store import RunFolder
with RunFolder(path=Path(sys.argv[1]), reference="mine").lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def make_run(root: Path, name: str = "mine") -> RunFolder:
    folder = new_run(name, root)
    write_json(folder.path / "recipe.json", {"name": "none"})
    return folder


def refuse(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace", "fdopen", "chmod"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "log"
    write_atomic(path, b"old")
    monkeypatch.setattr(store.os, step, refuse)
    with pytest.raises(WorkbenchError, match=r"Cannot write .*log: No space left on device\. Nothing was half-written"):
        write_atomic(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    write_atomic(path, b"old")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_atomic(tmp_path / "deep" / "file", b"content")
    assert (tmp_path / "deep" / "file").read_bytes() == b"content"
    assert (tmp_path / "deep" / "file").stat().st_mode & 0o777 == 0o644


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match=r"Cannot write .*file/inner.*choose another --runs"):
        write_atomic(tmp_path / "file" / "inner", b"")


def test_numbers_that_are_not_finite_become_null() -> None:
    content = {"loss": float("nan"), "rows": [1.5, float("inf"), (-float("inf"), 2)], 7: True, "none": None}
    read = json.loads(to_json(content), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert read == {"loss": None, "rows": [1.5, None, [None, 2]], "7": True, "none": None}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_whatever_is_written_is_json(content: Any) -> None:
    json.loads(to_json(content), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"\xff\xfe", "can't decode"),
        (None, "No such file"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkbenchError, match=rf"recipe\.json.*{message}"):
        read_json(path)


def saved(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "step_00000001.safetensors"
    return path, save_tensors(path, {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, {"step": 1})


def test_tensors_come_back(tmp_path: Path) -> None:
    path, sha256 = saved(tmp_path)
    tensors, card = load_tensors(path)
    assert torch.equal(tensors["w"], torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    assert card == {"step": 1, "sha256": sha256}
    assert sha256 == digest(path.read_bytes())


def test_tensors_that_are_not_contiguous_or_need_gradients(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).view(2, 3).requires_grad_()
    save_tensors(tmp_path / "t.safetensors", {"w": matrix.T}, {})
    tensors, _ = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(tensors["w"], matrix.detach().T)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_damage_is_named_by_file_and_hash(tmp_path: Path, damage: str) -> None:
    path, sha256 = saved(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    path.write_bytes(b"" if damage == "emptied" else bytes(content[:-1] if damage == "truncated" else content))
    found = digest(path.read_bytes())
    message = rf"step_00000001\.safetensors is damaged: its SHA-256 is {found[:16]}…, its card says {sha256[:16]}…"
    with pytest.raises(WorkbenchError, match=message):
        load_tensors(path)


@given(place=st.integers(0), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    path, _ = saved(tmp_path_factory.mktemp("bits"))
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))
    with pytest.raises(WorkbenchError, match="is damaged"):
        load_tensors(path)


def test_a_card_or_a_file_that_is_missing(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    path.unlink()
    with pytest.raises(WorkbenchError, match=r"Cannot read .*step_00000001\.safetensors: No such file"):
        load_tensors(path)
    path, _ = saved(tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(WorkbenchError, match=r"Cannot read .*step_00000001\.json"):
        load_tensors(path)


def test_weights_without_their_card_are_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card seals the tensors, so it comes second: a kill between the two leaves no card."""
    monkeypatch.setattr(store, "write_json", refuse)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_foreign_state_dicts(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    assert torch.equal(load_state_dict(tmp_path / "good.pt")["w"], torch.ones(2))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WorkbenchError, match="is not a state dict: it must map names to tensors"):
        load_state_dict(tmp_path / "list.pt")
    with pytest.raises(WorkbenchError, match=r"Cannot read .*absent\.pt as a state dict"):
        load_state_dict(tmp_path / "absent.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"noise that is long enough")
    with pytest.raises(WorkbenchError, match=r"Cannot read .*noise\.safetensors as a state dict"):
        load_state_dict(tmp_path / "noise.safetensors")


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_nothing_in_a_state_dict_runs(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    torch.save({"w": Evil(trace)}, tmp_path / "evil.pt")
    with pytest.raises(WorkbenchError, match="as a state dict"):
        load_state_dict(tmp_path / "evil.pt")
    assert not trace.exists()
    # The bait is live: read without restraint it does make the file.
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert not folder.busy
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert folder.busy
        with pytest.raises(WorkbenchError, match="Run 'mine' is being written by another process"), folder.lock():
            pass
        # The lock goes with its process, however that ends.
        holder.kill()
    assert not folder.busy
    with folder.lock():
        assert folder.busy


def test_busy_needs_no_lock_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert not folder.busy
    assert not (folder.path / ".lock").exists()


def made(name: str, root: Path) -> RunFolder | None:
    try:
        return new_run(name, root)
    except WorkbenchError:
        return None


@given(st.text(max_size=120) | st.from_regex(r"[A-Za-z0-9_./\\-]{1,20}", fullmatch=True))
def test_no_name_leaves_the_runs_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    around = tmp_path_factory.mktemp("around")
    folder = made(name, around / "runs")
    paths = [path.relative_to(around).as_posix() for path in sorted(around.rglob("*"))]
    if folder is None:
        assert paths == []
    else:
        assert paths == ["runs", f"runs/{name}"]
        # Hidden folders, such as `.results`, are the workbench's.
        assert not name.startswith(".")


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/a", "a..b", "", ".hidden", "-flag", "a b", "a\n", "ä", "x" * 101, "~"]
)
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(WorkbenchError, match="it names a folder inside the runs folder"):
        new_run(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(WorkbenchError, match="Run 'mine' exists at .*--resume, or choose another --run"):
        new_run("mine", tmp_path)
    # A folder that holds nothing but a lock was never begun.
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").touch()
    assert new_run("begun", tmp_path).path == tmp_path / "begun"


def test_find_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    assert find_run("mine", tmp_path) == folder
    assert find_run(str(folder.path)).path == folder.path
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    assert find_run("mine").path == folder.path
    monkeypatch.chdir(folder.path)
    assert find_run(".").path == Path(".")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mone", "No run 'mone' at .*Did you mean 'mine'"),
        ("entirely-else", "No run 'entirely-else' at .*Known: mine"),
        ("gallery:nothing-like-it", "No run 'nothing-like-it' in the gallery"),
        ("not-a-run", "not-a-run is not a run: it has no recipe.json"),
        ("", "is not a run: it has no recipe.json"),
        ("./absent", r"No run '\./absent' at absent"),
    ],
)
def test_runs_that_are_not_there(tmp_path: Path, reference: str, message: str) -> None:
    make_run(tmp_path)
    (tmp_path / "not-a-run").mkdir()
    with pytest.raises(WorkbenchError, match=message):
        find_run(reference, tmp_path)


def test_the_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GALLERY", tmp_path / "gallery")
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))
    write_json(tmp_path / "gallery" / "modular" / "recipe.json", {})
    assert store.gallery_names() == ["modular"]
    folder = find_run("gallery:modular")
    assert folder.path == tmp_path / "gallery" / "modular"
    # It is not ours to write: its results go among the user's own.
    assert folder.results == tmp_path / "runs" / ".results" / "gallery_modular"
    assert make_run(tmp_path / "runs").results == tmp_path / "runs" / "mine" / "results"
    with pytest.raises(WorkbenchError, match="Did you mean 'modular'"):
        find_run("gallery:modul")


def test_run_names_are_in_the_order_of_their_making(tmp_path: Path) -> None:
    for age, name in enumerate(["c", "a", "b"]):
        folder = make_run(tmp_path, name)
        os.utime(folder.path / "recipe.json", (age, age))
    (tmp_path / "other").mkdir()
    assert run_names(tmp_path) == ["c", "a", "b"]
    assert run_names(tmp_path / "absent") == []


def test_where_the_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBENCH_RUNS", raising=False)
    assert runs_root() == Path("runs")
    monkeypatch.setenv("WORKBENCH_RUNS", "elsewhere")
    assert runs_root() == Path("elsewhere")
    assert runs_root(tmp_path) == tmp_path


def test_a_log_whose_last_line_was_cut(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert folder.lines("metrics.jsonl") == []
    log = folder.path / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert folder.lines("metrics.jsonl") == [{"step": 0}, {"step": 1}]
    log.write_text('{"st')
    assert folder.lines("metrics.jsonl") == []
    log.write_text('{"step": 0}\nno json\n{"step": 2}\n')
    with pytest.raises(WorkbenchError, match=r"metrics\.jsonl is not a log of the workbench"):
        folder.lines("metrics.jsonl")


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """A small result."""

    value: float
    provenance: Provenance

    def tables(self) -> list[Table]:
        frame = pd.DataFrame({"step": [0, 1], "value": [self.value, 2.0]})
        return [Table(name="curve", frame=frame, kind="curve", axes={"x": "step", "y": "value"}, unit="", caption="")]

    def summary(self) -> dict[str, object]:
        return {"value": self.value, "nothing": float("nan")}


def finding(value: float = 1.0) -> Finding:
    return Finding(value=value, provenance=Provenance(code_version="1", recipe="r", seed=3, parents=("abc",)))


def test_a_result_is_kept_with_its_digests(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    path = save_result(folder, "key", finding())
    assert (path / "curve.csv").read_text() == "step,value\n0,1.0\n1,2.0\n"
    kept = read_json(path / "result.json")
    assert kept["provenance"]["parents"] == ["abc"]
    assert kept["sha256"] == {name: digest((path / name).read_bytes()) for name in ("curve.csv", "summary.json")}
    assert load_summary(folder, "key") == {"value": 1.0, "nothing": None}
    assert load_summary(folder, "another") is None
    save_result(folder, "key", finding(5.0))
    assert load_summary(folder, "key") == {"value": 5.0, "nothing": None}


@pytest.mark.parametrize("name", ["curve.csv", "summary.json"])
def test_a_result_that_was_changed_is_no_result(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path)
    path = save_result(folder, "key", finding())
    (path / name).write_text((path / name).read_text().replace("1.0", "1.5"))
    assert load_summary(folder, "key") is None
    (path / name).unlink()
    assert load_summary(folder, "key") is None


def test_a_result_that_was_never_finished_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    monkeypatch.setattr(store, "write_json", refuse)
    with pytest.raises(OSError, match="No space"):
        save_result(folder, "key", finding())
    assert load_summary(folder, "key") is None


def test_a_key_answers_for_function_arguments_parents_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    key = result_key("lens", {"n": 3, "split": "test"}, ["abc"])
    assert key == result_key("lens", {"split": "test", "n": 3}, ["abc"])
    others = {
        result_key("patch", {"n": 3, "split": "test"}, ["abc"]),
        result_key("lens", {"n": 4, "split": "test"}, ["abc"]),
        result_key("lens", {"n": 3, "split": "test"}, ["abd"]),
        result_key("lens", {"n": 3, "split": "test"}, ["abc", "abc"]),
    }
    monkeypatch.setattr(store, "code_version", lambda: "another")
    others.add(result_key("lens", {"n": 3, "split": "test"}, ["abc"]))
    assert len(others) == 5
    assert key not in others
