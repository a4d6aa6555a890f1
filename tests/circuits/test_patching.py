from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.patching import patch_each
from workbench.instrument.passes import run
from workbench.instrument.sites import select_sites
from workbench.instrument.trace import FromTrace
from workbench.metrics import METRICS, metric
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch
from workbench.tasks.modular import Modular

EVERY_KIND = (
    "embed,pos_embed,resid_pre,q,k,v,attn_scores,pattern,z,attn_out,resid_mid,pre,L0.pre.n2,post,L0.post.n*,mlp_out,"
    "resid_post"
)
NORM_KINDS = "ln1_scale,ln1_normalized,ln2_scale,ln2_normalized,ln_final_scale,ln_final_normalized"


def transformer(seed=0, **changes):
    config = {
        "n_layers": 2, "d_model": 12, "n_heads": 2, "d_head": 5, "d_mlp": 7, "n_ctx": 4, "d_vocab": 9,
        "d_vocab_out": 9, "normalization": "LN", "biases": ("attn", "mlp", "unembed"),
    } | changes  # fmt: skip
    return Transformer(ModelConfig(**config), generator=torch.Generator().manual_seed(seed)).eval()


def pairs(n=5, *, pos=4, vocab=9, reads="last", seed=0, pad=None):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab, (n, pos), generator=rng)
    corrupt = torch.randint(1, vocab, (n, pos), generator=rng)
    read = torch.zeros(n, pos, dtype=torch.bool)
    if reads == "last":
        read[:, -1] = True
    else:
        read[torch.arange(n), torch.arange(n) % pos] = True
        read[:, 2] = True
    if pad is not None:
        tokens[::2, -1] = corrupt[::2, -1] = pad
    targets = torch.randint(0, vocab, (n, pos), generator=rng)
    return Batch(tokens=tokens, targets=targets, read=read, corrupt=corrupt, distractor=(targets + 1) % vocab)


def by_loop(model, batch, patch_map):
    """The reference: one plain pass for each cell."""
    measure = metric(patch_map.metric)
    read = batch.read
    sites = {cell.site for cell in patch_map.cells}
    traces = [run(model, tokens, record=sites) for tokens in (batch.tokens, batch.corrupt)]
    reference = traces[0].logits[read]
    clean, corrupt = (measure(trace.logits[read], batch, reference).double().mean() for trace in traces)
    rows = torch.arange(len(batch))
    effects = []
    for direction in patch_map.directions:
        base, other = (traces[1], traces[0]) if direction == "denoise" else (traces[0], traces[1])
        start = corrupt if direction == "denoise" else clean
        sign = 1 if direction == "denoise" else -1
        for cell in patch_map.cells:
            trace = run(model, base.tokens, patches=[cell.patch(FromTrace(other), rows)])
            after = measure(trace.logits[read], batch, reference).double().mean()
            effects.append(float(sign * (after - start) / (clean - corrupt)))
    return torch.tensor(effects).reshape(len(patch_map.directions), -1)


# Small enough for the loop, and every kind of site that a cell can be.
VARIANTS = {
    "plain": ({}, {}),
    "no LN": ({"normalization": None}, {}),
    "bidirectional": ({"causal": False}, {}),
    "shared": ({"schedule": (0, 1, 0)}, {}),
    "several reads": ({}, {"reads": "several"}),
    "bidirectional, several reads": ({"causal": False}, {"reads": "several"}),
    "padding": ({"pad_token": 0}, {"pad": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_batched_map_equals_a_loop_of_single_patches(name):
    options, drawn = VARIANTS[name]
    model, batch = transformer(**options), pairs(**drawn)
    found = patch_each(model, batch, sites=EVERY_KIND)
    assert torch.allclose(found.effect.float(), by_loop(model, batch, found), atol=1e-4)


def test_norms_can_be_patched_too():
    model, batch = transformer(), pairs(reads="several")
    found = patch_each(model, batch, sites=NORM_KINDS)
    assert torch.allclose(found.effect.float(), by_loop(model, batch, found), atol=1e-4)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("reads", ["last", "several"])
def test_every_metric_sees_the_patched_logits(name, reads):
    model, batch = transformer(), pairs(n=13, reads=reads)
    found = patch_each(model, batch, sites="resid_pre,z,v", metric=name)
    # Where the top token is counted, a logit that is off by a rounding error is a whole example.
    tolerance = 0.2 if name in ("accuracy", "disagreement") else 1e-4
    assert torch.allclose(found.effect.float(), by_loop(model, batch, found), atol=tolerance)


def test_the_two_logits_that_a_metric_picks_are_those_of_the_whole_vocabulary():
    model, batch = transformer(tied=True), pairs(reads="several")
    # A metric of the user's own may look at every logit, so it is shown every logit.
    own = replace(METRICS["logit_difference"], name="my own")
    picked, full = (
        patch_each(model, batch, sites="resid_pre,mlp_out", metric=each) for each in ("logit_difference", own)
    )
    assert torch.allclose(picked.effect, full.effect, atol=1e-5)
    assert torch.allclose(picked.low, full.low, atol=1e-4)


class Plain:
    """A model that can only be run whole."""

    def __init__(self, model):
        self.model, self.config, self.sites, self.provenance = model, model.config, model.sites, model.provenance

    def forward(self, tokens, edits=None):
        return self.model.forward(tokens, edits)


def test_a_model_that_cannot_resume_gives_the_same_map(monkeypatch):
    model, batch = transformer(), pairs(reads="several")
    whole = patch_each(Plain(model), batch, sites="resid_pre,z,pattern,mlp_out")
    resumed = patch_each(model, batch, sites="resid_pre,z,pattern,mlp_out")
    assert torch.allclose(whole.effect, resumed.effect, atol=1e-5)
    # Neither depends on how much shares a pass.
    for size in ("circuits.patching.ROWS", "circuits.patching.LOGITS", "circuits.cone.TOKENS", "circuits.cone.HIDDEN"):
        monkeypatch.setattr(size, 15)
    for narrow in (Plain(model), model):
        again = patch_each(narrow, batch, sites="resid_pre,z,pattern,mlp_out")
        assert torch.allclose(again.effect, resumed.effect, atol=1e-5)


def test_a_mutant_that_forgets_the_past_is_caught(monkeypatch):
    model, batch = transformer(), pairs()
    advance = Transformer.advance

    def forgetful(self, step, x, tokens, edits, past=None):
        if past is not None:
            past = replace(past, v=torch.zeros_like(past.v))
        return advance(self, step, x, tokens, edits, past)

    monkeypatch.setattr(Transformer, "advance", forgetful)
    found = patch_each(model, batch, sites="v")
    assert not torch.allclose(found.effect.float(), by_loop(model, batch, found), atol=1e-2)


@given(st.integers(0, 10_000), st.sampled_from(["resid_pre", "z", "mlp_out"]))
@settings(max_examples=15)
def test_patching_everything_that_is_read_carries_all_of_the_difference(seed, site):
    model, batch = transformer(seed), pairs(seed=seed)
    found = patch_each(model, batch, sites=f"L1.resid_post,{site}")
    last = [i for i, cell in enumerate(found.cells) if str(cell.site) == "L1.resid_post" and cell.position == 3]
    assert found.effect[:, last].flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    # And what comes after the read, or is the same in both runs, carries nothing.
    earlier = [i for i, cell in enumerate(found.cells) if str(cell.site) == "L1.resid_post" and cell.position != 3]
    assert found.effect[:, earlier].abs().max() < 1e-4


def planted():
    """Copies operand a to the answer through head 1, and reads b nowhere: the circuit is L0.z.h1 at `=`."""
    task = Modular(p=5, train_fraction=0.5)
    config = ModelConfig(
        n_layers=1, d_model=11, n_heads=2, d_head=5, d_mlp=3, n_ctx=3, d_vocab=6, d_vocab_out=5, biases=()
    )
    model = Transformer(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # Dimensions: 0-4 the token, 5-9 the answer, 10 marks position 0.
        model.embed.W_E[:5, :5] = torch.eye(5)
        model.pos_embed.W_pos[0, 10] = 1.0
        model.pos_embed.W_pos[2, 9] = 1.0
        attention = model.block(0).attn
        attention.W_Q[1, 9, 0] = 50.0
        attention.W_K[1, 10, 0] = 50.0
        attention.W_V[1, :5] = torch.eye(5)
        attention.W_O[1, :, 5:10] = 10 * torch.eye(5)
        model.unembed.W_U[5:10] = torch.eye(5)
    return task, model


def test_finds_the_planted_head_and_nothing_else():
    task, model = planted()
    batch = task.contrast(task.examples("all"), "a", seed=1)
    answer = batch.latents["a"].value
    targets, distractor = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens)
    targets[:, 2], distractor[:, 2] = answer, batch.corrupt[:, 0]
    batch = replace(batch, targets=targets, distractor=distractor)
    found = patch_each(model, batch, sites="z,mlp_out,L0.post.n*,pattern,v", position_labels=task.position_labels)
    carrying = {
        (str(cell.site), cell.position) for index, cell in enumerate(found.cells) if found.effect[:, index].min() > 0.5
    }
    assert carrying == {("L0.z.h1", 2), ("L0.v.h1", 0)}
    others = [i for i, cell in enumerate(found.cells) if (str(cell.site), cell.position) not in carrying]
    assert found.effect[:, others].abs().max() < 1e-6
    assert not found.significant[:, others].any()
    assert found.significant[:, [i for i in range(len(found.cells)) if i not in others]].all()
    assert not found.disagree.any()


def test_says_where_denoising_and_noising_disagree():
    """Two heads that each carry the answer alone (an OR gate): either suffices, neither is needed."""
    task, model = planted()
    with torch.no_grad():
        attention = model.block(0).attn
        for weight in (attention.W_Q, attention.W_K, attention.W_V, attention.W_O):
            weight[0] = weight[1]
    batch = task.contrast(task.examples("all"), "a", seed=1)
    targets, distractor = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens)
    targets[:, 2], distractor[:, 2] = batch.latents["a"].value, batch.corrupt[:, 0]
    batch = replace(batch, targets=targets, distractor=distractor)
    # One vote of two makes a tie: almost all of the log probability (it was hopeless), almost none of it lost.
    found = patch_each(model, batch, sites="z", metric="log_probability")
    at_answer = [i for i, cell in enumerate(found.cells) if cell.position == 2]
    denoised, noised = found.effect[:, at_answer]
    assert (denoised > 0.9).all()
    assert (noised < 0.1).all()
    assert found.disagree[at_answer].all()
    assert found.summary()["disagreements"] == 2


def test_result_carries_n_metric_direction_and_flat_cells():
    model = transformer()
    batch = replace(pairs(), dropped=3)
    found = patch_each(model, batch, sites="z,L0.pattern.h0", direction="noise", metric="probability_difference")
    summary = found.summary()
    assert summary["n"] == 5
    assert summary["dropped"] == 3
    assert summary["metric"] == "probability_difference"
    assert summary["direction"] == ["noise"]
    assert summary["clean"] != summary["corrupt"]
    assert set(summary["cells"][0]) == {
        "site", "layer", "head", "position", "dest", "src", "direction", "effect", "low", "high", "disagree",
    }  # fmt: skip
    by_head = [cell for cell in summary["cells"] if cell["site"] == "L1.z.h1"]
    assert [cell["position"] for cell in by_head] == [0, 1, 2, 3]
    entries = [(cell["dest"], cell["src"]) for cell in summary["cells"] if cell["site"] == "L0.pattern.h0"]
    assert entries == [(dest, src) for dest in range(4) for src in range(dest + 1)]
    assert (found.low <= found.effect + 1e-9).all()
    assert (found.effect <= found.high + 1e-9).all()
    assert [table.name for table in found.tables()] == ["patch_heads", "patch_pattern"]


def test_seed_moves_the_interval_only():
    model, batch = transformer(), pairs(n=12)
    first, second = (patch_each(model, batch, sites="resid_mid", seed=seed) for seed in (0, 1))
    assert torch.equal(first.effect, second.effect)
    assert not torch.equal(first.low, second.low)


@pytest.mark.parametrize(
    ("batch", "sites", "message"),
    [
        (replace(pairs(), corrupt=None, distractor=None), "z", "no counterfactual pairs"),
        (replace(pairs(), corrupt=pairs().tokens), "z", "No headroom: mean logit_difference is"),
        (pairs(), "zz", "Unknown site 'zz'"),
        (pairs(), "L7.z", "Site L7.z is not in this model"),
    ],
)
def test_bad_input_is_one_clear_error(batch, sites, message):
    with pytest.raises(WorkbenchError, match=message):
        patch_each(transformer(), batch, sites=sites)


def test_attention_only_models_have_no_mlp_to_patch():
    model = transformer(d_mlp=0, biases=("attn",))
    assert patch_each(model, pairs(), sites="resid_pre,attn_out,z").n == 5
    with pytest.raises(WorkbenchError, match="'mlp_out' is not in this model"):
        select_sites("mlp_out", model)
