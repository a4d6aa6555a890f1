"""Curves on one axis of steps, and effects by place."""

import pandas as pd
import pytest
import torch

from apps.ui.panels import GAP, NAME, PANEL, effect_grid, panel_height, stacked
from circuits.patching import patch_each
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.tables import Table
from workbench.tasks.modular import Modular


def curve(name: str, unit: str, *, log_y: bool = False) -> Table:
    frame = pd.DataFrame({"step": [0, 100, 0, 100], name: [2.0, 1.0, 0.5, 0.25], "split": ["train"] * 2 + ["test"] * 2})
    axes = {"x": "step", "y": name, "series": "split"}
    return Table(name=name, frame=frame, kind="curve", axes=axes, unit=unit, caption=f"{name}.", log_y=log_y)


def test_panels_share_the_steps_and_keep_their_own_scales() -> None:
    drawn = stacked([curve("loss", "nats", log_y=True), curve("accuracy", "fraction")], landmarks={"memorised": 50})
    assert [trace.yaxis for trace in drawn.data] == ["y", "y", "y2", "y2"]
    assert drawn.layout.xaxis.matches == "x2"
    assert (drawn.layout.yaxis.type, drawn.layout.yaxis2.type) == ("log", None)
    assert drawn.layout.yaxis2.range == (-0.03, 1.03)
    assert [trace.legend for trace in drawn.data] == ["legend", "legend", "legend2", "legend2"]


def test_landmarks_and_the_place_where_one_is_go_through_every_panel() -> None:
    tables = [curve("loss", "nats"), curve("accuracy", "fraction")]
    drawn = stacked(tables, landmarks={"memorised": 50, "generalised": 90}, here=70)
    lines = sorted((line.x0, line.line.dash) for line in drawn.layout.shapes)
    assert lines == [(50, "dash"), (50, "dash"), (70, None), (70, None), (90, "dash"), (90, "dash")]
    assert [note.text for note in drawn.layout.annotations] == ["memorised", "generalised"]
    assert not stacked(tables, landmarks={}).layout.shapes


def test_a_panel_has_room_for_the_names_of_its_curves() -> None:
    few = curve("few", "fraction")
    names = [f"split {place}" for place in range(12)]
    frame = pd.DataFrame({"step": [0] * 12, "many": [1.0] * 12, "split": names})
    many = Table(
        name="many", frame=frame, kind="curve", axes={**few.axes, "y": "many"}, unit="fraction", caption="Many."
    )
    assert (panel_height(few), panel_height(many)) == (PANEL, 12 * NAME + GAP)
    upper, lower = (
        axis.domain[1] - axis.domain[0]
        for drawn in [stacked([few, many], landmarks={})]
        for axis in (drawn.layout.yaxis, drawn.layout.yaxis2)
    )
    assert lower / upper == pytest.approx((12 * NAME + GAP) / PANEL)


def test_an_axis_says_what_it_is_told_to() -> None:
    drawn = stacked(
        [curve("loss", "nats"), curve("rank", "fraction")], landmarks={}, titles={"rank": "second relation at r2"}
    )
    assert drawn.layout.yaxis.title.text == "loss (nats)"
    assert drawn.layout.yaxis2.title.text == "second relation<br>at r2"


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_effects_stand_by_depth_and_position(direction: str) -> None:
    task = Modular(p=5, train_fraction=0.5)
    config = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=4, n_ctx=3, d_vocab=6, d_vocab_out=5)
    model = Transformer(config, generator=torch.Generator().manual_seed(0)).eval()
    patches = patch_each(model, task.sample(4, split="all"), sites="resid_post,z,pattern,resid_pre")
    grid = effect_grid(patches, direction)
    assert list(grid.index) == ["L0.resid_pre", "L0.z.h0", "L0.z.h1", "L0.resid_post"]
    assert list(grid.columns) == ["0: 0", "1: 1", "2: 2"]
    # The last state at the place that is read is the whole run.
    assert grid.loc["L0.resid_post", "2: 2"] == pytest.approx(1.0)
    row = patches.frame.query("site == 'L0.z.h1' and position == 1 and direction == @direction")
    assert grid.loc["L0.z.h1", "1: 1"] == row["effect"].item()
