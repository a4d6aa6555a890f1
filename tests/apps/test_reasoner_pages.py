"""Pages on composition and comparison: curves and causes in Dynamics, hops of a typed chain in Explore."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Page, expect
from typing_in_pages import type_until

from apps.reasoner_rows import draw_prompts
from apps.reasoning import PROMPTS
from apps.ui import reasoner_panels, state
from apps.ui.questions import paired, position_names
from circuits.causal_tracing import CausalMap, causal_tracing
from probes.logit_lens import logit_lens
from workbench import load
from workbench.runtime import WorkbenchError
from workbench.tasks.composition import Composition
from workbench.tasks.modular import Modular
from workbench.training.checkpoints import Run

AppOn = Callable[..., Any]


@pytest.fixture(scope="module")
def run(reasoners_folder: Path) -> Run:
    return load("chains", runs=reasoners_folder)


@pytest.fixture(scope="module")
def traced(run: Run) -> CausalMap:
    """Causes on the test split, as the page asks for them."""
    assert isinstance(run.task, Composition)
    return causal_tracing(run.model(), run.task, draw_prompts(run.task, PROMPTS).splits["test"], split="test")


def texts(app: Any) -> str:
    shown = [*app.markdown, *app.caption, *app.info, *app.error, *app.warning, *app.subheader, *app.success]
    return "\n".join(element.value for element in shown)


def charts(app: Any) -> list[str]:
    return [each.proto.spec for each in app.get("echarts_chart")]


def chain(run: Run, split: str = "test") -> str:
    return run.task.decode(run.task.examples(split).tokens[0].tolist())


# Dynamics -----------------------------------------------------------------------------------------------------------


def test_dynamics_offers_the_curves_of_reasoning_and_no_spectrum(app_on: AppOn, reasoners_folder: Path) -> None:
    app = app_on("dynamics", reasoners_folder, run="chains")
    assert not app.exception
    assert not app.error
    assert not app.info
    offered = app.button_group(key="curves").options
    names = [option.content if hasattr(option, "content") else option for option in offered]
    assert {"loss", "accuracy", "bridge at r1", "second relation at r2", "redirect rate", "two calls"} <= set(names)
    assert not any("Embedding by frequency" in spec for spec in charts(app))


def test_dynamics_lands_on_id_and_ood(app_on: AppOn, reasoners_folder: Path, run: Run) -> None:
    app = app_on("dynamics", reasoners_folder, run="chains", step="16")
    row = max((row for row in run.log.rows if row["step"] <= 16), key=lambda row: row["step"])
    numbers = {metric.label: metric.value for metric in app.metric}
    assert numbers == {
        "Train accuracy": f"{row['train_accuracy']:.1%}",
        "Test (ID) accuracy": f"{row['test_accuracy']:.1%}",
        "OOD accuracy": f"{row['ood_accuracy']:.1%}",
    }


def test_causes_stand_side_by_side_at_both_checkpoints(app_on: AppOn, reasoners_folder: Path) -> None:
    app = app_on("dynamics", reasoners_folder, run="chains", pin="16")
    last = load("chains", runs=reasoners_folder).checkpoint().step
    found = [re.search(r"Strength, ([^\"]+)\"", spec) for spec in charts(app)]
    assert [each[1] for each in found if each] == [
        "test (ID), step 16",
        "ood, step 16",
        f"test (ID), step {last}",
        f"ood, step {last}",
    ]
    # One scale, from 0 to 1, whatever was measured.
    assert all(re.search(r'"min":\s*0\.0.*"max":\s*1\.0', spec) for spec in charts(app) if "Strength," in spec)


def test_a_cell_says_its_numbers(app_on: AppOn, reasoners_folder: Path, traced: CausalMap) -> None:
    app = app_on("dynamics", reasoners_folder, run="chains", cause="1.2", causal="altered")
    shown = app.dataframe[0].value
    assert shown["site"].tolist() == ["L0.mlp_out"] * 2
    assert shown["split"].tolist() == ["test", "ood"]
    cause = next(each for each in traced.causes if (str(each.site), each.name) == ("L0.mlp_out", "second"))
    assert cause.strength is not None
    low, high = cause.strength.low, cause.strength.high
    assert shown["strength"][0] == f"{cause.strength.mean:.3f} [{low:.3f}, {high:.3f}]"
    assert shown["n"][0] == cause.n
    assert any("Altered, test (ID)" in spec for spec in charts(app))


def test_the_middle_cell_is_chosen_first(traced: CausalMap) -> None:
    grid = reasoner_panels.causal_grid(traced, "strength")
    row, column = reasoner_panels.middle_cell(grid)
    assert (grid.index[row], grid.columns[column]) == ("L0.resid_post", "first")
    assert list(grid.index) == [
        f"L{layer}.{kind}" for layer in (0, 1) for kind in ("attn_out", "mlp_out", "resid_post")
    ]


def test_dynamics_of_a_comparison(app_on: AppOn, reasoners_folder: Path) -> None:
    app = app_on("dynamics", reasoners_folder, run="values")
    assert not app.exception
    assert not app.error
    assert any("e1" in spec and "attr" in spec for spec in charts(app) if "Strength," in spec)


def test_a_run_that_was_not_measured_keeps_its_curves_and_causes(
    app_on: AppOn, reasoners_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(reasoners_folder / "chains", tmp_path / "bare")
    (tmp_path / "bare" / "measures.jsonl").unlink()
    app = app_on("dynamics", tmp_path, run="bare")
    assert not app.exception
    assert "it has no curves of its reasoning" in texts(app)
    assert any("Strength, test" in spec for spec in charts(app))


def test_the_copied_code_traces_the_causes(
    app_on: AppOn, reasoners_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_on("dynamics", reasoners_folder, run="chains")
    assert "fourier" not in app.code[0].value
    exec(app.code[0].value, {})
    # Two layers, three sites each, three causes.
    assert "[18 rows" in capsys.readouterr().out


# Explore ------------------------------------------------------------------------------------------------------------


def test_a_typed_chain_resolves_hop_by_hop(app_on: AppOn, reasoners_folder: Path, run: Run) -> None:
    text = chain(run)
    app = app_on("explore", reasoners_folder, run="chains", prompt=text)
    assert not app.exception
    assert not app.error
    assert "Hop by hop" in [header.value for header in app.header]
    prompt = run.task.prompt(text)
    _, r1, r2 = position_names(run.task, prompt.tokens[0].tolist())
    named = {name: run.task.vocab[int(latent.value)] for name, latent in prompt.latents.items()}
    assert f"**bridge {named['bridge']} at {r1}**" in texts(app)
    assert f"**relation {text.split()[2]} at {r2}**" in texts(app)
    assert f"**answer {named['answer']} at {r2}**" in texts(app)
    assert "This prompt is of split `test`." in texts(app)
    # The last place is the model itself.
    assert re.search(rf"At {r2}, L1.resid_post reads \*\*e\d+\*\*.*answer {named['answer']} has rank \d+", texts(app))


def test_ranks_are_those_of_the_lens(run: Run) -> None:
    prompt = run.task.prompt(chain(run))
    model = run.model()
    lens = logit_lens(model, prompt, position_labels=run.task.position_labels)
    ranks = reasoner_panels.latent_ranks(lens, prompt, run.task.vocab, run.task.position_labels)
    assert [title.split()[0] for title in ranks] == ["bridge", "relation", "answer"]
    logits = model(prompt.tokens)[0, 1]
    beaten = int((logits > logits[prompt.latents["bridge"].value]).sum())
    assert ranks.iloc[-1, 0] == beaten
    # Weights are tied: before the first layer r2 is its own best guess, unless position or scale speak against it.
    assert (ranks >= 0).all(axis=None)


def test_lines_say_where_a_latent_is_on_top() -> None:
    sites = ["L0.resid_pre", "L0.resid_mid", "L0.resid_post"]
    ranks = pd.DataFrame({"bridge e1 at r1": [3, 0, 0], "answer e2 at r2": [9, 4, 6]}, index=sites)
    assert reasoner_panels.said_of(ranks) == [
        "**bridge e1 at r1**: on top at L0.resid_mid, L0.resid_post",
        "**answer e2 at r2**: never on top; best at L0.resid_mid, rank 4",
    ]


def test_what_a_prompt_names_itself_is_no_hop(run: Run) -> None:
    assert reasoner_panels.hides_something(run.task.prompt(chain(run)))
    assert not reasoner_panels.hides_something(run.task.prompt(" ".join(chain(run).split()[:2])))
    assert not reasoner_panels.hides_something(Modular(p=5).prompt("1 + 2 ="))


def test_a_fact_has_no_hops(app_on: AppOn, reasoners_folder: Path, run: Run) -> None:
    fact = " ".join(chain(run).split()[:2])
    app = app_on("explore", reasoners_folder, run="chains", prompt=fact)
    assert not app.exception
    assert not app.error
    assert "Hop by hop" not in [header.value for header in app.header]


def test_the_values_of_a_comparison_are_hops_too(app_on: AppOn, reasoners_folder: Path) -> None:
    app = app_on("explore", reasoners_folder, run="values")
    assert not app.exception
    assert not app.error
    assert re.search(r"\*\*v1 \d at e1=e\d+\*\*", texts(app))


def absent(task: Composition) -> tuple[str, str]:
    """A head, and a relation that it has not."""
    head, relation = next(
        (head, relation)
        for head in range(task.entities)
        for relation in range(task.relations)
        if int(task._world.table[head, relation]) < 0
    )
    return f"e{head}", f"r{relation}"


def test_what_is_not_in_the_world_is_one_line(app_on: AppOn, reasoners_folder: Path, run: Run) -> None:
    assert isinstance(run.task, Composition)
    head, relation = absent(run.task)
    for text, says in {
        "e99 r1 r2": "Unknown entity 'e99'",
        "e3 r99 r2": "Unknown relation 'r99'",
        "e3": "Cannot read 'e3' as a prompt",
        f"{head} {relation} r1": f"{head} has no relation {relation}; it has",
    }.items():
        app = app_on("explore", reasoners_folder, run="chains", prompt=text)
        assert not app.exception
        assert says in app.error[0].value
        assert "\n" not in app.error[0].value


def test_every_kind_of_change_can_be_patched_from(app_on: AppOn, reasoners_folder: Path, run: Run) -> None:
    for kind in run.task.contrasts:
        app = app_on("explore", reasoners_folder, run="chains", source=f"another prompt: {kind} changed")
        assert not app.exception, kind
        # There may be no such change of this prompt; then the page says so.
        assert "Taken from" in texts(app) or "draw another" in app.error[0].value, kind
        for button in [each for each in app.button if each.label.startswith("Measure over n")]:
            button.click().run()
            assert not app.exception, kind
            assert app.success, kind


def test_a_change_that_keeps_the_answer_does_not_stop_the_page(app_on: AppOn, reasoners_folder: Path, run: Run) -> None:
    same = run.task.contrast(run.task.examples("test"), "same_bridge", seed=0)
    clean, other = (run.task.decode(tokens[0].tolist()) for tokens in (same.tokens, same.pairs()[0]))
    app = app_on("explore", reasoners_folder, run="chains", prompt=clean, counterfactual=other)
    assert not app.exception
    assert "No headroom" in app.error[0].value
    assert "Attention" in [header.value for header in app.header]
    app.button(key="change_same_bridge").click().run()
    assert not app.exception


def test_a_chain_and_a_fact_are_no_pair(app_on: AppOn, reasoners_folder: Path, run: Run) -> None:
    text = chain(run)
    fact = " ".join(text.split()[:2])
    with pytest.raises(WorkbenchError, match="answered at position 2 and its counterfactual at 1"):
        paired(run.task.prompt(text), run.task.prompt(fact))
    app = app_on("explore", reasoners_folder, run="chains", prompt=text, counterfactual=fact)
    assert not app.exception
    assert "Give two prompts of one length" in app.error[0].value


def test_pairs_are_counted_without_drawing_them_all(run: Run) -> None:
    held_out = run.task.examples("test")
    with_headroom = len(run.task.contrast(held_out))
    assert state.pair_count(run, 3) == 3
    assert state.pair_count(run, 10_000) == with_headroom


@pytest.mark.browser
def test_a_chain_in_the_browser(
    server_on: Callable[[Path], Any], open_page: Callable[[Any], Page], reasoners_folder: Path, run: Run
) -> None:
    page = open_page(server_on(reasoners_folder))
    page.goto("/explore?run=chains")
    prompt = page.get_by_label("Prompt", exact=True)
    text = chain(run, "ood")
    type_until(prompt, text, page.get_by_text("This prompt is of split ood."))
    expect(page.get_by_role("heading", name="Hop by hop")).to_be_visible()
    expect(page.locator(".st-key-hop canvas").first).to_be_visible()

    type_until(prompt, "e3 r77 r1", page.get_by_text("Unknown relation 'r77'"))

    page.goto("/dynamics?run=chains")
    expect(page.get_by_role("heading", name="Causes of the answer")).to_be_visible()
    expect(page.get_by_text("OOD accuracy")).to_be_visible()
    # A table that has a column of this name holds it too, out of sight.
    page.get_by_text("redirected", exact=True).filter(visible=True).click()
    expect(page).to_have_url(re.compile("causal=redirected"))
