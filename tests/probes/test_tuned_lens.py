import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from probes.logit_lens import lens_logits
from probes.tuned_lens import tuned_lens
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tasks.modular import Modular

TASK = Modular(p=7)
D_MODEL = 8
EARLY, LATE = Site.parse("L0.resid_pre"), Site.parse("L0.resid_post")


class Rotated:
    """A model that knows its answer from the start, in a basis of its own until its one layer turns it back."""

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace(n_steps=1, n_heads=0, d_mlp=0, n_ctx=3, causal=True, d_vocab=8)
        self.sites, self.provenance = (EARLY, LATE), Provenance(code_version="test", parents=("rotated",))
        self.rotation = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=rng))[0]
        self.W_U = 3 * torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=rng))[0][:, :7]
        self.noise = torch.randn(7, 7, D_MODEL, generator=rng)

    def forward(self, tokens, edits=None):
        edits = edits or {}
        a, b = tokens[:, 0], tokens[:, 1]
        known = 2 * self.W_U.T[(a + b) % 7] / 3 + 0.3 * self.noise[a, b]
        stream = (known @ self.rotation.T)[:, None].expand(-1, 3, -1)
        stream = edits.get(EARLY, torch.clone)(stream) @ self.rotation
        return self.finish(edits.get(LATE, torch.clone)(stream), {})

    def finish(self, x, edits):
        return x @ self.W_U


def rows(found, lens):
    return found.frame[found.frame["lens"] == lens].set_index("site")


def test_a_rotation_is_undone():
    found = tuned_lens(Rotated(), TASK.examples("all"), sites="resid_pre,resid_post")
    logit, tuned = rows(found, "logit"), rows(found, "tuned")
    assert logit.loc["L0.resid_pre", "kl"] > 1
    assert tuned.loc["L0.resid_pre", "kl_high"] < 0.1
    assert logit.loc["L0.resid_pre", "reciprocal_rank"] < 0.7
    assert tuned.loc["L0.resid_pre", "reciprocal_rank_low"] > 0.95
    assert (found.n_train, found.n_test) == (37, 12)


def test_translate_is_the_affine_map_of_its_site():
    model, batch = Rotated(), TASK.examples("all")
    found = tuned_lens(model, batch, sites="resid_pre,resid_post")
    trace = run(model, batch.tokens, record=[EARLY])
    logits = model.finish(found.translate(EARLY, trace[EARLY]), {})
    assert (logits[:, 2].argmax(-1) == trace.logits[:, 2].argmax(-1)).float().mean() > 0.95
    with pytest.raises(WorkbenchError, match=r"No translator at L0.resid_mid. Fitted: L0.resid_pre, L0.resid_post"):
        found.translate(Site.parse("L0.resid_mid"), trace[EARLY])


@pytest.mark.parametrize("normalization", ["LN", None])
def test_the_last_site_has_nothing_to_learn_and_no_site_loses(transformer, normalization):
    model, batch = transformer(TASK, normalization=normalization, n_layers=2), TASK.examples("all")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tuned_lens(model, batch, sites="resid_pre,resid_mid,resid_post", steps=100)
    assert found.sites[-1] == Site.parse("L1.resid_post")
    torch.testing.assert_close(found.weight[-1], torch.eye(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.bias[-1], torch.zeros(16), atol=1e-3, rtol=0)
    logit, tuned = rows(found, "logit"), rows(found, "tuned")
    assert (tuned["train_kl"] <= logit["train_kl"]).all()
    # At "=" the first stream is one vector for all prompts: there a constant is the best that can be learnt.
    assert (tuned["train_kl"][:-1] < 0.75 * logit["train_kl"][:-1]).all()
    assert float(tuned["kl"].iloc[-1]) < 1e-5
    # The model is as it was, and holds no gradients.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_logit_lens_by_hand(transformer):
    model, batch = transformer(TASK), TASK.examples("all")
    # Read at two places, so that means over places come before means over prompts.
    read = batch.read.clone()
    read[::2, 1] = True
    batch = replace(batch, read=read)
    found = tuned_lens(model, batch, sites="resid_pre", steps=1)
    trace = run(model, batch.tokens, record=[EARLY])
    lens = lens_logits(model, trace, [EARLY])[:, 0].log_softmax(-1)
    final = trace.logits.log_softmax(-1)
    kl = torch.nn.functional.kl_div(lens, final, log_target=True, reduction="none").sum(-1)
    own = lens.gather(-1, batch.targets[..., None])
    rank = 1 / ((lens > own).sum(-1) + 1)
    (row,) = rows(found, "logit").to_dict("records")
    # The mean over all prompts is that of both parts together.
    whole = [(values * read).sum(1) / read.sum(1) for values in (kl, rank)]
    n = found.n_train + found.n_test
    assert (row["train_kl"] * found.n_train + row["kl"] * found.n_test) / n == pytest.approx(
        float(whole[0].mean()), rel=1e-4
    )
    assert row["kl_low"] < row["kl"] < row["kl_high"]
    held_out = whole[1][torch.randperm(n, generator=generator(0, "tuned lens"))[: found.n_test]]
    assert row["reciprocal_rank"] == pytest.approx(float(held_out.mean()), rel=1e-5)


def test_steps_and_seed():
    batch = TASK.examples("all")
    few, many, other = (
        rows(tuned_lens(Rotated(), batch, sites="resid_pre", steps=steps, seed=seed), "tuned")
        for steps, seed in ((5, 0), (50, 0), (50, 1))
    )
    assert float(many["train_kl"].iloc[0]) < float(few["train_kl"].iloc[0])
    assert float(many["train_kl"].iloc[0]) != float(other["train_kl"].iloc[0])


def test_tables_and_summary():
    found = tuned_lens(Rotated(), TASK.examples("all"), sites="resid_pre", steps=2)
    kl, rank = found.tables()
    assert (kl.axes["series"], kl.unit) == ("lens", "nats")
    assert rank.axes["low"] == "reciprocal_rank_low"
    assert "on 12 prompts held out from the 37" in kl.caption
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert [cell["lens"] for cell in summary["cells"]] == ["logit", "tuned"]
    assert found.provenance.parents == ("rotated",)


def test_errors(transformer, foreign):
    model, batch = transformer(TASK), TASK.examples("all")
    with pytest.raises(WorkbenchError, match="L0.attn_out is not it. Use resid_pre, resid_mid, resid_post"):
        tuned_lens(model, batch, sites="attn_out")
    with pytest.raises(WorkbenchError, match="Foreign has none"):
        tuned_lens(foreign(model), batch, sites="resid_pre")
    with pytest.raises(WorkbenchError, match="got 3, of which 0 are read nowhere"):
        tuned_lens(model, batch.select(slice(0, 3)), sites="resid_pre")
    with pytest.raises(WorkbenchError, match="got 49, of which 49 are read nowhere"):
        tuned_lens(model, replace(batch, read=torch.zeros_like(batch.read)), sites="resid_pre")
    with pytest.raises(WorkbenchError, match="one step or more, got 0"):
        tuned_lens(model, batch, sites="resid_pre", steps=0)
