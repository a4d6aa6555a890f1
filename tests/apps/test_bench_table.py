"""The README's table of benchmarks is what its generator prints from the numbers that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apps.bench_table import BEGIN, END, README, keep, kept_rows, table, with_table
from apps.benchmarks import ALL
from apps.cli import main
from workbench.runtime import WorkbenchError


def result(name: str = "acdc", **changes: Any) -> dict[str, Any]:
    fields = {
        "name": name, "compares": "Something.", "peer": "plain", "ratio": 2.34567, "ratio_interval": [2.0, 3.0],
        "gate": 1.5, "n": 7, "agrees": True, "gemm_share": 0.5, "peak_bytes": {"peer": 2**20, "ours": 2**19},
    }  # fmt: skip
    return {**fields, **changes}


def test_the_readme_has_the_table_of_what_is_kept() -> None:
    text = README.read_text()
    assert text == with_table(text, kept_rows())


def test_what_is_kept_are_known_benchmarks_that_agreed() -> None:
    rows = kept_rows()
    assert {row["name"] for row in rows} <= set(ALL)
    assert all(row.get("agrees", True) for row in rows)


def test_a_line_a_benchmark_in_their_order() -> None:
    race = {name: value for name, value in result("generalise-engine").items() if name[:4] not in ("gemm", "peak")}
    lines = table([race, result(), result("step-modular", gate=2.5, conditions={"d_model": 8, "load": 1})]).splitlines()
    assert lines[0] == "| benchmark | peer | ratio | gate | n | share | memory |"
    assert lines[2] == (
        "| `step-modular`: Something (d_model 8) | plain | 2.35 [2, 3] | 2.5, missed | 7 | 0.50 | 0.50 of 1 MiB |"
    )
    assert lines[3].startswith("| `acdc`: Something | plain | 2.35 [2, 3] | 1.5 | 7 |")
    assert lines[4] == "| `generalise-engine`: Something | plain | 2.35 [2, 3] | 1.5 | 7 | – | – |"


def test_new_results_replace_those_of_their_name(tmp_path: Path) -> None:
    place, readme = tmp_path / "kept.json", tmp_path / "README.md"
    readme.write_text(f"Before.\n{BEGIN}old\n{END}After.\n")
    keep([result(), result("curve")], place=place, readme=readme)
    keep([result(ratio=7.654321)], place=place, readme=readme)
    assert {row["name"]: row["ratio"] for row in kept_rows(place)} == {"acdc": 7.654, "curve": 2.346}
    text = readme.read_text()
    assert text == f"Before.\n{BEGIN}{table(kept_rows(place))}{END}After.\n"
    assert "old" not in text


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    place, readme = tmp_path / "kept.json", tmp_path / "README.md"
    readme.write_text("No table.\n")
    with pytest.raises(WorkbenchError, match="The README has no place for the table: a line '<!-- from here"):
        keep([result()], place=place, readme=readme)
    with pytest.raises(WorkbenchError, match="acdc found something else than its peer"):
        keep([result(agrees=False)], place=place, readme=readme)
    assert not place.exists()


def test_the_command_prints_every_kind_of_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Found:
        def __init__(self, name: str) -> None:
            self.name = name

        def summary(self) -> dict[str, Any]:
            row = {**result(self.name), "met": True, "agreement": 0.0}
            if self.name == "generalise-engine":
                del row["agreement"], row["gemm_share"]
            return row

    monkeypatch.setattr("apps.benchmarks.run_benchmark", lambda name, repeats: Found(name))
    assert main(["bench", "acdc", "generalise-engine"]) == 0
    out = capsys.readouterr().out
    assert "generalise-engine" in out
    assert main(["bench", "generalise-engine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["benchmarks"][0]["name"] == "generalise-engine"


def test_without_bfloat16_its_benchmarks_are_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    class Found:
        def summary(self) -> dict[str, Any]:
            return {**result("acdc"), "met": True, "agreement": 0.0}

    monkeypatch.setattr("apps.benchmarks.run_benchmark", lambda name, repeats: asked.append(name) or Found())
    for has, left_out in ((True, 0), (False, 4)):
        asked.clear()
        monkeypatch.setattr("workbench.runtime.has_bfloat16", lambda device, has=has: has)
        assert main(["bench", "--json"]) == 0
        assert len(asked) == len(ALL) - left_out
        assert ("4 benchmarks of it are left out" in caplog.text) == (not has)
