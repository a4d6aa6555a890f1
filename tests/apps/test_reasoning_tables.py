"""Curves with readable names, causes by site, and every number in one table."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from apps.reasoning import ReasoningMeasures, kept_reasoning
from apps.reasoning_tables import PANELS, all_rows, causal_table, counted, curve_tables, middle_site
from workbench import load
from workbench.figures import figure


def measures(folder: Path, name: str) -> ReasoningMeasures:
    found = kept_reasoning(load(name, runs=folder))
    assert found is not None
    return found


def series(folder: Path, name: str, panel: str) -> Sequence[str]:
    return curve_tables(measures(folder, name))[f"reasoning_{panel}"].frame["series"].unique().tolist()


def test_every_task_has_the_curves_that_are_its_own(reasoners_folder: Path) -> None:
    chains, values = (set(curve_tables(measures(reasoners_folder, name))) for name in ("chains", "values"))
    assert chains | values == set(PANELS)
    assert chains - values == {
        f"reasoning_{name}" for name in ("bridge", "relation", "redirect", "transplant", "two_calls")
    }
    assert values - chains == {f"reasoning_{name}" for name in ("v1", "v2", "labels")}


def test_curves_name_split_and_site(reasoners_folder: Path) -> None:
    assert series(reasoners_folder, "chains", "bridge") == [
        "test, L0.resid_post",
        "test, L1.resid_post",
        "ood, L0.resid_post",
        "ood, L1.resid_post",
    ]
    assert set(series(reasoners_folder, "chains", "redirect")) <= {
        f"{split}, {what}" for split in ("train_inferred", "test") for what in ("another bridge", "same bridge")
    }
    assert series(reasoners_folder, "chains", "transplant") == [
        "id_ood, ID state",
        "id_ood, left alone",
        "ood_id, ID state",
        "ood_id, left alone",
        "ood, ID state",
        "ood, left alone",
    ]


def test_curves_are_what_was_measured(reasoners_folder: Path) -> None:
    found = measures(reasoners_folder, "chains")
    frame = curve_tables(found)["reasoning_two_calls"].frame
    for row in found.find("two_calls"):
        shown = frame[(frame["split"] == row["split"]) & (frame["step"] == row["step"])]
        assert shown[["value", "low", "high", "n"]].to_numpy().tolist() == [
            [row["value"], row["low"], row["high"], row["n"]]
        ]
    for table in curve_tables(found).values():
        assert "n = " in table.caption
        assert figure(table).data


@pytest.mark.parametrize(("name", "middle"), [("chains", "L0.resid_post"), ("values", "L0.resid_post")])
def test_the_middle(name: str, middle: str, reasoners_folder: Path) -> None:
    assert middle_site(measures(reasoners_folder, name)) == middle


def test_a_model_of_one_layer_has_no_middle(reasoners_folder: Path) -> None:
    found = measures(reasoners_folder, "values")
    shallow = replace(found, rows=[row for row in found.rows if "L1" not in (row["site"] or "")])
    assert middle_site(shallow) is None
    assert "reasoning_strength" not in curve_tables(shallow)


def test_causes_of_two_checkpoints_share_a_scale_and_a_picture(reasoners_folder: Path) -> None:
    found = measures(reasoners_folder, "chains")
    steps = {"early": found.steps[1], "last": found.steps[-1]}
    table = causal_table(found, "strength", steps)
    assert table.frame["panel"].unique().tolist() == ["test, early", "test, last", "ood, early", "ood, last"]
    assert f"early (step {found.steps[1]})" in table.caption
    [row] = found.find("strength", step=steps["last"], split="ood", site="L0.mlp_out", cause="first")
    shown = table.frame.query("panel == 'ood, last' and site == 'L0.mlp_out' and cause == 'first'")
    assert shown["value"].item() == row["value"]
    assert len(figure(table).data) == 4


def test_all_rows_keep_n_and_what_has_no_step(reasoners_folder: Path) -> None:
    found = measures(reasoners_folder, "chains")
    table = all_rows(found)
    assert len(table.frame) == len(found.rows)
    assert table.frame.loc[table.frame["measure"] == "marginal_loss", "step"].isna().all()
    assert table.csv().splitlines()[1].startswith("marginal_accuracy,,test,")


@pytest.mark.parametrize(("n", "said"), [([], "No prompt counts"), ([3, 3], "n = 3"), ([5, 3], "n = 3 to 5")])
def test_how_many_is_said(n: list[int], said: str) -> None:
    assert counted([{"n": each} for each in n]) == said
