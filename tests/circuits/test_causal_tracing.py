"""Causal tracing: on models whose causes are known, and equal to a loop over single prompts on a trained one."""

from dataclasses import replace

import pytest
import torch
from hops import REGISTER, WORLD, Hops, reasoner_run

from circuits.causal_tracing import causal_tracing
from workbench.instrument.sites import Site
from workbench.intervals import mean_of, share_of
from workbench.runtime import WorkbenchError
from workbench.tasks.modular import Modular

SHARES = ("strength", "altered", "redirected", "lead_lost")


def cell(found, site, name):
    [cause] = [cause for cause in found.causes if (str(cause.site), cause.name) == (site, name)]
    return cause


def first_logits(model, batch, row, tokens=None, edits=None):
    tokens = batch.tokens[row : row + 1] if tokens is None else tokens
    with torch.no_grad():
        return model(tokens, edits)[0, int(batch.read[row].nonzero())]


def one_by_one(model, task, batch, name, site, seed):
    """Each prompt alone, its state put in by hand: what every measure is a mean over."""
    changed, site = task.perturbed(batch, name, seed=seed), Site.parse(site)
    found = {name: [] for name in SHARES}
    for row in range(len(batch)):
        if not changed.kept[row]:
            continue
        state = {}
        other_tokens = changed.tokens[row : row + 1]
        other = first_logits(model, batch, row, other_tokens, {site: lambda x, kept=state: kept.setdefault("x", x)})

        def put(x, source=state):
            x = x.clone()
            for position in task.causes[name]:
                x[0, position] = source["x"][0, position]
            return x

        before, after = first_logits(model, batch, row), first_logits(model, batch, row, None, {site: put})
        answer, wanted = int(batch.targets[row][batch.read[row]]), int(changed.answer[row])
        wrong = int(after.argmax()) != answer
        found["strength"].append(wrong)
        if int(before.argmax()) == answer:
            found["altered"].append(wrong)
            if changed.defined[row] and int(other.argmax()) == wanted:
                found["redirected"].append(int(after.argmax()) == wanted)
                found["lead_lost"].append(float((before[answer] - before[wanted]) - (after[answer] - after[wanted])))
    return found


@pytest.mark.parametrize(
    ("kind", "split", "sites"),
    [
        ("composition", "train_inferred", "L0.attn_out,L0.mlp_out,L0.resid_post"),
        ("composition", "test", "L0.resid_post,L1.mlp_out"),
        ("composition", "ood_id", "L0.resid_post"),
        ("comparison", "test", "L0.resid_pre,L0.resid_post,L1.attn_out"),
    ],
)
def test_equals_one_prompt_at_a_time(kind, split, sites):
    run = reasoner_run(kind)
    model, task = run.model(), run.task
    batch = task.examples(split).select(slice(0, 24))
    found = causal_tracing(model, task, batch, split=split, sites=sites, seed=3)
    assert {cause.name for cause in found.causes} == set(task.causes)
    for cause in found.causes:
        slow = one_by_one(model, task, batch, cause.name, str(cause.site), 3)
        counts = (cause.n, cause.n_right, cause.n_both)
        assert counts == tuple(len(slow[name]) for name in ("strength", "altered", "redirected"))
        assert cause.n + cause.skipped == len(batch)
        for name in ("strength", "altered", "redirected"):
            assert getattr(cause, name) == (share_of(torch.tensor(slow[name])) if slow[name] else None)
        if slow["lead_lost"]:
            expected = mean_of(torch.tensor(slow["lead_lost"]))
            for part in ("mean", "low", "high"):
                assert getattr(cause.lead_lost, part) == pytest.approx(getattr(expected, part), abs=1e-4)
        else:
            assert cause.lead_lost is None
    right = [int(first_logits(model, batch, row).argmax()) == int(batch.targets[row, -1]) for row in range(len(batch))]
    assert found.accuracy == share_of(torch.tensor(right))


def test_a_model_that_goes_by_hops_and_one_that_memorises():
    batch = WORLD.examples("test")
    hops, memory = (
        causal_tracing(Hops(WORLD, memorises=memorises), WORLD, batch, split="test", sites="resid_pre,resid_post")
        for memorises in (False, True)
    )
    assert hops.accuracy.mean == memory.accuracy.mean == 1
    expected = {
        # The head is read in layer 0, the bridge at r1 between the layers, r2 at its place until the end.
        "head": {"L0.resid_pre": 1, "L0.resid_post": 0, "L1.resid_post": 0},
        "first": {"L0.resid_pre": 1, "L0.resid_post": 1, "L1.resid_pre": 1, "L1.resid_post": 0},
        "second": {"L0.resid_post": 1, "L1.resid_post": 1},
    }
    for name, places in expected.items():
        for site, share in places.items():
            found = cell(hops, site, name)
            assert found.strength.mean == found.altered.mean == share
            assert found.redirected.mean == share
            assert found.n_right == found.n
            # Where there is a redirection the answer's lead turns into a lag: from 1 to -1.
            assert found.lead_lost.mean == 2 * share
    # Memorised answers hang on nothing that stands at r1 between the layers.
    assert cell(memory, "L0.resid_post", "first").strength.mean == 0
    assert cell(memory, "L0.resid_pre", "first").strength.mean == 1


def test_wrong_answers_count_as_strong_causes_and_nowhere_else():
    model, batch = Hops(WORLD, second_ood=False), WORLD.examples("id_ood")
    found = causal_tracing(model, WORLD, batch, split="id_ood", sites="resid_post")
    assert found.accuracy.mean == 0
    for cause in found.causes:
        assert cause.strength.mean == 1
        assert (cause.altered, cause.redirected, cause.lead_lost, cause.n_right, cause.n_both) == (None,) * 3 + (0, 0)
    assert found.frame["altered"].isna().all()


def test_a_changed_prompt_that_asks_for_nothing_is_never_redirected_to():
    batch = WORLD.examples("test")
    found = causal_tracing(Hops(WORLD), WORLD, batch, split="test", sites="L0.resid_pre")
    changed = WORLD.perturbed(batch, "head", seed=0)
    assert 0 < cell(found, "L0.resid_pre", "head").n_both == int(changed.defined.sum()) < int(changed.kept.sum())


def test_prompts_without_a_change_are_counted_and_a_cause_without_any_is_empty():
    changed = WORLD.perturbed(WORLD.examples("test"), "second")
    rows = torch.cat([(~changed.kept).nonzero()[:, 0], changed.kept.nonzero()[:3, 0]])
    assert len(rows) > 3
    some = WORLD.examples("test").select(rows)
    found = cell(causal_tracing(Hops(WORLD), WORLD, some, split="test", sites="resid_post"), "L0.resid_post", "second")
    assert (found.n, found.skipped) == (3, len(rows) - 3)
    none = causal_tracing(Hops(WORLD), WORLD, some.select(slice(0, len(rows) - 3)), split="test", sites="resid_post")
    empty = cell(none, "L0.resid_post", "second")
    assert (empty.strength, empty.altered, empty.redirected, empty.lead_lost) == (None,) * 4
    assert (empty.n, empty.skipped) == (0, len(rows) - 3)


def test_tables_and_summary_say_the_same():
    run = reasoner_run("composition")
    found = causal_tracing(run.model(), WORLD, run.task.examples("test"), split="test")
    summary = found.summary()
    assert {row["site"] for row in summary["cells"]} == {
        f"L{layer}.{kind}" for layer in (0, 1) for kind in ("attn_out", "mlp_out", "resid_post")
    }
    assert summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"]
    tables = {table.name: table for table in found.tables()}
    assert set(tables) == {"causes_strength_test", "causes_altered_test", "causes_redirected_test"}
    for table in tables.values():
        assert table.kind == "heatmap"
        assert len(table.frame) == 3 * 6
        assert "n = 38 to 40" in table.caption
    row = next(row for row in summary["cells"] if (row["site"], row["cause"]) == ("L0.resid_post", "first"))
    assert row["strength_low"] <= row["strength"] <= row["strength_high"]
    assert found.provenance.parents == (run.checkpoint().sha256,)


def test_another_seed_draws_other_changes():
    run, batch = reasoner_run("comparison"), REGISTER.examples("test")
    shares = [
        causal_tracing(run.model(), REGISTER, batch, split="test", sites="L0.resid_post", seed=seed).summary()["cells"]
        for seed in (0, 0, 1)
    ]
    assert shares[0] == shares[1] != shares[2]


def test_what_cannot_be_traced():
    task = Modular(p=7)
    with pytest.raises(WorkbenchError, match="Task 'modular' does not say how to change one cause of an answer"):
        causal_tracing(Hops(WORLD), task, task.examples("test"), split="test")
    with pytest.raises(WorkbenchError, match="Only a chain has a perturbation; 3 of 3 prompts are single facts"):
        causal_tracing(Hops(WORLD), WORLD, WORLD.examples("atomic_id").select(slice(0, 3)), split="atomic_id")
    with pytest.raises(WorkbenchError, match="Site L7.resid_post is not in this model"):
        causal_tracing(Hops(WORLD), WORLD, WORLD.examples("test"), split="test", sites="L7.resid_post")
    empty = replace(WORLD.examples("test").select(slice(0, 0)))
    with pytest.raises(WorkbenchError, match="Prompts must be"):
        causal_tracing(Hops(WORLD), WORLD, empty, split="test")
