import pytest
import torch

from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.instrument.trace import FromTrace, Mean, Patch, Value, Zero
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 6, 1]])
OTHER = torch.tensor([[6, 5, 4], [3, 2, 1], [2, 2, 2]])


def transformer(**changes):
    config = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 3, "d_mlp": 5, "n_ctx": 4, "d_vocab": 7} | changes
    return Transformer(ModelConfig(d_vocab_out=7, **config), generator=torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module")
def model():
    return transformer()


def site(text):
    return Site.parse(text)


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_records_every_site_in_its_shape(model):
    trace = run(model, TOKENS, record=model.sites)
    sizes = {
        "batch": 3, "pos": 3, "dest": 3, "src": 3, "head": 2, "d_head": 3, "d_model": 8, "d_mlp": 5, "one": 1,
    }  # fmt: skip
    for recorded, tensor in trace.activations.items():
        assert tensor.shape == tuple(sizes[dim] for dim in recorded.kind.dims)
    assert torch.equal(trace.logits, model(TOKENS))
    assert torch.equal(trace["L0.z.h1"], trace["L0.z"][:, :, 1])
    assert torch.equal(trace["L1.post.n4"], trace["L1.post"][:, :, 4])
    assert torch.equal(trace["L0.pattern.h0"], trace["L0.pattern"][:, 0])
    assert torch.allclose(trace["L0.pattern"].sum(-1), torch.ones(3, 2, 3))
    assert not trace.logits.requires_grad


def test_unrecorded_site_is_named(model):
    with pytest.raises(WorkbenchError, match="did not record L0.z; it holds L0.q. Name it in `record=`"):
        run(model, TOKENS, record=["L0.q"])["L0.z"]


def test_patching_a_state_with_itself_changes_nothing(model):
    clean = run(model, TOKENS, record=model.sites)
    for each in model.sites:
        again = run(model, TOKENS, patches=[Patch(site=each, source=FromTrace(clean))])
        assert relative(again.logits, clean.logits) < 1e-5, each


def test_last_residual_carries_the_other_runs_logits(model):
    other = run(model, OTHER, record=["L1.resid_post"])
    patch = Patch(site=site("L1.resid_post"), source=FromTrace(other), positions=[2])
    patched, clean = run(model, TOKENS, patches=[patch]), run(model, TOKENS)
    assert relative(patched.logits[:, 2], other.logits[:, 2]) < 1e-5
    assert torch.equal(patched.logits[:, :2], clean.logits[:, :2])


def test_rows_and_source_rows(model):
    other = run(model, OTHER, record=["L0.resid_pre"])
    patch = Patch(site=site("L0.resid_pre"), source=FromTrace(other, torch.tensor([2, 0])), rows=torch.tensor([0, 1]))
    trace = run(model, TOKENS, patches=[patch])
    assert relative(trace.logits[[0, 1]], other.logits[[2, 0]]) < 1e-5
    assert torch.equal(trace.logits[2], run(model, TOKENS).logits[2])


def patched_value(model, patch, record):
    return run(model, TOKENS, patches=[patch], record=[record])[record]


def test_sources_by_hand(model):
    other = run(model, OTHER, record=["L0.z", "L0.pattern"])
    whole = other["L0.z"]
    cases = {
        "zero": (Zero(), torch.zeros(3, 3)),
        "value": (Value(torch.arange(3.0)), torch.arange(3.0).expand(3, 3)),
        "mean over batch": (Mean(other, over="batch"), whole[:, 1, 1].mean(0).expand(3, 3)),
        "mean over batch and positions": (Mean(other, over="batch_pos"), whole[:, :, 1].mean((0, 1)).expand(3, 3)),
        "trace": (FromTrace(other), whole[:, 1, 1]),
    }
    clean = run(model, TOKENS, record=["L0.z"])["L0.z"]
    for name, (source, wanted) in cases.items():
        found = patched_value(model, Patch(site=site("L0.z.h1"), source=source, positions=[1]), "L0.z")
        assert torch.allclose(found[:, 1, 1], wanted), name
        found[:, 1, 1] = clean[:, 1, 1]
        assert torch.equal(found, clean), name


def test_one_entry_of_a_pattern(model):
    patch = Patch(site=site("L0.pattern.h1"), source=Zero(), dest=2, src=0)
    found = patched_value(model, patch, "L0.pattern")
    clean = run(model, TOKENS, record=["L0.pattern"])["L0.pattern"]
    assert (found[:, 1, 2, 0] == 0).all()
    found[:, 1, 2, 0] = clean[:, 1, 2, 0]
    assert torch.equal(found, clean)


def test_one_neuron(model):
    patch = Patch(site=site("L1.post.n3"), source=Value(torch.tensor(7.0)))
    assert (patched_value(model, patch, "L1.post")[:, :, 3] == 7).all()


def test_patches_at_one_site_apply_in_order(model):
    patches = [
        Patch(site=site("L0.mlp_out"), source=Value(torch.tensor(1.0))),
        Patch(site=site("L0.mlp_out"), source=Zero(), positions=[0]),
    ]
    found = run(model, TOKENS, patches=patches, record=["L0.mlp_out"])["L0.mlp_out"]
    assert (found[:, 0] == 0).all()
    assert (found[:, 1:] == 1).all()


def test_passes_of_a_shared_block_are_patched_apart():
    model = transformer(n_layers=1, schedule=(0, 0))
    traces = [
        run(
            model,
            TOKENS,
            patches=[Patch(site=site(f"L{step}.mlp_out"), source=Zero())],
            record=["L0.mlp_out", "L1.mlp_out"],
        )
        for step in (0, 1)
    ]
    assert not torch.allclose(traces[0].logits, traces[1].logits)
    assert (traces[1]["L1.mlp_out"] == 0).all()
    assert not (traces[1]["L0.mlp_out"] == 0).all()


def test_nothing_is_left_behind(model):
    before = model(TOKENS)
    run(model, TOKENS, patches=[Patch(site=site("L0.resid_pre"), source=Zero())], record=model.sites)
    with pytest.raises(WorkbenchError):
        run(model, TOKENS, patches=[Patch(site=site("L0.resid_pre"), source=Zero(), positions=[9])])
    assert torch.equal(model(TOKENS), before)


def test_gradients_are_those_of_finite_differences(model):
    def answer(logits):
        return logits[:, -1, 3].sum()

    double = transformer().double()
    trace = run(double, TOKENS, record=["L0.resid_mid", "L1.z"], gradient_of=answer)
    for name, index in (("L0.resid_mid", (1, 2, 4)), ("L1.z", (0, 2, 1, 2))):
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = trace[name].clone()
            moved[index] += sign * step
            ends.append(answer(run(double, TOKENS, patches=[Patch(site=site(name), source=Value(moved))]).logits))
        assert float(trace.gradient(name)[index]) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-5)
    assert trace.gradient("L1.z.h1").shape == (3, 3, 3)


def test_gradient_where_the_scalar_does_not_reach_is_zero(model):
    trace = run(model, TOKENS, record=["L1.resid_post"], gradient_of=lambda logits: logits[:, 0].sum())
    assert (trace.gradient("L1.resid_post")[:, 1:] == 0).all()
    assert (trace.gradient("L1.resid_post")[:, 0] != 0).any()


class Deaf:
    """A model that loses what it is asked to do."""

    def __init__(self, model):
        self.model, self.config, self.sites, self.provenance = model, model.config, model.sites, model.provenance

    def forward(self, tokens, edits=None):
        return self.model.forward(tokens)


def test_a_patch_that_does_not_fire_is_an_error(model):
    with pytest.raises(WorkbenchError, match="1 of 1 patches did not fire: L0.z"):
        run(Deaf(model), TOKENS, patches=[Patch(site=site("L0.z"), source=Zero())])
    with pytest.raises(WorkbenchError, match="never reached L0.z: nothing was recorded"):
        run(Deaf(model), TOKENS, record=["L0.z"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[7, 0]]), "Token 7 is outside the vocabulary: tokens go from 0 to 6"),
        (torch.tensor([[-1, 0]]), "Token -1 is outside"),
        (torch.zeros(1, 5, dtype=torch.long), "1 to 4 positions, got shape \\(1, 5\\)"),
        (torch.zeros(0, 3, dtype=torch.long), "got shape \\(0, 3\\)"),
    ],
)
def test_bad_prompts(model, tokens, message):
    with pytest.raises(WorkbenchError, match=message):
        run(model, tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "L0.z", "positions": []}, "names no position"),
        ({"site": "L0.z", "rows": torch.tensor([], dtype=torch.long)}, "names no row"),
        ({"site": "L0.z", "dest": 0}, "only pattern and attn_scores have dest"),
        ({"site": "L0.pattern", "positions": [0]}, "say dest= and src="),
    ],
)
def test_bad_patches(fields, message):
    with pytest.raises(WorkbenchError, match=message):
        Patch(**{**fields, "site": site(fields["site"]), "source": Zero()})


def test_bad_places_and_sources(model):
    other = run(model, OTHER, record=["L0.z", "L0.pattern"])
    cases = [
        (Patch(site=site("L0.z"), source=Zero(), positions=[3]), "pos 3 is outside 0 to 2"),
        (Patch(site=site("L0.z"), source=Zero(), positions=[-1]), "pos -1 is outside 0 to 2"),
        (Patch(site=site("L0.z"), source=FromTrace(other, torch.tensor([0, 1]))), "replaces 3 rows from a trace of 3"),
        (Patch(site=site("L0.z"), source=FromTrace(other, torch.tensor([0, 1, 3]))), "all inside the trace"),
        (Patch(site=site("L0.pattern"), source=Mean(other, over="batch_pos")), "over positions is not defined"),
        (Patch(site=site("L0.q"), source=FromTrace(other)), "did not record L0.q"),
    ]
    for patch, message in cases:
        with pytest.raises(WorkbenchError, match=message):
            run(model, TOKENS, patches=[patch])
