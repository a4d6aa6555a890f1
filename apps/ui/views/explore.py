"""Page Explore: one prompt and its counterfactual, and what every place in the model does with them.

The page remembers two texts; all else follows from them. Results are kept by the hash of the weights and the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import streamlit as st

from apps.ui import charts, questions, reasoner_panels, state
from apps.ui.panels import effect_grid
from apps.ui.questions import Asked
from circuits.patching import Cell, Direction
from circuits.swaps import Base
from workbench.figures import figure
from workbench.instrument.answers import Answers
from workbench.instrument.sites import Site
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Task
from workbench.training.checkpoints import Run

KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "post", "mlp_out", "resid_post")
DEFAULT_KINDS = ("resid_pre", "z", "attn_out", "post", "mlp_out", "resid_post")
FEWEST, MOST = 16, 256
"""Pairs that an effect is averaged over."""
PAIR, TYPED, ZERO = "the other run", "a prompt that I type", "zero"
PLOTLY = {"displaylogo": False}
PROMPT_KEYS = ("prompt", "counterfactual")


def page() -> None:
    """The page."""
    st.title("Explore")
    run = state.choose_run()
    with st.sidebar:
        step = state.choose_step(run)
    _forget_other_runs(run)
    clean, corrupt = _choose_prompts(run)
    asked = Asked(reference=run.reference, step=step, sha256=run.checkpoint(step).sha256, clean=clean, corrupt=corrupt)
    _answers(asked)
    with state.user_errors_shown():
        reasoner_panels.hops(asked)
    st.header("Patching", divider="gray")
    with state.user_errors_shown():
        _patching(asked)
    left, right = st.columns(2)
    with left, state.user_errors_shown():
        _lens(asked)
    with right, state.user_errors_shown():
        _attribution(asked)
    with state.user_errors_shown():
        _attention(asked)


def kinds_of(sites: Sequence[Site]) -> list[str]:
    """Kinds of site that the map can show, of those that the model has."""
    present = {site.kind.name for site in sites}
    return [kind for kind in KINDS if kind in present]


def short(probability: float) -> str:
    """A probability as one reads it."""
    return "< 0.001" if probability < 0.001 else f"{probability:.3f}"


def python_code(asked: Asked, cell: Cell, sites: str, direction: Direction) -> str:
    """The code that computes what the page shows."""
    base: Base = "clean" if direction == "noise" else "corrupt"
    head = "" if cell.site.head is None else f", head={cell.site.head}"
    layer = "" if cell.site.layer is None else f", layer={cell.site.layer}"
    return f"""
from dataclasses import replace

from circuits import patch_each
from circuits.patching import Cell
from circuits.swaps import swap
from probes import direct_logit_attribution, logit_lens
from probes.places import read_place
from workbench import load
from workbench.instrument.sites import Site, SiteKind

run = load({asked.reference!r})
model = run.model({asked.step})
clean, other = run.task.prompt({asked.clean!r}), run.task.prompt({asked.corrupt!r})
pair = replace(clean, corrupt=other.tokens, distractor=other.targets)

patches = patch_each(model, pair, sites={sites!r}, direction={direction!r})
lens = logit_lens(model, pair)
attribution = direct_logit_attribution(model, pair, by="head")

site = Site(kind=SiteKind.{cell.site.kind.name}{layer}{head})
reading = read_place(model, pair, site, {cell.position}, names=run.task.vocab)
swapped = swap(model, pair, Cell(site=site, position={cell.position}), base={base!r})
for result in (patches, lens, attribution, reading, swapped):
    print(result.summary())
"""


def _forget_other_runs(run: Run) -> None:
    """Prompts that were typed for another run may not be in this one's vocabulary."""
    if st.session_state.get("explored", run.reference) != run.reference:
        for key in PROMPT_KEYS:
            st.session_state.pop(key, None)
    st.session_state["explored"] = run.reference


def _choose_prompts(run: Run) -> tuple[str, str]:
    task = run.task
    first = _example(task, state.unseen_split(run), 0)
    left, right, examples = st.columns([4, 4, 2.6], vertical_alignment="bottom")
    clean = left.text_input("Prompt", first, key="prompt", bind="query-params")
    known = {"clean": clean or first}
    try:
        default = _contrasted(task, known["clean"], None, 0)
    except WorkbenchError:
        # What is wrong with the prompt is said where it is first used.
        default = first
    corrupt = right.text_input("Counterfactual", default, key="counterfactual", bind="query-params")
    with examples.popover("Examples", width="stretch"):
        _offer_examples(run)
    return clean or "", corrupt or ""


def _offer_examples(run: Run) -> None:
    task = run.task
    split = st.selectbox("Split", task.splits, index=list(task.splits).index(state.unseen_split(run)))
    count = len(task.examples(split))
    index = st.number_input("Example", 0, count - 1, 0, help=f"{count} examples, counted from 0")

    def take() -> None:
        with state.user_errors_shown():
            text = _example(task, split, index)
            st.session_state.update(prompt=text, counterfactual=_contrasted(task, text, None, 0))

    st.button("Take this example", on_click=take, width="stretch", type="primary")
    for kind in task.contrasts:
        st.button(f"Change {kind}", on_click=_change, args=(task, kind), width="stretch", key=f"change_{kind}")


def _change(task: Task, kind: str) -> None:
    """Put another counterfactual beside the prompt: another one at each click."""
    draw = st.session_state.get("draw", 0) + 1
    st.session_state["draw"] = draw
    with state.user_errors_shown():
        st.session_state["counterfactual"] = _contrasted(task, st.session_state["prompt"], kind, draw)


def _example(task: Task, split: str, index: int) -> str:
    return task.decode(task.examples(split).tokens[index].tolist())


def _contrasted(task: Task, text: str, kind: str | None, seed: int) -> str:
    """A prompt with one thing changed."""
    found = task.contrast(task.prompt(text), kind, seed=seed)
    if not len(found):
        raise WorkbenchError(f"Changing {kind or task.contrasts[0]} of {text!r} leaves its answer: draw another.")
    return task.decode(found.pairs()[0][0].tolist())


def _answers(asked: Asked) -> None:
    vocab, batch = asked.task.vocab, asked.batch
    for column, name, text, prompt, targets in zip(
        st.columns(2),
        ("Clean", "Counterfactual"),
        (asked.clean, asked.corrupt),
        (batch.tokens, batch.corrupt),
        (batch.targets, batch.distractor),
        strict=True,
    ):
        assert prompt is not None
        assert targets is not None
        tokens = " ".join(f"`{vocab[token]}`" for token in prompt[0].tolist())
        answer = vocab[int(targets[batch.read][0])]
        column.markdown(f"**{name}** {tokens} → right answer **{answer}**")
        _show_answers(column, questions.answered(replace_texts(asked, text)), vocab)


def replace_texts(asked: Asked, text: str) -> Asked:
    """The question about one prompt alone."""
    return replace(asked, clean=text, corrupt=text)


def _show_answers(where: st.delta_generator.DeltaGenerator, answers: Answers, vocab: Sequence[str]) -> None:
    rows = {
        "answer": [vocab[token] for token in answers.tokens[0].tolist()],
        "probability": answers.probabilities[0].tolist(),
    }
    config = {"probability": st.column_config.ProgressColumn(format="%.4f", min_value=0, max_value=1)}
    where.dataframe(rows, column_config=config, hide_index=True)


def _compare_answers(before: Answers, after: Answers, vocab: Sequence[str]) -> None:
    columns = {}
    for name, answers in (("before", before), ("after", after)):
        columns[name] = [vocab[token] for token in answers.tokens[0].tolist()]
        columns[f"p {name}"] = [short(value) for value in answers.probabilities[0].tolist()]
    st.dataframe(columns, hide_index=True)


def _patching(asked: Asked) -> None:
    kinds = kinds_of(state.model_at(state.open_run(asked.reference), asked.step).sites)
    direction = st.segmented_control(
        "Direction",
        ["denoise", "noise"],
        default="denoise",
        required=True,
        key="direction",
        bind="query-params",
        help="Denoise: the clean activation in the counterfactual's run. Noise: the other way round.",
    )
    chosen = st.pills(
        "Places",
        kinds,
        selection_mode="multi",
        default=[kind for kind in DEFAULT_KINDS if kind in kinds],
        key="places",
        bind="query-params",
        # Another list of places: what was clicked stands for another one now.
        on_change=lambda: st.query_params.pop("cell", None),
    )
    if not chosen:
        state.missing("Choose at least one kind of place.")
        return
    sites = ",".join(kind for kind in kinds if kind in chosen)
    patches = questions.patches(asked, sites, direction)
    effect = effect_grid(patches, direction)
    wide, narrow = st.columns(2)
    with wide:
        place = charts.heatmap(
            effect.to_numpy(dtype=float),
            list(effect.index),
            list(effect.columns),
            key="cell",
            title="Effect of patching one place",
            unit="share",
            limit=1.0,
            default=(len(effect) - 1, len(effect.columns) - 1),
        )
        st.caption(
            f"Logit difference {patches.clean:.2f} clean, {patches.corrupt:.2f} corrupt; 1 is all of the way from one "
            "run to the other, in this one pair. Click a place."
        )
        state.download(patches.tables()[0], key="patches")
    assert place is not None
    site, position = Site.parse(effect.index[place[0]]), place[1]
    cell = Cell(site=site, position=position)
    with narrow:
        _place(asked, cell, direction)
    state.copy_as_python(python_code(asked, cell, sites, direction))


def _place(asked: Asked, cell: Cell, direction: Direction) -> None:
    assert cell.position is not None
    st.subheader(f"{cell.site} at {cell.position}: {asked.labels[cell.position]}")
    reading = questions.reading(asked, cell)
    left, right = st.columns(2)
    left.metric("Norm", f"{reading.norm:.3g}")
    direct = "–" if reading.direct_effect is None else f"{reading.direct_effect:.3g}"
    right.metric("Direct effect", direct, help="What it adds directly to the answer's lead over the other, in logits")
    if reading.tokens:
        heading = "The lens reads" if reading.unit == "probability" else "It writes (logits)"
        write = short if reading.unit == "probability" else "{:.2f}".format
        st.markdown(f"{heading}: " + ", ".join(f"**{token}** {write(value)}" for token, value in reading.tokens))
    else:
        st.caption("This place has no reading in tokens.")
    if reading.neurons is not None:
        st.dataframe(reading.neurons, hide_index=True, height=180)
    _patch_from(asked, cell, direction)


def _patch_from(asked: Asked, cell: Cell, direction: Direction) -> None:
    """What putting something else at the place does: to this prompt, and over many."""
    base: Base = "clean" if direction == "noise" else "corrupt"
    kinds = {f"another prompt: {kind} changed": kind for kind in asked.task.contrasts}
    choice = st.selectbox("Patch from", [PAIR, *kinds, TYPED, ZERO], key="source", bind="query-params")
    text = None
    if choice in kinds:
        own = asked.clean if base == "clean" else asked.corrupt
        text = _contrasted(asked.task, own, kinds[choice], st.session_state.get("draw", 0))
        st.caption(f"Taken from `{text}`")
    elif choice == TYPED:
        text = st.text_input("Prompt to take it from", asked.clean, key="other", bind="query-params")
    found = questions.swapped(asked, cell, base, "zero" if choice == ZERO else "counterfactual", text)
    name = "counterfactual" if base == "corrupt" else "clean"
    st.caption(f"Top answers of the {name} run, before and after patching")
    _compare_answers(found.before, found.after, asked.task.vocab)
    st.markdown(f"Logit difference **{found.metric_before:.2f}** → **{found.metric_after:.2f}**")
    _over_many(asked, cell, base, choice, kinds, text)


def _over_many(asked: Asked, cell: Cell, base: Base, choice: str, kinds: Mapping[str, str], text: str | None) -> None:
    """The effect over pairs of the task, with its interval, once it is asked for."""
    run = state.open_run(asked.reference)
    most = state.pair_count(run, MOST)
    n = most
    if most > FEWEST:
        n = st.slider("Over n pairs", FEWEST, most, min(64, most), key="n", bind="query-params")
    request = (asked, cell, base, choice, text, n)
    if st.button(f"Measure over n = {n}", width="stretch"):
        st.session_state["measured"] = request
    if st.session_state.get("measured") != request:
        return
    source = "zero" if choice == ZERO else "counterfactual"
    typed = text if choice == TYPED else None
    found = questions.swapped_over(asked, cell, base, source, typed, kinds.get(choice), n)
    share = (
        ""
        if found.share is None
        else (
            f" – **{found.share.mean:.3f}** of the way to the other run [{found.share.low:.3f}, {found.share.high:.3f}]"
        )
    )
    st.success(
        f"Logit difference changes by **{found.change.mean:+.3f}** [{found.change.low:+.3f}, {found.change.high:+.3f}]"
        f"{share}; n = {found.n} pairs, 95 % bootstrap interval."
    )


def _lens(asked: Asked) -> None:
    st.header("Logit lens", divider="gray")
    lens = questions.trajectory(asked)
    measure = st.selectbox(
        "Measure",
        list(lens.measures),
        format_func=lambda name: name.replace("_", " "),
        key="measure",
        bind="query-params",
    )
    measured = lens.measures[measure]
    place = charts.heatmap(
        measured.mean.numpy(),
        [str(site) for site in lens.sites],
        lens.positions,
        key="lens",
        title=f"Lens: {measure.replace('_', ' ')}",
        unit=measured.unit,
        diverging=False,
        limit=1.0 if "probability" in measure or "reciprocal" in measure else None,
        default=(len(lens.sites) - 1, len(lens.positions) - 1),
    )
    assert place is not None
    tokens, probabilities = (
        values[0, place[0], place[1]].tolist() for values in (lens.top_tokens, lens.top_probabilities)
    )
    said = ", ".join(
        f"**{asked.task.vocab[token]}** {short(p)}" for token, p in zip(tokens, probabilities, strict=True)
    )
    st.markdown(f"{lens.sites[place[0]]} at {lens.positions[place[1]]} predicts {said}")
    table = next(table for table in lens.tables() if table.name == f"lens_{measure}")
    state.download(table, key="lens_table")
    _tuned_lens(asked)


def _tuned_lens(asked: Asked) -> None:
    """Both lenses over many prompts, once that is asked for: the tuned one is fitted first."""
    if not st.toggle("Tuned lens, over many prompts", key="tuned", bind="query-params"):
        return
    split = state.unseen_split(state.open_run(asked.reference))
    tables = {table.name: table for table in questions.tuned(asked.reference, asked.step, asked.sha256, split).tables()}
    names = {"KL to the final distribution": "tuned_lens_kl", "reciprocal rank": "tuned_lens_reciprocal_rank"}
    chosen = st.segmented_control(
        "Lenses compared by", list(names), default=next(iter(names)), required=True, key="lenses", bind="query-params"
    )
    table = tables[names[chosen]]
    st.plotly_chart(figure(table).update_layout(title_text="", margin_t=16), key="tuned_lens", config=PLOTLY)
    st.caption(table.caption)
    state.download(table, key="tuned_lens_table")


def _attribution(asked: Asked) -> None:
    st.header("Direct logit attribution", divider="gray")
    by = st.segmented_control(
        "By", ["component", "head", "neuron"], default="head", required=True, key="by", bind="query-params"
    )
    table = questions.attributed(asked, by).tables()[0]
    st.plotly_chart(figure(table).update_layout(title_text="", margin_t=16), key="attribution", config=PLOTLY)
    state.download(table, key="attribution_table")


def _attention(asked: Asked) -> None:
    st.header("Attention", divider="gray")
    table = questions.attended(asked).tables()[0]
    st.plotly_chart(figure(table).update_layout(title_text=""), key="attention", config=PLOTLY)
    state.download(table, key="attention_table")
