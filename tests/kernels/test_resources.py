"""What the kernels take of three generations of cards, compiled here without any of them, is what the table says."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux alone")

HERE = Path(__file__).parent
TABLE = HERE / "resources.csv"


@pytest.mark.slow
def test_the_table_is_what_the_compiler_says():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_ahead.py")]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert made == TABLE.read_text(), "A kernel or its compiler has changed: look at what it takes now, then keep it."


def test_no_kernel_spills_on_any_target():
    rows = list(csv.DictReader(TABLE.read_text().splitlines()))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    parts = {
        "add_norm": (" forward", " backward"),
        "attention": (" forward", " dest", " src"),
        "cross_entropy": (" forward", " rows", " matrix"),
        "adamw": ("",),
    }
    assert {row["kernel"] for row in rows} == {operation + part for operation in parts for part in parts[operation]}
    assert [row for row in rows if row["spilled_bytes"] != "0"] == []
