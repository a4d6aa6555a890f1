"""The parts that circuits are made of, against autograd and against the whole."""

from __future__ import annotations

import pytest
import torch

from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import generator


def model_with(normalization: str | None) -> Transformer:
    config = ModelConfig(
        n_layers=2, d_model=12, n_heads=3, d_head=4, d_mlp=8, n_ctx=4, d_vocab=7, d_vocab_out=7,
        normalization=normalization, biases=("attn", "mlp", "unembed"),
    )  # fmt: skip  # pyright: ignore[reportArgumentType]
    model = Transformer(config, generator=generator(0, "parts")).double()
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in ("w", "b", "b_Q", "b_K", "b_V", "b_O"):
            torch.nn.init.normal_(parameter, mean=1.0, generator=generator(1, name))
    return model


@pytest.mark.parametrize("normalization", ["LN", None])
@pytest.mark.parametrize("slot", ["q", "k", "v"])
def test_pulling_back_is_the_mean_of_autograds_gradients(normalization: str | None, slot: str) -> None:
    model, rng = model_with(normalization), generator(2, slot)
    x = torch.randn(5, 6, 4, 12, generator=rng, dtype=torch.float64)
    gradient = torch.randn(5, 6, 4, 3, 4, generator=rng, dtype=torch.float64)
    apart = x[..., None, :].repeat(1, 1, 1, 3, 1).requires_grad_()
    read = model.read_heads(1, slot, slice(None), apart)  # pyright: ignore[reportArgumentType]
    [wanted] = torch.autograd.grad(read, apart, gradient)
    with torch.no_grad():
        found = model.pull_heads(1, slot, x, gradient)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, wanted.mean(0), rtol=1e-10, atol=1e-12)


def test_one_input_for_all_heads_is_the_same_as_each_its_own() -> None:
    model, rng = model_with("LN"), generator(3, "shared")
    x = torch.randn(6, 4, 1, 12, generator=rng, dtype=torch.float64)
    for heads in (slice(None), slice(1, 2), slice(1, 3)):
        n_heads = len(range(3)[heads])
        together = model.read_heads(0, "k", heads, x)
        torch.testing.assert_close(together, model.read_heads(0, "k", heads, x.repeat(1, 1, n_heads, 1)))
        assert together.shape == (6, 4, n_heads, 4)


def test_heads_write_together_what_they_write_one_by_one() -> None:
    model = model_with("LN")
    z = torch.randn(6, 4, 3, 4, generator=generator(4, "z"), dtype=torch.float64)
    torch.testing.assert_close(model.sum_heads(0, z), model.write_heads(0, slice(None), z).sum(2))
    assert model.block(0).attn.b_O is not None
    torch.testing.assert_close(model.sum_heads(0, z) + model.block(0).attn.b_O, model.block(0).attn.merge(z))
