import json
import math
import os
import signal

import jaxtyping
import pytest
import torch
from torch import nn

from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import new_run
from workbench.training.loop import Interrupted, train
from workbench.training.optimisers import AdamW, Muon, Signum, optimisers_of, orthogonalise
from workbench.training.recipe import Recipe, TrainConfig
from workbench.training.recipes import RECIPES, find_recipe

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=20", "stop_when_clean=false"]


def tiny(*settings):
    return find_recipe("modular-smoke").override([*TINY, *settings])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def model_of(recipe):
    return Transformer(recipe.model, generator=generator(recipe.train.init_seed, "init"))


def test_signum_by_hand():
    weight = nn.Parameter(torch.tensor([2.0, -2.0, 1.0]))
    optimiser = Signum([weight], lr=0.1, momentum=0.5, weight_decay=0.5)
    weight.grad = torch.tensor([3.0, -8.0, 0.0])
    optimiser.step()
    # Decayed by 0.05, then moved by 0.1 against the sign: not at all where there is no gradient.
    assert torch.allclose(weight, torch.tensor([1.8, -1.8, 0.95]))
    # Means 1.5, -4, 0 become 0.25, -1.5, 0.5: the second keeps its sign against the new gradient.
    weight.grad = torch.tensor([-1.0, 1.0, 1.0])
    optimiser.step()
    assert torch.allclose(optimiser.state[weight]["mean"], torch.tensor([0.25, -1.5, 0.5]))
    assert torch.allclose(weight, torch.tensor([1.61, -1.61, 0.8025]))


def test_sgd_steps_by_the_gradient_alone():
    model = model_of(tiny())
    (optimiser,) = optimisers_of(model, TrainConfig(steps=1, optimiser="sgd", learning_rate=0.1, weight_decay=0.0))
    before = model.embed.W_E.detach().clone()
    for _ in range(2):
        model.embed.W_E.grad = torch.full_like(before, -2.0)
        optimiser.step()
    assert torch.allclose(model.embed.W_E, before + 0.4)


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16), (3, 16, 4)])
def test_orthogonalising_keeps_singular_vectors_and_levels_their_values(shape):
    matrix = torch.randn(shape, generator=generator(0, "matrix", *shape))
    found = orthogonalise(matrix)
    assert found.shape == matrix.shape
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ found @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(inner, torch.diag_embed(values), atol=1e-4)
    assert values.min() > 0.3
    assert values.max() < 1.3
    # The scale of the matrix does not matter.
    assert torch.allclose(orthogonalise(1e-3 * matrix), found, atol=1e-4)


def test_muon_is_torchs_on_one_matrix_but_for_its_bfloat16():
    start = torch.randn(16, 8, generator=generator(0, "start"))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.2)
    peer = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    rng = generator(0, "gradients")
    for _ in range(5):
        ours.grad = torch.randn(16, 8, generator=rng)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    # bfloat16 holds eight bits: the updates, of size 0.02 each, agree to some percent.
    assert (ours - theirs).abs().max() < 5e-3
    assert (ours - start).abs().max() > 5e-2


def test_each_head_is_a_matrix_of_its_own():
    together = nn.Parameter(torch.zeros(2, 6, 3))
    apart = [nn.Parameter(torch.zeros(6, 3)) for _ in range(2)]
    together.grad = torch.randn(2, 6, 3, generator=generator(0, "heads"))
    # A head with a small gradient moves as far as one with a large one.
    together.grad[1] *= 1e-3
    for head, weight in enumerate(apart):
        weight.grad = together.grad[head].clone()
    Muon([together], lr=1.0, momentum=0.0, weight_decay=0.0).step()
    Muon(apart, lr=1.0, momentum=0.0, weight_decay=0.0).step()
    assert torch.allclose(together, torch.stack(list(apart)), atol=1e-5)
    assert math.isclose(together[0].norm().item(), together[1].norm().item(), rel_tol=0.3)


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_muon_takes_the_blocks_matrices_and_adamw_every_other_parameter(decay):
    recipe = tiny("optimiser=muon", "normalization=LN", f"decay={decay}", "betas=[0.95,0.98]")
    model = model_of(recipe)
    muon, adamw = optimisers_of(model, recipe.train)
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken, rest = (
        {names[parameter] for group in optimiser.param_groups for parameter in group["params"]}
        for optimiser in (muon, adamw)
    )
    assert (type(muon), type(adamw)) == (Muon, AdamW)
    assert taken == {
        *(f"weights.0.attn.W_{letter}" for letter in "QKVO"),
        "weights.0.mlp.W_in",
        "weights.0.mlp.W_out",
    }
    assert rest == set(names.values()) - taken
    assert {group["momentum"] for group in muon.param_groups} == {0.95}
    decays = {names[p]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decays["weights.0.ln1.w"] == (1.0 if decay == "all" else 0.0)
    assert decays["embed.W_E"] == 1.0


@pytest.mark.parametrize("name", ["muon", "signum"])
def test_every_optimiser_learns_and_differs_from_adamw(tmp_path, name):
    plain = train(tiny("learning_rate=1e-2"), new_run("plain", tmp_path))
    changed = train(tiny("learning_rate=1e-2", f"optimiser={name}"), new_run("changed", tmp_path))
    assert not same(plain.checkpoint().tensors(), changed.checkpoint().tensors())
    assert changed.log.rows[0]["train_loss"] == plain.log.rows[0]["train_loss"]
    assert changed.log.rows[-1]["train_loss"] < changed.log.rows[0]["train_loss"] - 0.1


@pytest.mark.parametrize("name", ["muon", "signum"])
def test_every_optimiser_resumes_bit_identical(tmp_path, name):
    recipe = tiny("steps=80", "evaluate_every=10", f"optimiser={name}", "decay=matrices", "normalization=LN")
    unbroken = train(recipe, new_run("whole", tmp_path))
    folder = new_run("broken", tmp_path)

    def interrupt(step, steps, row):
        if step == 40:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="is saved; go on with --resume"):
        train(recipe, folder, on_progress=interrupt)
    resumed = train(recipe, folder, resume=True)
    assert same(unbroken.checkpoint().tensors(), resumed.checkpoint().tensors())


def test_faithful_recipes_keep_adamw_and_the_choice_survives_json():
    optimisers = {name: find_recipe(name).train.optimiser for name in RECIPES}
    # Not the paper's recipes of search, which are at its scale (`search-paper`) or as it trains (`search-at-once`).
    assert {name: each for name, each in optimisers.items() if each != "adamw"} == {
        "search": "muon",
        "search-naive": "muon",
        "search-star": "muon",
        "search-32": "muon",
        "search-learned": "muon",
    }
    recipe = tiny("optimiser=muon")
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    content = tiny().to_json()
    del content["train"]["optimiser"]
    assert Recipe.from_json(content) == tiny()


def test_an_unknown_optimiser_is_refused(monkeypatch):
    with pytest.raises(WorkbenchError, match="optimiser=sophia is none of adamw, muon, signum, sgd"):
        tiny("optimiser=sophia")
    # The tests' type checker would be first; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match="Unknown optimiser 'sophia'. Known: adamw, muon, signum"):
        TrainConfig(steps=1, optimiser="sophia")


def test_a_state_without_the_filters_mean_is_refused():
    """As an earlier version saved it, which kept the mean elsewhere."""
    parameter = nn.Parameter(torch.ones(2))
    made = {filtered: AdamW([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, grokfast=filtered and (0.9, 2.0))
            for filtered in (None, True)}  # fmt: skip
    parameter.grad = torch.ones(2)
    made[None].step()
    with pytest.raises(WorkbenchError, match="holds no running mean of Grokfast's"):
        made[True].load_state_dict(made[None].state_dict())
    made[True].step()
    again = AdamW([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, grokfast=(0.9, 2.0))
    again.load_state_dict(made[True].state_dict())
    assert torch.equal(again.state[parameter]["slow"], made[True].state[parameter]["slow"])
