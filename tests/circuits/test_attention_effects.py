"""The effects of all edits at once are those of one forward pass an edit."""

from dataclasses import replace

import pytest
import torch
from search_models import branches, one_pass_an_edit, prompt_of, random_model

from circuits.attention_effects import CleanPass, edit_effects
from circuits.attention_ops import (
    PUBLISHED,
    SHARE,
    EditedPass,
    count_by_layer,
    important_operations,
    measure_of,
    strongest_operations,
)
from workbench.models.planted_search import path_doubling
from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import search_layout

LAYOUT = search_layout(17, 2)


def slow_pass(model, prompt, unit):
    clean = CleanPass.of(model, prompt)
    best, rival = clean.logits.topk(2).indices.tolist()

    def lead(logits, resid):
        return logits[best] - logits[rival] if unit == "margin" else resid @ model.W_U[:, best].detach()

    effects = tuple(
        one_pass_an_edit(model, prompt, step, clean.pattern[step], lead) for step in range(model.config.n_steps)
    )
    value = float(lead(clean.logits, clean.resid[-1][-1]).detach())
    return EditedPass(clean=clean, effects=effects, value=value, unit=unit)


@pytest.fixture(scope="module")
def prompt():
    return prompt_of([(1, 2), (2, 3), (1, 4)], 1, 3, LAYOUT)


@pytest.mark.parametrize(
    ("shape", "unit"),
    [
        ({}, "margin"),
        ({"normalization": None, "n_layers": 2}, "logit"),
        ({"d_mlp": 0, "n_layers": 4}, "logit"),
    ],
)
def test_equals_one_forward_pass_an_edit(prompt, shape, unit):
    model = random_model(LAYOUT, **shape)
    slow, thresholds = slow_pass(model, prompt, unit), SHARE if unit == "margin" else PUBLISHED
    fast = EditedPass.of(slow.clean, unit)
    assert fast.value == pytest.approx(slow.value, abs=1e-5)
    for mine, theirs in zip(fast.effects, slow.effects, strict=True):
        for name in ("measure", "key_score", "query_score"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=1e-4, rtol=0)

    def chosen(edited):
        return {(op.layer, op.dest, op.src, op.sign) for op in important_operations(edited, thresholds)}

    assert fast.read_rows(thresholds) == slow.read_rows(thresholds)
    assert chosen(fast) == chosen(slow)
    assert len(chosen(fast)) > 3


def test_chunks_change_nothing(prompt, monkeypatch):
    clean = CleanPass.of(random_model(LAYOUT), prompt)
    measure = measure_of(clean, "margin")
    whole = edit_effects(clean, 0, measure)
    monkeypatch.setattr("circuits.attention_effects.CHUNK", 7 * 14 * 20)
    torch.testing.assert_close(edit_effects(clean, 0, measure).key_score, whole.key_score)


def test_padding_is_not_read(prompt):
    """The same prompt with and without padding has the same pass, where positions embed alike."""
    model = random_model(LAYOUT)
    clean = CleanPass.of(model, prompt)
    assert len(prompt) == 14 < LAYOUT.size
    with torch.no_grad():
        torch.testing.assert_close(clean.logits, model(prompt.padded[None])[0, -1])


def test_operations_of_the_wired_model():
    """Zeroing the copy that the answer is read off by costs the whole answer; its strength is in shares of the lead."""
    layout = search_layout(26, 1)
    edited = EditedPass.of(CleanPass.of(path_doubling(layout), branches(3, 2, layout, seed=1)), "margin")
    assert edited.value == pytest.approx(10, abs=1e-3)
    found = important_operations(edited, SHARE)
    [read] = [operation for operation in found if operation.layer == 2]
    assert (read.dest, read.sign) == (22, 1)
    # The lead falls from 10 to 0: ten times a tenth of it.
    assert read.strength == pytest.approx(10, abs=1e-3)
    assert important_operations(edited, SHARE.times(2.0)) != ()
    counts = count_by_layer(found)
    assert counts == {0: 4, 1: 2, 2: 1}

    def places(operations):
        return {(operation.layer, operation.dest, operation.src) for operation in operations}

    # What counts most in the wired model are its own operations.
    assert places(strongest_operations(edited, counts, SHARE)) == places(found)


def test_errors(prompt):
    two_heads = random_model(LAYOUT, n_heads=2)
    with pytest.raises(WorkbenchError, match="one head a layer; this one has 2"):
        CleanPass.of(two_heads, prompt)
    small = random_model(replace(LAYOUT, size=16))
    with pytest.raises(WorkbenchError, match="has 17 positions and tokens up to 10; the model reads 16 positions"):
        CleanPass.of(small, prompt)
    with pytest.raises(WorkbenchError, match="Thresholds are above 0, got 0.0"):
        SHARE.times(0.0)
