"""Unembedding and cross-entropy, interpreted on the CPU, against their definition in float64."""

import pytest
import torch
from exactness import RELATIVE, compare, error, kernels

from workbench.kernels import dispatch, reference
from workbench.models.config import ModelConfig
from workbench.models.fast import ReadPlan, read_cross_entropy
from workbench.models.transformer import Transformer
from workbench.store import new_run
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

pytest.importorskip("triton", reason="Triton is published for Linux alone")

SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _however_few(monkeypatch):
    """The kernels take any number of logits."""
    monkeypatch.setattr(dispatch, "MOST_LOGITS", 0)


def operands(members, n_rows, width, n_vocab, bias, rng):
    named = {
        "x": torch.randn(*members, n_rows, width, generator=rng),
        "w": torch.randn(*members, width, n_vocab, generator=rng),
        "b": torch.randn(*members, n_vocab, generator=rng),
        "answer": torch.randint(n_vocab, (*members, n_rows), generator=rng),
    }
    return named if bias else {name: value for name, value in named.items() if name != "b"}


def taking(function, dtype, bias):
    return lambda x, w, *rest: function(x, w, *(rest if bias else (None, *rest)), dtype)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("members", "n_rows", "width", "n_vocab"),
    [((), 1, 1, 2), ((), 5, 16, 7), ((), 33, 20, 113), ((3,), 7, 33, 65), ((2, 2), 40, 5, 3), ((), 3, 256, 130)],
)
def test_it_is_its_definition(members, n_rows, width, n_vocab, bias, dtype):
    rng = torch.Generator().manual_seed(n_rows + n_vocab)
    named = operands(members, n_rows, width, n_vocab, bias, rng)
    compare(taking(kernels().cross_entropy, dtype, bias), taking(reference.cross_entropy, DOUBLE, bias), named, rng)


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_however_many_programs_share_the_work_its_parts_are_summed(monkeypatch, programs):
    from workbench.kernels import fused_cross_entropy

    monkeypatch.setattr(fused_cross_entropy, "PROGRAMS", programs)
    test_it_is_its_definition((2,), 70, 20, 131, True, DOUBLE)


def test_it_takes_operands_in_any_order_of_memory():
    rng = torch.Generator().manual_seed(0)
    # As a tied unembedding is: the embedding, transposed; and each member's in a larger tensor.
    for w in (torch.randn(9, 40, generator=rng).T, torch.randn(3, 80, 18, generator=rng)[1, ::2, ::2]):
        x = torch.randn(40, 6, generator=rng).T
        answer = torch.randint(9, (6, 2), generator=rng)[:, 1]
        above = torch.randn(1, generator=rng).expand(6)
        found = []
        for function in (kernels().cross_entropy, reference.cross_entropy):
            leaves = [each.detach().requires_grad_() for each in (x, w)]
            found.append(torch.autograd.grad(function(*leaves, None, answer, SINGLE), leaves, above))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_loss_in_float64_keeps_what_float32_rounds_away():
    # Logits 40 and 0: the probability lacks 4e-18 of 1.
    x, w, answer = torch.tensor([[40.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert kernels().cross_entropy(x, w, None, answer, SINGLE).item() == 0
    x, least = x * 0.75, torch.tensor([30.0]).double().neg().exp().log1p()
    ours = kernels().cross_entropy(x, w, None, answer, DOUBLE)
    assert ours.dtype == DOUBLE
    assert ours.item() == pytest.approx(least.item(), rel=1e-2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(kernels().cross_entropy(x, w, None, answer, DOUBLE).sum(), x)
    assert gradient.item() == pytest.approx(-least.item(), rel=1e-2)


def test_large_logits_stay_finite():
    rng = torch.Generator().manual_seed(0)
    x, w, b, answer = operands((), 9, 8, 70, True, rng).values()
    # Where no row is, the logits are the biases alone.
    x, b = 1000 * x, 1000 * b
    for dtype in (SINGLE, DOUBLE):
        found = []
        for function in (kernels().cross_entropy, reference.cross_entropy):
            leaves = [each.detach().requires_grad_() for each in (x, w, b)]
            losses = function(*leaves, answer, dtype)
            found.append((losses.detach(), *torch.autograd.grad(losses.sum(), leaves)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_wide_rows_and_float64_go_to_the_reference():
    rng = torch.Generator().manual_seed(0)
    for width, dtype in ((257, SINGLE), (4, DOUBLE)):
        x, w = torch.randn(5, width, generator=rng).to(dtype), torch.randn(width, 9, generator=rng).to(dtype)
        answer = torch.randint(9, (5,), generator=rng)
        ours, theirs = (each(x, w, None, answer, dtype) for each in (kernels().cross_entropy, reference.cross_entropy))
        assert torch.equal(ours, theirs)


@pytest.fixture
def counted(monkeypatch):
    """Names of the kernels that were launched."""
    from workbench.kernels import fused_adamw, fused_cross_entropy

    names = []
    for module, name in ((fused_cross_entropy, "cross_entropy"), (fused_adamw, "adamw")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real, name=name: names.append(name) or real(*given))
    return names


def test_only_logits_that_are_too_many_for_memory_are_the_kernels(counted, monkeypatch):
    x, w, answer = torch.ones(4, 8), torch.ones(8, 5), torch.zeros(4, dtype=torch.int64)
    for most, launched in ((20, []), (19, ["cross_entropy"])):
        monkeypatch.setattr(dispatch, "MOST_LOGITS", most)
        torch.testing.assert_close(
            kernels().cross_entropy(x, w, None, answer, DOUBLE), torch.full((4,), 5.0).double().log()
        )
        assert counted == launched


@pytest.mark.parametrize("tied", [True, False])
def test_every_gradient_of_a_models_loss_is_that_of_its_definition(counted, tied):
    rng = torch.Generator().manual_seed(0)
    config = ModelConfig(
        n_layers=1, d_model=12, n_heads=2, d_head=6, d_mlp=20, n_ctx=5, d_vocab=37, d_vocab_out=37, normalization="LN",
        biases=("attn", "mlp", "unembed"), tied=tied,
    )  # fmt: skip
    model = Transformer(config, generator=rng)
    tokens, read = torch.randint(37, (6, 5), generator=rng), torch.ones(6, 5, dtype=torch.bool)
    answers, weights = torch.randint(37, (30,), generator=rng), torch.rand(30, generator=rng)
    (read_cross_entropy(model, ReadPlan.of(config, tokens, read), answers, DOUBLE) * weights).sum().backward()
    assert counted == ["cross_entropy"]
    exact = Transformer(config, generator=None).double()
    exact.load_state_dict(model.state_dict())
    losses = torch.nn.functional.cross_entropy(exact(tokens)[read], answers, reduction="none")
    (losses * weights).sum().backward()
    scale = max(float(parameter.grad.norm()) for parameter in exact.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert float((ours.grad.double() - theirs.grad).norm()) < RELATIVE * scale, name


@pytest.mark.parametrize(
    "settings",
    [
        ("grokfast=[0.9,2]", "decay=matrices", "normalization=LN"),
        ("grokfast=[0.9,0]", "loss_dtype=float32", "batch_size=32"),
    ],
)
def test_training_by_the_kernels_is_training_by_the_reference(tmp_path, monkeypatch, counted, settings):
    sizes = ("p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=4", "stop_when_clean=false")
    recipe = find_recipe("modular-smoke").override([*sizes, *settings])
    fused = train(recipe, new_run("fused", tmp_path))
    assert counted == ["cross_entropy", "adamw"] * 4
    assert fused.status["kernels"] == "triton"
    monkeypatch.setenv("WORKBENCH_KERNELS", "reference")
    plain = train(recipe, new_run("plain", tmp_path))
    assert len(counted) == 8
    ours, theirs = fused.checkpoint().tensors(), plain.checkpoint().tensors()
    for name in theirs:
        assert error(ours[name], theirs[name].double()) < 1e-4, name
