"""Transformer Programs in the training loop: noise that a state need not hold, and what is measured."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from workbench.models.interpreter import program_logits
from workbench.models.kinds import build
from workbench.models.program import Gumbel
from workbench.runtime import WorkbenchError, generator
from workbench.store import new_run
from workbench.training.answer_loss import Dataset
from workbench.training.checkpoints import load
from workbench.training.loop import Interrupted, Trainer, train
from workbench.training.recipes import find_recipe

TINY = ["steps=40", "size=300", "batch_size=32", "evaluate_every=10", "d_mlp=8"]


def tiny(*settings):
    return find_recipe("program-smoke").override([*TINY, *settings])


def weights(run):
    return run.checkpoint().tensors()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_temperature_falls_geometrically_by_hand():
    config = tiny("steps=3", "temperature=[4.0,0.25]").train
    assert [config.temperature_at(step) for step in range(3)] == pytest.approx([4.0, 1.0, 0.25])


def test_a_killed_run_goes_on_bit_identical(tmp_path):
    unbroken = train(tiny(), new_run("whole", tmp_path))
    folder = new_run("broken", tmp_path)

    def interrupt(step, steps, row):
        if step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(tiny(), folder, on_progress=interrupt)
    resumed = train(tiny(), folder, resume=True)
    assert same(weights(unbroken), weights(resumed))
    assert [{**row, "seconds": 0} for row in unbroken.log.rows] == [{**row, "seconds": 0} for row in resumed.log.rows]


def test_every_step_draws_noise_of_its_own(tmp_path, monkeypatch):
    draw, drawn = Gumbel.__call__, []

    def watched(noise, logits):
        drawn.append(noise.generator.get_state().numpy().tobytes())
        return draw(noise, logits)

    monkeypatch.setattr(Gumbel, "__call__", watched)
    train(tiny("steps=4"), new_run("a", tmp_path))
    assert len(drawn) > 4
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "setting", ["temperature=[3.0,3.0]", "average=answers", "batch_seed=1", "coded=true", "optimiser=muon"]
)
def test_every_option_changes_the_weights(tmp_path, setting):
    plain, changed = (
        train(tiny("steps=5", *extra), new_run(name, tmp_path)) for name, extra in (("a", ()), ("b", (setting,)))
    )
    assert not same(weights(plain), weights(changed))


def test_biases_alone_are_spared_where_matrices_are_decayed(tmp_path):
    flags = ["steps=3", "weight_decay=0.5"]
    first, second = (train(tiny(*flags, f"decay={each}"), new_run(each, tmp_path)) for each in ("all", "matrices"))
    one, two = (Trainer(run.recipe, run.folder, Accelerator(cpu=True)) for run in (first, second))
    assert [len(each.optimisers[0].param_groups) for each in (one, two)] == [1, 2]
    spared = {id(each) for each in two.optimisers[0].param_groups[1]["params"]}
    names = {name.rpartition(".")[2] for name, each in two.model.named_parameters() if id(each) in spared}
    assert names == {"b_in", "b_out"}


def test_what_is_logged_is_the_program(tmp_path):
    run = train(tiny(), new_run("a", tmp_path))
    task = run.task
    program = run.program().discrete_program(tuple(task.vocab))
    batch = task.examples("test")
    found = torch.from_numpy(program_logits(program, batch.tokens.numpy()).argmax(-1))
    share = (found == batch.targets)[batch.read].double().mean()
    assert run.log.rows[-1]["test_accuracy"] == pytest.approx(float(share), abs=1e-12)
    assert load("a", runs=tmp_path).recipe == run.recipe


def test_every_prompt_counts_as_much():
    recipe = tiny()
    batch = recipe.task.examples("train").select(slice(0, 50))
    rows = Dataset.of(recipe, batch)
    totals = torch.zeros(50).double().index_add(0, rows.plan.example, rows.weights.double())
    assert torch.allclose(totals, totals[0].expand(50))
    assert totals.sum().item() == pytest.approx(int(batch.read.sum()))
    even = Dataset.of(tiny("average=answers"), batch)
    assert (even.weights == 1).all()


def test_tokens_that_are_not_coded_stay_what_they_are(tmp_path):
    run = train(tiny("steps=5"), new_run("a", tmp_path))
    assert torch.equal(run.program(0).W_E, run.program(5).W_E)
    noisy = run.program().relaxed(
        run.task.examples("test").tokens, Gumbel(temperature=1.0, generator=generator(0, "g"))
    )
    assert torch.isfinite(noisy).all()


def test_padding_changes_nothing_in_the_ordinary_transformer():
    recipe = find_recipe("sequences-transformer").override(["size=100", "n_layers=2", "d_mlp=16"])
    model = build(recipe.model, generator=generator(0, "init"))
    batch = recipe.task.examples("train")
    together = model.forward(batch.tokens)
    for row in range(8):
        length = int((batch.tokens[row] != recipe.task.pad_token).sum())
        alone = model.forward(batch.tokens[row : row + 1])
        short = model.forward(batch.tokens[row : row + 1, :length])
        assert torch.allclose(alone[0], together[row], atol=1e-5)
        assert torch.allclose(short[0], together[row, :length], atol=1e-5)
    # Mutant: a model that sees padding.
    seeing = build(replace(recipe.model, pad_token=None), generator=generator(0, "init"))
    whole = seeing.forward(batch.tokens)
    padded = int((batch.tokens == recipe.task.pad_token).any(1).nonzero()[0])
    length = int((batch.tokens[padded] != recipe.task.pad_token).sum())
    short = seeing.forward(batch.tokens[padded : padded + 1, :length])
    assert not torch.allclose(short[0], whole[padded, :length], atol=1e-3)


def test_the_transformer_follows_the_task():
    recipe = find_recipe("sequences-transformer").override(["function=sort", "letters=5"])
    assert (recipe.model.d_vocab, recipe.model.d_vocab_out, recipe.model.pad_token) == (8, 8, 5)


def test_models_of_another_kind_are_refused(tmp_path):
    run = train(tiny("steps=1"), new_run("a", tmp_path))
    with pytest.raises(WorkbenchError, match="learns a Transformer Program, and this is for transformers"):
        run.model()
    with pytest.raises(WorkbenchError, match="learnt a transformer, no Transformer Program"):
        load("gallery:modular").program()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("temperature=null", "need one such as"),
        ("temperature=[0.0,1.0]", "two numbers above 0"),
        ("dropout=0.1", "has no dropout"),
        ("model.n_ctx=9", "need a cardinality of at least 9"),
    ],
)
def test_bad_settings_are_one_clear_error(setting, message):
    with pytest.raises(WorkbenchError, match=message):
        tiny(setting)


def test_the_answers_follow_the_task():
    recipe = tiny("letters=5")
    assert (recipe.model.outputs, recipe.model.d_vocab) == (recipe.task.outputs, len(recipe.task.vocab))
