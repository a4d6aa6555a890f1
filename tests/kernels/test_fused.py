"""The kernels, interpreted on the CPU, against their definitions in float64: values, and every gradient by name."""

import importlib

import pytest
import torch
from exactness import RELATIVE, compare, kernels

from workbench.kernels import dispatch, onednn, reference
from workbench.kernels.dispatch import kernels_for
from workbench.models.config import ModelConfig
from workbench.models.fast import ReadPlan, read_logits
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError

pytest.importorskip("triton", reason="Triton is published for Linux alone")

EPS = 1e-5


def attention():
    """The kernel, at lengths too that go to the reference because it is faster there."""
    from workbench.kernels import fused_attention

    return fused_attention.attention


@pytest.mark.parametrize(
    ("members", "rows", "width"), [((), 1, 1), ((), 5, 16), ((3,), 7, 33), ((2, 2), 130, 16), ((), 2110, 12)]
)
def test_add_norm_is_its_definition(members, rows, width):
    rng = torch.Generator().manual_seed(rows + width)
    named = {
        "x": torch.randn(*members, rows, width, generator=rng),
        "added": 3 + torch.randn(*members, rows, width, generator=rng),
        "w": torch.randn(*members, width, generator=rng),
        "b": torch.randn(*members, width, generator=rng),
    }
    if width == 1:
        # One entry has no spread: its norm is the shift, and no gradient passes.
        total, normed = kernels().add_norm(*named.values(), EPS)
        torch.testing.assert_close(total, named["x"] + named["added"])
        torch.testing.assert_close(normed, named["b"].expand_as(normed))
        return
    fused, plain = kernels().add_norm, reference.add_norm
    compare(lambda *args: fused(*args, EPS), lambda *args: plain(*args, EPS), named, rng)


def test_a_program_that_has_many_turns_sums_them_all(monkeypatch):
    from workbench.kernels import fused_add_norm

    monkeypatch.setattr(fused_add_norm, "CHUNKS", 3)
    test_add_norm_is_its_definition((2,), 2110, 12)


def test_add_norm_takes_operands_in_any_order_of_memory():
    rng = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(24, 6, generator=rng).T, torch.randn(24, generator=rng), torch.randn(24, generator=rng)
    ours, theirs = kernels().add_norm(x, x, w, b, EPS), reference.add_norm(x, x, w, b, EPS)
    torch.testing.assert_close(ours, theirs)


def masks(kind, batch, n_dest, n_src, rng):
    if kind == "padding":
        lengths = torch.randint(1, n_src + 1, (batch,), generator=rng)
        return (torch.arange(n_src) < lengths[:, None])[:, None].expand(batch, n_dest, n_src)
    full = torch.ones(1, n_dest, n_src, dtype=torch.bool)
    return full.tril(n_src - n_dest) if kind == "causal" else full


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "padding"])
@pytest.mark.parametrize(
    ("batch", "n_dest", "n_src", "heads", "width"),
    [(3, 1, 1, 2, 4), (4, 3, 3, 4, 32), (2, 6, 6, 1, 20), (2, 2, 5, 3, 7), (2, 17, 17, 2, 16), (1, 70, 70, 1, 64)],
)
def test_attention_is_its_definition(mask, batch, n_dest, n_src, heads, width):
    rng = torch.Generator().manual_seed(batch * n_src + width)
    named = {
        "q": torch.randn(batch, n_dest, heads, width, generator=rng),
        "k": torch.randn(batch, n_src, heads, width, generator=rng),
        "v": torch.randn(batch, n_src, heads, width, generator=rng),
        "allowed": masks(mask, batch, n_dest, n_src, rng),
    }
    if n_src == 1:
        ours = attention()(*named.values())
        torch.testing.assert_close(ours, named["v"])
        return
    compare(attention(), reference.attention, named, rng)


def test_attention_takes_operands_in_any_order_of_memory():
    rng = torch.Generator().manual_seed(0)
    # Heads before positions, as a model that keeps them so hands them over; and a gradient from above like that.
    q, k, v = (torch.randn(2, 3, 5, 4, generator=rng).transpose(1, 2).requires_grad_() for _ in range(3))
    allowed = torch.ones(5, 5, dtype=torch.bool).triu().T[None]
    above = torch.randn(4, 3, 5, 2, generator=rng).permute(3, 2, 1, 0)
    ours = torch.autograd.grad(attention()(q, k, v, allowed), (q, k, v), above)
    theirs = torch.autograd.grad(reference.attention(q, k, v, allowed), (q, k, v), above)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_of_large_scores_stays_finite():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (50 * torch.randn(2, 9, 2, 8, generator=rng) for _ in range(3))
    allowed = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(kernels().attention(q, k, v, allowed), reference.attention(q, k, v, allowed))


def test_long_prompts_go_to_the_reference():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 17, 1, 8, generator=rng) for _ in range(3))
    allowed = torch.ones(1, 17, 17, dtype=torch.bool).tril()
    assert torch.equal(kernels().attention(q, k, v, allowed), reference.attention(q, k, v, allowed))


def test_float64_goes_to_the_reference():
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 8, generator=rng).double(), torch.ones(8).double()
    for ours, theirs in zip(kernels().add_norm(x, x, w, w, EPS), reference.add_norm(x, x, w, w, EPS), strict=True):
        assert ours.dtype == torch.float64
        assert torch.equal(ours, theirs)


def test_a_processor_is_not_interpreting_unless_told_so(monkeypatch):
    assert kernels().name == "triton"
    monkeypatch.delenv("WORKBENCH_KERNELS")
    assert kernels().name == ("onednn" if onednn.is_available() else "reference")
    assert kernels_for(torch.device("cuda")).name == "triton"


def test_kernels_that_nothing_interprets_need_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", dispatch._chosen.__wrapped__)
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    with pytest.raises(WorkbenchError, match="WORKBENCH_KERNELS=triton needs a CUDA device, and this is 'cpu'"):
        kernels()
    assert kernels_for(torch.device("cuda")).name == "triton"


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_trains_by_the_kernels_as_by_its_definition(monkeypatch, causal):
    # Padded prompts of 5 tokens, read twice; two blocks with biases everywhere.
    rng = torch.Generator().manual_seed(0)
    config = ModelConfig(
        n_layers=2, d_model=12, n_heads=2, d_head=6, d_mlp=20, n_ctx=5, d_vocab=7, d_vocab_out=7, normalization="LN",
        activation="gelu", biases=("attn", "mlp", "unembed"), causal=causal, pad_token=0,
    )  # fmt: skip
    model = Transformer(config, generator=rng)
    tokens = torch.randint(1, 7, (6, 5), generator=rng)
    tokens[::2, 0] = 0
    read = torch.zeros(6, 5, dtype=torch.bool)
    read[:, [2, 4]] = True
    counted = []
    for name in ("add_norm", "attention"):
        module = importlib.import_module(f"workbench.kernels.fused_{name}")
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real, name=name: counted.append(name) or real(*given))
    above = torch.randn(int(read.sum()), 7, generator=rng)
    (read_logits(model, ReadPlan.of(config, tokens, read)) * above).sum().backward()
    assert counted == ["attention", "add_norm", "add_norm"]
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    exact = Transformer(config, generator=None).double()
    exact.load_state_dict(model.state_dict())
    (exact(tokens)[read] * above).sum().backward()
    # What adds the same to every score has no gradient but rounding: keys' bias.
    scale = max(float(parameter.grad.norm()) for parameter in exact.parameters())
    for name, parameter in exact.named_parameters():
        assert float((ours[name].double() - parameter.grad).norm()) < RELATIVE * scale, name


def test_unknown_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("WORKBENCH_KERNELS", "cutlass")
    with pytest.raises(WorkbenchError, match="WORKBENCH_KERNELS=cutlass names no kernels. Known: reference, triton."):
        kernels()


def test_without_triton_the_reference_is_used_and_said(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(dispatch, "_chosen", dispatch._chosen.__wrapped__)
    with pytest.raises(WorkbenchError, match="Triton is not installed"):
        kernels()
    monkeypatch.delenv("WORKBENCH_KERNELS")
    assert kernels_for(torch.device("cuda")).name == "reference"
    assert "the plain kernels are used" in caplog.text
