import json
from dataclasses import replace

import pytest
import torch

from probes.attribution import direct_logit_attribution, ov_matrix, qk_matrix
from workbench.instrument.passes import run
from workbench.runtime import WorkbenchError
from workbench.tasks.modular import Modular

TASK = Modular(p=11)
ALL = ("attn", "mlp", "unembed")
VARIANTS = [
    {"normalization": "LN", "biases": ALL, "n_layers": 2},
    {"normalization": None, "biases": ALL, "n_layers": 2, "schedule": (0, 1, 0)},
    {"normalization": "LN", "biases": (), "tied": True, "d_vocab_out": 12},
    {"normalization": None, "biases": ("mlp",)},
    {"normalization": "LN", "biases": ("attn", "unembed"), "d_mlp": 0},
]


@pytest.mark.parametrize("by", ["component", "head", "neuron"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_contributions_add_up_to_the_lead(transformer, variant, by):
    model, batch = transformer(TASK, **variant), TASK.sample(12)
    logits = model.forward(batch.tokens).detach()[:, -1]
    answer, distractor = batch.targets[:, -1:], batch.distractor[:, -1:]
    whole = logits.gather(1, answer)[:, 0]
    leads = {"distractor": whole - logits.gather(1, distractor)[:, 0], "mean": whole - logits.mean(1)}
    for against, lead in leads.items():
        found = direct_logit_attribution(model, batch, by=by, against=against)
        torch.testing.assert_close(found.values.sum(1), lead, atol=1e-4, rtol=1e-4)
        assert len(found.parts) == len(set(found.parts)) == found.values.shape[1]


def test_leaving_a_bias_out_does_not_add_up(transformer):
    # Mutant: the sum above is exact because every bias is one of the parts.
    model, batch = transformer(TASK, normalization="LN", biases=ALL), TASK.sample(12)
    found = direct_logit_attribution(model, batch, by="neuron")
    lead = found.values.sum(1)
    for bias in ("L0.b_O", "L0.b_out", "ln_final.b", "b_U"):
        kept = [i for i, part in enumerate(found.parts) if part != bias]
        assert len(kept) == len(found.parts) - 1
        assert (found.values[:, kept].sum(1) - lead).abs().max() > 1e-2


def test_granularities_split_one_another(transformer):
    model, batch = transformer(TASK, biases=ALL, n_layers=2), TASK.sample(9)
    component, head, neuron = (direct_logit_attribution(model, batch, by=by) for by in ("component", "head", "neuron"))
    assert component.parts == ("embed", "pos_embed", "L0.attn_out", "L0.mlp_out", "L1.attn_out", "L1.mlp_out", "b_U")
    assert head.parts[2:6] == ("L0.z.h0", "L0.z.h1", "L0.b_O", "L0.mlp_out")
    assert neuron.parts[5:7] == ("L0.post.n0", "L0.post.n1")

    def total(found, *starts):
        chosen = [i for i, part in enumerate(found.parts) if part.startswith(starts)]
        return found.values[:, chosen].sum(1)

    torch.testing.assert_close(total(component, "L1.attn_out"), total(head, "L1.z", "L1.b_O"))
    torch.testing.assert_close(total(component, "L1.mlp_out"), total(neuron, "L1.post", "L1.b_out"))


def test_a_part_by_hand(transformer):
    model, batch = transformer(TASK), TASK.sample(3)
    found = direct_logit_attribution(model, batch, by="neuron")
    trace = run(model, batch.tokens, record=["L0.post"])
    unembed = model.unembed.W_U.detach()
    direction = unembed[:, batch.targets[1, 2]] - unembed[:, batch.distractor[1, 2]]
    expected = trace["L0.post.n4"][1, 2] * (model.weights[0].mlp.W_out[4].detach() @ direction)
    torch.testing.assert_close(found.values[1, found.parts.index("L0.post.n4")], expected)


def test_several_reads_are_averaged(transformer):
    model, batch = transformer(TASK, normalization="LN"), TASK.sample(4)
    read = batch.read.clone()
    read[:, 1] = True
    both = direct_logit_attribution(model, replace(batch, read=read))
    alone = direct_logit_attribution(model, batch)
    first = direct_logit_attribution(model, replace(batch, read=read & ~batch.read))
    torch.testing.assert_close(both.values, (alone.values + first.values) / 2)


def test_summary_and_table(transformer):
    found = direct_logit_attribution(transformer(TASK, d_mlp=64), TASK.sample(10), by="neuron")
    summary = json.loads(json.dumps(found.summary()))
    assert summary["n"] == 10
    assert summary["metric"] == "answer logit minus distractor logit"
    assert summary["total"] == pytest.approx(sum(cell["effect"] for cell in summary["cells"]), abs=1e-4)
    assert all(cell["low"] <= cell["effect"] <= cell["high"] for cell in summary["cells"])
    (table,) = found.tables()
    assert len(table.frame) == 30
    assert table.frame.effect.abs().is_monotonic_decreasing
    assert table.frame.effect.abs().iloc[0] == pytest.approx(float(found.effect.abs().max()))
    assert "the 30 largest of 69 parts" in table.caption


@pytest.mark.parametrize("head", [0, 1])
def test_qk_is_the_score_of_the_first_layer(transformer, head):
    model = transformer(TASK, biases=())
    with torch.no_grad():
        model.pos_embed.W_pos.zero_()
    tokens = torch.tensor([[3, 7, 11]])
    scores = run(model, tokens, record=["L0.attn_scores"])["L0.attn_scores"][0, head]
    matrix = qk_matrix(model, 0, head).matrix
    for dest in range(3):
        for src in range(dest + 1):
            torch.testing.assert_close(matrix[tokens[0, dest], tokens[0, src]], scores[dest, src])


def test_ov_is_what_attention_adds(transformer):
    model = transformer(TASK, biases=(), d_mlp=0)
    with torch.no_grad():
        model.pos_embed.W_pos.zero_()
    tokens = torch.tensor([[3, 7, 11]])
    trace = run(model, tokens, record=["L0.pattern"])
    pattern = trace["L0.pattern"][0, :, 2]
    added = sum(pattern[head] @ ov_matrix(model, 0, head).matrix[tokens[0]] for head in range(2))
    torch.testing.assert_close(model.embed.W_E.detach()[11] @ model.W_U.detach() + added, trace.logits[0, 2])


def test_matrices_are_tables(transformer):
    model = transformer(TASK, schedule=(0, 0))
    qk, ov = qk_matrix(model, 1, 0, labels=TASK.vocab), ov_matrix(model, 1, 0, labels=TASK.vocab)
    assert ov.summary() | {"norm": None} == {
        "circuit": "ov",
        "site": "L1.z.h0",
        "rows": 12,
        "columns": 11,
        "norm": None,
    }
    assert ov.summary()["norm"] == pytest.approx(float(ov.matrix.norm()))
    (scores,), (writes,) = qk.tables(), ov.tables()
    row = scores.frame[(scores.frame.destination == "=") & (scores.frame.source == "5")].iloc[0]
    assert row.value == pytest.approx(float(qk.matrix[11, 5]))
    assert (scores.unit, writes.unit) == ("attention score", "logits")
    row = writes.frame[(writes.frame.attended == "=") & (writes.frame.predicted == "5")].iloc[0]
    assert row.value == pytest.approx(float(ov.matrix[11, 5]))
    # Without labels, tokens go by number.
    assert qk_matrix(model, 1, 0).rows == tuple(map(str, range(12)))


def test_bad_input(transformer, foreign):
    model, batch = transformer(TASK), TASK.sample(4)
    with pytest.raises(WorkbenchError, match="no counterfactual pairs"):
        direct_logit_attribution(model, TASK.examples("test"))
    assert direct_logit_attribution(model, TASK.examples("test"), against="mean").n == 85
    with pytest.raises(WorkbenchError, match="which Foreign does not offer"):
        direct_logit_attribution(foreign(model), batch)
    for wrong in ((1, 0), (0, 2), (-1, 0)):
        with pytest.raises(WorkbenchError, match="layers go from 0 to 0, heads from 0 to 1"):
            qk_matrix(model, *wrong)
    with pytest.raises(WorkbenchError, match="2 labels for a vocabulary of 12 tokens"):
        ov_matrix(model, 0, 0, labels=["a", "b"])
