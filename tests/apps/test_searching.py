import pytest

from apps.searching import by_lookahead
from workbench.instrument.passes import run as run_model
from workbench.store import new_run
from workbench.training.loop import train
from workbench.training.recipes import find_recipe


def test_a_search_is_told_by_lookahead(tmp_path):
    recipe = find_recipe("search-smoke").override(["steps=2", "batch_size=8", "test_size=40"])
    run = train(recipe, new_run("a", tmp_path))
    told = by_lookahead(run)
    assert list(told["accuracy_by_lookahead"]) == [0, 1, 2, 3]
    assert told["n_by_lookahead"] == dict.fromkeys(range(4), 40)
    assert told["step_by_lookahead"] == dict.fromkeys(range(4))
    for lookahead, accuracy in told["accuracy_by_lookahead"].items():
        batch = run.task.examples(f"test_{lookahead}")
        answers = run_model(run.model(), batch.tokens).logits[:, -1].argmax(1)
        assert accuracy == pytest.approx(float((answers == batch.targets[:, -1]).double().mean()))
        assert accuracy == pytest.approx(run.log.rows[-1][f"test_{lookahead}_accuracy"])
        low, high = told["interval_by_lookahead"][lookahead]
        assert low <= accuracy <= high


def test_other_runs_are_not(tmp_path):
    recipe = find_recipe("modular-smoke").override(["p=13", "steps=1"])
    assert by_lookahead(train(recipe, new_run("a", tmp_path))) == {}
