"""What a place holds, against the algebra of a model without normalisation and against the parts of its logits."""

import pytest
import torch

from probes.attention import attention_patterns
from probes.attribution import direct_logit_attribution
from probes.places import NEURONS, read_place
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch
from workbench.tasks.modular import Modular

TASK = Modular(p=7, train_fraction=0.5)
SHAPE = {
    "n_layers": 2,
    "d_model": 12,
    "n_heads": 2,
    "d_head": 6,
    "d_mlp": 20,
    "n_ctx": 3,
    "d_vocab": 8,
    "d_vocab_out": 7,
}


def transformer(**changes: object) -> Transformer:
    return Transformer(ModelConfig(**{**SHAPE, **changes}), generator=torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return transformer()


@pytest.fixture(scope="module")
def pair() -> Batch:
    return TASK.sample(1, split="all", seed=2)


def test_the_stream_is_read_by_the_lens(model: Transformer, pair: Batch) -> None:
    reading = read_place(model, pair, Site.parse("L1.resid_post"), 2, names=TASK.vocab)
    probabilities = run(model, pair.tokens).logits[0, 2].softmax(-1)
    top, tokens = probabilities.topk(5)
    assert [token for token, _ in reading.tokens] == [TASK.vocab[token] for token in tokens]
    assert [value for _, value in reading.tokens] == pytest.approx(top.tolist())
    assert reading.unit == "probability"
    assert reading.direct_effect is None


@pytest.mark.parametrize("normalization", [None, "LN"])
def test_what_is_written_adds_up_to_the_logits(normalization: str | None, pair: Batch) -> None:
    model = transformer(normalization=normalization, biases=())
    whole = direct_logit_attribution(model, pair, by="head")
    found = [read_place(model, pair, Site.parse(part), 2) for part in whole.parts if part.startswith("L")]
    assert [reading.direct_effect for reading in found] == pytest.approx(
        [value for part, value in zip(whole.parts, whole.effect.tolist(), strict=True) if part.startswith("L")]
    )
    # The same difference, read off the tokens of a head.
    answer, other = int(pair.targets[0, 2]), int(pair.distractor[0, 2])
    head = read_place(model, pair, Site.parse("L0.z.h1"), 2)
    said = dict(head.tokens)
    if str(answer) in said and str(other) in said:
        assert said[str(answer)] - said[str(other)] == pytest.approx(head.direct_effect, abs=1e-5)
    assert head.unit == "logits"


def test_heads_neurons_and_their_sums_write_the_same(model: Transformer, pair: Batch) -> None:
    def written(site: str) -> dict[str, float]:
        return dict(read_place(model, pair, Site.parse(site), 2).tokens)

    vector = run(model, pair.tokens, record=["L0.attn_out"])["L0.attn_out"][0, 2]
    top = (vector @ model.W_U).detach().topk(5)
    assert list(written("L0.attn_out").values()) == pytest.approx(top.values.tolist(), abs=1e-5)
    assert list(written("L0.z").values()) == pytest.approx(top.values.tolist(), abs=1e-5)
    # Only the MLP's bias, zero at first, parts what its neurons write from its output.
    assert list(written("L0.post").values()) == pytest.approx(list(written("L0.mlp_out").values()), abs=1e-5)


def test_neurons_are_listed_by_what_they_do(model: Transformer, pair: Batch) -> None:
    reading = read_place(model, pair, Site.parse("L1.post"), 2)
    assert reading.neurons is not None
    assert len(reading.neurons) == NEURONS
    sizes = reading.neurons["direct_effect"].abs()
    assert sizes.is_monotonic_decreasing
    first = int(reading.neurons["neuron"][0])
    one = read_place(model, pair, Site.parse(f"L1.post.n{first}"), 2)
    assert one.neurons is None
    assert one.direct_effect == pytest.approx(reading.neurons["direct_effect"][0])
    # Away from the answer's place there is no direct effect: the largest activations come first.
    away = read_place(model, pair, Site.parse("L1.post"), 0)
    assert away.neurons is not None
    assert list(away.neurons.columns) == ["neuron", "activation"]
    assert away.neurons["activation"].is_monotonic_decreasing


def test_queries_have_a_norm_and_nothing_else(model: Transformer, pair: Batch) -> None:
    reading = read_place(model, pair, Site.parse("L0.q.h0"), 1)
    assert reading.norm == pytest.approx(float(run(model, pair.tokens, record=["L0.q"])["L0.q.h0"][0, 1].norm()))
    assert (reading.tokens, reading.direct_effect, reading.neurons, reading.tables()) == ((), None, None, [])


def test_summary_and_tables(model: Transformer, pair: Batch) -> None:
    reading = read_place(model, pair, Site.parse("L1.post"), 2)
    assert [table.name for table in reading.tables()] == ["place_tokens", "place_neurons"]
    summary = reading.summary()
    assert (summary["site"], summary["position"], summary["unit"]) == ("L1.post", 2, "logits")
    assert len(summary["neurons"]) == NEURONS
    assert summary["tokens"][0] == {"token": reading.tokens[0][0], "value": reading.tokens[0][1]}


def test_places_that_are_none(model: Transformer, pair: Batch) -> None:
    with pytest.raises(WorkbenchError, match="positions go from 0 to 2"):
        read_place(model, pair, Site.parse("L0.z.h0"), 3)
    with pytest.raises(WorkbenchError, match="patterns have none"):
        read_place(model, pair, Site.parse("L0.pattern.h0"), 1)
    with pytest.raises(WorkbenchError, match="this batch has 4"):
        read_place(model, TASK.sample(4, split="all"), Site.parse("L0.z.h0"), 2)


def test_attention_is_the_mean_pattern(model: Transformer) -> None:
    batch = TASK.sample(6, split="all")
    found = attention_patterns(model, batch, position_labels=TASK.position_labels)
    trace = run(model, batch.tokens, record=["L0.pattern", "L1.pattern"])
    assert [str(head) for head in found.heads] == [f"L{layer}.pattern.h{head}" for layer in (0, 1) for head in (0, 1)]
    torch.testing.assert_close(found.pattern[3], trace["L1.pattern.h1"].mean(0))
    torch.testing.assert_close(found.pattern.sum(-1), torch.ones(4, 3))
    (table,) = found.tables()
    row = table.frame.query("head == 'L1.h1' and dest == '=' and src == 'b'")
    assert row["attention"].item() == pytest.approx(float(trace["L1.pattern.h1"][:, 2, 1].mean()))
    assert found.summary()["n"] == 6
    assert attention_patterns(model, batch).positions == ("0", "1", "2")


def test_a_model_that_hides_its_patterns() -> None:
    model = transformer()
    model.sites = tuple(site for site in model.sites if site.kind.name != "pattern")
    with pytest.raises(WorkbenchError, match="does not show its attention patterns"):
        attention_patterns(model, TASK.sample(2, split="all"))
