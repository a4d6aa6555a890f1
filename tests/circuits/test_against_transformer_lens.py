"""TransformerLens' own patching, on the exported model, as the oracle of the batched map."""

import pytest
import torch

from circuits.patching import patch_each
from workbench.instrument.adapters import BridgeModel
from workbench.models.bridges import to_bridge
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.tasks.modular import Modular

TASK = Modular(p=11, train_fraction=0.5)
SITES = {
    "resid_pre": "resid_pre",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "z": "attn_head_out_by_pos",
    "q": "attn_head_q_by_pos",
    "k": "attn_head_k_by_pos",
    "v": "attn_head_v_by_pos",
}


@pytest.fixture(scope="module", params=[None, "LN"])
def model(request):
    config = ModelConfig(
        n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=24, n_ctx=3, d_vocab=12, d_vocab_out=11,
        normalization=request.param, biases=("attn", "mlp"),
    )  # fmt: skip
    return Transformer(config, generator=torch.Generator().manual_seed(0)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SITES)
def test_batched_map_equals_transformer_lens_patching(model, kind):
    from transformer_lens import patching

    batch = TASK.sample(16, split="all", seed=0)
    found = patch_each(model, batch, sites=kind, direction="denoise")
    bridge, _ = to_bridge(model)
    answer, distractor = batch.targets[:, 2], batch.distractor[:, 2]
    rows = torch.arange(16)

    def logit_difference(logits):
        return (logits[rows, 2, answer] - logits[rows, 2, distractor]).mean()

    _, cache = bridge.run_with_cache(batch.tokens)
    theirs = getattr(patching, f"get_act_patch_{SITES[kind]}")(bridge, batch.corrupt, cache, logit_difference)
    # Theirs is [layer, pos], for heads [layer, pos, head]; ours goes by site, then position.
    theirs = theirs.detach() if theirs.ndim == 2 else theirs.detach().transpose(1, 2)
    scale = bridge(batch.tokens).detach().abs().max()
    assert float((found.patched[0] - theirs.flatten()).abs().max() / scale) < 1e-5


def test_the_map_of_the_bridge_is_the_map_of_the_model(model):
    batch = TASK.sample(8, split="all", seed=1)
    bridge, _ = to_bridge(model)
    ours = patch_each(model, batch, sites="resid_pre,z,pattern,mlp_out,L0.post.n3")
    theirs = patch_each(BridgeModel(bridge), batch, sites="resid_pre,z,pattern,mlp_out,L0.post.n3")
    assert torch.allclose(ours.effect, theirs.effect, atol=1e-4)
