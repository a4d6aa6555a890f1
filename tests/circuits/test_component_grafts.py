import pytest
import torch

from circuits.component_grafts import component_grafts
from circuits.grafting import Delta
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.training.finetune import with_weights
from workbench.training.recipes import find_recipe


def base_and_batch(*settings):
    recipe = find_recipe("skills-smoke").override(["size=200", "n_layers=2", *settings])
    model = Transformer(recipe.transformer, generator=generator(0, "weights"))
    return model, recipe.task.examples("val").select(slice(300))


def changed(model, names):
    """A delta of every weight of the blocks, which is 0 but in the tensors of these names."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("weights.")}
    rng = torch.Generator().manual_seed(1)
    donor = {
        name: tensor + torch.randn(tensor.shape, generator=rng) * (name in names) for name, tensor in weights.items()
    }
    return Delta.between(weights, donor, weights)


def test_a_change_in_one_mlp_is_found_in_its_weights_and_in_its_activation():
    model, batch = base_and_batch()
    rows = component_grafts(model, changed(model, ["weights.1.mlp.W_out"]), batch).frame.set_index("component")
    donor, base = (rows.loc[name, "weights_grafted"] for name in ("donor", "base"))
    assert donor != base
    assert rows.loc["L1.mlp_out", "weights_grafted"] == rows.loc["L1.mlp_out", "activation_patched"] == donor
    # Nothing before it differs, and nothing else was changed.
    others = [name for name in rows.index if name not in ("donor", "L1.mlp_out")]
    assert set(rows.loc[others, "weights_grafted"]) == {base}
    assert len(rows) == 2 + 2 * (model.config.n_heads + 1)


def test_what_reads_a_change_has_it_in_its_activation_alone():
    model, batch = base_and_batch()
    rows = component_grafts(model, changed(model, ["weights.0.mlp.W_out"]), batch).frame.set_index("component")
    assert rows.loc["L1.mlp_out", "weights_grafted"] == rows.loc["base", "weights_grafted"]
    assert rows.loc["L1.mlp_out", "activation_patched"] != rows.loc["base", "weights_grafted"]


def test_a_copy_has_the_weights_and_leaves_the_model_alone():
    model, _ = base_and_batch()
    before = model.state_dict()["weights.0.attn.W_Q"].clone()
    other = with_weights(model, {"weights.0.attn.W_Q": torch.zeros_like(before)})
    assert not other.state_dict()["weights.0.attn.W_Q"].any()
    assert torch.equal(model.state_dict()["weights.0.attn.W_Q"], before)


def test_blocks_that_run_twice_are_refused():
    model, batch = base_and_batch("schedule=[0,1,0,1]")
    with pytest.raises(WorkbenchError, match="run by a schedule"):
        component_grafts(model, changed(model, ["weights.1.mlp.W_out"]), batch)
