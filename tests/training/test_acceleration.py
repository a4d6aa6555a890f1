import json
import math
import os
import signal

import jaxtyping
import pytest
import torch
from torch.nn import functional

from workbench.models.fast import ReadPlan, read_logits
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import load_tensors, new_run
from workbench.training import loop
from workbench.training.acceleration import LOSSES, amplify_slow, cross_entropy, orthogonal_to, stablemax
from workbench.training.loop import Interrupted, train
from workbench.training.optimisers import AdamW
from workbench.training.recipe import Recipe, TrainConfig
from workbench.training.recipes import RECIPES, find_recipe

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=20", "stop_when_clean=false"]


def tiny(*settings):
    return find_recipe("modular-smoke").override([*TINY, *settings])


def trained(folder, name, *settings):
    return train(tiny(*settings), new_run(name, folder)).checkpoint().tensors()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def gradients(recipe):
    """The parameters at the start of a recipe, by name, with their gradients."""
    model = Transformer(recipe.model, generator=generator(recipe.train.init_seed, "init"))
    batch = recipe.task.examples("train")
    logits = model(batch.tokens)[batch.read].double()
    (LOSSES[recipe.train.loss](logits, batch.targets[batch.read]).mean()).backward()
    return dict(model.named_parameters())


def test_stablemax_by_hand():
    # s = 2, 1, 1/2, 1/4: together 15/4.
    logits = torch.tensor([[1.0, 0.0, -1.0, -3.0]]).double()
    for answer, probability in enumerate([8 / 15, 4 / 15, 2 / 15, 1 / 15]):
        assert stablemax(logits, torch.tensor([answer])).item() == pytest.approx(-math.log(probability), rel=1e-12)
    both = stablemax(logits.expand(2, 4), torch.tensor([0, 3]))
    assert both.tolist() == pytest.approx([math.log(15 / 8), math.log(15)], rel=1e-12)


def test_gradient_of_stablemax_by_hand():
    logits = torch.tensor([[1.0, 0.0, -1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    stablemax(logits, torch.tensor([2])).sum().backward()
    # Slopes of s are 1, 1, 1/4, 1/16; the answer's own 1/4 is also divided by its s of 1/2.
    by_hand = torch.tensor([[4 / 15, 4 / 15, 1 / 15 - 1 / 2, 1 / 60]]).double()
    assert torch.allclose(logits.grad, by_hand, atol=1e-12)


def test_stablemax_keeps_what_the_softmax_rounds_away():
    logits = torch.tensor([[200.0, 0.0]])
    assert cross_entropy(logits, torch.tensor([0])).item() == 0
    assert stablemax(logits, torch.tensor([0])).item() == pytest.approx(math.log(202 / 201), rel=1e-3)


def test_the_default_loss_is_cross_entropy():
    logits, answers = torch.randn(5, 3, generator=generator(0, "logits")), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(cross_entropy(logits, answers), functional.cross_entropy(logits, answers, reduction="none"))


def test_grokfast_by_hand():
    first, mean = amplify_slow(torch.tensor([1.0, -2.0]), None, 0.75, 2.0)
    assert (first.tolist(), mean.tolist()) == ([3.0, -6.0], [1.0, -2.0])
    second, mean = amplify_slow(torch.tensor([5.0, 2.0]), mean, 0.75, 2.0)
    assert (second.tolist(), mean.tolist()) == ([9.0, 0.0], [2.0, -1.0])


def test_orthogonal_gradient_by_hand():
    # Along the weight (3, 4) the gradient (2, 11) has 2 of it, (6, 8); the rest, (-4, 3), has norm 5.
    rest = orthogonal_to(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 11.0]))
    assert torch.allclose(rest, torch.tensor([-0.8, 0.6]) * math.sqrt(125))
    # A tensor is one vector, whatever its shape.
    square = orthogonal_to(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0], [11.0]]))
    assert torch.equal(square[:, 0], rest)


def test_orthogonal_gradient_where_nothing_is_there_to_be_orthogonal_to():
    gradient = torch.tensor([1.0, -2.0])
    assert torch.equal(orthogonal_to(torch.zeros(2), gradient), gradient)
    assert torch.equal(orthogonal_to(gradient, torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("setting", ["grokfast=[0.9,2]", "loss=stablemax", "orthogonal_gradient=true"])
def test_every_acceleration_changes_the_weights_but_not_what_is_logged_at_the_start(tmp_path, setting, decay):
    shared = ["normalization=LN", f"decay={decay}"]
    plain = train(tiny(*shared), new_run("plain", tmp_path))
    changed = train(tiny(*shared, setting), new_run("changed", tmp_path))
    assert not same(plain.checkpoint().tensors(), changed.checkpoint().tensors())
    for name in ("train_loss", "test_loss"):
        assert changed.log.rows[0][name] == plain.log.rows[0][name]
    assert changed.log.rows[-1]["train_loss"] < changed.log.rows[0]["train_loss"]


def test_no_shipped_recipe_accelerates():
    for name in RECIPES:
        config = find_recipe(name).train
        assert (config.grokfast, config.loss, config.orthogonal_gradient) == (None, "cross_entropy", False)


@pytest.mark.parametrize("settings", [(), ("batch_size=32", "decay=matrices", "normalization=LN", "clip_norm=0.1")])
def test_neutral_values_train_bit_identical_to_none(tmp_path, settings):
    neutral = ("grokfast=[0.98,0]", "loss=cross_entropy", "orthogonal_gradient=false")
    assert same(trained(tmp_path, "plain", *settings), trained(tmp_path, "neutral", *settings, *neutral))


def test_without_acceleration_training_is_plain_adamw_on_cross_entropy(tmp_path):
    recipe = tiny("warmup_steps=0", "steps=5")
    config, batch = recipe.train, recipe.task.examples("train")
    model = Transformer(recipe.model, generator=generator(config.init_seed, "init"))
    plan, answers = ReadPlan.of(recipe.model, batch.tokens, batch.read), batch.targets[batch.read]
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    for _ in range(config.steps):
        optimiser.zero_grad()
        loss = functional.cross_entropy(read_logits(model, plan).double(), answers, reduction="sum") / len(answers)
        loss.backward()
        optimiser.step()
    assert same(train(recipe, new_run("a", tmp_path)).checkpoint().tensors(), model.state_dict())


@pytest.mark.parametrize("grokfast", [(), ("grokfast=[0.5,4]",)])
def test_a_step_is_orthogonal_to_the_weights_with_grokfast_too(tmp_path, monkeypatch, grokfast):
    seen = []
    step = AdamW.step

    def look(optimiser, *given):
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        seen.append([functional.cosine_similarity(p.flatten(), p.grad.flatten(), dim=0).item() for p in parameters])
        return step(optimiser, *given)

    monkeypatch.setattr(AdamW, "step", look)
    trained(tmp_path, "plain", "steps=3")
    assert max(abs(cosine) for cosine in seen[-1]) > 1e-3
    seen.clear()
    trained(tmp_path, "changed", "steps=3", "orthogonal_gradient=true", "clip_norm=0.1", *grokfast)
    assert len(seen) == 3
    assert max(abs(cosine) for each in seen for cosine in each) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_the_state_holds_the_running_mean_of_the_gradients_of_the_chosen_loss(tmp_path, loss):
    recipe = tiny("steps=1", "grokfast=[0.9,2]", "clip_norm=0.001", f"loss={loss}")
    run = train(recipe, new_run("a", tmp_path))
    tensors, _ = load_tensors(run.folder.path / "state" / "step_00000001.safetensors")
    for name, parameter in gradients(recipe).items():
        # The mean is of gradients as they were before clipping.
        assert torch.allclose(tensors[f"slow.{name}"], parameter.grad, atol=1e-6), name


def test_grokfast_within_the_update_is_grokfast_before_it(tmp_path):
    # A bound that is never reached puts clipping in between.
    filtered = ("grokfast=[0.9,2]", "decay=matrices", "normalization=LN")
    assert same(trained(tmp_path, "within", *filtered), trained(tmp_path, "before", *filtered, "clip_norm=1e30"))
    within, before = (
        load_tensors(tmp_path / name / "state" / "step_00000020.safetensors")[0] for name in ("within", "before")
    )
    assert sum(key.startswith("slow.") for key in before) == sum(key.endswith(".slow") for key in within) > 0
    assert not any(key.startswith("slow.") for key in within)


@pytest.mark.parametrize("settings", [(), ("batch_size=32", "decay=matrices", "normalization=LN", "dropout=0.1")])
@pytest.mark.parametrize("orthogonal", ["true", "false"])
def test_an_accelerated_run_resumes_bit_identical(tmp_path, settings, orthogonal):
    accelerated = ("grokfast=[0.9,2]", "loss=stablemax", f"orthogonal_gradient={orthogonal}")
    recipe = tiny("steps=80", "evaluate_every=10", *settings, *accelerated)
    unbroken = train(recipe, new_run("whole", tmp_path))
    folder = new_run("broken", tmp_path)

    def interrupt(step, steps, row):
        if step == 40:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="is saved; go on with --resume"):
        train(recipe, folder, on_progress=interrupt)
    resumed = train(recipe, folder, resume=True)
    assert same(unbroken.checkpoint().tensors(), resumed.checkpoint().tensors())


def test_a_run_that_falls_back_to_an_older_state_forgets_the_later_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)
    run = train(tiny("grokfast=[0.9,2]"), new_run("a", tmp_path))
    before = run.checkpoint().tensors()
    newest = sorted((run.folder.path / "state").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert same(before, train(run.recipe, run.folder, resume=True).checkpoint().tensors())


def test_an_accelerated_recipe_survives_json():
    recipe = tiny("grokfast=[0.98,2]", "loss=stablemax", "orthogonal_gradient=true")
    assert recipe.train.grokfast == (0.98, 2.0)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.override(["grokfast=null"]).train.grokfast is None


def test_a_recipe_written_before_there_was_acceleration_is_read():
    content = tiny().to_json()
    for name in ("grokfast", "loss", "orthogonal_gradient"):
        del content["train"][name]
    assert Recipe.from_json(content) == tiny()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("grokfast=[1,2]", r"alpha in \[0, 1\) and lambda at least 0, such as \[0.98, 2.0\], got \(1.0, 2.0\)"),
        ("grokfast=[-0.1,2]", r"alpha in \[0, 1\) .* got \(-0.1, 2.0\)"),
        ("grokfast=[0.9,-1]", r"lambda at least 0, .* got \(0.9, -1.0\)"),
        ("grokfast=[0.9,Infinity]", r"lambda at least 0, .* got \(0.9, inf\)"),
        ("grokfast=[NaN,2]", r"alpha in \[0, 1\) .* got \(nan, 2.0\)"),
        ("grokfast=[0.9]", r"grokfast=\[0.9\] is not of the kind tuple\[float, float\]"),
        ("grokfast=[true,2]", r"grokfast=\[true,2\] is not of the kind"),
        ("loss=hinge", "loss=hinge is none of cross_entropy, stablemax"),
        ("orthogonal_gradient=1", "orthogonal_gradient=1 is not of the kind bool"),
    ],
)
def test_bad_values_are_refused(setting, message):
    with pytest.raises(WorkbenchError, match=message):
        tiny(setting)


def test_an_unknown_loss_is_refused_where_types_are_not_checked(monkeypatch):
    # The tests' type checker would be first; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match="Unknown loss 'hinge'. Known: cross_entropy, stablemax"):
        TrainConfig(steps=1, loss="hinge")
