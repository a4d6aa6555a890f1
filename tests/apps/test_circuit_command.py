"""`workbench circuit`, `scorecard` and `bench`: what they print, what they write, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from apps import benchmarks
from apps.analyses import PAIRS
from apps.bench import Benchmark
from apps.circuits_of_runs import circuit_of
from apps.cli import main
from circuits.circuit import Terms
from circuits.discovery import METHODS
from circuits.exchange import Foreign, load_circuit
from circuits.faithfulness import evaluate
from workbench.store import RunFolder
from workbench.training.checkpoints import load, save_checkpoint

pytestmark = pytest.mark.slow

KEYS = {
    "edges", "requested", "size", "live_edges", "all_edges", "method", "ablation", "metric", "faithfulness",
    "faithfulness_interval", "random_95", "accuracy", "completeness", "n", "seconds",
}  # fmt: skip
RUN = "gallery:modular"


@pytest.fixture(autouse=True)
def own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()[-1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prints_its_circuit(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "circuit", RUN, "--method", method, "--edges", "12", "--n", "16")
    assert set(found) >= KEYS
    assert found["requested"] == 12
    assert len(found["edges"]) == found["size"] <= 12
    assert set(found["edges"][0]) == {"from", "to", "score"}
    assert (found["live_edges"], found["all_edges"]) == (17, 23)
    assert (found["method"], found["ablation"], found["n"]) == (method, "resample", 16)
    low, high = found["faithfulness_interval"]
    assert low <= found["faithfulness"] <= high
    assert found["faithfulness"] > found["random_95"]


def test_without_a_size_it_is_the_smallest_that_does_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "circuit", RUN, "--method", "exact")
    assert found["rule"].startswith("smallest with faithfulness 0.9, accuracy 0.9")
    assert 9 <= found["size"] <= 13
    assert "Say --edges or --threshold" in refused(capsys, "circuit", RUN, "--method", "acdc")


def test_the_smallest_circuit_of_the_grokked_model_stands() -> None:
    run = load(RUN)
    judged = circuit_of(run, method="exact")
    own = evaluate(run.model(), judged.circuit, run.task.sample(PAIRS, split="test", seed=0))
    assert judged.circuit.size < judged.live_edges == 17
    assert own.faithfulness.mean >= 0.9
    assert own.accuracy.mean >= 0.9
    assert judged.accuracy.mean >= 0.9
    for found in (own, judged):
        assert len(found.controls) == 100
        assert found.controls_size == judged.circuit.size
        assert found.random_95 is not None
        assert found.faithfulness.low > found.random_95
        rows = found.minimality.rows()
        assert [row["edge"] for row in rows] == judged.circuit.edges
        assert {row["verdict"] for row in rows} <= {"needed", "redundant", "hurts", "little effect", "not told from 0"}
    assert "needed" in judged.minimality.verdicts


def test_what_is_asked_for_is_what_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    signed = printed(capsys, "circuit", RUN, "--edges", "9", "--signed", "--n", "8", "--select", "grow")
    assert signed["absolute"] is False
    assert "grown from the logits to 9 by signed scores" in signed["rule"]
    fine = printed(
        capsys, "circuit", RUN, "--threshold", "2", "--granularity", "positions", "--ablation", "mean", "--n", "8"
    )
    assert fine["ablation"] == "mean"
    assert fine["requested"] is None
    assert fine["all_edges"] > 100
    assert any(edge["to"].endswith("@=") for edge in fine["edges"])


def test_the_circuit_is_written_for_other_tools(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ("own.json", "theirs.eap.json", "theirs.pt", "drawn.dot", "drawn.graphml")
    for name in names:
        found = printed(capsys, "circuit", RUN, "--edges", "12", "--n", "8", "--out", str(tmp_path / name))
    own = load_circuit(tmp_path / "own.json")
    assert own.size == found["size"]
    terms = Terms(ablation="resample", metric="logit_difference", unit="logits", better="higher", n=8)
    foreign = Foreign(terms=terms, change_of="metric", method="eap-ig")
    for name in names[1:3]:
        assert load_circuit(tmp_path / name, own.graph, foreign=foreign).edges == own.edges
    message = refused(
        capsys, "circuit", RUN, "--edges", "12", "--granularity", "positions", "--out", str(tmp_path / "no.pt")
    )
    assert "cannot hold this graph" in message
    assert not (tmp_path / "no.pt").exists()


def test_all_checkpoints_follow_the_edges_through_training(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "circuit", RUN, "--checkpoint", "all", "--edges", "11", "--n", "16")
    steps = [each["step"] for each in found["checkpoints"]]
    assert steps == [each.step for each in load(RUN).checkpoints]
    assert found["checkpoints"][0]["reason"]
    assert found["checkpoints"][-1]["faithfulness"] > 0.8
    assert any(each["edge"] == "m0->logits" for each in found["lifetimes"])
    assert "name one checkpoint" in refused(capsys, "circuit", RUN, "--checkpoint", "all", "--out", "x.json")
    assert "leave --select out" in refused(capsys, "circuit", RUN, "--checkpoint", "all", "--select", "grow")


@pytest.fixture
def twin(tmp_path: Path) -> str:
    """The gallery's run without its first head, as of a seed that found another circuit."""
    run, folder = load(RUN), tmp_path / "runs" / "twin"
    shutil.copytree(run.folder.path, folder)
    weights = run.checkpoint().tensors()
    weights["weights.0.attn.W_O"][0] = 0
    found = RunFolder(path=folder, reference="twin")
    save_checkpoint(found, run.checkpoint().step, weights, ["final"], dtype=torch.float32)
    return "twin"


@pytest.mark.parametrize("method", ["exact", "acdc"])
def test_over_seeds_the_same_circuit_is_judged_in_every_run(
    method: str, twin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", method, "--edges", "9", "--n", "16"]
    found = printed(capsys, "circuit", RUN, "--seeds", twin, *options)
    alone = [printed(capsys, "circuit", name, *options) for name in (RUN, twin)]
    assert found["runs"] == found["agreement"]["labels"] == [RUN, twin]
    for measure in ("size", "faithfulness", "accuracy", "completeness"):
        values = [each[measure] for each in alone]
        assert [each[measure] for each in found["circuits"]] == pytest.approx(values)
        over = found["over_seeds"][measure]
        assert over["mean"] == pytest.approx(sum(values) / 2)
        assert over["interval"][0] <= over["mean"] <= over["interval"][1]
    edges = [{f"{edge['from']}->{edge['to']}" for edge in each["edges"]} for each in alone]
    assert [set(each["edges"]) for each in found["circuits"]] == edges
    there, back = found["agreement"]["pairs"]
    assert there["jaccard"] == back["jaccard"] < 1
    if method == "exact":
        assert there["jaccard"] == pytest.approx(len(edges[0] & edges[1]) / len(edges[0] | edges[1]))
        assert set(found["agreement"]["shared"]) == edges[0] & edges[1]
    assert (found["agreement"]["metric"], found["agreement"]["ablation"]) == ("logit_difference", "resample")
    assert printed(capsys, "circuit", RUN, "--seeds", twin, *options)["circuits"] == found["circuits"]


def test_over_seeds_the_first_run_sets_the_size(twin: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = printed(capsys, "circuit", twin, "--n", "16")["requested"]
    found = printed(capsys, "circuit", twin, "--seeds", RUN, "--n", "16")
    assert found["requested"] == size
    assert main(["circuit", twin, "--seeds", RUN, "--n", "16"]) == 0
    text = capsys.readouterr().out
    assert "Edges that all find: " in text
    assert "mean" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", RUN], f"two different runs or more, got {RUN}, {RUN}"),
        (["--seeds", ""], f"two different runs or more, got {RUN}."),
        (["--seeds", "twin", "--checkpoint", "all"], "leave --checkpoint all out"),
        (["--seeds", "twin", "--out", "x.json"], "leave --out out"),
        (["--seeds", "twin", "--threshold", "1", "--select", "grow"], "leave --threshold, --select out"),
        (["--seeds", "twni"], "Did you mean 'twin'"),
        (["--seeds", "twin", "--method", "mask"], "Say --edges"),
    ],
)
def test_what_does_not_compare_over_seeds_is_one_line(
    arguments: list[str], message: str, twin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "circuit", RUN, *arguments)


def test_runs_of_another_shape_do_not_compare(pairs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "circuit", RUN, "--seeds", str(pairs_folder / "own"))
    assert f"The graphs of '{RUN}' and '{pairs_folder}/own' differ (23 and 13 edges)" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--edges", "24"], "Asked for 24 edges; this model has 23"),
        (["--edges", "0"], "a circuit at least 1"),
        (["--edges", "5", "--threshold", "1"], "one of the two"),
        (["--edges", "5", "--method", "eapig"], "Did you mean 'eap-ig'"),
        (["--edges", "5", "--metric", "accuracy"], "has no gradient"),
        (["--edges", "5", "--metric", "logits"], "Unknown metric 'logits'"),
        (["--edges", "5", "--checkpoint", "0"], "Headroom is not told from 0"),
        (["--edges", "5", "--method", "eap", "--metric", "kl"], "its gradient is zero for every edge"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "circuit", RUN, *arguments)


def test_the_score_card_of_some(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--methods", "exact, eap", "--circuits", "or_gate", "--ablations", "resample"]
    found = printed(capsys, "scorecard", *arguments, "--out", str(tmp_path / "card"))
    assert {row["finder"] for row in found["rows"]} == {"exact", "eap"}
    assert {row["truth"] for row in found["rows"]} == {"structural", "causal"}
    assert found["version"] is None
    assert (tmp_path / "card" / "scorecard.csv").read_text().count("\n") == 5
    assert "Did you mean 'or_gate'" in refused(capsys, "scorecard", "--circuits", "orgate")


def test_benchmarks_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Benchmark(
        name="quick", compares="Nothing.", peer="itself", target=1.0, gate=0.1,
        prepare=lambda: (lambda: sum(range(1000)), lambda: sum(range(1000))),
        agreement=lambda one, other: abs(one - other),
    )  # fmt: skip
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"quick": lambda: quick})
    found = printed(capsys, "bench", "quick", "--repeats", "3")
    assert found["benchmarks"][0]["n"] == 3
    assert found["benchmarks"][0]["agrees"] is True
    assert "Did you mean 'quick'" in refused(capsys, "bench", "quik")
    assert "at least 1 round" in refused(capsys, "bench", "quick", "--repeats", "0")


def test_what_is_no_known_circuit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "learnt a transformer" in refused(capsys, "scorecard", "--circuits", "gallery:modular")
    assert "Did you mean 'sort'" in refused(capsys, "scorecard", "--circuits", "gallery:srt")


@pytest.mark.slow
def test_a_program_is_scored_by_its_own_dependencies(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "scorecard", "--circuits", "gallery:hist", "--methods", "eap")
    assert found["version"] is None
    assert "no gradient" in found["gradients"]["gallery:hist"]
    assert {row["truth"]: row["true"] for row in found["rows"]} == {"structural": 18, "causal": 11}
