import json
from dataclasses import replace

import pytest
import torch

from probes.logit_lens import lens_logits, logit_lens, next_answer
from workbench.instrument.passes import run
from workbench.instrument.sites import select_sites
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Latent
from workbench.tasks.modular import Modular

TASK = Modular(p=11)
VARIANTS = [
    {"normalization": "LN", "biases": ("attn", "mlp", "unembed"), "n_layers": 2},
    {"normalization": None, "n_layers": 1, "schedule": (0, 0)},
    {"normalization": "LN", "d_mlp": 0, "n_layers": 1},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_lens_is_the_model(transformer, variant):
    model, batch = transformer(TASK, **variant), TASK.sample(20)
    sites = select_sites("resid_post", model)
    trace = run(model, batch.tokens, record=sites)
    lens = lens_logits(model, trace, sites)
    assert torch.equal(lens[:, -1], trace.logits)
    if variant["normalization"]:
        # Mutant: a lens that forgets the final norm is another model.
        assert not torch.allclose(trace[sites[-1]] @ model.W_U.detach(), trace.logits, atol=0.1)


def test_measures_of_the_last_site_by_hand(transformer):
    model, batch = transformer(TASK, normalization="LN"), TASK.sample(20)
    found = logit_lens(model, batch)
    probabilities = model.forward(batch.tokens).detach().softmax(-1)
    answer = batch.latents["answer"].value
    at_answer = probabilities[torch.arange(20), :, answer]
    rank = (probabilities > at_answer[..., None]).sum(-1).float()
    expected = {
        "answer_probability": at_answer,
        "answer_rank": rank,
        "answer_reciprocal_rank": 1 / (1 + rank),
        "entropy": -(probabilities * probabilities.log()).sum(-1),
        "reciprocal_rank_answer": 1 / (1 + rank),
    }
    for name, values in expected.items():
        measured = found.measures[name]
        torch.testing.assert_close(measured.mean[-1], values.mean(0))
        assert (measured.low <= measured.mean).all()
        assert (measured.mean <= measured.high).all()
        assert (measured.low < measured.high).any()
    assert found.n == 20


def test_every_latent_is_ranked(transformer):
    model, batch = transformer(TASK), TASK.sample(5)
    assert {"reciprocal_rank_a", "reciprocal_rank_b", "reciprocal_rank_answer"} <= set(
        logit_lens(model, batch).measures
    )
    # "=" cannot be predicted: it has no rank.
    equals = Latent(value=torch.full((5,), 11), position=2)
    assert "reciprocal_rank_sign" not in logit_lens(model, replace(batch, latents={"sign": equals})).measures


def test_the_embedding_names_its_own_token(transformer):
    # A tied model without MLP and positions: the closest unembedding to a long embedding is its own.
    model = transformer(TASK, tied=True, d_vocab_out=12, biases=())
    with torch.no_grad():
        model.pos_embed.W_pos.zero_()
        model.embed.W_E.copy_(torch.eye(12, 16) * 5)
    found = logit_lens(model, TASK.sample(8), sites="L0.resid_pre", position_labels=TASK.position_labels)
    ranks = {name: found.measures[f"reciprocal_rank_{name}"].mean[0] for name in ("a", "b")}
    assert ranks["a"][0] == 1.0
    assert ranks["b"][1] == 1.0
    assert torch.equal(found.top_tokens[:, 0, :, 0], TASK.sample(8).tokens)


def test_sites_and_top_tokens(transformer):
    model, batch = transformer(TASK, n_layers=2), TASK.sample(6)
    found = logit_lens(model, batch)
    assert [str(site) for site in found.sites] == [
        "L0.resid_pre",
        "L0.resid_mid",
        "L0.resid_post",
        "L1.resid_mid",
        "L1.resid_post",
    ]
    assert found.top_tokens.shape == (6, 5, 3, 5)
    assert torch.equal(found.top_tokens[:, -1, -1, 0], model.forward(batch.tokens)[:, -1].argmax(-1))
    assert (found.top_probabilities.diff(dim=-1) <= 0).all()
    assert [str(site) for site in logit_lens(model, batch, sites="L1.resid_pre").sites] == ["L1.resid_pre"]


def test_the_next_answer_by_hand():
    targets = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    read = torch.tensor([[False, True, False, True], [True, False, False, False]])
    assert next_answer(targets, read).tolist() == [[11, 11, 13, 13], [20, 20, 20, 20]]
    with pytest.raises(WorkbenchError, match="some prompt of this batch is read nowhere"):
        next_answer(targets, read & (targets > 15))


def test_tables_and_summary(transformer):
    model, batch = transformer(TASK), TASK.sample(6)
    found = logit_lens(model, batch, position_labels=TASK.position_labels)
    summary = json.loads(json.dumps(found.summary()))
    assert len(summary["cells"]) == len(found.measures) * 3 * 3
    cell = next(c for c in summary["cells"] if c["site"] == "L0.resid_mid" and c["position"] == "=")
    assert cell["measure"] == "answer_probability"
    assert cell["layer"] == 0
    assert cell["mean"] == pytest.approx(float(found.measures["answer_probability"].mean[1, 2]))
    tables = {table.name: table for table in found.tables()}
    assert set(tables) == {f"lens_{name}" for name in found.measures}
    entropy = tables["lens_entropy"]
    assert (entropy.unit, entropy.axes["value"]) == ("nats", "entropy")
    assert "n = 6" in entropy.caption
    assert all(table.csv() for table in tables.values())


def test_bad_input(transformer, foreign):
    model, batch = transformer(TASK), TASK.sample(4)
    with pytest.raises(WorkbenchError, match=r"reads the residual stream; L0.z.h0, L0.z.h1, L0.mlp_out is not it"):
        logit_lens(model, batch, sites="mlp_out,z")
    with pytest.raises(WorkbenchError, match="2 position labels for prompts of 3 positions"):
        logit_lens(model, batch, position_labels=["a", "b"])
    with pytest.raises(WorkbenchError, match="Foreign has none. Import the model"):
        logit_lens(foreign(model), batch)
