from dataclasses import replace
from pathlib import Path

import pytest

from apps.references import references
from apps.sections import Section
from apps.training_section import training_section
from workbench.training.checkpoints import Run, load


@pytest.fixture(scope="module")
def small(runs_folder: Path) -> Run:
    return load("small", runs=runs_folder)


def section_with(run: Run, *settings: str) -> Section:
    found = training_section(replace(run, recipe=run.recipe.override(settings)))
    assert found is not None
    # Whatever is cited is known.
    assert len(references(found.references)) == len(found.references)
    return found


def test_how_it_was_trained_is_said(small: Run) -> None:
    plain = section_with(small)
    assert plain.text.startswith("AdamW with learning rate 0.01, decoupled weight decay 1 and betas 0.9 and 0.98, on ")
    assert "dropout" not in plain.text
    assert "log-softmax in float64. " in plain.text
    assert "at 0.99 or above on the training split (memorised), at 0.99 or above on the test split" in plain.text
    assert plain.references == ("power2022grokking",)
    changed = section_with(small, "dropout=0.1", "decay=matrices", "batch_size=32")
    assert "weight decay 1 of matrices alone and betas 0.9 and 0.98, dropout 0.1, on batches of 32" in changed.text


def test_how_it_was_accelerated_is_said(small: Run) -> None:
    found = section_with(small, "loss=stablemax", "grokfast=[0.98, 2]", "orthogonal_gradient=true")
    assert (
        "StableMax in float64; Grokfast adds 2 times the gradients' running mean (decay 0.98); "
        "gradients orthogonal to the parameters. " in found.text
    )
    assert found.references == ("power2022grokking", "lee2024grokfast", "prieto2025grokking")


@pytest.mark.parametrize(
    ("optimiser", "words", "cited"),
    [
        (
            "muon",
            "Muon on the blocks' matrices and AdamW on the rest, with learning rate",
            ["jordan2024muon", "liu2025muon"],
        ),
        (
            "signum",
            "Signum with learning rate 0.01, decoupled weight decay 1 and momentum 0.95, on",
            ["bernstein2018signsgd"],
        ),
    ],
)
def test_the_optimiser_is_named_and_cited(small: Run, optimiser: str, words: str, cited: list[str]) -> None:
    found = section_with(small, f"optimiser={optimiser}", "betas=[0.95,0.98]")
    assert found.text.startswith(words)
    assert found.references == ("power2022grokking", *cited)


def test_a_run_that_came_trained_has_no_such_section(small: Run) -> None:
    untold = replace(small)
    # Read once and kept: as a run without a log would find it.
    untold.__dict__["log"] = replace(small.log, rows=())
    assert training_section(untold) is None
