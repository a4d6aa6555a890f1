"""Page Dynamics: a run through its training; one slider moves curves, spectrum or causes, and patch map together.

All that is computed is kept by the hash of the checkpoint's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import streamlit as st

from apps.analyses import PAIRS, modular_task, pairs_of
from apps.reasoner_rows import Reasoner
from apps.reasoning import kept_reasoning
from apps.reasoning_tables import PANELS, curve_tables
from apps.ui import charts, state
from apps.ui.panels import effect_grid, stacked
from apps.ui.probe_panels import latent_maps
from apps.ui.reasoner_panels import causal_maps
from circuits.patching import PatchMap, patch_each
from probes.fourier import FourierResult, ablate_frequencies, fourier, neuron_grid
from probes.progress import ProgressMeasures
from workbench.figures import figure
from workbench.runtime import WorkbenchError
from workbench.tables import Table
from workbench.training.checkpoints import MEASURES, Checkpoint, Run

SITES = "resid_pre,z,attn_out,resid_mid,mlp_out,resid_post"
KEPT = 256
"""Results of each kind that are kept in memory."""
EFFECT_LIMIT = 1.0
"""Effects are shares of the difference between two runs: 1 is all of it, at every checkpoint."""
CURVES = {
    "loss": "training_loss",
    "accuracy": "training_accuracy",
    "excluded and restricted loss": "progress_loss",
    "explained by key frequencies": "progress_explained",
    "sparsity": "progress_gini",
    "weights": "progress_weights",
    "Clock or Pizza": "progress_clock_pizza",
    **{panel.title: name for name, panel in PANELS.items()},
}
TITLES_OF_CURVES = {name: panel.title for name, panel in PANELS.items()}
"""What stands at the axis of a curve whose unit does not say what it is of."""
DEFAULT_CURVES = ("loss", "accuracy", "excluded and restricted loss", "redirect rate", "value at e1")
LANDING = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
LANDING_REASONER = ("train_accuracy", "test_accuracy", "ood_accuracy", "hard_accuracy")
TITLES = {"test_accuracy": "Test (ID) accuracy", "ood_accuracy": "OOD accuracy"}
"""How a column of the log is called where there are OOD facts."""
SPECTRA = {"embedding": "norm", "neurons": "neurons owned", "logits": "logits"}
SPECTRUM_TITLES = {
    "embedding": "Embedding by frequency",
    "neurons": "Live neurons by the frequency they follow",
    "logits": "cos(w(a+b−c)) in the logits",
}


def page() -> None:
    """The page."""
    st.title("Dynamics")
    run = state.choose_run()
    steps = [checkpoint.step for checkpoint in run.checkpoints]
    final = _final_spectrum(run)
    above = st.container()
    step, pinned = _choose_checkpoints(run, steps)
    with above:
        _curves(run, final, step, steps)
    shown = [run.checkpoint(each) for each in ([step] if pinned in (None, step) else [pinned, step])]
    _landing(run, step)
    frequency = None if final is None else _replay(run, shown, final)
    if isinstance(run.task, Reasoner):
        with state.user_errors_shown():
            causal_maps(run, shown)
    with state.user_errors_shown():
        latent_maps(run, shown)
    _maps(run, shown)
    _python(run, step, final, frequency)


def nearest_step(steps: Sequence[int], wanted: float) -> int:
    """The checkpoint that is closest to a point of a curve."""
    return min(steps, key=lambda step: abs(step - wanted))


def spectrum_of(result: FourierResult, which: str) -> np.ndarray:
    """What the bars show, by frequency from 1."""
    if which == "embedding":
        return result.embedding_norm.numpy()
    if which == "logits":
        return result.logits.coefficient.numpy()
    owners = {} if result.neurons is None else result.neurons.owners()
    return np.array([owners.get(frequency, 0) for frequency in range(1, len(result.embedding_norm) + 1)], dtype=float)


def _final_spectrum(run: Run) -> FourierResult | None:
    """Fourier analysis of the last checkpoint; None, and why, where it does not apply."""
    if isinstance(run.task, Reasoner):
        return None
    last = run.checkpoint()
    try:
        return _fourier(run.reference, last.step, last.sha256, None)
    except WorkbenchError as error:
        state.missing(f"{error} Curves and patch maps below apply to every run.")
        return None


def _choose_checkpoints(run: Run, steps: Sequence[int]) -> tuple[int, int | None]:
    """The checkpoint that is looked at, and the pinned one beside it."""
    if len(steps) == 1:
        return state.choose_step(run), None
    left, right, button = st.columns([5, 2, 1.4], vertical_alignment="bottom")
    with left:
        step = state.choose_step(run)
    pinned = right.selectbox("Pinned", steps, index=None, placeholder="none", key="pin", bind="query-params")
    button.button("Pin", on_click=lambda: st.session_state.update(pin=step), width="stretch", help="Pin this one")
    return step, pinned


def _curves(run: Run, final: FourierResult | None, step: int, steps: Sequence[int]) -> None:
    if not run.log.rows:
        state.missing("This run was not trained here, so it has no curves.")
        return
    tables = {table.name: table for table in [*run.log.tables(), *_measures(run, final)]}
    offered = [name for name, table in CURVES.items() if table in tables]
    chosen = st.pills(
        "Curves",
        offered,
        selection_mode="multi",
        default=[name for name in DEFAULT_CURVES if name in offered],
        key="curves",
        bind="query-params",
        label_visibility="collapsed",
    )
    shown = [tables[CURVES[name]] for name in offered if name in chosen]
    if shown:
        charts.curves(
            stacked(shown, landmarks=run.log.landmarks(), here=step, titles=TITLES_OF_CURVES),
            key="curves_chart",
            on_click=lambda x: st.session_state.update(step=nearest_step(steps, x)),
        )
        st.caption(
            "Dashed: memorised and generalised. Orange: the checkpoint below. Click into the curves to go there."
        )
    if (final is not None or isinstance(run.task, Reasoner)) and not run.folder.lines(MEASURES):
        what = "progress measures" if final is not None else "curves of its reasoning"
        state.missing(f"This run was not measured: it has no {what}. Training measures a run at its end.")
    with st.popover("Downloads"):
        for table in shown:
            st.caption(table.caption)
            state.download(table, key=table.name)


def _measures(run: Run, final: FourierResult | None) -> Sequence[Table]:
    if isinstance(run.task, Reasoner):
        found = kept_reasoning(run)
        return [] if found is None else list(curve_tables(found).values())
    rows = run.folder.lines(MEASURES)
    if final is None or not rows:
        return []
    provenance = run.provenance(run.checkpoint())
    return ProgressMeasures(rows=rows, key_frequencies=final.key_frequencies, provenance=provenance).tables()


def _landing(run: Run, step: int) -> None:
    """What the log says of this checkpoint."""
    if not run.log.rows:
        return
    row = max((row for row in run.log.rows if row["step"] <= step), key=lambda row: row["step"])
    names, titles = (LANDING_REASONER, TITLES) if isinstance(run.task, Reasoner) else (LANDING, {})
    # A row that wraps: in columns the numbers would be cut off on a narrow screen.
    with st.container(horizontal=True, gap="medium"):
        for name in [each for each in names if each in row]:
            value = f"{row[name]:.1%}" if name.endswith("accuracy") else f"{row[name]:.3g}"
            st.metric(titles.get(name, name.replace("_", " ").capitalize()), value, width="content")


def _replay(run: Run, shown: Sequence[Checkpoint], final: FourierResult) -> int:
    """The spectrum of each checkpoint, and what belongs to the frequency that was clicked, which is returned."""
    results = [_fourier(run.reference, each.step, each.sha256, final.key_frequencies) for each in shown]
    frequencies = range(1, len(final.embedding_norm) + 1)
    kinds = [kind for kind in SPECTRA if kind != "neurons" or final.neurons is not None]
    which = st.segmented_control(
        "Spectrum of", kinds, default=kinds[0], required=True, key="spectrum", bind="query-params"
    )
    values = [spectrum_of(result, which) for result in results]
    limit = math.ceil(max([*_largest(run, which), *(float(each.max()) for each in values)]))
    chosen: int | None = None
    for column, checkpoint, each in zip(st.columns(len(shown)), shown, values, strict=True):
        with column:
            chosen = charts.bars(
                each,
                [str(frequency) for frequency in frequencies],
                key=f"spectrum_{_side(checkpoint, shown)}",
                title=f"{SPECTRUM_TITLES[which]}, step {checkpoint.step}",
                unit=SPECTRA[which],
                limit=limit,
                marked=[frequency - 1 for frequency in final.key_frequencies],
                choice="frequency",
                default=_first_frequency(final) - 1,
            )
    keys = ", ".join(map(str, final.key_frequencies)) or "none"
    st.caption(f"Blue: the key frequencies of the last checkpoint ({keys}). Orange: the chosen one. Click a bar.")
    assert chosen is not None
    frequency = chosen + 1
    _frequency(run, shown[-1], results[-1], frequency)
    return frequency


def _frequency(run: Run, checkpoint: Checkpoint, result: FourierResult, frequency: int) -> None:
    """One frequency: the losses without it, and the neurons that follow it."""
    st.subheader(f"Frequency {frequency} at step {checkpoint.step}")
    if st.toggle(f"Ablate frequency {frequency}", key="ablate", bind="query-params"):
        losses = _ablated(run.reference, checkpoint.step, checkpoint.sha256, frequency)
        with st.container(horizontal=True, gap="medium"):
            for split in ("train", "test"):
                before, after = losses[f"{split}_loss"], losses[f"{split}_loss_ablated"]
                st.metric(
                    f"{split.capitalize()} loss without it",
                    f"{after:.3g}",
                    delta=f"{after - before:+.3g} from {before:.3g}",
                    delta_color="inverse",
                    width="content",
                )
    st.caption(f"Ablating takes cos and sin of w(a+b) at frequency {frequency} out of this checkpoint's logits.")
    _neurons(run, checkpoint, result, frequency)


def _neurons(run: Run, checkpoint: Checkpoint, result: FourierResult, frequency: int) -> None:
    owned = result.neurons_of(frequency)
    if not owned:
        state.missing(f"No live neuron follows frequency {frequency} at step {checkpoint.step}.")
        return
    assert result.neurons is not None
    left, right = st.columns(2)
    with left:
        place = charts.bars(
            result.neurons.explained[owned].numpy(),
            [str(neuron) for neuron in owned],
            key="neurons",
            title=f"{len(owned)} neurons follow frequency {frequency}",
            unit="share explained",
            limit=1.0,
            choice="neuron",
            default=0,
        )
        assert place is not None
        neuron = owned[place]
        st.dataframe(
            {"neuron": owned, "share explained": [float(result.neurons.explained[each]) for each in owned]},
            height=180,
            hide_index=True,
        )
    with right:
        table = _grid(run.reference, checkpoint.step, checkpoint.sha256, neuron)
        drawn = figure(table).update_layout(title_text=f"Neuron {neuron}, step {checkpoint.step}", height=440)
        st.plotly_chart(drawn, key="neuron_grid", config={"displaylogo": False})
        state.download(table, key="neuron_grid_table")


def _maps(run: Run, shown: Sequence[Checkpoint]) -> None:
    direction = st.segmented_control(
        "Patching direction",
        ["denoise", "noise"],
        default="denoise",
        required=True,
        key="direction",
        bind="query-params",
    )
    for column, checkpoint in zip(st.columns(len(shown)), shown, strict=True):
        with column, state.user_errors_shown():
            patches = _patches(run.reference, checkpoint.step, checkpoint.sha256)
            effect = effect_grid(patches, direction)
            charts.heatmap(
                effect.to_numpy(dtype=float),
                list(effect.index),
                list(effect.columns),
                key=f"patches_{_side(checkpoint, shown)}",
                title=f"Effect of patching, step {checkpoint.step}",
                unit="share",
                limit=EFFECT_LIMIT,
            )
            st.caption(
                f"Mean over n = {patches.n} test pairs; logit difference {patches.clean:.2f} clean, "
                f"{patches.corrupt:.2f} corrupt. One colour scale for all checkpoints."
            )
            state.download(patches.tables()[0], key=f"patches_{_side(checkpoint, shown)}")


def _python(run: Run, step: int, final: FourierResult | None, frequency: int | None) -> None:
    lines = [
        "from workbench import load",
        "from circuits import patch_each",
        "",
        f"run = load({run.reference!r})",
        f"model = run.model({step})",
        f"pairs = run.task.sample({state.pair_count(run, PAIRS)}, split={state.unseen_split(run)!r}, seed=0)",
        f'patches = patch_each(model, pairs, sites="{SITES}")',
        "print(patches.frame)",
    ]
    if final is not None:
        lines[2:2] = ["from probes import ablate_frequencies, fourier"]
        lines += [
            f"result = fourier(model, run.task, key_frequencies={final.key_frequencies})",
            "print(result.summary())",
            f"print(ablate_frequencies(model, run.task, [{frequency}]))",
        ]
    if isinstance(run.task, Reasoner):
        lines[2:2] = ["from circuits.causal_tracing import causal_tracing"]
        lines += ["causes = causal_tracing(model, run.task, pairs, split='test')", "print(causes.frame)"]
    state.copy_as_python("\n".join(lines))


def _side(checkpoint: Checkpoint, shown: Sequence[Checkpoint]) -> str:
    return "now" if checkpoint is shown[-1] else "pinned"


def _first_frequency(final: FourierResult) -> int:
    return final.key_frequencies[0] if final.key_frequencies else 1


def _largest(run: Run, which: str) -> list[float]:
    """The largest value that the spectrum reaches at any checkpoint, where it was measured."""
    column = {"embedding": "embedding_norm", "logits": "logit_coefficient"}.get(which)
    rows = run.folder.lines(MEASURES) if column else []
    return [max(row[column]) for row in rows if row.get(column)]


@st.cache_resource(max_entries=KEPT, show_spinner="Fourier analysis …")
def _fourier(reference: str, step: int, sha256: str, key_frequencies: tuple[int, ...] | None) -> FourierResult:
    run = state.open_run(reference)
    return fourier(state.model_at(run, step), modular_task(run), key_frequencies=key_frequencies)


@st.cache_resource(max_entries=KEPT, show_spinner="Ablating …")
def _ablated(reference: str, step: int, sha256: str, frequency: int) -> dict[str, float]:
    run = state.open_run(reference)
    return ablate_frequencies(state.model_at(run, step), modular_task(run), [frequency])


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def _grid(reference: str, step: int, sha256: str, neuron: int) -> Table:
    run = state.open_run(reference)
    return neuron_grid(state.model_at(run, step), modular_task(run), neuron)


@st.cache_resource(max_entries=KEPT, show_spinner="Patching …")
def _patches(reference: str, step: int, sha256: str) -> PatchMap:
    run = state.open_run(reference)
    pairs = pairs_of(run, state.pair_count(run, PAIRS), state.unseen_split(run))
    return patch_each(state.model_at(run, step), pairs, sites=SITES, position_labels=run.task.position_labels)
