"""Page Graft: the few weights that carry a donor's skill, beside what they have to beat."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from apps.graft_pairs import Pair, is_donor
from apps.grafting import REAL_STEPS
from apps.ui import charts, job_panels, jobs, state
from apps.ui.graft_questions import (
    Asked,
    answers,
    command_of,
    edges_of,
    judgement_of,
    kept_judgement_of,
    overlaps_of,
    pair_of,
    real_siblings,
    siblings,
    sizes_of,
    without,
)
from circuits.graft_judgement import ENOUGH, TOO_MUCH, GraftJudgement
from circuits.graft_masks import METHODS
from circuits.grafting import place_of
from workbench.figures import figure
from workbench.training.checkpoints import Run
from workbench.training.text_donors import donor_names, load_donor

DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
NO_OTHER = "none"


def page() -> None:
    """The page."""
    st.title("Graft")
    real = donor_names()
    first = next(iter(state.references_where(is_donor)), None)
    reference = state.choose_reference(first, more=real)
    with state.user_errors_shown():
        if reference in real:
            _real_donor(reference)
        elif is_donor(run := state.open_run(reference)):
            _donor(run)
        else:
            _offer_donors(run)


def _donor(run: Run) -> None:
    """A donor of a run: its graft is found at once."""
    pair, others = pair_of(run.reference), siblings(run)
    asked = _ask(pair, others)
    _show(pair, judgement_of(asked))
    _edges(asked)
    _more(asked, others)
    state.copy_as_python(_python(run, asked))


def _real_donor(reference: str) -> None:
    """A donor of a real model: its graft takes minutes, and a job finds it."""
    pair, donor = pair_of(reference), load_donor(reference)
    base = donor.recipe.base
    st.caption(donor.story)
    asked = _ask(pair, real_siblings(donor))
    found = kept_judgement_of(asked)
    if found is None:
        _obtain(command_of(asked, base), reference)
        return
    _show(pair, found)
    state.copy_as_python(_python_of_real(base, asked))


def _show(pair: Pair, found: GraftJudgement) -> None:
    _figures(found)
    _places(pair, found)
    _prompt(pair, found)


def _obtain(command: tuple[str, ...], reference: str) -> None:
    """The job that finds a graft: how it stands, or a button that starts it."""
    job = next((each for each in jobs.list_jobs(kind="graft") if each.arguments == command), None)
    if job is None:
        st.caption("Finding and judging a graft of a real model takes some minutes, in the background.")
    else:
        job_panels.follow(job, "Finding the graft and its controls", key="graft")
    if job is None or not job.running:
        st.button("Find the graft", key="graft_start", on_click=_start, args=(command, reference))


def _start(command: tuple[str, ...], reference: str) -> None:
    jobs.start(command, subject=reference)


def _ask(pair: Pair, others: Sequence[str]) -> Asked:
    """Method, size and the control from another task."""
    with st.sidebar:
        method = st.selectbox("Method", list(METHODS), key="method", bind="query-params")
        density = st.select_slider(
            "Share of weights", DENSITIES, value=0.01, format_func="{:.1%}".format, key="density", bind="query-params"
        )
        other = st.selectbox("Control: another task's donor", [*others, NO_OTHER], key="foreign")
    base, donor = pair.provenance.parents
    return Asked(
        donor=pair.reference,
        donor_sha256=donor,
        base_sha256=base,
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


def _places(pair: Pair, found: GraftJudgement) -> None:
    """Where the region lies; a click leaves one tensor to the base."""
    st.header("Where the weights lie", divider="gray")
    table = found.graft.where()
    # Components have long names, which are only told apart where they are written out: beside the rows.
    grid = table.frame.pivot_table(index="component", columns="layer", values="times_even", sort=False)
    rows, columns = list(map(str, grid.index)), list(map(str, grid.columns))
    chosen = charts.heatmap(
        grid.to_numpy(),
        [component.removesuffix(".weight") for component in rows],
        columns,
        key="place",
        title="Density by component and layer",
        unit="× evenly spread",
        diverging=False,
    )
    st.caption(f"{table.caption} Click a cell to leave that tensor to the base.")
    if chosen is not None:
        place = (columns[chosen[1]], rows[chosen[0]])
        name = next(name for name in found.graft.mask if place_of(name) == place)
        left = without(pair, found.graft, name)
        st.markdown(
            f"Without `{name}` ({int(found.graft.mask[name].sum()):,} grafted weights): accuracy of the graft "
            f"**{left['graft']:.3f}**, of the donor **{left['donor']:.3f}** (n = {left['n']:,})."
        )
    state.download(table, key="places_table")


def _prompt(pair: Pair, found: GraftJudgement) -> None:
    """What base, graft and donor say."""
    st.header("Ask them", divider="gray")
    said = "A sentence" if pair.is_real else "Words and a question"
    text = st.text_input(said, value=pair.first(), key=f"prompt_{pair.reference}") or ""
    with state.user_errors_shown():
        st.dataframe(answers(pair, found.graft, text), width="stretch")


def _edges(asked: Asked) -> None:
    """What the graft does to the circuit."""
    st.header("What it does to the circuit", divider="gray")
    table = edges_of(asked)
    st.plotly_chart(figure(table).update_layout(title_text="", height=460, margin_t=16), key="edges")
    st.caption(table.caption)
    state.download(table, key="edges_table")


def _more(asked: Asked, others: Sequence[str]) -> None:
    """What takes longer: every size, and the regions of other tasks."""
    st.header("Sizes and tasks", divider="gray")
    if st.toggle("Relative gain at every size (about a minute)", key="sizes"):
        table = sizes_of(asked.donor, asked.donor_sha256, asked.base_sha256)
        st.plotly_chart(figure(table).update_layout(title_text="", height=380, margin_t=16).update_xaxes(type="log"))
        st.caption(table.caption)
        state.download(table, key="sizes_table")
    if others and st.toggle("Overlap with the regions of other tasks", key="overlaps"):
        table = overlaps_of(asked, others)
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


def _python_of_real(base: str, asked: Asked) -> str:
    other = "None" if asked.foreign is None else f"open_pairs({base!r}, [{asked.foreign!r}], None)[0]"
    return f"""
from apps.graft_pairs import open_pairs
from apps.grafting import graft_in

(pair,) = open_pairs({base!r}, [{asked.donor!r}], None)
found = graft_in(pair, method={asked.method!r}, density={asked.density}, steps={REAL_STEPS}, foreign={other})
print(found.summary())
"""


def _offer_donors(run: Run) -> None:
    """Say that this run is no donor, and how one is made."""
    known = state.references_where(is_donor)
    state.missing(
        f"Run {run.reference!r} was not taught a skill of a base; this page shows those that were. "
        + (
            "Choose one in the sidebar."
            if known or donor_names()
            else "Make one: `workbench train skills`, then `workbench finetune skills tone`."
        )
    )
