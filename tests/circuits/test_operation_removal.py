"""Undoing operations: by the engine what the tracer measures by its own short cuts, and nothing where nothing is."""

import pytest
import torch

from circuits.attention_effects import CleanPass
from circuits.attention_ops import SHARE, EditedPass, Operation, important_operations
from circuits.operation_removal import logits_without
from circuits.path_merging import trace_paths
from circuits.search_prompts import SearchPrompt
from workbench.models.planted_search import path_doubling
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.graph_search import GraphSearch
from workbench.training.search_recipes import search

TASK = GraphSearch(size=26, test_size=20)


@pytest.fixture
def prompt() -> SearchPrompt:
    return SearchPrompt.read(TASK.prompt("1>2 2>3 1>4 4>5 3>6 Q 1 3").tokens[0], TASK.layout)


def test_one_undone_is_what_the_tracer_measures(prompt: SearchPrompt) -> None:
    model = Transformer(search().model, generator=generator(0, "weights"))
    edited = EditedPass.of(CleanPass.of(model, prompt), "margin")
    best, rival = edited.clean.logits.topk(2).indices.tolist()
    operations = important_operations(edited, SHARE)
    assert {each.sign for each in operations} == {1, -1}
    for each in operations:
        logits = logits_without(model, prompt, [each])
        mode = 0 if each.sign == 1 else 1
        measured = edited.effects[each.layer].measure[mode, each.dest, each.src]
        assert float(logits[best] - logits[rival]) == pytest.approx(float(measured), abs=1e-4)


def test_without_its_reading_the_doubling_model_goes_astray(prompt: SearchPrompt) -> None:
    model = path_doubling(TASK.layout)
    trace = trace_paths(model, prompt)
    assert trace.explained_strict
    assert int(logits_without(model, prompt, []).argmax()) == 2
    reading = [each for each in trace.strict.operations if each.layer == 2]
    undone = logits_without(model, prompt, reading)
    assert undone[2] < logits_without(model, prompt, [])[2] / 2


def test_nothing_undone_is_the_model_itself(prompt: SearchPrompt) -> None:
    model = path_doubling(TASK.layout)
    assert torch.equal(logits_without(model, prompt, []), model(prompt.padded[None])[0, -1])


def test_an_operation_of_another_model_is_refused(prompt: SearchPrompt) -> None:
    other = Operation(layer=7, dest=0, src=1, sign=1, strength=1.0)
    with pytest.raises(WorkbenchError, match=r"L7\.pattern"):
        logits_without(path_doubling(TASK.layout), prompt, [other])
