"""oneDNN's affine maps and MLPs against their definitions in float64, and when they are not taken."""

import pytest
import torch
from exactness import compare, kernels

from workbench.kernels import dispatch, onednn, reference
from workbench.runtime import WorkbenchError
from workbench.store import new_run
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="PyTorch was built without oneDNN")
ROWS, WIDTH, NEURONS = 1030, 64, 70


@pytest.fixture(autouse=True)
def _chosen(_poisoned, monkeypatch):
    monkeypatch.delenv("WORKBENCH_KERNELS")


def drawn(rng, **shapes):
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.mark.parametrize("leading", [(ROWS,), (5, 206), (2, 5, 103)])
def test_an_affine_map_is_its_definition(leading):
    rng = torch.Generator().manual_seed(0)
    named = drawn(rng, x=(*leading, WIDTH), w=(WIDTH, NEURONS), b=(NEURONS,))
    compare(kernels().affine, reference.affine, named, rng)
    without = {name: named[name] for name in ("x", "w")}
    compare(lambda x, w: kernels().affine(x, w, None), lambda x, w: reference.affine(x, w, None), without, rng)


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("cached", [onednn.CACHED, 100 * NEURONS, ROWS // 2 * NEURONS])
def test_an_mlp_is_its_definition_in_pieces_of_any_size(activation, cached, monkeypatch):
    monkeypatch.setattr(onednn, "CACHED", cached)
    rng = torch.Generator().manual_seed(0)
    named = drawn(
        rng, x=(5, 206, WIDTH), w_in=(WIDTH, NEURONS), b_in=(NEURONS,), w_out=(NEURONS, WIDTH), b_out=(WIDTH,)
    )
    ours, theirs = kernels().mlp, reference.mlp
    assert ours is not theirs
    compare(lambda *args: ours(*args, activation), lambda *args: theirs(*args, activation), named, rng)
    bare = {name: named[name] for name in ("x", "w_in", "w_out")}
    compare(
        lambda x, w_in, w_out: ours(x, w_in, None, w_out, None, activation),
        lambda x, w_in, w_out: theirs(x, w_in, None, w_out, None, activation),
        bare,
        rng,
    )


def test_gradients_go_where_they_are_asked_for():
    rng = torch.Generator().manual_seed(0)
    named = drawn(rng, x=(ROWS, WIDTH), w_in=(WIDTH, NEURONS), b_in=(NEURONS,), w_out=(NEURONS, WIDTH), b_out=(WIDTH,))
    for wanted in named:
        given = {name: value.clone().requires_grad_(name == wanted) for name, value in named.items()}
        kernels().mlp(*given.values(), "relu").square().sum().backward()
        plain = {name: value.clone().requires_grad_(name == wanted) for name, value in named.items()}
        reference.mlp(*plain.values(), "relu").square().sum().backward()
        assert [name for name, value in given.items() if value.grad is not None] == [wanted]
        torch.testing.assert_close(given[wanted].grad, plain[wanted].grad, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(kernels().mlp(*named.values(), "relu"), reference.mlp(*named.values(), "relu"))


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (onednn.FEWEST_ROWS - 1, WIDTH, torch.float32),
        (ROWS, onednn.NARROWEST - 1, torch.float32),
        (ROWS, WIDTH, torch.float64),
    ],
)
def test_few_rows_narrow_ones_and_float64_go_to_the_reference(rows, width, dtype, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x, w, v = (each.to(dtype) for each in drawn(rng, x=(rows, width), w=(width, 80), v=(80, width)).values())
    monkeypatch.delattr(onednn, "affine")
    monkeypatch.delattr(onednn, "mlp")
    assert torch.equal(kernels().affine(x, w, None), x @ w)
    assert torch.equal(kernels().mlp(x, w, None, v, None, "relu"), (x @ w).relu() @ v)


def test_in_bfloat16_weights_get_gradients_in_float32():
    rng = torch.Generator().manual_seed(0)
    named = drawn(rng, x=(ROWS, WIDTH), w_in=(WIDTH, NEURONS), b_in=(NEURONS,), w_out=(NEURONS, WIDTH), b_out=(WIDTH,))
    low, exact = ({name: value.clone().requires_grad_() for name, value in named.items()} for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels().mlp(*low.values(), "gelu")
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    reference.mlp(*exact.values(), "gelu").square().sum().backward()
    for name, value in low.items():
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
        away = float((value.grad - exact[name].grad).norm() / exact[name].grad.norm())
        assert 1e-5 < away < 0.02, name


def test_training_by_it_is_training_by_the_reference(tmp_path, monkeypatch):
    recipe = find_recipe("modular-smoke").override(["p=83", "d_model=64", "d_mlp=64", "steps=20"])
    runs, calls = {}, []
    real = onednn.mlp
    monkeypatch.setattr(onednn, "mlp", lambda *args: calls.append(1) or real(*args))
    for name in ("reference", "onednn"):
        assert not calls
        monkeypatch.setenv("WORKBENCH_KERNELS", name)
        runs[name] = train(recipe, new_run(name, tmp_path))
        assert runs[name].status["kernels"] == name
    assert len(calls) >= 20
    ours, theirs = (run.model().state_dict() for run in runs.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_it_is_refused_where_it_cannot_be(monkeypatch):
    monkeypatch.setenv("WORKBENCH_KERNELS", "onednn")
    with pytest.raises(WorkbenchError, match="WORKBENCH_KERNELS=onednn needs a processor"):
        dispatch.kernels_for(torch.device("cuda"))
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    dispatch._chosen.cache_clear()
    try:
        with pytest.raises(WorkbenchError, match="and a PyTorch with oneDNN"):
            kernels()
        monkeypatch.delenv("WORKBENCH_KERNELS")
        assert kernels().name == "reference"
    finally:
        dispatch._chosen.cache_clear()
