"""Masks that are drawn before the pass: where they act, how much they drop, and that they mean nothing on average."""

from dataclasses import replace

import pytest
import torch

from workbench.models.config import BIASES, ModelConfig
from workbench.models.transformer import Transformer
from workbench.training.dropout import as_edits, draw_masks

SMALL = ModelConfig(
    n_layers=2, d_model=16, n_heads=2, d_head=4, d_mlp=24, n_ctx=4, d_vocab=7, d_vocab_out=7, normalization="LN",
    activation="gelu_new", tied=True, biases=BIASES,
)  # fmt: skip
TOKENS = torch.randint(0, 7, (5, 4), generator=torch.Generator().manual_seed(0))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def build(**changes):
    return Transformer(replace(SMALL, **changes), generator=rng())


def test_it_drops_where_gpt2_does():
    names = ["L0.resid_pre", "L0.pattern", "L0.attn_out", "L0.mlp_out", "L1.pattern", "L1.attn_out", "L1.mlp_out"]
    masks = draw_masks(build(), TOKENS, 0.5, rng())
    assert [str(site) for site in masks] == names
    # Each step of a shared block drops for itself; without an MLP there is no second branch.
    looped = draw_masks(build(n_layers=1, schedule=(0, 0), d_mlp=0), TOKENS, 0.5, rng())
    assert [str(site) for site in looped] == [name for name in names if "mlp" not in name]


def test_a_share_is_dropped_and_the_rest_makes_up_for_it():
    tokens = TOKENS.repeat(400, 1)
    for site, mask in draw_masks(build(), tokens, 0.2, rng()).items():
        assert set(mask.unique().tolist()) == {0.0, 1.25}, site
        assert float((mask == 0).float().mean()) == pytest.approx(0.2, abs=0.01), site


def test_masks_come_from_the_generator_alone():
    state = torch.get_rng_state()
    one, same, other = (draw_masks(build(), TOKENS, 0.5, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[site], same[site]) and not torch.equal(one[site], other[site]) for site in one)


@torch.no_grad()
def test_each_mask_is_felt_by_the_example_it_is_for():
    model = build()
    plain, masks = model(TOKENS), draw_masks(build(), TOKENS, 0.1, rng())
    for site, mask in masks.items():
        mask[1:] = 1
        moved = (model(TOKENS, as_edits({site: mask})) - plain).abs().amax((1, 2))
        assert moved[0] > 1e-4, site
        assert not moved[1:].any(), site
    assert torch.equal(model(TOKENS, as_edits({site: torch.ones_like(mask) for site, mask in masks.items()})), plain)


@torch.no_grad()
@pytest.mark.parametrize("dropped", ["pattern", "attn_out", "mlp_out"])
def test_the_mean_over_many_masks_is_no_dropout(dropped):
    # After these sites the last layer without a norm is linear, but for its MLP, so that the mean comes through.
    model = build(n_layers=1, normalization=None, d_mlp=24 if dropped == "mlp_out" else 0)
    plain, generator = model(TOKENS), rng()
    away = []
    for _ in range(400):
        masks = draw_masks(model, TOKENS, 0.3, generator)
        edits = as_edits({site: mask for site, mask in masks.items() if site.kind.name == dropped})
        away.append(model(TOKENS, edits) - plain)
    draws = torch.stack(away)
    # The square of a mean of n is one n-th of the draws' own.
    assert draws.mean(0).square().mean() < 2 / 400 * draws.square().mean()
