"""Training steps as benchmarks: both sides compute the same gradients, and the comparison notices when they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apps import step_benchmarks
from apps.bench import Benchmark, _matrix_flops, measure
from apps.step_benchmarks import BRIDGE, EAGER, MATERIALISED, STEPS, MaterialisedReads, in_bfloat16, training_step
from workbench.kernels import reference
from workbench.kernels.dispatch import kernels_for
from workbench.models.config import ModelConfig
from workbench.tasks.graph_search import GraphSearch
from workbench.training import loop
from workbench.training.acceleration import cross_entropy
from workbench.training.program_recipes import program_smoke
from workbench.training.reasoner_recipes import composition_smoke
from workbench.training.recipe import Recipe
from workbench.training.recipes import modular_smoke
from workbench.training.search_recipes import search_smoke


def drawn_modular() -> Recipe:
    recipe = modular_smoke()
    return replace(recipe, train=replace(recipe.trainable(), batch_size=20))


def tied_composition() -> Recipe:
    recipe = composition_smoke()
    assert isinstance(recipe.model, ModelConfig)
    assert recipe.model.tied
    return replace(recipe, model=replace(recipe.model, d_model=16, n_heads=2, d_head=8, d_mlp=32))


def small_search() -> Recipe:
    recipe, task = search_smoke(), GraphSearch(size=20, test_size=30)
    words = len(task.vocab)
    model = ModelConfig(
        n_layers=2, d_model=16, n_heads=1, d_head=16, d_mlp=16, n_ctx=20, d_vocab=words, d_vocab_out=words,
        normalization="LN", causal=False,
    )  # fmt: skip
    return replace(recipe, task=task, model=model, train=replace(recipe.trainable(), batch_size=8))


def toy(make: Callable[[], Recipe], peer: dict[str, object]) -> Benchmark:
    return training_step("toy", make, **peer, target=1.0, gate=0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("make", "peer"),
    [
        (modular_smoke, EAGER),
        (modular_smoke, BRIDGE),
        (drawn_modular, EAGER),
        (tied_composition, BRIDGE),
        (small_search, EAGER),
        (small_search, BRIDGE),
        (program_smoke, MATERIALISED),
    ],
)
def test_both_sides_have_the_same_gradients_at_every_step(make: Callable[[], Recipe], peer: dict[str, object]) -> None:
    result = measure(toy(make, peer), repeats=3, round_seconds=0)
    assert result.agrees, result.distance
    assert 0 < result.gemm_share < 1


def test_a_step_in_bfloat16_is_near_the_peers_and_measured_against_products_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "has_bfloat16", lambda device: True)
    benchmark = toy(in_bfloat16(modular_smoke), EAGER)
    assert (benchmark.precision, benchmark.tolerance) == (torch.bfloat16, 0.05)
    assert " in bfloat16:" in benchmark.compares
    result = measure(benchmark, repeats=1, round_seconds=0)
    assert 1e-4 < result.distance < 0.05


@pytest.mark.parametrize("peer", [EAGER, BRIDGE])
def test_another_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, peer: dict[str, object]) -> None:
    monkeypatch.setattr(loop, "LOSSES", {"cross_entropy": lambda *given: 1.01 * cross_entropy(*given)})
    assert not measure(toy(modular_smoke, peer), repeats=1, round_seconds=0).agrees


def test_a_materialised_read_is_the_same_read() -> None:
    choice, variables = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), torch.rand(4, 5, 3, 6)
    for equation in ("hm,btmk->bhtk", "hm,bsmk->bhsk"):
        expected = torch.einsum(equation, choice, variables)
        with MaterialisedReads():
            assert torch.allclose(torch.einsum(equation, choice, variables), expected)
    # The matrix has 6 columns and 18 rows for each of 2 heads, where the choice has 3 entries.
    assert _matrix_flops(lambda: _read(choice, variables)) > 3 * _plain_flops(choice, variables)


def _read(choice: Tensor, variables: Tensor) -> Tensor:
    with MaterialisedReads():
        return torch.einsum("hm,btmk->bhtk", choice, variables)


def _plain_flops(choice: Tensor, variables: Tensor) -> int:
    return _matrix_flops(lambda: torch.einsum("hm,btmk->bhtk", choice, variables))


def test_operations_are_those_of_products_and_of_attention_with_its_gradient() -> None:
    one, two = torch.ones(3, 4), torch.ones(4, 5)
    assert _matrix_flops(lambda: one @ two) == 2 * 3 * 4 * 5
    many, plain = torch.ones(2000, 64), reference.affine
    weights = torch.ones(64, 80, requires_grad=True)
    for affine in (kernels_for(many.device).affine, plain):
        assert _matrix_flops(lambda: affine(many, weights, None).sum().backward()) == 2 * 2 * 2000 * 64 * 80  # noqa: B023
    q = torch.ones(2, 3, 8, 4, requires_grad=True)
    forward = 2 * 2 * (2 * 3 * 8 * 8 * 4)

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()

    assert _matrix_flops(attend) == forward
    # Scores once more, and two gradients of each of the two products.
    assert _matrix_flops(lambda: attend().backward()) == forward + 2.5 * forward


def test_shapes_are_those_that_the_names_say() -> None:
    assert step_benchmarks.whole_composition().trainable().batch_size is None
    conditions = {name: STEPS[name]().conditions for name in ("step-composition", "step-search", "step-program")}
    assert conditions["step-composition"]["d_model"] == 256
    assert 2200 <= int(str(conditions["step-composition"]["d_vocab"])) < 2300
    assert conditions["step-search"]["n_ctx"] == 64
    assert conditions["step-program"]["n_heads"] == 8
