"""`workbench probe` and `workbench lens --kind tuned` on tiny runs, and what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hops import WORLD, reasoner_run

from apps import probing
from apps.cli import main
from apps.probe_sections import LAST, compared_steps, gather_probes, probe_sections
from apps.probing import (
    MEASURES,
    REACHABILITY,
    draw_prompts,
    hidden_latents,
    probes_of,
    probing_tables,
    untrained_model,
)
from apps.references import REFERENCES
from circuits.amnesic import HELD_OUT, amnesic
from probes.linear import linear_probe
from probes.reachability import reachability
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.tasks.base import Latent
from workbench.tasks.graph_search import GraphSearch
from workbench.tasks.groups import in_several_groups
from workbench.tasks.modular import Modular
from workbench.training.checkpoints import Run, load

pytestmark = pytest.mark.slow

SPLIT = "train_inferred"
BRIDGE = ("--latent", "bridge", "--positions", "1", "--split", SPLIT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with few checkpoints, copied so that results may be kept in it."""
    folder = tmp_path_factory.mktemp("runs") / "chains"
    shutil.copytree(reasoner_run("composition").folder.path, folder)
    steps = [checkpoint.step for checkpoint in load(str(folder)).checkpoints]
    for step in steps[1:-1]:
        for path in (folder / "checkpoints").glob(f"step_{step:08d}.*"):
            path.unlink()
    return load(str(folder))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 2
    told = capsys.readouterr()
    assert not told.out
    return told.err.strip().splitlines()[-1]


def test_cells_are_those_of_the_probes_and_are_kept(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("probe", run.reference, *BRIDGE)
    found = printed(capsys, *command)
    batch = draw_prompts(run.task, 1000, SPLIT)
    batch = batch.select(in_several_groups(batch, "bridge"))
    probes = linear_probe(run.model(), batch, "bridge", sites="resid_post", positions=[1])
    assert [cell["accuracy"] for cell in found["cells"]] == [probe.accuracy.mean for probe in probes.probes]
    assert [cell["site"] for cell in found["cells"]] == ["L0.resid_post", "L1.resid_post"]
    assert {cell["at"] for cell in found["cells"]} == {"1: r1"}
    before = linear_probe(run.model(0), batch, "bridge", sites="resid_post", positions=[1])
    assert [cell["accuracy_untrained"] for cell in found["cells"]] == [probe.accuracy.mean for probe in before.probes]
    lost = amnesic(run.model(), batch, "bridge", sites="resid_post", positions=[1], directions=8)
    assert [cell["amnesic"] for cell in found["cells"]] == [place.accuracy_lost.mean for place in lost.places]
    prompts = [(row["model"], row["prompts"]) for row in found["amnesic"]]
    assert (
        prompts == [("trained", HELD_OUT), ("trained", "ood")] * 2 + [("untrained", HELD_OUT), ("untrained", "ood")] * 2
    )
    [sizes] = found["latents"]
    assert sizes["n_train"] + sizes["n_test"] + sizes["dropped"] == len(WORLD.examples(SPLIT))
    assert found["left_out"] == {}

    def unasked(*arguments: object, **options: object) -> None:
        raise AssertionError("it was kept")

    monkeypatch.setattr(probing, "linear_probe", unasked)
    again = printed(capsys, *command)
    assert {**again, "seconds": 0, "cpu_seconds": 0} == {**found, "seconds": 0, "cpu_seconds": 0}


def test_all_checkpoints_with_a_share_that_rises(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["probe", run.reference, *BRIDGE, "--sites", "L0.resid_post", "--checkpoint", "all", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [each["step"] for each in found["checkpoints"]] == [checkpoint.step for checkpoint in run.checkpoints]
    shares = [int(line.split()[-2]) for line in told.err.strip().splitlines()]
    assert shares == [25, 50, 75, 100]
    # The first checkpoint is the untrained model.
    [cell] = found["checkpoints"][0]["cells"]
    assert cell["accuracy"] == cell["accuracy_untrained"]


def test_every_latent_by_default_and_as_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["probe", run.reference, "--sites", "L1.resid_post", "--split", SPLIT]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("bridge", "relation", "answer", "amnesic_untrained"))


def test_what_cannot_be_probed_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    reference = run.reference
    assert "Unknown latent 'bride'" in refused(capsys, "probe", reference, "--latent", "bride")
    assert "'bridge'" in refused(capsys, "probe", reference, "--latent", "bride")
    assert "have no latents to probe" in refused(capsys, "probe", reference, "--split", "train")
    assert "has source and destination" in refused(capsys, "probe", reference, "--sites", "pattern")
    assert "No position 9: prompts have positions 0 to 2" in refused(capsys, "probe", reference, "--positions", "9")
    assert "--positions takes numbers" in refused(capsys, "probe", reference, "--positions", "r1")
    assert "Asked for 0 prompts" in refused(capsys, "probe", reference, "--n", "0")
    assert "Unknown split 'tests'" in refused(capsys, "probe", reference, "--split", "tests")
    assert "cannot be split by group" in refused(capsys, "probe", reference, "--split", "ood", "--latent", "answer")


def test_the_tuned_lens_stands_beside_the_logit_lens(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = printed(capsys, "lens", run.reference, "--kind", "tuned", "--split", SPLIT, "--n", "60")
    assert tuned["n_train"] + tuned["n_test"] == 60
    assert {(cell["lens"], cell["site"]) for cell in tuned["cells"]} == {
        (lens, site) for lens in ("logit", "tuned") for site in ("L0.resid_pre", "L0.resid_post", "L1.resid_post")
    }
    last = [cell["kl"] for cell in tuned["cells"] if cell["site"] == "L1.resid_post"]
    assert last == pytest.approx([0, 0], abs=1e-6)
    plain = printed(capsys, "lens", run.reference, "--split", SPLIT, "--n", "20")
    assert "n_train" not in plain
    through = printed(capsys, "lens", run.reference, "--kind", "tuned", "--n", "20", "--checkpoint", "all")
    assert len(through["checkpoints"]) == len(run.checkpoints)


def test_the_untrained_model_is_the_first_checkpoint_or_its_seed(run: Run, tmp_path: Path) -> None:
    first = untrained_model(run)
    assert torch.equal(first.embed.W_E, run.model(0).embed.W_E)
    shutil.copytree(run.folder.path, tmp_path / "late")
    for path in (tmp_path / "late" / "checkpoints").glob("step_00000000.*"):
        path.unlink()
    late = untrained_model(load(str(tmp_path / "late")))
    # The gallery's checkpoints are stored in half precision, this one's is not.
    assert torch.equal(late.embed.W_E, first.embed.W_E)
    assert run.recipe.train is not None
    other = Transformer(run.recipe.model, generator=generator(run.recipe.train.init_seed + 1, "init"))
    assert not torch.equal(other.embed.W_E, first.embed.W_E)


def test_latents_that_no_token_names() -> None:
    assert hidden_latents(WORLD.examples("test")) == ("bridge",)
    # What the prompt says itself is not hidden; the answer counts where nothing else does.
    assert hidden_latents(Modular(p=7).examples("all")) == ("answer",)
    batch = WORLD.examples("test")
    bare = replace(batch, latents={"h": Latent(value=batch.tokens[:, 0], position=0)})
    assert hidden_latents(bare) == ()


def test_a_latent_that_cannot_be_split_is_left_out_and_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw_prompts(run.task, 1000, SPLIT)
    alone = {**batch.latents, "alone": Latent(value=torch.arange(len(batch)), position=0)}
    monkeypatch.setattr(probing, "draw_prompts", lambda *arguments: replace(batch, latents=alone))
    monkeypatch.setattr(probing, "_ood_prompts", lambda *arguments: {})
    found = probes_of(run, sites="L0.resid_post", positions=(1,), split=SPLIT)
    assert found.latents == ("bridge", "relation", "answer")
    assert "Latent 'alone'" in found.left_out["alone"]


def test_tables_hold_both_models(run: Run) -> None:
    found = probes_of(run, latent="bridge", sites="L0.resid_post", positions=(1,), split=SPLIT)
    tables = {table.name: table for table in found.tables()}
    assert list(tables) == [*(f"probes_bridge_{measure}" for measure in MEASURES), "probes", "amnesic", "probe_sizes"]
    heat = tables["probes_bridge_accuracy"]
    assert heat.frame["model"].tolist() == ["trained", "untrained"]
    assert heat.frame["value"].tolist() == [found.cells[0]["accuracy"], found.cells[0]["accuracy_untrained"]]


@pytest.fixture(scope="module")
def searching(searches_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short training on graph search, copied so that results may be kept in it."""
    folder = tmp_path_factory.mktemp("searches") / "searching"
    shutil.copytree(searches_folder / "searching", folder)
    return load(str(folder))


def test_a_search_is_asked_for_reachability_too(searching: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "probe", searching.reference, "--latent", REACHABILITY)
    assert found["cells"] == []
    assert found["latents"] == []
    batch = draw_prompts(searching.task, 1000, "test")
    assert isinstance(searching.task, GraphSearch)
    reached = reachability(searching.model(), searching.task, batch, untrained=searching.model(0))
    assert found[REACHABILITY] == json.loads(json.dumps(reached.summary()))
    assert {cell["direction"] for cell in found[REACHABILITY]["cells"]} == {"forward", "backward"}
    sites = ["L0.resid_pre", "L0.resid_post", "L1.resid_post", "L2.resid_post"]
    assert list(dict.fromkeys(cell["site"] for cell in found[REACHABILITY]["cells"])) == sites
    tables = {table.name: table for table in probing_tables(found)}
    assert list(tables) == ["reachability_forward", "reachability_backward", "reachability"]
    panels = set(tables["reachability_forward"].frame["rows"])
    assert panels == {f"{side}{which}" for side in ("source", "target") for which in ("", ", untrained")}
    fewer = printed(capsys, "probe", searching.reference, "--latent", REACHABILITY, "--n", "160")
    assert fewer[REACHABILITY]["n_train"] < found[REACHABILITY]["n_train"]


def test_all_latents_of_a_search_and_reachability_as_text(searching: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("probe", searching.reference, "--sites", "L2.resid_post", "--positions", "25")
    found = printed(capsys, *command)
    assert {row["latent"] for row in found["latents"]} | set(found["left_out"]) == {"start", "goal", "next"}
    assert main([*command]) == 0
    latents, reached = capsys.readouterr().out.strip().split("\n\n")[1:]
    assert latents.split()[:2] == ["latent", "site"]
    assert reached.split()[:5] == ["site", "side", "direction", "distance", "auroc"]
    assert len(reached.splitlines()) == 1 + len(found[REACHABILITY]["cells"])


def test_reachability_that_cannot_be_probed_is_left_out_or_refused(
    searching: Run, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--n", "6", "--positions", "25", "--sites", "L0.resid_post")
    assert "a probe needs 8 or more" in refused(capsys, "probe", searching.reference, "--latent", REACHABILITY, *few)
    assert "Unknown latent 'reachability'" in refused(capsys, "probe", run.reference, "--latent", REACHABILITY)
    assert REACHABILITY not in printed(capsys, "probe", run.reference, *BRIDGE)


def test_sections_of_a_report(run: Run) -> None:
    evidence = gather_probes(run, split=SPLIT)
    assert evidence.steps[LAST] == run.checkpoint().step
    assert {row["latent"] for row in evidence.rows} == {"bridge"}
    models = {*compared_steps(run), "untrained"}
    assert {row["model"] for row in evidence.rows} == {row["model"] for row in evidence.forgotten} == models
    probes, lenses = probe_sections(evidence)
    assert f"{LAST}: step {run.checkpoint().step}" in probes.text
    assert f"n = {evidence.sizes[0]['n_test']}" in probes.text
    names = [table.name for section in (probes, lenses) for table in section.tables]
    assert len(set(names)) == len(names)
    assert {*probes.references, *lenses.references} <= set(REFERENCES)
