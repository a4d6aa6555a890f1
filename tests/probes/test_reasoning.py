"""What a reasoner knows: by hand, on models of which it is known, and equal to the logit lens."""

import math
from dataclasses import replace

import pytest
import torch
from hops import REGISTER, WORLD, Hops, reasoner_run

from probes.logit_lens import logit_lens
from probes.reasoning import label_recall, latent_ranks, leads, marginal, marginals_table, two_calls
from workbench.instrument.passes import run as run_model
from workbench.instrument.sites import select_sites
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, Latent

SITES = "L0.resid_pre,resid_post"


@pytest.mark.parametrize(
    ("kind", "latents"), [("composition", ("bridge", "relation", "answer")), ("comparison", ("v1", "v2", "answer"))]
)
def test_latents_are_those_of_the_logit_lens_at_their_own_place(kind, latents):
    run = reasoner_run(kind)
    model, batch = run.model(), run.task.examples("test").select(slice(0, 30))
    lens = logit_lens(model, batch, sites=SITES)
    for name in latents:
        ranks = latent_ranks(model, batch, name, sites=SITES)
        expected = lens.measures[f"reciprocal_rank_{name}"].mean[:, batch.latents[name].position]
        torch.testing.assert_close(ranks.mean(0), expected)


@pytest.mark.parametrize(("latent", "position"), [("bridge", 1), ("relation", 2)])
def test_ranks_one_prompt_at_a_time_among_all_and_among_those_that_could_stand_there(latent, position):
    run = reasoner_run("composition")
    model, batch = run.model(), run.task.examples("test").select(slice(0, 12))
    whole, among = (latent_ranks(model, batch, latent, sites=SITES, among=among) for among in (False, True))
    sites = select_sites(SITES, model)
    trace = run_model(model, batch.tokens, record=sites)
    for row in range(len(batch)):
        token = int(batch.latents[latent].value[row])
        for column, site in enumerate(sites):
            logits = model.finish(trace[site], {})[row, position].tolist()
            better = [other for other, logit in enumerate(logits) if logit > logits[token]]
            assert whole[row, column] == pytest.approx(1 / (1 + len(better)))
            alike = [other for other in better if (other < WORLD.entities) == (latent == "bridge")]
            alike = [other for other in alike if other != WORLD.pad_token]
            assert among[row, column] == pytest.approx(1 / (1 + len(alike)))
    assert (among >= whole).all()


def test_ranks_of_a_model_that_goes_by_hops():
    model, batch = Hops(WORLD), WORLD.examples("test")
    bridge = latent_ranks(model, batch, "bridge", sites=SITES).mean(0)
    # Before layer 0 the relation r1 alone is ahead of it; behind it the bridge stands there.
    assert bridge.tolist() == [0.5, 1, 1]
    assert latent_ranks(model, batch, "bridge", sites=SITES, among=True).mean(0).tolist() == [1, 1, 1]
    assert latent_ranks(model, batch, "relation", sites=SITES).mean(0).tolist() == [1, 1, 0.5]


def test_labels_ranked_third_or_better_one_prompt_at_a_time():
    run = reasoner_run("comparison")
    model, batch = run.model(), REGISTER.examples("test").select(slice(0, 20))
    found = label_recall(model, REGISTER, batch, sites=SITES)
    sites = select_sites(SITES, model)
    trace = run_model(model, batch.tokens, record=sites)
    for row in range(len(batch)):
        attribute = REGISTER.vocab[int(batch.tokens[row, 0])]
        labels = [REGISTER.vocab.index(f"{attribute}{sign}") for sign in "<=>"]
        for column, site in enumerate(sites):
            logits = model.finish(trace[site], {})[row, 0].tolist()
            top = sorted(range(len(logits)), key=lambda token: -logits[token])[:3]
            assert found[row, column] == pytest.approx(len(set(labels) & set(top)) / 3)
    assert 0 < found.mean() < 1


def test_leads_by_hand():
    run = reasoner_run("composition")
    model, batch = run.model(), run.task.examples("test").select(slice(0, 12))
    logits = run_model(model, batch.tokens).logits[:, 2]
    found = leads(model, batch)
    for row, answer in enumerate(batch.targets[:, 2].tolist()):
        others = [logit for token, logit in enumerate(logits[row].tolist()) if token != answer]
        assert found[row] == pytest.approx(float(logits[row, answer]) - max(others), abs=1e-5)
    assert ((found > 0) == (logits.argmax(1) == batch.targets[:, 2])).all()


def test_two_calls_one_prompt_at_a_time():
    run = reasoner_run("composition")
    # Early in training, when some facts are known and some are not.
    model, batch = run.model(32), WORLD.examples("train_inferred")
    found = two_calls(model, WORLD, batch)
    assert 0 < found.double().mean() < 1
    for row, (head, first, second) in enumerate(batch.tokens.tolist()):
        with torch.no_grad():
            bridge = int(model(torch.tensor([[head, first, WORLD.pad_token]]))[0, 1].argmax())
            answer = int(model(torch.tensor([[bridge, second, WORLD.pad_token]]))[0, 1].argmax())
        assert bool(found[row]) == (answer == int(batch.targets[row, 2]))


@pytest.mark.parametrize(
    ("knows", "split", "share"),
    [
        ({}, "ood", 1),
        # Asked as a fact, an OOD one is a first hop: where only the second hop lacks it, two calls are right.
        ({"second_ood": False}, "id_ood", 1),
        ({"first_ood": False}, "id_ood", 0),
        ({"first_ood": False}, "ood_id", 0),
    ],
)
def test_two_calls_tell_facts_from_their_composition(knows, split, share):
    assert two_calls(Hops(WORLD, **knows), WORLD, WORLD.examples(split)).double().mean() == share


def counted(rows, answers):
    """Prompts of two tokens, read at the second."""
    tokens = torch.tensor(rows)
    read = torch.tensor([[False, True]]).repeat(len(rows), 1)
    return Batch(tokens=tokens, targets=torch.where(read, torch.tensor(answers)[:, None], 0), read=read)


def test_marginals_by_hand():
    train = counted([[0, 5], [0, 5], [0, 6], [1, 5]], [2, 2, 3, 3])
    asked = counted([[0, 5], [1, 5], [7, 5]], [2, 3, 3])
    # One count is added to each of the two answers there are.
    by_first = marginal(train, asked, (0,))
    assert by_first.accuracy.mean == pytest.approx(2 / 3)
    # 0: answers 2, 2, 3; 1: answer 3; 7 was never seen, so that either answer is as likely.
    assert by_first.loss.mean == pytest.approx(-(math.log(3 / 5) + math.log(2 / 3) + math.log(1 / 2)) / 3)
    by_second = marginal(train, asked, (1,))
    assert by_second.loss.mean == pytest.approx(-(math.log(3 / 5) + 2 * math.log(2 / 5)) / 3)
    both = marginal(train, asked, (0, 1))
    assert both.loss.mean == pytest.approx(-(math.log(3 / 4) + math.log(2 / 3) + math.log(1 / 2)) / 3)
    nothing = marginal(train, asked, ())
    assert nothing.loss.mean == pytest.approx(-math.log(3 / 6))
    assert (both.n, both.positions, nothing.label("ab"), both.label("ab")) == (3, (0, 1), "nothing", "a b")


def test_an_answer_that_training_lacks_has_a_finite_loss():
    found = marginal(counted([[0, 5]], [2]), counted([[0, 5]], [9]), (0,))
    assert found.accuracy.mean == 0
    assert found.loss.mean == pytest.approx(-math.log(1 / 3))


def test_marginals_of_a_world_by_counting():
    train, test = WORLD.examples("train_inferred"), WORLD.examples("test")
    seen = {}
    for tokens, answer in zip(train.tokens.tolist(), train.targets[:, 2].tolist(), strict=True):
        seen.setdefault(tokens[2], []).append(answer)
    known = set(train.targets[:, 2].tolist()) | set(test.targets[:, 2].tolist())
    loss = 0.0
    for tokens, answer in zip(test.tokens.tolist(), test.targets[:, 2].tolist(), strict=True):
        answers = seen.get(tokens[2], [])
        loss -= math.log((answers.count(answer) + 1) / (len(answers) + len(known)))
    assert marginal(train, test, (2,)).loss.mean == pytest.approx(loss / len(test))


def test_the_table_of_marginals():
    train, test = WORLD.examples("train_inferred"), WORLD.examples("test")
    found = [marginal(train, test, positions) for positions in ((2,), (1, 2), ())]
    table = marginals_table(found, WORLD.position_labels, "test")
    assert table.frame["looks_at"].tolist() == ["r2", "r1 r2", "nothing"]
    assert table.frame["loss"].tolist() == [each.loss.mean for each in found]
    assert (table.frame["accuracy_low"] <= table.frame["accuracy"]).all()


def test_what_cannot_be_asked():
    model, batch = Hops(WORLD), WORLD.examples("test")
    with pytest.raises(WorkbenchError, match="Unknown latent 'bridg'. Did you mean 'bridge'"):
        latent_ranks(model, batch, "bridg", sites=SITES)
    bare = replace(batch, latents={"x": Latent(value=batch.tokens[:, 0], position=0)})
    with pytest.raises(WorkbenchError, match="Latent 'x' does not say which tokens could stand in its place"):
        latent_ranks(model, bare, "x", sites=SITES, among=True)
    facts = WORLD.examples("atomic_id").select(slice(0, 3))
    with pytest.raises(WorkbenchError, match="asked hop by hop; 3 of 3 prompts are single facts"):
        two_calls(model, WORLD, facts)
