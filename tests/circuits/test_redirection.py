"""Redirection: on models whose bridge is known, and equal to a loop over single pairs on a trained one."""

from dataclasses import replace

import pytest
import torch
from hops import WORLD, Hops, reasoner_run

from circuits.redirection import redirection
from workbench.instrument.sites import Site
from workbench.intervals import share_of
from workbench.runtime import WorkbenchError

R1 = 1


def pairs(split, contrast, seed=0):
    return WORLD.contrast(WORLD.examples(split), contrast, seed=seed)


def redirected(model, split="test", contrast="bridge", **options):
    return redirection(model, pairs(split, contrast), split=split, contrast=contrast, position=R1, **options)


def shares(found):
    return {str(place.site): (place.redirected.mean, place.changed.mean, place.right.mean) for place in found.places}


def answer(model, tokens, edits=None):
    with torch.no_grad():
        return int(model(tokens[None], edits)[0, -1].argmax())


def one_by_one(model, batch, site, *, both_right):
    site, found = Site.parse(site), {"redirected": [], "changed": [], "right": [], "before": []}
    for row in range(len(batch)):
        right, other = int(batch.targets[row, -1]), int(batch.distractor[row, -1])
        state = {}
        given = answer(model, batch.corrupt[row], {site: lambda x, kept=state: kept.setdefault("x", x)})

        def put(x, source=state):
            x = x.clone()
            x[0, R1] = source["x"][0, R1]
            return x

        before = answer(model, batch.tokens[row])
        if both_right and (before != right or given != other):
            continue
        after = answer(model, batch.tokens[row], {site: put})
        found["redirected"].append(after == other)
        found["changed"].append(after != before)
        found["right"].append(after == right)
        found["before"].append(before == right)
    return found


@pytest.mark.parametrize("both_right", [True, False])
@pytest.mark.parametrize(
    ("split", "contrast"), [("train_inferred", "bridge"), ("test", "bridge"), ("ood_id", "same_bridge")]
)
def test_equals_one_pair_at_a_time(split, contrast, both_right):
    model, batch = reasoner_run("composition").model(), pairs(split, contrast)
    found = redirection(
        model,
        batch,
        split=split,
        contrast=contrast,
        position=R1,
        sites="L0.resid_pre,resid_post",
        both_right=both_right,
    )
    for place in found.places:
        slow = one_by_one(model, batch, str(place.site), both_right=both_right)
        assert found.n == len(slow["right"]) > 0
        assert found.n + found.skipped_wrong == len(batch)
        for name in ("redirected", "changed", "right"):
            assert getattr(place, name) == share_of(torch.tensor(slow[name]))
        assert found.right_before == share_of(torch.tensor(slow["before"]))
    assert found.skipped_missing == batch.dropped


def test_the_bridge_decides_in_a_model_that_goes_by_hops():
    model = Hops(WORLD)
    found = redirected(model, sites="L0.resid_pre,resid_post")
    # Before layer 0 r1 holds a relation, which leads elsewhere from this head; after layer 1 nothing is read there.
    assert shares(found)["L0.resid_post"] == (1, 1, 0)
    assert shares(found)["L1.resid_post"] == (0, 0, 1)
    assert shares(found)["L0.resid_pre"][0] < 0.5
    assert str(found.best.site) == "L0.resid_post"
    control = redirected(model, contrast="same_bridge", sites="L0.resid_post")
    assert shares(control)["L0.resid_post"][1:] == (0, 1)
    assert redirected(model, sites="resid_post,L1.resid_pre").best.site == Site.parse("L0.resid_post")


def test_nothing_is_redirected_in_a_model_that_memorises():
    found = redirected(Hops(WORLD, memorises=True))
    assert found.n == len(pairs("test", "bridge"))
    assert set(shares(found).values()) == {(0, 0, 1)}


def test_the_control_catches_a_place_that_holds_more_than_the_bridge():
    # Before layer 0 the place holds r1 itself: another r1 with another head leads elsewhere.
    control = redirected(Hops(WORLD), contrast="same_bridge", sites="L0.resid_pre")
    assert shares(control)["L0.resid_pre"][1] > 0.5


@pytest.mark.parametrize(
    ("knows", "split", "before", "after"),
    [
        # The first hop is missing, and a state that has it mends the answer.
        ({"first_ood": False}, "ood_id", 0, 1),
        ({"first_ood": False}, "id_ood", 1, 1),
        # The second hop is missing: what the state holds was there before.
        ({"second_ood": False}, "id_ood", 0, 0),
        ({"second_ood": False}, "ood_id", 1, 1),
        ({"first_ood": False, "second_ood": False}, "ood", 0, 0),
        ({"first_ood": False}, "ood", 0, 1),
    ],
)
def test_transplants_say_which_hop_is_missing(knows, split, before, after):
    found = redirected(Hops(WORLD, **knows), split, "same_bridge", sites="L0.resid_post", both_right=False)
    assert (found.right_before.mean, found.places[0].right.mean) == (before, after)
    assert found.skipped_wrong == 0
    assert found.n + found.skipped_missing == len(WORLD.examples(split))
    # Two right answers are asked for unless one says otherwise.
    assert redirected(Hops(WORLD, **knows), split, "same_bridge").n == (found.n if before else 0)


def test_without_a_pair_that_counts_everything_is_empty():
    none_right = redirected(Hops(WORLD, second_ood=False), "id_ood", "bridge")
    assert (none_right.n, none_right.best, none_right.right_before) == (0, None, None)
    assert none_right.skipped_wrong == len(pairs("id_ood", "bridge"))
    assert none_right.frame["redirected"].isna().all()
    assert "no pair counts" in none_right.tables()[0].caption
    batch = replace(pairs("test", "bridge").select(slice(0, 0)), dropped=4)
    none_drawn = redirection(Hops(WORLD), batch, split="test", contrast="bridge", position=R1)
    assert (none_drawn.n, none_drawn.skipped_wrong, none_drawn.skipped_missing) == (0, 0, 4)
    assert [place.redirected for place in none_drawn.places] == [None, None]


def test_tables_and_summary_say_the_same():
    found = redirected(reasoner_run("composition").model(), "train_inferred")
    summary, [table] = found.summary(), found.tables()
    assert (summary["n"], summary["position"], summary["contrast"]) == (found.n, 1, "bridge")
    assert [row["site"] for row in summary["cells"]] == ["L0.resid_post", "L1.resid_post"]
    assert table.frame.to_dict("records") == summary["cells"]
    assert table.name == "redirection_bridge_train_inferred"
    assert f"n = {found.n}, right before: 1.000" in table.caption


def test_what_cannot_be_redirected():
    model, batch = Hops(WORLD), pairs("test", "bridge")
    with pytest.raises(WorkbenchError, match="has no counterfactual pairs"):
        redirection(model, WORLD.examples("test"), split="test", contrast="bridge", position=R1)
    twice = replace(batch, read=torch.ones_like(batch.read))
    with pytest.raises(WorkbenchError, match="give prompts that are read at one place"):
        redirection(model, twice, split="test", contrast="bridge", position=R1)
    with pytest.raises(WorkbenchError, match="pos 5 is outside 0 to 2"):
        redirection(model, batch, split="test", contrast="bridge", position=5)
