"""Transformer Programs in the training loop: noise that a state need not hold, and what is measured."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from words_fixtures import tiny_corpus

from apps.programs import by_answer
from workbench.models.interpreter import program_logits
from workbench.models.kinds import build
from workbench.models.program import Gumbel
from workbench.runtime import WorkbenchError, generator
from workbench.store import new_run
from workbench.training.answer_loss import Dataset
from workbench.training.checkpoints import Run, load, thin
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
    "setting",
    ["temperature=[3.0,3.0]", "average=answers", "batch_seed=1", "fallback=max", "coded=true", "optimiser=muon"],
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
    assert run.last["test_accuracy"] == pytest.approx(float(share), abs=1e-12)
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


def test_the_best_program_is_what_a_run_ends_with(tmp_path):
    # At this rate the program changes at every step: the last is hardly ever the best.
    settings = ["keep=best", "learning_rate=0.5", "evaluate_every=3"]
    run = train(tiny(*settings), new_run("best", tmp_path))
    rows = run.log.rows
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert best["step"] < rows[-1]["step"]
    assert run.checkpoint().step == run.last["step"] == best["step"]
    assert "best" in run.checkpoint().reasons
    batch = run.task.examples("val")
    right = (run.program().forward(batch.tokens).argmax(2) == batch.targets)[batch.read]
    assert float(right.double().mean()) == pytest.approx(best["val_accuracy"])
    assert run.checkpoint() in thin(run, 2)
    assert run.checkpoint(rows[-1]["step"]).step == rows[-1]["step"]
    last = train(tiny(*settings, "keep=last"), new_run("last", tmp_path))
    assert last.checkpoint().step == last.last["step"] == rows[-1]["step"]


def test_a_run_that_is_not_evaluated_yet_has_the_weights_that_it_began_with(tmp_path):
    folder = new_run("begun", tmp_path)
    recipe = tiny("keep=best")
    Trainer(recipe, folder, Accelerator(cpu=True)).start()
    (folder.path / "metrics.jsonl").unlink()
    begun = Run(folder=folder, recipe=recipe)
    assert begun.checkpoint().step == 0
    assert begun.last == {}


def test_the_best_is_refused_where_nothing_is_held_out_for_choosing_it():
    with pytest.raises(WorkbenchError, match="measures no split `val`"):
        find_recipe("modular").override(["keep=best"])


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
        ("keep=first", "keep"),
        ("fallback=min", "fallback"),
        ("model.n_ctx=9", "need a cardinality of at least 9"),
    ],
)
def test_bad_settings_are_one_clear_error(setting, message):
    with pytest.raises(WorkbenchError, match=message):
        tiny(setting)


def test_the_answers_follow_the_task():
    recipe = tiny("letters=5")
    assert (recipe.model.outputs, recipe.model.d_vocab) == (recipe.task.outputs, len(recipe.task.vocab))


def test_text_is_learnt_by_coded_words(tmp_path, monkeypatch):
    tiny_corpus(monkeypatch)
    small = ["text=tiny", "words=8", "task.n_ctx=8", "model.n_ctx=8", "cardinality=8", "columns=2", "d_mlp=8"]
    recipe = find_recipe("program-text").override([*small, "steps=60", "batch_size=64", "evaluate_every=20"])
    assert (recipe.model.pooled, recipe.model.outputs, recipe.model.d_vocab_out) == (True, (0, 1), 2)
    run = train(recipe, new_run("text", tmp_path))
    assert load("text", runs=tmp_path).recipe == recipe
    scores = by_answer(run)
    assert scores["token_accuracy"] == scores["sequence_accuracy"] > 0.9
    assert scores["logistic_token_accuracy"] == 1
    assert "names_f1" not in scores


def test_names_are_learnt_from_the_word_before(tmp_path, monkeypatch):
    tiny_corpus(monkeypatch, each=True)
    small = ["text=tiny", "words=8", "task.n_ctx=8", "model.n_ctx=8", "cardinality=8", "columns=2", "d_mlp=8"]
    recipe = find_recipe("program-ner").override([*small, "steps=3", "batch_size=64", "evaluate_every=20"])
    assert (recipe.model.pooled, recipe.model.outputs) == (False, (0, 1))
    scores = by_answer(train(recipe, new_run("names", tmp_path)))
    assert scores["logistic_names_f1"] == 1
    assert scores["majority_names_f1"] == 0
    assert scores["majority_names_precision"] is None
    assert 0 <= scores["names_f1"] <= 1
