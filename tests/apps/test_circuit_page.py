"""Page Circuit: a circuit that a job finds, its drawing, its sizes, its parts, and what it is compared with."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Page, expect

from apps.analyses import kept, key_of
from apps.circuits_of_runs import circuit_of
from apps.cli import build_parser
from apps.ui import circuit_jobs, circuit_questions, job_panels, jobs
from apps.ui.circuit_drawing import AROUND
from apps.ui.circuit_questions import Question
from circuits.circuit import Circuit
from circuits.discovery import find
from circuits.exchange import load_circuit, save_circuit
from circuits.paths import path_patch
from tests.circuits.test_attribution import silent_mlp
from workbench import load, store
from workbench.training.checkpoints import Run

AppOn = Callable[..., Any]


@dataclass(frozen=True)
class Held:
    """A circuit as the page has it, at any size."""

    circuit: Circuit

    def at(self, size: int | None) -> Circuit:
        return self.circuit


@pytest.fixture(scope="module")
def run(runs_folder: Path) -> Run:
    return load("small", runs=runs_folder)


@pytest.fixture(scope="module")
def question(run: Run) -> Question:
    """As the page asks when it opens."""
    return Question(
        reference="small",
        step=400,
        sha256=run.checkpoint().sha256,
        method="eap-ig",
        edges=None,
        ablation="resample",
        metric="logit_difference",
        granularity="component",
        absolute=True,
        n=64,
        split="test",
    )


@pytest.fixture(scope="module")
def summary(run: Run, question: Question) -> dict[str, Any]:
    """What is kept of it, as `workbench circuit` keeps it."""
    return kept(run, "circuit", circuit_of, 400, question.arguments)


@pytest.fixture
def app(app_on: AppOn, runs_folder: Path, summary: dict[str, Any]) -> Any:
    return app_on("circuit", runs_folder, run="small")


def texts(app: Any) -> str:
    shown = [*app.markdown, *app.caption, *app.info, *app.error, *app.warning, *app.subheader]
    return "\n".join(element.value for element in shown)


def numbers(app: Any) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


@pytest.mark.parametrize("change", [{}, {"edges": 7, "absolute": False, "ablation": "zero", "metric": "loss"}])
def test_the_job_keeps_what_the_page_looks_for(question: Question, change: dict[str, Any]) -> None:
    asked = replace(question, **change)
    options = vars(build_parser().parse_args(asked.command))
    told = {name: options[name] for name in asked.arguments if name != "absolute"}
    assert {**told, "absolute": not options["signed"]} == asked.arguments
    assert (options["run"], options["checkpoint"], options["json"]) == ("small", "400", True)


@pytest.mark.parametrize(("told", "share"), [("circuit small  42%", 0.42), ("7 % then 100 %", 1.0), ("loading", None)])
def test_the_share_that_a_job_tells(told: str, share: float | None) -> None:
    assert job_panels.share_of(told) == share


def test_a_kept_circuit_is_shown_at_once(app: Any, summary: dict[str, Any]) -> None:
    assert not app.exception
    assert not app.error
    assert numbers(app) == {
        "Edges": f"{summary['size']} of 23",
        "Faithfulness": f"{summary['faithfulness']:.3f}",
        "Random, 95 %": f"{summary['random_95']:.3f}",
        "Accuracy": f"{summary['accuracy']:.1%}",
    }
    low, high = summary["faithfulness_interval"]
    assert f"[{low:.3f}, {high:.3f}]" in texts(app)
    assert "n = 64 pairs other than those" in texts(app)
    spec = app.get("echarts_chart")[0].proto.spec
    assert '"m0->logits"' in spec
    assert f"**{summary['necessity']:.3f}**" in texts(app)


def test_the_slider_prunes(app: Any, summary: dict[str, Any]) -> None:
    row = next(row for row in summary["curve"] if row["requested"] == 3)
    app.select_slider(key="size").set_value(3).run()
    assert not app.exception
    assert numbers(app)["Edges"] == f"{row['edges']} of 23"
    assert numbers(app)["Faithfulness"] == f"{row['faithfulness']:.3f}"
    assert numbers(app)["Accuracy"] == f"{row['accuracy']:.1%}"
    if row["edges"] < 3:
        assert f"{3 - row['edges']} of the 3 best edges dangle" in texts(app)


def test_an_edge_tells_noise_and_denoise_in_model_and_circuit(
    app_on: AppOn, runs_folder: Path, run: Run, summary: dict[str, Any]
) -> None:
    app = app_on("circuit", runs_folder, run="small", look="m0->logits")
    assert not app.exception
    pairs = run.task.sample(64, split="test", seed=1)
    patched = path_patch(run.model(), pairs, senders="m0", receivers="logits").frame.set_index("direction")
    for direction in ("noise", "denoise"):
        row = patched.loc[direction]
        assert f"**{direction}** {row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in texts(app)
    # Without its last edge nothing is left of the circuit.
    assert f"**in the circuit** {summary['faithfulness']:+.3f}" in texts(app)
    assert "taken out of this circuit" in texts(app)
    examples = next(frame.value for frame in app.dataframe if "prompt" in frame.value.columns)
    lost = examples["logit_difference lost"]
    assert lost.abs().is_monotonic_decreasing
    first = run.task.decode(pairs.tokens[int(examples["example"].iloc[0])].tolist())
    assert examples["prompt"].iloc[0] == first


def test_an_edge_outside_the_circuit_is_put_into_it(app_on: AppOn, runs_folder: Path, summary: dict[str, Any]) -> None:
    kept_edges = {f"{edge['from']}->{edge['to']}" for edge in summary["edges"]}
    assert "input->a0.h0<q>" not in kept_edges
    app = app_on("circuit", runs_folder, run="small", look="input->a0.h0<q>")
    assert not app.exception
    assert "**not kept**" in texts(app)
    assert "put into this circuit: what is gained" in texts(app)
    # The query is read at "=", which both prompts have.
    assert "Effects of 0 say nothing about it" in texts(app)


def test_a_head_tells_where_it_looks_and_what_it_adds(
    app_on: AppOn, runs_folder: Path, summary: dict[str, Any]
) -> None:
    app = app_on("circuit", runs_folder, run="small", look="a0.h1")
    assert not app.exception
    assert app.subheader[0].value == "a0.h1"
    assert "Straight into the logits it adds" in texts(app)
    assert "all that it writes ablated in the whole model" in texts(app)
    assert "Mean over n = 64 clean prompts." in texts(app)
    prompt = app.selectbox(key="prompt_of").options[1]
    app.selectbox(key="prompt_of").set_value(prompt).run()
    assert not app.exception
    assert "it writes (logits): **" in texts(app)


@pytest.mark.parametrize("node", ["logits", "input", "m0"])
def test_every_node_can_be_looked_at(node: str, app_on: AppOn, runs_folder: Path, summary: dict[str, Any]) -> None:
    app = app_on("circuit", runs_folder, run="small", look=node)
    assert not app.exception
    assert not app.error
    assert "of its" in texts(app)


def test_each_edge_is_taken_out(app: Any, summary: dict[str, Any]) -> None:
    def costs() -> dict[str, float]:
        found = [frame.value for frame in app.dataframe if "verdict" in frame.value.columns]
        return dict(zip(found[0]["edge"], found[0]["cost"], strict=True)) if found else {}

    at_once = {row["edge"]: row["cost"] for row in summary["minimality"]}
    assert costs() == pytest.approx(at_once, abs=1e-6)
    # Another size is measured once it is asked for; this one is all that is live.
    size = max(row["requested"] for row in summary["curve"] if row["requested"] <= summary["live_edges"])
    app.select_slider(key="size").set_value(size).run()
    assert not costs()
    app.button(key="minimality").click().run()
    assert not app.exception
    assert set(at_once) < set(costs())
    # Back again, what was kept agrees with what is measured.
    app.select_slider(key="size").set_value(summary["requested"]).run()
    assert set(costs()) == set(at_once)


def test_redundant_edges_keep_their_partners(summary: dict[str, Any], run: Run, question: Question) -> None:
    rows = [
        {"edge": "x", "cost": 0.0, "low": 0.0, "high": 0.01, "verdict": "redundant", "redundant_with": "y, z"},
        {"edge": "y", "cost": 0.5, "low": 0.4, "high": 0.6, "verdict": "needed", "redundant_with": ""},
    ]
    path = store.kept_result(run.folder, key_of(run, "circuit", 400, question.arguments))
    assert path is not None
    held = circuit_questions.Found(
        circuit=load_circuit(path / "circuit.json"), summary={"minimality": rows, "n": 3}, curve=None
    )
    assert held.minimality.partners == (("y", "z"), ())
    assert held.minimality.verdicts == ("redundant", "needed")


def test_an_edge_that_changes_an_answer_is_not_called_dead(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = silent_mlp()
    monkeypatch.setattr(circuit_questions, "plan_of", lambda question: plan)
    monkeypatch.setattr(circuit_questions, "found", lambda question: Held(find(plan, "exact", edges=1)))
    monkeypatch.setattr(circuit_questions, "_examples", lambda question, plan, lost: pd.DataFrame())
    asked = replace(question, ablation="zero")
    seen = {edge: circuit_questions.examined_edge.__wrapped__(asked, None, edge) for edge in plan.graph.index}
    assert not seen["input->m0"].dead
    assert not bool(plan.live[plan.graph.index["input->m0"]])
    assert seen["m0->logits"].dead


def test_two_checkpoints_and_two_methods_are_compared(
    app: Any, run: Run, question: Question, summary: dict[str, Any]
) -> None:
    wanted = replace(question, edges=summary["requested"])
    steps = [each.step for each in run.checkpoints][:-1]
    early = replace(wanted, step=steps[-1], sha256=run.checkpoint(steps[-1]).sha256)
    exact = replace(wanted, method="exact")
    for asked in (early, exact):
        kept(run, "circuit", circuit_of, asked.step, asked.arguments)
    app.selectbox(key="against").set_value("another checkpoint").run()
    assert not app.exception
    assert f"Against step {steps[-1]}" in texts(app)
    assert re.search(r"hit \d+, miss \d+, false alarm \d+; precision [\d.]+, recall [\d.]+", texts(app))
    table = next(frame.value for frame in app.dataframe if "status" in frame.value.columns)
    assert {"score", "score of the other"} <= set(table.columns)
    app.selectbox(key="against").set_value("another method").run()
    assert not app.exception
    assert "Against method exact" in texts(app)


@pytest.mark.parametrize(
    "query",
    [{"size": "99"}, {"size": "x"}, {"look": "nowhere"}, {"look": "a9.h9->logits"}, {"rank": "x"}, {"against": "x"}],
)
def test_a_stale_link_falls_back(
    query: dict[str, str], app_on: AppOn, runs_folder: Path, summary: dict[str, Any]
) -> None:
    app = app_on("circuit", runs_folder, run="small", **query)
    assert not app.exception
    assert not app.error
    assert numbers(app)["Edges"] == f"{summary['size']} of 23"


@pytest.mark.parametrize("chosen", [None, "m0"])
def test_the_copied_code_finds_the_same(
    chosen: str | None,
    app_on: AppOn,
    runs_folder: Path,
    summary: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = next(row for row in summary["curve"] if row["requested"] == 5)
    app = app_on("circuit", runs_folder, run="small", size="5", **({} if chosen is None else {"look": chosen}))
    exec(app.code[0].value, {})
    printed = capsys.readouterr().out
    found = re.search(r"faithfulness (-?[\d.]+)\n", printed)
    assert found is not None
    assert float(found[1]) == pytest.approx(row["faithfulness"], abs=1e-5)
    if chosen is not None:
        lost = re.search(r"m0 ablated alone (-?[\d.]+)", printed)
        assert lost is not None
        assert f"**noise** {float(lost[1]):+.3f}" in texts(app)


def test_a_learned_mask_is_of_one_size_too(app_on: AppOn, runs_folder: Path) -> None:
    app = app_on("circuit", runs_folder, run="small", method="mask")
    assert not app.exception
    assert "mask looks for a circuit of one size" in app.info[0].value


def test_what_does_not_rank_edges_asks_for_a_size(
    app_on: AppOn, runs_folder: Path, run: Run, question: Question
) -> None:
    app = app_on("circuit", runs_folder, run="small", method="acdc")
    assert not app.exception
    assert "acdc looks for a circuit of one size" in app.info[0].value
    asked = replace(question, method="acdc", edges=8)
    found = kept(run, "circuit", circuit_of, 400, asked.arguments)
    app.number_input(key="edges").set_value(8).run()
    assert not app.exception
    assert numbers(app)["Edges"] == f"{found['size']} of 23"
    assert "By acdc edges have no ranking" in texts(app)
    exec(app.code[0].value, {})


def test_formats_that_cannot_hold_the_circuit_say_why(
    app_on: AppOn, runs_folder: Path, run: Run, question: Question
) -> None:
    asked = replace(question, granularity="inputs")
    kept(run, "circuit", circuit_of, 400, asked.arguments)
    app = app_on("circuit", runs_folder, run="small", granularity="inputs")
    assert not app.exception
    assert "No EAP (JSON): " in texts(app)
    labels = [button.proto.label for button in app.get("download_button")]
    assert {"Workbench (JSON)", "Drawing (DOT)", "Graph (GraphML)", "Picture (HTML)"} <= set(labels)
    assert "EAP (JSON)" not in labels


def test_a_small_model_is_searched_without_being_asked(
    app_on: AppOn, runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").symlink_to(runs_folder / "small")
    started: list[tuple[str, ...]] = []
    waiting = [sys.executable, "-c", "import sys, time; print(' 42 %', file=sys.stderr, flush=True); time.sleep(60)"]

    def start(arguments: tuple[str, ...], *, subject: str) -> jobs.Job:
        started.append(arguments)
        return jobs.start_process(waiting, arguments, subject=subject)

    monkeypatch.setattr(jobs, "start", start)
    app = app_on("circuit", tmp_path, run="small", method="eap", n="20")
    assert not app.exception
    assert len(started) == 1
    assert "--method eap" in " ".join(started[0])
    # Looked at again, the same job is watched and no other started.
    app.run()
    assert len(started) == 1
    app.button(key="circuit_cancel").click().run()
    job = jobs.list_jobs(tmp_path)[0]
    for _ in range(50):
        app.run()
        if not job.running:
            break
    assert job.status == "cancelled"
    app.run()
    assert "Cancelled." in texts(app)
    assert app.button(key="circuit_find").label == "Look for it again"


def test_a_large_model_waits_for_a_click(
    app_on: AppOn, runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").symlink_to(runs_folder / "small")
    monkeypatch.setattr(circuit_jobs, "SMALL", 22)
    failing = [
        sys.executable,
        "-c",
        "import sys; print('No headroom: choose other pairs.', file=sys.stderr); sys.exit(2)",
    ]
    monkeypatch.setattr(
        jobs, "start", lambda arguments, *, subject: jobs.start_process(failing, arguments, subject=subject)
    )
    app = app_on("circuit", tmp_path, run="small", method="eap", n="21")
    assert "This model has 23 edges" in app.info[0].value
    app.button(key="circuit_find").click().run()
    job = jobs.list_jobs(tmp_path)[0]
    while job.running:
        app.run()
    app.run()
    assert app.error[0].value == "No headroom: choose other pairs."


def test_an_empty_runs_folder(app_on: AppOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GALLERY", tmp_path / "gallery")
    app = app_on("circuit", tmp_path)
    assert not app.exception
    assert "There are no runs yet" in app.info[0].value


def click(page: Page, stage: float, row: float, stages: int = 4, rows: int = 4) -> None:
    """Click into the drawing, at a stage and a row of it."""
    canvas = page.locator(".st-key-circuit canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    across = (box["width"] - AROUND.left - AROUND.right) * (stage + 0.5) / stages
    down = (box["height"] - AROUND.top - AROUND.bottom) * (row + 0.5) / rows
    page.mouse.click(box["x"] + AROUND.left + across, box["y"] + AROUND.top + down)


@pytest.mark.browser
def test_a_circuit_in_the_browser(page: Page, tmp_path: Path, run: Run, question: Question) -> None:
    # Nothing is kept of this question: a real job finds it.
    page.goto("/circuit?run=small&n=48")
    expect(page.get_by_text("pairs other than those")).to_be_visible(timeout=60_000)
    click(page, 1, 0)
    expect(page.get_by_role("heading", name="a0.h0", exact=True)).to_be_visible()
    expect(page).to_have_url(re.compile("look=a0.h0"))
    expect(page.get_by_text("Attention over")).to_be_visible()
    # Half of the way from the MLP to the logits.
    click(page, 2.5, 1.5)
    expect(page.get_by_role("heading", name="m0->logits")).to_be_visible()
    expect(page.get_by_text("its clean value alone in the counterfactual run")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="m0->logits")).to_be_visible()
    # A second click takes it back, and a third brings it again.
    click(page, 2.5, 1.5)
    expect(page.get_by_role("heading", name="m0->logits")).to_have_count(0)
    expect(page).not_to_have_url(re.compile("look="))
    click(page, 2.5, 1.5)
    expect(page.get_by_role("heading", name="m0->logits")).to_be_visible()

    page.get_by_role("slider", name="Size").focus()
    page.keyboard.press("ArrowLeft")
    expect(page).to_have_url(re.compile("size="))

    # A truth from a file: one edge that is there and one that is not.
    asked = replace(question, n=48)
    results = store.kept_result(run.folder, key_of(run, "circuit", 400, asked.arguments))
    assert results is not None
    circuit = load_circuit(results / "circuit.json")
    keep = circuit.graph.mask(["m0->logits", "input->logits"])
    save_circuit(tmp_path / "truth.json", replace(circuit, keep=keep))
    save_circuit(tmp_path / "foreign.eap.json", replace(circuit, keep=keep))
    (tmp_path / "broken.json").write_text("{")
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="a file").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "truth.json")
    expect(page.get_by_text("Against truth.json (2 edges): hit 1, miss 1").first).to_be_visible()
    page.locator("input[type=file]").set_input_files(tmp_path / "broken.json")
    expect(page.get_by_test_id("stAlertContentError")).to_contain_text("broken.json")
    # The EAP format does not say under what it holds; other terms are refused.
    page.locator("input[type=file]").set_input_files(tmp_path / "foreign.eap.json")
    page.get_by_label("Its ablation").click()
    page.get_by_role("option", name="zero", exact=True).click()
    page.get_by_label("Its metric").click()
    page.get_by_role("option", name="logit_difference", exact=True).click()
    expect(page.get_by_text("These results do not compare")).to_be_visible()
