from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probes.modular
from probes.modular import (
    cell_losses,
    embeddings,
    neuron_logit_map,
    observe,
    pair_grid,
    powers_of_primitive_root,
    sum_squared_weights,
)
from workbench.runtime import WorkbenchError
from workbench.tasks.modular import Modular, Operation


@given(st.sampled_from(get_args(Operation)), st.sampled_from([3, 5, 7, 11, 13, 17]))
def test_every_operation_is_a_sum_of_exponents(operation, p):
    grid = pair_grid(Modular(operation=operation, p=p, train_fraction=0.5))
    x, y = torch.cartesian_prod(torch.arange(grid.order), torch.arange(grid.order)).unbind(1)
    assert grid.order == (p if operation in ("add", "sub") else p - 1)
    assert torch.equal(grid.batch.latents["a"].value, grid.residue[x])
    assert torch.equal(grid.answers, grid.residue[(x + y) % grid.order])


def test_exponents_by_hand():
    # 3 generates the residues modulo 7, 2 does not: its powers are 1, 2, 4.
    assert powers_of_primitive_root(7).tolist() == [1, 3, 2, 6, 4, 5]
    grid = pair_grid(Modular(operation="div", p=7))
    # Cell (1, 2): 3^1 divided by 3^-2 is 3^3.
    assert grid.batch.tokens[1 * 6 + 2].tolist() == [3, 4, 7]
    assert grid.answers[1 * 6 + 2] == 6


def test_shuffle_breaks_the_sum_and_keeps_the_pairs():
    task = Modular(p=13)
    grid = pair_grid(task, shuffle_seed=1)
    x, y = torch.cartesian_prod(torch.arange(13), torch.arange(13)).unbind(1)
    assert (grid.answers == grid.residue[(x + y) % 13]).float().mean() < 0.3
    assert torch.equal(grid.answers, task.answer(grid.batch.tokens[:, 0], grid.batch.tokens[:, 1]))
    assert not torch.equal(grid.residue, pair_grid(task, shuffle_seed=2).residue)


def test_cells_are_the_splits_without_factors_of_zero():
    task = Modular(operation="mul", p=11, train_fraction=0.4)
    grid = pair_grid(task)
    train, test = grid.cells("train"), grid.cells("test")
    assert sorted(torch.cat([train, test]).tolist()) == list(range(100))
    tokens = task.examples("train").tokens
    kept = tokens[(tokens[:, :2] != 0).all(1)]
    assert torch.equal(grid.batch.tokens[train], kept)


def test_composite_multiplication_has_no_basis():
    with pytest.raises(WorkbenchError, match=r"needs a prime modulus, got p=15.*Train with p=113"):
        pair_grid(Modular(operation="mul", p=15))
    assert pair_grid(Modular(operation="add", p=15)).order == 15


def test_other_tasks_are_refused():
    with pytest.raises(WorkbenchError, match="reads modular arithmetic; this run's task is 'facts'"):
        # Past the annotation, as an untyped caller would.
        pair_grid.__wrapped__(SimpleNamespace(name="facts"))


@pytest.mark.parametrize("d_mlp", [0, 24])
@pytest.mark.parametrize("operation", ["add", "div"])
def test_fast_path_sees_what_the_hooked_pass_sees(d_mlp, operation, transformer, foreign, monkeypatch):
    monkeypatch.setattr(probes.modular, "ROWS", 50)
    task = Modular(operation=operation, p=11)
    model = transformer(task, d_mlp=d_mlp, n_layers=2, normalization="LN", biases=("attn", "mlp", "unembed"))
    grid = pair_grid(task)
    fast, hooked = observe(model, grid), observe(foreign(model), grid)
    assert fast.logits.shape == (grid.order, grid.order, 11)
    torch.testing.assert_close(fast.logits, hooked.logits)
    if d_mlp:
        torch.testing.assert_close(fast.neurons, hooked.neurons)
        assert not fast.logits.requires_grad
    else:
        assert fast.neurons is None
        assert hooked.neurons is None


def test_observation_is_in_the_order_of_cells(transformer):
    task = Modular(operation="sub", p=7)
    model, grid = transformer(task), pair_grid(task)
    # Cell (2, 3) is 2 - (-3) = 2 - 4.
    alone = model.forward(torch.tensor([[2, 4, 7]]))[0, -1]
    torch.testing.assert_close(observe(model, grid).logits[2, 3], alone.detach())


def test_losses_are_of_the_right_answer():
    grid = pair_grid(Modular(p=3))
    logits = torch.zeros(3, 3, 3)
    logits[1, 1, 2] = 100.0
    losses = cell_losses(logits, grid, torch.tensor([4, 0]))
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([0.0, 1.0986123], abs=1e-6)


def test_weights_are_read_where_there_are_any(transformer, foreign):
    task = Modular(operation="mul", p=7)
    model, grid = transformer(task), pair_grid(task)
    assert torch.equal(embeddings(model, grid), model.embed.W_E.detach()[grid.residue])
    assert torch.equal(embeddings(foreign(model), grid), embeddings(model, grid))
    written = neuron_logit_map(model, grid)
    assert written is not None
    expected = model.weights[0].mlp.W_out[5] @ model.unembed.W_U[:, 3]
    torch.testing.assert_close(written[1, 5], expected.detach())
    assert sum_squared_weights(model) == pytest.approx(
        sum(p.detach().square().sum().item() for p in model.parameters())
    )
    assert neuron_logit_map(foreign(model), grid) is None
    assert sum_squared_weights(foreign(model)) is None
    assert neuron_logit_map(transformer(task, d_mlp=0), grid) is None
