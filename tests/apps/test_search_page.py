"""Page Search: a graph typed, edited or drawn; the choice, the sets by layer, operations and their removal."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect
from typing_in_pages import settled, type_until

from apps.analyses import kept
from apps.cli import build_parser, main
from apps.tracing import COLUMNS, printed_rows, traces_of
from apps.ui import jobs, search_drawing, search_input, search_questions, search_traces
from apps.ui.circuit_drawing import AROUND, echarts, plotly
from circuits.path_merging import PathTrace, trace_paths
from circuits.search_prompts import SearchPrompt
from workbench import load
from workbench.models.planted_search import path_doubling
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import new_run, write_json
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import save_checkpoint

AppOn = Callable[..., Any]
GRAPH = "1>2 2>3 1>4 4>5 3>6 Q 1 3"
TASK = GraphSearch(size=26, test_size=60)


def texts(app: Any) -> str:
    shown = [*app.markdown, *app.caption, *app.info, *app.error, *app.warning, *app.success]
    return "\n".join(element.value for element in shown)


def drawings(app: Any) -> list[Any]:
    return [json.loads(each.proto.spec) for each in app.get("echarts_chart")]


def labels(app: Any) -> dict[str, str]:
    """What is written on each vertex of the drawn graph."""
    return {node["name"]: node["label"]["formatter"] for node in drawings(app)[0]["series"][0]["data"]}


@pytest.fixture(scope="module")
def trace() -> PathTrace:
    prompt = SearchPrompt.read(TASK.prompt(GRAPH).tokens[0], TASK.layout)
    return trace_paths(path_doubling(TASK.layout), prompt)


# The graph ----------------------------------------------------------------------------------------------------------


def test_the_page_opens_on_a_run_that_searches(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder)
    assert not app.exception
    assert not app.error
    assert app.sidebar.selectbox(key="run").value == "gallery:search"
    task = load("gallery:search").task
    assert isinstance(task, GraphSearch)
    assert app.text_input(key="graph").value == search_questions.example(task, "balanced", 3, 0)
    assert "(lookahead 3)" in texts(app)


def test_a_typed_graph_is_answered(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="doubling", graph=GRAPH)
    assert not app.exception
    assert app.success[0].value == "From **1** to **3** (lookahead 2), the model goes to **2**: right."
    chances = app.dataframe[1].value
    assert chances["child"].tolist() == ["2", "4", "all else"]
    assert chances["right"].tolist() == [True, False, False]
    assert chances["probability"].sum() == pytest.approx(1)
    wrong = app_on("search", searches_folder, run="doubling", graph=GRAPH, step="0")
    assert "wrong" in texts(wrong)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("1>2 2>3 3>1 Q 1 3", "This graph has a cycle through 1, 2, 3"),
        ("1>2 4>5 Q 1 2", "This graph is in several parts: nothing connects 4, 5 with the start 1"),
        ("1>2 1>3 3>4 Q 2 4", "Goal 4 cannot be reached from start 2"),
        ("1>2 1>3 1>4 1>5 1>6 1>7 1>8 2>3 Q 1 3", "This graph has 8 edges; the model reads 1 to 7"),
        ("1>2 1>2 Q 1 2", "Edge 1>2 is given twice"),
        ("1>9 Q 1 9", "Vertex 9 is not in the vocabulary: vertices go from 1 to 8"),
        ("one to two", "Cannot read 'one to two' as a prompt"),
        ("", "Cannot read '' as a prompt"),
    ],
)
def test_a_graph_that_cannot_be_asked_about(app_on: AppOn, searches_folder: Path, graph: str, message: str) -> None:
    app = app_on("search", searches_folder, run="doubling", graph="1>2 Q 1 2")
    app.text_input(key="graph").set_value(graph).run()
    assert not app.exception
    assert message in app.error[0].value
    # What training showed is there all the same.
    assert [header.value for header in app.header] == ["Many inputs", "Through training"]


def test_start_and_goal_are_chosen(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="doubling", graph=GRAPH)
    (goal,) = (each for each in app.selectbox if each.label == "Goal")
    assert goal.options == ["1", "2", "3", "4", "5", "6"]
    goal.set_value(5).run()
    assert not app.exception
    assert app.text_input(key="graph").value == "1>2 2>3 1>4 4>5 3>6 Q 1 5"
    assert "the model goes to **4**: right" in texts(app)
    (start,) = (each for each in app.selectbox if each.label == "Start")
    start.set_value(3).run()
    assert "Goal 5 cannot be reached from start 3" in app.error[0].value


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({"edited_rows": {1: {"target": 7}}}, [(1, 2), (2, 7)]),
        ({"deleted_rows": [0]}, [(2, 3)]),
        ({"added_rows": [{"source": 3, "target": 4}]}, [(1, 2), (2, 3), (3, 4)]),
        ({"added_rows": [{"source": 3}]}, None),
        ({"edited_rows": {0: {"source": None}}}, None),
    ],
)
def test_edges_are_edited_in_a_table(edits: dict[str, Any], expected: object) -> None:
    none = {"edited_rows": {}, "deleted_rows": [], "added_rows": []}
    assert search_input.edited_edges([(1, 2), (2, 3)], {**none, **edits}) == expected


def test_texts_are_read_as_they_are_written() -> None:
    edges, ends = search_questions.read_text(GRAPH)
    assert edges == [(1, 2), (2, 3), (1, 4), (4, 5), (3, 6)]
    assert ends == (1, 3)
    assert ends is not None
    assert search_questions.write_text(edges, *ends) == GRAPH
    assert search_questions.read_text("a cycle is read: 1>1") == ([], None)
    assert search_questions.read_text("1>2 2>1 Q 1 2") == ([(1, 2), (2, 1)], (1, 2))


# Among a few naive graphs hardly any has a lookahead above 1.
@pytest.mark.parametrize(("distribution", "lookahead"), [("balanced", 2), ("naive", 1), ("star", 2)])
def test_one_is_drawn_at_random(app_on: AppOn, searches_folder: Path, distribution: str, lookahead: int) -> None:
    app = app_on("search", searches_folder, run="doubling")
    before = app.text_input(key="graph").value
    app.selectbox(key="drawn_from").set_value(distribution)
    app.selectbox(key="drawn_lookahead").set_value(lookahead).run()
    app.button(key="draw_graph").click().run()
    assert not app.exception
    first = app.text_input(key="graph").value
    assert first != before
    assert f"(lookahead {lookahead})" in texts(app)
    app.button(key="draw_graph").click().run()
    assert app.text_input(key="graph").value != first


def test_a_lookahead_that_a_distribution_lacks_is_said() -> None:
    with pytest.raises(WorkbenchError, match="None of 60 star test graphs has a lookahead of 0"):
        search_questions.example(TASK, "star", 0, 0)


def test_another_run_has_another_graph(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="doubling", graph=GRAPH)
    app.sidebar.selectbox(key="run").set_value("searching").run()
    assert not app.exception
    assert app.text_input(key="graph").value != GRAPH


# Sets and operations ------------------------------------------------------------------------------------------------


def test_sets_grow_from_layer_to_layer(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="doubling", graph=GRAPH, layers="0")
    assert labels(app) == {
        "1": "1 start\n(1)",
        "2": "2\n(2)",
        "3": "3 goal\n(3)",
        "4": "4\n(4)",
        "5": "5\n(5)",
        "6": "6\n(6)",
    }
    sizes = []
    for layers in range(4):
        app.slider(key="layers").set_value(layers).run()
        assert not app.exception
        sizes.append(sum(len(label.split("\n")[1].split()) for label in labels(app).values()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1]
    assert "Path merging explains this answer" in texts(app)


def test_a_vertex_shows_what_it_holds(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="doubling", graph=GRAPH, layers="1", vertex="1")
    assert not app.exception
    assert app.selectbox(key="vertex").value == 1
    ink = {node["name"]: node["label"]["color"] for node in drawings(app)[0]["series"][0]["data"]}
    held = labels(app)["1"].split("\n")[1].strip("()").split()
    assert {name for name, colour in ink.items() if colour == ink["1"]} == set(held)


def test_an_operation_is_removed_and_put_back(app_on: AppOn, searches_folder: Path, trace: PathTrace) -> None:
    app = app_on("search", searches_folder, run="doubling", graph=GRAPH)
    names = [search_questions.name_of(each, trace.prompt) for each in trace.strict.operations]
    assert app.selectbox(key="operation").options == names
    reading = next(name for name in names if name.startswith("L2: answer from"))
    app.selectbox(key="operation").set_value(reading).run()
    assert not app.exception
    assert f"**{reading}**: the first copies from the second." in texts(app)
    assert "It merged a set that flows into the answer." in texts(app)
    before = app.dataframe[1].value["probability"][0]
    app.button(key="toggle").click().run()
    assert not app.exception
    assert app.multiselect(key="removed").value == [reading]
    assert "without the removed operations the model goes to" in texts(app)
    after = app.dataframe[1].value["without them"][0]
    assert after < before / 2
    dashes = {link["id"]: link["lineStyle"]["type"] for link in drawings(app)[1]["series"][0]["links"]}
    assert dashes[reading] == "dotted"
    app.button(key="toggle").click().run()
    assert app.multiselect(key="removed").value == []
    assert "without the removed operations" not in texts(app)


def test_all_that_the_answer_hangs_on(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="searching", graph=GRAPH)
    few = len(app.selectbox(key="operation").options)
    app.toggle(key="every").set_value(True).run()
    assert not app.exception
    many = len(app.selectbox(key="operation").options)
    assert many > few
    assert str(many) in app.toggle(key="every").label


def test_a_link_brings_back_what_was_seen(app_on: AppOn, searches_folder: Path, trace: PathTrace) -> None:
    name = search_questions.name_of(trace.strict.operations[0], trace.prompt)
    seen = {"graph": GRAPH, "layers": "2", "operation": name, "removed": name, "vertex": "2", "merge": "published"}
    app = app_on("search", searches_folder, run="doubling", **seen)
    assert not app.exception
    assert app.slider(key="layers").value == 2
    assert app.selectbox(key="operation").value == name
    assert app.multiselect(key="removed").value == [name]
    assert app.selectbox(key="vertex").value == 2
    assert app.button_group(key="merge").value == "published"


def test_the_copied_code_gives_the_same_answer(
    app_on: AppOn, searches_folder: Path, trace: PathTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    name = search_questions.name_of(trace.strict.operations[-1], trace.prompt)
    app = app_on("search", searches_folder, run="doubling", graph=GRAPH, removed=name)
    exec(app.code[0].value, {})
    said = capsys.readouterr().out
    assert "'explained_strict': True" in said
    shares = [float(number) for number in re.findall(r"\d\.\d+e?[-+]?\d*", said[said.rindex("tensor(") :])]
    assert shares[2] == pytest.approx(app.dataframe[1].value["without them"][0], abs=1e-3)


# Many inputs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(searches_folder: Path, tmp_path: Path) -> Path:
    """The wired model in a runs folder of its own, of which nothing is kept."""
    shutil.copytree(searches_folder / "doubling", tmp_path / "doubling")
    return tmp_path


def test_many_inputs_are_shown_where_they_were_traced(app_on: AppOn, copied: Path) -> None:
    found = kept(load("doubling", runs=copied), "path_traces", traces_of, 1, {"n": 2, "lookahead": 2, "seed": 0})
    app = app_on("search", copied, run="doubling", graph=GRAPH, traced="2", traced_lookahead="2")
    assert not app.exception
    assert not app.error
    shown = next(each.value for each in app.dataframe if "variant" in each.value.columns)
    assert shown.to_dict("records") == [{name: row[name] for name in COLUMNS} for row in printed_rows(found)]
    assert shown.set_index(["variant", "lookahead"]).loc[("model", "2+"), "explained_strict"] == 1
    assert [tab.label for tab in app.tabs][-4:] == list(search_traces.DRAWN.values())
    code = next(each.value for each in app.code if "traces_of" in each.value)
    assert "1, n=2, lookahead=2)" in code


@pytest.mark.parametrize(("lookahead", "options", "inputs"), [(None, [], 12), ("3", ["--lookahead", "3"], 3)])
def test_many_inputs_are_traced_by_a_job(
    app_on: AppOn,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    lookahead: str | None,
    options: list[str],
    inputs: int,
) -> None:
    query = {} if lookahead is None else {"traced_lookahead": lookahead}
    app = app_on("search", copied, run="doubling", graph=GRAPH, step="0", traced="3", **query)
    assert not app.exception
    assert app.button(key="traces_start").label == f"Trace {inputs} inputs"
    waiting = [sys.executable, "-c", "import sys, time; print('trace 40 %', file=sys.stderr); time.sleep(60)"]
    started: list[tuple[str, ...]] = []

    def start(arguments: tuple[str, ...], *, subject: str) -> jobs.Job:
        started.append(arguments)
        return jobs.start_process(waiting, arguments, subject=subject)

    monkeypatch.setattr(jobs, "start", start)
    app.button(key="traces_start").click().run()
    assert started == [("trace", "doubling", "--checkpoint", "0", "--n", "3", *options, "--json")]
    assert "traces_start" not in [button.key for button in app.button]
    app.button(key="traces_cancel").click().run()
    job = jobs.list_jobs(copied)[0]
    while job.running:
        time.sleep(0.05)
    assert job.status == "cancelled"
    again = app_on("search", copied, run="doubling", graph=GRAPH, step="0", traced="3", **query)
    assert "Cancelled." in texts(again)
    assert again.button(key="traces_start").label == f"Trace {inputs} inputs again"


def test_the_job_keeps_what_the_page_looks_for(copied: Path) -> None:
    run = load("doubling", runs=copied)
    asked = build_parser().parse_args(["trace", "doubling"])
    assert asked.n is None
    assert asked.seed == search_traces.SEED
    assert main(["trace", "doubling", "--n", "1", "--lookahead", "1", "--runs", str(copied), "--json"]) == 0
    assert search_traces.kept_traces(run, 1, 1, 1) is not None


# Other runs ---------------------------------------------------------------------------------------------------------


def test_a_run_of_another_task_offers_those_that_search(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="gallery:modular")
    assert not app.exception
    assert "learnt 'modular'; this page shows runs on graph search" in app.info[0].value
    app.button(key="open_doubling").click().run()
    assert not app.exception
    assert "the model goes to" in texts(app)


def test_where_nothing_searches_it_says_how_to_train_one(app_on: AppOn, tmp_path: Path) -> None:
    app = app_on("search", tmp_path, run="gallery:modular")
    assert not app.exception
    if not [button for button in app.button if button.key and button.key.startswith("open_")]:
        assert "`workbench train search`" in app.info[0].value


def test_a_model_that_cannot_be_traced_still_answers(app_on: AppOn, searches_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(searches_folder / "doubling", tmp_path / "heads")
    recipe = load("doubling", runs=searches_folder).recipe
    config = replace(recipe.model, n_heads=2, d_head=8)
    two = replace(recipe, name="heads", model=config)
    run = new_run("heads2", tmp_path)
    write_json(run.path / "recipe.json", two.to_json())
    weights = Transformer(config, generator=generator(0, "weights")).state_dict()
    save_checkpoint(run, 0, weights, ["wired"], dtype=torch.float32)
    app = app_on("search", tmp_path, run="heads2", graph=GRAPH)
    assert not app.exception
    assert "Path merging is traced in models with one head a layer; this one has 2" in app.error[0].value
    assert "the model goes to" in texts(app)
    assert labels(app)["4"] == "4\n(4)"


def test_accuracy_by_lookahead_moves_the_checkpoint(app_on: AppOn, searches_folder: Path) -> None:
    app = app_on("search", searches_folder, run="searching")
    assert not app.exception
    assert "Accuracy on 60 balanced test graphs of each lookahead" in texts(app)
    bare = app_on("search", searches_folder, run="doubling")
    assert "This run was not trained here, so it has no curves." in texts(bare)


# Drawings -----------------------------------------------------------------------------------------------------------


def test_vertices_stand_right_of_all_that_lead_to_them() -> None:
    places, n_stages, n_rows = search_drawing.layered([(1, 2), (1, 3), (2, 4), (3, 5), (1, 5)])
    assert n_stages == 3
    assert n_rows == 2
    assert {vertex: stage for vertex, (stage, _) in places.items()} == {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    assert len(set(places.values())) == 5
    # Children stand in the order of their parents, so that their edges do not cross.
    assert (places[4][1] < places[5][1]) == (places[2][1] < places[3][1])


def test_both_drawings_are_pictures_to_keep(trace: PathTrace) -> None:
    prompt, merge = trace.prompt, trace.strict
    sets = search_drawing.sets_after(merge, prompt, 3)
    graph = search_drawing.draw_graph(prompt, sets, chosen=None, answer="2")
    assert graph.arrows
    series = echarts(graph)["series"][0]
    assert series["edgeSymbol"] == ["none", "arrow"]
    (marked,) = (line for line in graph.lines if "the model's choice" in line.tip)
    assert marked.name == "1>2"
    operations = search_drawing.draw_operations(prompt, trace.operations, merge, layers=3, chosen=None, removed=())
    assert {line.source for line in operations.lines} <= {dot.name for dot in operations.dots}
    assert plotly(graph, GRAPH).to_dict()["data"][-1]["text"][0].startswith("1 start<br>(1")


def test_rows_are_named_by_their_edges(trace: PathTrace) -> None:
    rows = [search_questions.row_label(trace.prompt, row) for row in range(len(trace.prompt))]
    assert rows[:4] == ["E of 1>2", "1 of 1>2", "2 of 1>2", "E of 2>3"]
    assert rows[-5:] == ["Q", "start 1", "goal 3", "P", "answer"]
    assert len(set(rows)) == len(rows)


# In the browser -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_draw_step_click_and_remove(
    open_page: Callable[..., Page], server_on: Callable[..., Any], searches_folder: Path, trace: PathTrace
) -> None:
    page = open_page(server_on(searches_folder))
    page.goto("/search?run=doubling")
    expect(page.get_by_text("the model goes to")).to_be_visible()
    box = page.get_by_label("Graph", exact=True)
    before = box.input_value()
    page.get_by_role("button", name="Draw one at random").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(box).not_to_have_value(before)
    settled(page)
    page.keyboard.press("Escape")
    type_until(box, GRAPH, page.get_by_text("From 1 to 3 (lookahead 2), the model goes to 2: right."))
    settled(page)
    slider = page.get_by_role("slider", name="Layers that have run")
    slider.press("Home")
    expect(page.get_by_text("hold before the first layer")).to_be_visible()
    slider.press("End")
    expect(page.get_by_text("hold after layer 2")).to_be_visible()
    settled(page)
    operation = trace.strict.operations[-1]
    click_operation(page, trace, operation)
    name = search_questions.name_of(operation, trace.prompt)
    expect(page.get_by_text(f"{name}: the first copies from the second.")).to_be_visible()
    page.get_by_role("button", name="Remove it").click()
    expect(page.get_by_text("without the removed operations the model goes to")).to_be_visible()
    expect(page.get_by_role("button", name="Put it back")).to_be_visible()
    page.reload()
    expect(page.get_by_text("without the removed operations the model goes to")).to_be_visible()


@pytest.mark.browser
def test_many_inputs_by_a_real_job(
    open_page: Callable[..., Page], server_on: Callable[..., Any], searches_folder: Path
) -> None:
    page = open_page(server_on(searches_folder))
    page.goto("/search?run=doubling&traced=1&traced_lookahead=2")
    page.get_by_role("button", name="Trace 1 input", exact=True).click()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    expect(page.get_by_text("Shares of inputs with 95 % score intervals.")).to_be_visible(timeout=120_000)
    settled(page)
    page.get_by_role("tab", name="With and without the operations").click()
    expect(page.get_by_text("Accuracy with attention entries at zero")).to_be_visible()


def click_operation(page: Page, trace: PathTrace, operation: Any) -> None:
    """Click an operation near the row that it copies from, where no other line lies."""
    drawing = search_drawing.draw_operations(
        trace.prompt, trace.strict.operations, trace.strict, layers=3, chosen=None, removed=()
    )
    name = search_questions.name_of(operation, trace.prompt)
    line = next(line for line in drawing.lines if line.name == name)
    at = {dot.name: dot.at for dot in drawing.dots}
    start, end = at[line.source], at[line.target]
    stage, row = (start[axis] + 0.5 * (end[axis] - start[axis]) for axis in (0, 1))
    canvas = page.locator(".st-key-operations canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    across = (box["width"] - AROUND.left - AROUND.right) * (stage + 0.5) / len(drawing.stages)
    down = (box["height"] - AROUND.top - AROUND.bottom) * (row + 0.5) / drawing.rows
    page.mouse.click(box["x"] + AROUND.left + across, box["y"] + AROUND.top + down)
