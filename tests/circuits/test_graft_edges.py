"""What a graft does to the edges of the circuit: hand-made changes whose reach is known."""

import pytest
import torch

from circuits.graft_edges import graft_edges
from circuits.grafting import Delta, Graft
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.training.recipes import find_recipe

CHANGED = "weights.1.mlp.W_out"


@pytest.fixture(scope="module")
def world():
    """A model without LayerNorms, through which a change would reach every edge, and a donor with one other tensor."""
    recipe = find_recipe("skills-smoke").override(["size=400", "n_layers=2", "normalization=null"])
    model = Transformer(recipe.transformer, generator=generator(0, "weights"))
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("weights.")}
    rng = torch.Generator().manual_seed(1)
    donor = {**weights, CHANGED: weights[CHANGED] + 0.1 * torch.randn(weights[CHANGED].shape, generator=rng)}
    task = find_recipe("skills-smoke").override(["size=400", "skill=tone"]).task
    return model, Delta.between(weights, donor, weights), task.sample(48, split="val", seed=0)


def graft_of(delta, kept):
    mask = {
        name: torch.full_like(tensor, kept and name == CHANGED, dtype=torch.bool)
        for name, tensor in delta.change.items()
    }
    return Graft(delta=delta, mask=mask, method="learned")


def test_only_edges_that_meet_the_changed_part_change(world):
    model, delta, batch = world
    found = graft_edges(model, graft_of(delta, kept=True), batch)
    change = dict(zip([edge.name for edge in found.change.graph.edges], found.change.score.tolist(), strict=True))
    assert change["m1->logits"] != 0
    past_it = [name for name in change if name.endswith("->logits") and name != "m1->logits"]
    assert past_it
    assert {change[name] for name in past_it} == {0.0}
    # The graft is the donor here.
    assert found.correlation == pytest.approx(1)
    assert torch.equal(found.scores["graft"].score, found.scores["donor"].score)


def test_the_table_begins_with_what_changes_most_and_says_of_how_many(world):
    model, delta, batch = world
    found = graft_edges(model, graft_of(delta, kept=True), batch)
    table = found.table()
    sizes = table.frame["change"].abs().tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(float(found.change.score.abs().max()))
    assert (table.frame["graft"] - table.frame["base"]).tolist() == pytest.approx(table.frame["change"].tolist())
    assert (
        (table.frame["change_low"] <= table.frame["change"]) & (table.frame["change"] <= table.frame["change_high"])
    ).all()
    assert f"n = {len(batch)} pairs" in table.caption


def test_a_graft_of_nothing_changes_no_edge(world):
    model, delta, batch = world
    found = graft_edges(model, graft_of(delta, kept=False), batch)
    assert not found.change.score.any()
    assert not found.significance.found.any()


def test_too_few_pairs_find_nothing_and_are_refused(world):
    model, delta, batch = world
    with pytest.raises(WorkbenchError, match="Score at least"):
        graft_edges(model, graft_of(delta, kept=True), batch.select(slice(4)))
