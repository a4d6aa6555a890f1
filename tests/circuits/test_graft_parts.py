import pytest
import torch
from torch import nn

from circuits.graft_parts import SLICED, best_parts, n_heads_of, parts_of
from workbench import load
from workbench.runtime import WorkbenchError


class Config:
    """What a model says of itself."""

    n_heads = 2


class Model(nn.Module):
    """Nothing but a configuration."""

    config = Config()


BERT = {
    "layer.0.attention.self.query.weight": torch.zeros(4, 3),
    "layer.0.attention.output.dense.weight": torch.zeros(3, 4),
    "layer.0.intermediate.dense.bias": torch.zeros(2),
    "layer.0.output.dense.weight": torch.zeros(3, 2),
    "layer.1.attention.self.query.weight": torch.zeros(4, 3),
    "embeddings.weight": torch.zeros(5),
}


def test_heads_of_bert_are_rows_of_what_makes_them_and_columns_of_what_reads_them():
    parts = parts_of(BERT, "heads", Model())
    assert parts.count == 4
    assert parts.number["layer.0.attention.self.query.weight"][:, 0].tolist() == [0, 0, 1, 1]
    assert parts.number["layer.0.attention.output.dense.weight"].tolist() == [[0, 0, 1, 1]] * 3
    assert parts.number["layer.1.attention.self.query.weight"][:, 0].tolist() == [2, 2, 3, 3]
    assert (parts.number["layer.0.output.dense.weight"] == -1).all()


def test_neurons_of_bert_are_what_they_read_and_write():
    parts = parts_of(BERT, "neurons", Model())
    assert parts.count == 2
    assert parts.number["layer.0.intermediate.dense.bias"].tolist() == [0, 1]
    assert parts.number["layer.0.output.dense.weight"].tolist() == [[0, 1]] * 3
    assert (parts.number["layer.0.attention.output.dense.weight"] == -1).all()


def test_heads_of_llama_do_not_own_the_keys_that_they_share():
    llama = {
        "layers.0.self_attn.q_proj.weight": torch.zeros(4, 3),
        "layers.0.self_attn.k_proj.weight": torch.zeros(2, 3),
        "layers.0.self_attn.o_proj.weight": torch.zeros(3, 4),
        "layers.0.mlp.gate_proj.weight": torch.zeros(2, 3),
        "layers.0.mlp.down_proj.weight": torch.zeros(3, 2),
    }
    heads, neurons = parts_of(llama, "heads", Model()), parts_of(llama, "neurons", Model())
    assert heads.number["layers.0.self_attn.q_proj.weight"][:, 0].tolist() == [0, 0, 1, 1]
    assert heads.number["layers.0.self_attn.o_proj.weight"].tolist() == [[0, 0, 1, 1]] * 3
    assert (heads.number["layers.0.self_attn.k_proj.weight"] == -1).all()
    assert neurons.number["layers.0.mlp.gate_proj.weight"][:, 0].tolist() == [0, 1]
    assert neurons.number["layers.0.mlp.down_proj.weight"].tolist() == [[0, 1]] * 3


def test_layers_hold_all_that_is_in_them():
    parts = parts_of(BERT, "layers", Model())
    assert parts.count == 2
    assert (parts.number["layer.0.attention.output.dense.weight"] == 0).all()
    assert (parts.number["layer.1.attention.self.query.weight"] == 1).all()
    assert (parts.number["embeddings.weight"] == -1).all()


def test_parts_of_our_own_models():
    model = load("gallery:skills-base").model()
    weights = {name: tensor for name, tensor in model.named_parameters() if name.startswith("weights.")}
    config = model.config
    assert n_heads_of(model) == config.n_heads
    heads, neurons = parts_of(weights, "heads", model), parts_of(weights, "neurons", model)
    assert heads.count == config.n_layers * config.n_heads
    assert neurons.count == config.n_layers * config.d_mlp
    inside = sum(int((number == 5).sum()) for number in heads.number.values())
    assert inside == 4 * config.d_model * config.d_head
    inside = sum(int((number == 5).sum()) for number in neurons.number.values())
    assert inside == 2 * config.d_model + 1
    known = {name.split(".", 2)[2] for name in weights}
    assert {"attn.W_Q", "attn.W_O", "mlp.W_in"} <= known & {name for kind in SLICED.values() for name in kind}


def test_as_many_parts_as_fit_the_best_first():
    parts = parts_of(BERT, "heads", Model())
    scores = {name: torch.zeros_like(tensor) for name, tensor in BERT.items()}
    scores["layer.0.attention.self.query.weight"][2:] = 1.0
    scores["layer.1.attention.self.query.weight"][0] = 9.0
    # Heads of the first layer have 12 weights, of the second 6; the mean score decides.
    for size, wanted in ((1, [2]), (17, [2]), (18, [1, 2]), (99, [0, 1, 2, 3])):
        mask = best_parts(parts, scores, size)
        taken = torch.cat([parts.number[name][chosen] for name, chosen in mask.items()])
        assert taken.unique().tolist() == wanted
        assert all(bool(mask[name][parts.number[name] == part].all()) for name in BERT for part in wanted)


def test_what_has_no_such_parts_is_refused():
    with pytest.raises(WorkbenchError, match="None of the weights lies in neurons"):
        parts_of({"w": torch.zeros(2)}, "neurons", Model())
    with pytest.raises(WorkbenchError, match="does not say how many heads"):
        parts_of(BERT, "heads", nn.Module())
