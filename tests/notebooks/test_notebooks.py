from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from workbench.store import new_run
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    recipe = find_recipe("modular-smoke").override(["steps=260", "evaluate_every=20"])
    return train(recipe, new_run("smoke", tmp_path_factory.mktemp("runs")))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, smoke_run, monkeypatch):
    monkeypatch.setenv("WORKBENCH_NOTEBOOK_RUN", str(smoke_run.folder.path))
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
