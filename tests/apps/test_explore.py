"""Page Explore: two prompts, a place that is clicked, and what is put there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from typing_in_pages import type_until

from apps.ui.questions import paired, position_names
from apps.ui.views import explore
from circuits.patching import Cell, patch_each
from circuits.swaps import swap
from probes.places import read_place
from workbench import load, store
from workbench.instrument.sites import Site
from workbench.tasks.modular import Modular
from workbench.tasks.pairs import Pairs
from workbench.training.checkpoints import Run

AppOn = Callable[..., Any]
PROMPTS = {"prompt": "3 + 5 =", "counterfactual": "3 + 9 ="}


@pytest.fixture(scope="module")
def run(runs_folder: Path) -> Run:
    return load("small", runs=runs_folder)


@pytest.fixture
def app(app_on: AppOn, runs_folder: Path) -> Any:
    return app_on("explore", runs_folder, run="small", **PROMPTS)


def texts(app: Any) -> str:
    shown = [*app.markdown, *app.caption, *app.info, *app.error, *app.warning, *app.subheader, *app.success]
    return "\n".join(element.value for element in shown)


def chart(app: Any, title: str) -> str:
    return next(each.proto.spec for each in app.get("echarts_chart") if title in each.proto.spec)


def test_positions_carry_their_tokens() -> None:
    assert position_names(Modular(p=5), [3, 4, 5]) == ("a=3", "b=4", "=")
    own = Pairs(vocab=("x", "y"), clean=((0, 1),), corrupt=((1, 1),), answer=(0,), distractor=(1,))
    assert position_names(own, [1]) == ("t0=y",)
    # Longer than any of the task's own prompts.
    assert position_names(own, [1, 1, 0]) == ("t0=y", "t1=y", "t2=x")


def test_only_kinds_that_the_model_has_are_offered(run: Run) -> None:
    sites = run.model().sites
    assert explore.kinds_of(sites) == list(explore.KINDS)
    without = [site for site in sites if site.kind.name not in ("post", "mlp_out")]
    assert set(explore.KINDS) - set(explore.kinds_of(without)) == {"post", "mlp_out"}


@pytest.mark.parametrize(("probability", "text"), [(0.5, "0.500"), (0.0009, "< 0.001"), (1.0, "1.000")])
def test_short_probabilities(probability: float, text: str) -> None:
    assert explore.short(probability) == text


def test_tokens_answers_and_every_view_are_shown(app: Any) -> None:
    assert not app.exception
    assert not app.error
    assert "**Clean** `3` `5` `=` → right answer **8**" in texts(app)
    assert "**Counterfactual** `3` `9` `=` → right answer **12**" in texts(app)
    assert app.dataframe[0].value["answer"].iloc[0] == "8"
    assert [header.value for header in app.header] == [
        "Patching",
        "Logit lens",
        "Direct logit attribution",
        "Attention",
    ]


def test_the_map_is_that_of_this_one_pair(app: Any, run: Run) -> None:
    pair = paired(run.task.prompt("3 + 5 ="), run.task.prompt("3 + 9 ="))
    patches = patch_each(run.model(), pair, sites="resid_pre", direction="denoise")
    # Only b differs, so that its embedding carries all of the difference and that of a none.
    assert patches.effect[0].tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-5)
    assert f"Logit difference {patches.clean:.2f} clean, {patches.corrupt:.2f} corrupt" in texts(app)
    assert "0: a=3" in chart(app, "Effect of patching")


def test_the_last_place_is_chosen_until_another_is(app_on: AppOn, runs_folder: Path, run: Run, app: Any) -> None:
    assert app.subheader[0].value == "L0.resid_post at 2: ="
    other = app_on("explore", runs_folder, run="small", **PROMPTS, cell="1.2")
    assert other.subheader[0].value == "L0.z.h0 at 2: ="
    pair = paired(run.task.prompt("3 + 5 ="), run.task.prompt("3 + 9 ="))
    reading = read_place(run.model(), pair, Site.parse("L0.z.h0"), 2)
    numbers = {metric.label: metric.value for metric in other.metric}
    assert numbers == {"Norm": f"{reading.norm:.3g}", "Direct effect": f"{reading.direct_effect:.3g}"}


def test_neurons_are_listed_where_there_are_any(app_on: AppOn, runs_folder: Path, app: Any) -> None:
    # Rows: resid_pre, four heads, attn_out, post.
    post = app_on("explore", runs_folder, run="small", **PROMPTS, cell="6.2")
    assert post.subheader[0].value == "L0.post at 2: ="
    columns = [set(frame.value.columns) for frame in post.dataframe]
    assert {"neuron", "activation", "direct_effect"} in columns
    assert {"neuron", "activation", "direct_effect"} not in [set(frame.value.columns) for frame in app.dataframe]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_the_whole_state_gives_the_other_answer(direction: str, app_on: AppOn, runs_folder: Path) -> None:
    app = app_on("explore", runs_folder, run="small", **PROMPTS, direction=direction)
    before, after = ("12", "8") if direction == "denoise" else ("8", "12")
    compared = next(frame.value for frame in app.dataframe if "p before" in frame.value.columns)
    assert (compared["before"].iloc[0], compared["after"].iloc[0]) == (before, after)


def test_patch_from_zero_a_typed_prompt_or_another_operand(app: Any, run: Run) -> None:
    pair = paired(run.task.prompt("3 + 5 ="), run.task.prompt("3 + 9 ="))
    cell = Cell(site=Site.parse("L0.resid_post"), position=2)
    app.selectbox(key="source").set_value(explore.ZERO).run()
    zeroed = swap(run.model(), pair, cell, source="zero", base="corrupt")
    assert f"**{zeroed.metric_before:.2f}** → **{zeroed.metric_after:.2f}**" in texts(app)
    app.selectbox(key="source").set_value(explore.TYPED).run()
    app.text_input(key="other").set_value("10 + 10 =").run()
    compared = next(frame.value for frame in app.dataframe if "p before" in frame.value.columns)
    assert compared["after"].iloc[0] == "20"
    app.selectbox(key="source").set_value("another prompt: a changed").run()
    assert not app.exception
    taken = re.search(r"Taken from `(\d+) \+ 9 =`", texts(app))
    assert taken is not None
    assert taken[1] != "3"


def test_over_n_shows_the_interval_of_what_was_asked_for(app: Any, run: Run) -> None:
    assert not app.success
    app.slider(key="n").set_value(32).run()
    next(button for button in app.button if button.label == "Measure over n = 32").click().run()
    cell = Cell(site=Site.parse("L0.resid_post"), position=2)
    over = swap(run.model(), run.task.sample(32, split="test", seed=0), cell, base="corrupt")
    assert over.share is not None
    assert f"**{over.share.mean:.3f}** of the way" in app.success[0].value
    assert "n = 32 pairs" in app.success[0].value
    # Another question: the answer to the last one goes.
    app.selectbox(key="source").set_value(explore.ZERO).run()
    assert not app.success


def test_examples_and_changes_fill_the_prompts(app: Any, run: Run) -> None:
    app.number_input[0].set_value(4).run()
    next(button for button in app.button if button.label == "Take this example").click().run()
    wanted = run.task.decode(run.task.examples("test").tokens[4].tolist())
    assert app.text_input(key="prompt").value == wanted
    a, _, b = wanted.removesuffix(" =").split()
    seen = set()
    for _ in range(3):
        app.button(key="change_b").click().run()
        seen.add(app.text_input(key="counterfactual").value)
    assert all(text.startswith(f"{a} + ") and not text.startswith(f"{a} + {b} ") for text in seen)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"prompt": "99 + 1 ="}, "Token 99 is outside the vocabulary: residues go from 0 to 22."),
        ({"prompt": "three"}, "Cannot read 'three' as a prompt."),
        ({"prompt": "3 + 5 =", "counterfactual": "3 + 23 ="}, "Token 23 is outside the vocabulary"),
        ({"prompt": "3 + 5 =", "counterfactual": "3 + 5 ="}, "No headroom"),
        ({"prompt": "3 + 5 =", "counterfactual": "5 + 3 ="}, "No headroom"),
    ],
)
def test_bad_prompts_are_one_line(query: dict[str, str], says: str, app_on: AppOn, runs_folder: Path) -> None:
    app = app_on("explore", runs_folder, run="small", **query)
    assert not app.exception
    assert says in app.error[0].value
    assert "\n" not in app.error[0].value


@pytest.mark.parametrize("query", [{"cell": "99.0"}, {"cell": "x"}, {"n": "5"}, {"places": "nothing"}, {"by": "x"}])
def test_a_stale_link_falls_back(query: dict[str, str], app_on: AppOn, runs_folder: Path) -> None:
    app = app_on("explore", runs_folder, run="small", **PROMPTS, **query)
    assert not app.exception
    assert not app.error
    assert app.subheader[0].value == "L0.resid_post at 2: ="


def test_another_run_gets_prompts_of_its_own(app_on: AppOn, runs_folder: Path, pairs_folder: Path) -> None:
    (pairs_folder / "small").symlink_to(runs_folder / "small")
    app = app_on("explore", pairs_folder, run="small")
    assert app.text_input(key="prompt").value.endswith("=")
    app.sidebar.selectbox(key="run").set_value("own").run()
    assert not app.exception
    assert not app.error
    assert (app.text_input(key="prompt").value, app.text_input(key="counterfactual").value) == ("x y z", "w y z")


def test_an_empty_runs_folder(app_on: AppOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GALLERY", tmp_path / "gallery")
    app = app_on("explore", tmp_path)
    assert not app.exception
    assert "There are no runs yet" in app.info[0].value


def test_the_copied_code_finds_the_same(app_on: AppOn, runs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = app_on("explore", runs_folder, run="small", **PROMPTS, direction="noise", cell="2.2")
    exec(app.code[0].value, {})
    printed = capsys.readouterr().out
    assert "'site': 'L0.z.h1'" in printed
    found = re.search(r"'norm': ([0-9.]+)", printed)
    assert found is not None
    assert app.metric[0].value == f"{float(found[1]):.3g}"


def click_cell(page: Page, row: int, column: int, rows: int, columns: int) -> None:
    """Click the middle of a cell of the patch map."""
    canvas = page.locator(".st-key-cell canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    left, top, right, bottom = 101, 39, 16, 78
    x = left + (box["width"] - left - right) * (column + 0.5) / columns
    y = top + (box["height"] - top - bottom) * (row + 0.5) / rows
    # A layer for tooltips lies over the canvas and hands on what it gets.
    canvas.click(position={"x": x, "y": y}, force=True)


@pytest.mark.browser
def test_explore_in_the_browser(page: Page) -> None:
    page.goto("/explore?run=small")
    prompt = page.get_by_label("Prompt", exact=True)
    type_until(prompt, "3 + 5 =", page.get_by_text("right answer 8"))
    type_until(page.get_by_label("Counterfactual", exact=True), "3 + 9 =", page.get_by_text("right answer 12"))
    expect(page.get_by_role("heading", name="L0.resid_post at 2: =")).to_be_visible()
    norm = page.get_by_test_id("stMetricValue").first
    before = norm.inner_text()

    # A click on a cell shows what that place holds and what patching it does.
    click_cell(page, 0, 1, 9, 3)
    expect(page.get_by_role("heading", name="L0.resid_pre at 1: b=5")).to_be_visible()
    expect(norm).not_to_have_text(before)
    expect(page).to_have_url(re.compile(r"cell=0\.1"))

    # Another source, and its effect over many pairs.
    page.get_by_label("Patch from").click()
    page.get_by_role("option", name="zero").click()
    expect(page).to_have_url(re.compile("source=zero"))
    page.get_by_role("button", name="Measure over n").click()
    expect(page.get_by_text("95 % bootstrap interval").first).to_be_visible()

    # A link to what is seen now shows the same.
    page.reload()
    expect(page.get_by_role("heading", name="L0.resid_pre at 1: b=5")).to_be_visible()
    expect(page.get_by_text("right answer 12")).to_be_visible()

    # Outside the vocabulary: one line, no traceback.
    type_until(prompt, "77 + 5 =", page.get_by_text("Token 77 is outside the vocabulary"))


@pytest.mark.browser
def test_the_run_and_the_checkpoint_go_along_from_page_to_page(page: Page) -> None:
    page.goto("/dynamics?run=small&step=100")
    expect(page.get_by_role("heading", name=re.compile("at step 100"))).to_be_visible()
    page.get_by_role("link", name="Explore").click()
    expect(page.get_by_role("heading", name="Explore")).to_be_visible()
    expect(page).to_have_url(re.compile("explore.*step=100"))
    page.get_by_role("slider").first.focus()
    page.keyboard.press("Home")
    expect(page).to_have_url(re.compile("step=0"))
    # The address changes in the browser before the server has heard of it.
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    page.get_by_role("link", name="Dynamics").click()
    expect(page.get_by_role("heading", name=re.compile("at step 0"))).to_be_visible()
    page.get_by_role("slider").first.focus()
    page.keyboard.press("End")
    expect(page.get_by_role("heading", name=re.compile("at step 400"))).to_be_visible()
    expect(page).not_to_have_url(re.compile("step="))
