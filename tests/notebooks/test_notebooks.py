from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from workbench.store import new_run
from workbench.training.checkpoints import load
from workbench.training.finetune import donor_recipe
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

CHAINS = ["entities=20", "relations=5", "out_degree=4", "phi=2", "d_model=32", "n_heads=2", "d_head=16", "d_mlp=64"]
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    recipe = find_recipe("modular-smoke").override(["steps=260", "evaluate_every=20"])
    return train(recipe, new_run("smoke", tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def reasoners(tmp_path_factory):
    """Two runs on chains, the second with blocks that are shared."""
    recipe = find_recipe("composition-smoke").override([*CHAINS, "batch_size=128", "learning_rate=0.004"])
    runs = tmp_path_factory.mktemp("reasoners")
    chains = train(recipe.override(["steps=160"]), new_run("chains", runs))
    return chains, train(recipe.override(["steps=20", "schedule=[0,1,0,1]"]), new_run("looped", runs))


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    settings = ["steps=40", "evaluate_every=20", "test_size=60", "batch_size=64"]
    return train(find_recipe("search-smoke").override(settings), new_run("search", tmp_path_factory.mktemp("searches")))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    settings = ["steps=100", "letters=3", "task.n_ctx=5", "size=60", "batch_size=64", "evaluate_every=50"]
    recipe = find_recipe("program-smoke").override(settings)
    return train(recipe, new_run("counts", tmp_path_factory.mktemp("programs")))


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    """A base of skills, and two donors."""
    runs = tmp_path_factory.mktemp("donors")
    short = ["steps=40", "size=600", "batch_size=32", "evaluate_every=40"]
    base = train(find_recipe("skills-smoke").override([*short, "cooldown=0"]), new_run("base", runs))
    taught = [
        train(donor_recipe(load("base", runs=runs), skill).override(short), new_run(skill, runs))
        for skill in ("tone", "ends")
    ]
    return base, *taught


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, smoke_run, reasoners, search, program, donors, monkeypatch):
    chains, looped = reasoners
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_RUN", str(smoke_run.folder.path))
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_REASONER", str(chains.folder.path))
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_LOOPED", str(looped.folder.path))
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_SEARCH", str(search.folder.path))
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_PROGRAM", str(program.folder.path))
    base, *taught = [str(run.folder.path) for run in donors]
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_BASE", base)
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_DONORS", ",".join(taught))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs_and_defines_nothing(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert not cell.outputs
        assert cell.execution_count is None
        assert "def " not in cell.source
        assert "class " not in cell.source
