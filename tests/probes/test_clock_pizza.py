import math

import pytest
import torch

from probes.clock_pizza import TRIPLES, distance_irrelevance, gradient_symmetricity
from probes.modular import observe, pair_grid
from workbench.tasks.modular import Modular

TASK = Modular(p=17)


def test_clock_and_pizza_are_told_apart(planted):
    grid = pair_grid(TASK)
    clock, pizza = planted(TASK, [3, 5], answer_bias=1.0), planted(TASK, [3, 5], pizza=True)
    assert gradient_symmetricity(clock, grid) < 0.3
    assert gradient_symmetricity(pizza, grid) > 0.999
    assert distance_irrelevance(observe(clock, grid).logits, grid) == pytest.approx(1.0, abs=1e-3)
    assert distance_irrelevance(observe(pizza, grid).logits, grid) < 1e-3


@pytest.mark.parametrize(("operation", "least"), [("sub", 0.999), ("mul", 0.8), ("div", 0.8)])
def test_distance_is_irrelevant_to_the_clock_of_any_operation(planted, operation, least):
    task = Modular(operation=operation, p=17)
    grid = pair_grid(task)
    clock = planted(task, [3, 5], answer_bias=1.0)
    assert distance_irrelevance(observe(clock, grid).logits, grid) > least


def test_gradients_of_the_clock_by_hand(planted):
    # By a the logit's gradient points to the angle w (c - b), by b to w (c - a): their cosine is cos(w (a - b)).
    grid = pair_grid(TASK)
    cosine = (2 * math.pi * 4 / 17 * torch.arange(17)).cos()
    error = 4 * cosine.std() / TRIPLES**0.5
    assert gradient_symmetricity(planted(TASK, [4]), grid) == pytest.approx(float(cosine.mean()), abs=float(error))


def test_triples_follow_their_seed(planted):
    model, grid = planted(TASK, [4]), pair_grid(TASK)
    assert gradient_symmetricity(model, grid, seed=1) == gradient_symmetricity(model, grid, seed=1)
    assert gradient_symmetricity(model, grid, seed=1) != gradient_symmetricity(model, grid, seed=2)


def test_a_gradient_is_each_examples_own(transformer):
    # Against one backward pass for each triple, on weights without structure.
    task = Modular(p=5)
    model, grid = transformer(task), pair_grid(task)
    cosines = []
    for tokens in grid.batch.tokens:
        for answer in range(5):
            leaf = model.embed.W_E.detach()[tokens].requires_grad_()
            x = leaf + model.pos_embed.W_pos
            logits = model.finish(model.advance(0, x[None], tokens[None], {}), {})
            by_a, by_b, _ = torch.autograd.grad(logits[0, -1, answer], leaf)[0]
            cosines.append(float(torch.cosine_similarity(by_a, by_b, dim=0)))
    exact = torch.tensor(cosines)
    found = gradient_symmetricity(model, grid)
    assert found == pytest.approx(float(exact.mean()), abs=float(4 * exact.std() / TRIPLES**0.5))
    assert exact.std() > 0.05


def test_distance_by_hand():
    grid = pair_grid(TASK)
    values = torch.randn(17, generator=torch.Generator().manual_seed(0))
    x, y = torch.cartesian_prod(torch.arange(17), torch.arange(17)).unbind(1)
    of_distance, of_sum = values[(x - y) % 17], values[(x + y) % 17]

    def right(correct):
        logits = torch.zeros(17 * 17, 17).scatter(1, grid.answers[:, None], correct[:, None])
        return distance_irrelevance(logits.view(17, 17, 17), grid)

    assert right(of_distance) == pytest.approx(0.0, abs=1e-6)
    assert right(of_sum) == pytest.approx(1.0, abs=1e-6)
    # Independent variances of equal size: the part at a fixed distance is 1/2 of the variance.
    assert right(of_distance + of_sum) == pytest.approx(0.5**0.5, abs=1e-6)
    assert right(torch.full((17 * 17,), 3.0)) == 1.0
