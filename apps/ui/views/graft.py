"""Page Graft: the few weights that carry a donor's skill, beside what they have to beat."""

from __future__ import annotations

import streamlit as st

from apps.ui import charts, state
from apps.ui.graft_questions import (
    Asked,
    answers,
    base_of,
    examples_to_judge,
    is_donor,
    judgement_of,
    overlaps_of,
    siblings,
    sizes_of,
    without,
)
from circuits.graft_judgement import ENOUGH, TOO_MUCH, GraftJudgement
from circuits.graft_masks import METHODS
from circuits.grafting import place_of
from workbench.figures import figure
from workbench.tasks.skills import Skills
from workbench.training.checkpoints import Run

DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
NO_OTHER = "none"


def page() -> None:
    """The page."""
    st.title("Graft")
    run = state.choose_run(first=next(iter(state.references_where(is_donor)), None))
    if not is_donor(run):
        _offer_donors(run)
        return
    with state.user_errors_shown():
        asked = _ask(run)
        found = judgement_of(asked)
        _figures(found)
        _places(run, found)
        _prompt(run, found)
        _more(run, asked)
        state.copy_as_python(_python(run, asked))


def _ask(run: Run) -> Asked:
    """Method, size and the control from another task."""
    with st.sidebar:
        method = st.selectbox("Method", list(METHODS), key="method", bind="query-params")
        density = st.select_slider(
            "Share of weights", DENSITIES, value=0.01, format_func="{:.1%}".format, key="density", bind="query-params"
        )
        other = st.selectbox("Control: another task's donor", [*siblings(run), NO_OTHER], key="foreign")
    return Asked(
        donor=run.reference,
        donor_sha256=run.checkpoint().sha256,
        base_sha256=base_of(run).checkpoint().sha256,
        method=method,
        density=density,
        foreign=None if other == NO_OTHER else other,
    )


def _figures(found: GraftJudgement) -> None:
    """What the graft has of the donor's gain, and what everything else has."""
    gain, _, reliability = found.tables()
    rows = gain.frame.set_index("weights_of")
    graft, base, donor = (rows.loc[name] for name in ("graft", "base", "donor"))
    interval = f"{graft['relative_gain_low']:.2f} to {graft['relative_gain_high']:.2f}"
    shown = (
        ("Weights", f"{len(found.graft):,}", f"{found.graft.density:.2%} of them"),
        ("Accuracy", f"{graft['accuracy']:.3f}", f"base {base['accuracy']:.3f}"),
        ("Relative gain", f"{graft['relative_gain']:.2f}", interval),
        ("Answers as the donor's", f"{graft['agreement']:.3f}", f"base's {base['agreement']:.3f}"),
        ("Calibration error", f"{graft['ece_debiased']:.3f}", f"donor {donor['ece_debiased']:.3f}"),
    )
    for column, (label, value, beside) in zip(st.columns(len(shown)), shown, strict=True):
        column.metric(label, value, beside, delta_color="off", delta_arrow="off")
    if found.localised:
        st.success(f"Localised: the gain's lower end is at least {ENOUGH}, and no control has over {TOO_MUCH} of it.")
    else:
        st.warning(f"Not localised: {found.objection}.")
    left, right = st.columns([3, 2])
    left.plotly_chart(figure(gain).update_layout(title_text="", height=360, margin_t=16), key="gain")
    left.caption(gain.caption)
    right.plotly_chart(figure(reliability).update_layout(title_text="", height=360, margin_t=16), key="reliability")
    right.caption(reliability.caption)
    state.download(gain, key="gain_table")
    with st.expander("All figures"):
        st.dataframe(rows, width="stretch")


def _places(run: Run, found: GraftJudgement) -> None:
    """Where the region lies; a click leaves one tensor to the base."""
    st.header("Where the weights lie", divider="gray")
    table = found.graft.where()
    grid = table.frame.pivot_table(index="layer", columns="component", values="times_even", sort=False)
    rows, columns = list(map(str, grid.index)), list(map(str, grid.columns))
    chosen = charts.heatmap(
        grid.to_numpy(), rows, columns, key="place", title="Density by tensor", unit="× evenly spread", diverging=False
    )
    st.caption(f"{table.caption} Click a cell to leave that tensor to the base.")
    if chosen is not None:
        place = (rows[chosen[0]], columns[chosen[1]])
        name = next(name for name in found.graft.mask if place_of(name) == place)
        left = without(found.graft, name, examples_to_judge(run))
        st.markdown(
            f"Without `{name}` ({int(found.graft.mask[name].sum()):,} grafted weights): accuracy of the graft "
            f"**{left['graft']:.3f}**, of the donor **{left['donor']:.3f}**."
        )
    state.download(table, key="places_table")


def _prompt(run: Run, found: GraftJudgement) -> None:
    """What base, graft and donor say."""
    st.header("Ask them", divider="gray")
    assert isinstance(run.task, Skills)
    first = run.task.decode(run.task.examples("test").tokens[0].tolist())
    text = st.text_input("Words and a question", value=first, key="prompt") or ""
    with state.user_errors_shown():
        st.dataframe(answers(run, found.graft, text), width="stretch")


def _more(run: Run, asked: Asked) -> None:
    """What takes longer: every size, and the regions of other tasks."""
    st.header("Sizes and tasks", divider="gray")
    if st.toggle("Relative gain at every size (about a minute)", key="sizes"):
        table = sizes_of(asked.donor, asked.donor_sha256, asked.base_sha256)
        st.plotly_chart(figure(table).update_layout(title_text="", height=380, margin_t=16).update_xaxes(type="log"))
        st.caption(table.caption)
        state.download(table, key="sizes_table")
    if siblings(run) and st.toggle("Overlap with the regions of other tasks", key="overlaps"):
        table = overlaps_of(asked)
        st.plotly_chart(figure(table).update_layout(title_text="", height=420, margin_t=16))
        st.caption(table.caption)
        st.dataframe(table.frame, width="stretch", hide_index=True)


def _python(run: Run, asked: Asked) -> str:
    assert run.recipe.start is not None
    return f"""
from apps.grafting import graft_of
from workbench import load

found = graft_of(
    load({run.recipe.start.run!r}), load({run.reference!r}), method={asked.method!r}, density={asked.density},
    foreign={None if asked.foreign is None else f"load({asked.foreign!r})"},
)
print(found.summary())
"""


def _offer_donors(run: Run) -> None:
    """Say that this run is no donor, and how one is made."""
    known = state.references_where(is_donor)
    state.missing(
        f"Run {run.reference!r} was not taught a skill of a base; this page shows those that were. "
        + (
            "Choose one in the sidebar."
            if known
            else "Make one: `workbench train skills`, then `workbench finetune skills tone`."
        )
    )
