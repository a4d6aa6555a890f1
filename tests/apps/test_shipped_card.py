"""The score card that ships is the one of the frozen set, and nothing else gets into its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apps.shipped_card import PLACE, ship, shipped_card
from circuits.discovery import METHODS
from circuits.scorecard import card_from_json, scorecard
from circuits.truths import SET, SET_DIGEST
from workbench.runtime import WorkbenchError


def test_the_shipped_card_is_of_the_whole_frozen_set() -> None:
    card = shipped_card()
    assert card.digest == SET_DIGEST
    assert {row.circuit for row in card.rows} == set(SET)
    assert {row.finder for row in card.rows} == set(METHODS)
    exact = card.means.query("finder == 'exact' and ablation == 'zero' and truth == 'causal'")
    assert exact["auroc"].item() > 0.99


def test_random_rankings_are_at_chance() -> None:
    means = [row.chance.auroc.mean for row in shipped_card().rows if row.chance is not None]
    assert means
    assert max(abs(mean - 0.5) for mean in means) < 0.05


def test_what_is_shipped_is_what_was_measured(tmp_path: Path) -> None:
    card = shipped_card()
    ship(card.summary(), tmp_path / "card.json")
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(PLACE.read_text())


def test_a_card_of_some_circuits_does_not_ship(tmp_path: Path) -> None:
    some = scorecard(["exact"], ["and_gate"], ["zero"], n=4)
    again = card_from_json(json.loads(json.dumps(some.summary())))
    assert again.rows == some.rows
    with pytest.raises(WorkbenchError, match="Only a card of the whole frozen set ships"):
        ship(some.summary(), tmp_path / "card.json")
    with pytest.raises(WorkbenchError, match="not a score card"):
        card_from_json({"rows": []})
    assert not list(tmp_path.iterdir())
