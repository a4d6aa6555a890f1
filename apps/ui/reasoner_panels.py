"""What pages show of a reasoner alone: causes by site at a checkpoint, and one prompt's hops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import streamlit as st

from apps.reasoner_rows import SEED, Reasoner, draw_prompts
from apps.reasoning import CAUSAL, PROMPTS, SAYS
from apps.reasoning_tables import UNSEEN
from apps.ui import charts, questions, state
from apps.ui.questions import Asked
from circuits.causal_tracing import CausalMap, causal_tracing
from probes.logit_lens import Trajectory
from workbench.instrument.sites import Site, SiteKind
from workbench.tasks.base import Batch
from workbench.training.checkpoints import Checkpoint, Run

KEPT = 64
"""Causal maps that are kept in memory."""
KINDS = {"test": "ID"}
"""What a split holds, where its name does not say it."""


def causal_maps(run: Run, shown: Sequence[Checkpoint]) -> None:
    """Causes by site at each checkpoint, the splits that training does not see side by side, on one fixed scale."""
    st.subheader("Causes of the answer")
    measure = st.segmented_control(
        "Measure", list(CAUSAL), default=CAUSAL[0], required=True, key="causal", bind="query-params"
    )
    rows: list[dict[str, object]] = []
    for checkpoint in shown:
        maps = {split: _traced(run.reference, checkpoint.step, checkpoint.sha256, split) for split in _splits(run)}
        for column, (split, traced) in zip(st.columns(len(maps)), maps.items(), strict=True):
            grid = causal_grid(traced, measure)
            # One place in all maps, also where it is blank.
            row, cause = charts.read_place(st.query_params.get("cause"), grid.shape) or middle_cell(grid)
            rows.append({"step": checkpoint.step, "split": split, **cell_numbers(traced, grid, (row, cause))})
            with column:
                charts.heatmap(
                    grid.to_numpy(dtype=float),
                    list(grid.index),
                    list(grid.columns),
                    key=f"causes_{split}_{checkpoint.step}",
                    title=f"{measure.capitalize()}, {_titled(split)}, step {checkpoint.step}",
                    unit="share of answers",
                    limit=1.0,
                    diverging=False,
                    choice="cause",
                    default=(row, cause),
                )
                table = next(table for table in traced.tables() if table.name == f"causes_{measure}_{split}")
                state.download(table, key=f"causes_{split}_{checkpoint.step}")
    st.caption(
        f"{SAYS[measure]} States of a changed prompt, put in at one site where the cause stands; blank where no prompt "
        "counts. One colour scale for all checkpoints. Click a cell."
    )
    st.dataframe(rows, hide_index=True)


def causal_grid(traced: CausalMap, measure: str) -> pd.DataFrame:
    """A measure of a causal map: a row a site, by depth, and a column a cause."""
    frame = traced.frame
    sites, causes = frame["site"].unique(), frame["cause"].unique()
    return frame.pivot(index="site", columns="cause", values=measure).loc[sites, causes].astype(float)


def middle_cell(grid: pd.DataFrame) -> tuple[int, int]:
    """The second cause in the stream after the middle layer: where a chain's bridge is handed on."""
    after = [row for row, site in enumerate(grid.index) if Site.parse(site).kind is SiteKind.resid_post]
    return after[(len(after) - 1) // 2], min(1, len(grid.columns) - 1)


def cell_numbers(traced: CausalMap, grid: pd.DataFrame, place: tuple[int, int]) -> dict[str, object]:
    """What was measured in a cell: each share with its interval, and how many prompts count."""
    site, name = grid.index[place[0]], grid.columns[place[1]]
    cause = next(each for each in traced.causes if (str(each.site), each.name) == (site, name))
    shares = {measure: getattr(cause, measure) for measure in CAUSAL}
    shown = {
        measure: "–" if found is None else f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
        for measure, found in shares.items()
    }
    counts = {"n": cause.n, "skipped": cause.skipped, "n right before": cause.n_right, "n both right": cause.n_both}
    return {"site": site, "cause": name, **shown, **counts}


def hops(asked: Asked) -> None:
    """The latents of the typed prompt, each at its own place, through the layers."""
    batch, lens = asked.batch, questions.trajectory(asked)
    if not hides_something(batch):
        return
    st.header("Hop by hop", divider="gray")
    ranks = latent_ranks(lens, batch, asked.task.vocab, asked.labels)
    st.markdown("  \n".join(said_of(ranks)))
    split = questions.split_of(asked)
    st.caption(
        "Among the whole vocabulary; on top is rank 0, a reciprocal rank of 1. "
        + (f"This prompt is of split `{split}`." if split else "This prompt is in no split.")
    )
    place = charts.heatmap(
        1 / (ranks.to_numpy(dtype=float) + 1),
        list(ranks.index),
        list(ranks.columns),
        key="hop",
        title="Each latent at its own place in the lens",
        unit="reciprocal rank",
        limit=1.0,
        diverging=False,
        default=(len(ranks) - 1, len(ranks.columns) - 1),
    )
    assert place is not None
    site, latent = ranks.index[place[0]], list(lens_latents(lens, batch))[place[1]]
    position = batch.latents[latent].position
    at = [str(each) for each in lens.sites].index(site)
    tokens = [asked.task.vocab[token] for token in lens.top_tokens[0, at, position].tolist()]
    probabilities = lens.top_probabilities[0, at, position].tolist()
    read = ", ".join(f"**{token}** {value:.3f}" for token, value in zip(tokens, probabilities, strict=True))
    st.markdown(
        f"At {asked.labels[position]}, {site} reads {read}; {ranks.columns[place[1]].split(' at ')[0]} has rank "
        f"{int(ranks.iloc[place])}."
    )


def hides_something(batch: Batch) -> bool:
    """Whether there is a latent besides the answer that the prompt does not name itself."""
    return any(
        int(latent.value[0]) != int(batch.tokens[0, latent.position])
        for name, latent in batch.latents.items()
        if name != "answer"
    )


def lens_latents(lens: Trajectory, batch: Batch) -> list[str]:
    """The latents that the lens can read."""
    return [name for name in batch.latents if f"reciprocal_rank_{name}" in lens.measures]


def latent_ranks(lens: Trajectory, batch: Batch, vocab: Sequence[str], labels: Sequence[str]) -> pd.DataFrame:
    """Rank of each latent of one prompt at its own position: a row a site, a column such as `bridge e17 at r1=r5`."""
    columns: dict[str, np.ndarray] = {}
    for name in lens_latents(lens, batch):
        latent = batch.latents[name]
        reciprocal = lens.measures[f"reciprocal_rank_{name}"].mean[:, latent.position]
        title = f"{name} {vocab[int(latent.value[0])]} at {labels[latent.position]}"
        columns[title] = (1 / reciprocal - 1).round().long().numpy()
    return pd.DataFrame(columns, index=[str(site) for site in lens.sites])


def said_of(ranks: pd.DataFrame) -> list[str]:
    """A line a latent: where it is on top, from the first site to the last."""
    return [f"**{title}**: {_tops(ranks[title])}" for title in ranks]


def _tops(ranks: pd.Series) -> str:
    top = [site for site, rank in ranks.items() if rank == 0]
    if not top:
        best = ranks.idxmin()
        return f"never on top; best at {best}, rank {ranks[best]}"
    return f"on top at {', '.join(map(str, top))}"


def _titled(split: str) -> str:
    return f"{split} ({KINDS[split]})" if split in KINDS else split


def _splits(run: Run) -> list[str]:
    return [split for split in UNSEEN if split in run.task.splits]


@st.cache_resource(max_entries=KEPT, show_spinner="Causal tracing …")
def _traced(reference: str, step: int, sha256: str, split: str) -> CausalMap:
    run = state.open_run(reference)
    assert isinstance(run.task, Reasoner)
    batch = _prompts(reference)[split]
    return causal_tracing(state.model_at(run, step), run.task, batch, split=split, seed=SEED)


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def _prompts(reference: str) -> Mapping[str, Batch]:
    task = state.open_run(reference).task
    assert isinstance(task, Reasoner)
    return draw_prompts(task, PROMPTS).splits
