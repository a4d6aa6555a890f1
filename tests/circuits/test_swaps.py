"""A swap at one place: equal to a cell of the map where both ask the same, and to the algebra where that is known."""

from dataclasses import replace

import pytest
import torch

from circuits.patching import Cell, patch_each
from circuits.swaps import swap
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch
from workbench.tasks.modular import Modular

TASK = Modular(p=7, train_fraction=0.5)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(n_layers=2, d_model=12, n_heads=2, d_head=6, d_mlp=8, n_ctx=3, d_vocab=8, d_vocab_out=7)
    return Transformer(config, generator=torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module")
def pairs() -> Batch:
    return TASK.sample(9, split="all", seed=3)


def cell(site: str, position: int = 2) -> Cell:
    return Cell(site=Site.parse(site), position=position)


@pytest.mark.parametrize(("base", "direction"), [("clean", "noise"), ("corrupt", "denoise")])
@pytest.mark.parametrize(("site", "position"), [("L0.z.h1", 2), ("L1.mlp_out", 2), ("L0.resid_pre", 0)])
def test_from_the_counterfactual_it_is_a_cell_of_the_map(
    base: str, direction: str, site: str, position: int, model: Transformer, pairs: Batch
) -> None:
    patches = patch_each(model, pairs, sites=site, direction=direction)
    found = swap(model, pairs, cell(site, position), base=base)
    row = patches.frame.set_index("position").loc[position]
    assert found.share is not None
    assert found.share.mean == pytest.approx(row["effect"], abs=1e-5)
    assert (found.share.low, found.share.high) == pytest.approx((row["low"], row["high"]), rel=1e-4)
    assert found.metric_after == pytest.approx(row["patched"], abs=1e-5)
    # The other direction is another number: the equality above is not one of constants.
    assert found.share.mean != pytest.approx(swap(model, pairs, cell(site, (position + 1) % 3), base=base).share.mean)


def test_the_whole_state_carries_the_other_answer(model: Transformer, pairs: Batch) -> None:
    found = swap(model, pairs, cell("L1.resid_post"))
    other = run(model, pairs.pairs()[0]).logits[pairs.read].argmax(1)
    assert found.after.tokens[:, 0].tolist() == other.tolist()
    assert found.share is not None
    assert found.share.mean == pytest.approx(1.0)


def test_zero_leaves_nothing_of_the_place(model: Transformer, pairs: Batch) -> None:
    found = swap(model, pairs, cell("L1.resid_post"), source="zero")
    # Without normalisation and biases a stream of zeros has no preference.
    assert found.after.probabilities == pytest.approx(torch.full((9, 5), 1 / 7))
    assert found.metric_after == pytest.approx(0.0, abs=1e-6)
    assert found.change.mean == pytest.approx(found.metric_after - found.metric_before)
    assert found.change.low <= found.change.mean <= found.change.high


def test_from_any_prompt_one_for_all_or_one_each(model: Transformer, pairs: Batch) -> None:
    place = cell("L1.resid_post")
    one = swap(model, pairs, place, source=TASK.prompt("3 + 4 =").tokens)
    answer = int(run(model, TASK.prompt("3 + 4 =").tokens).logits[0, 2].argmax())
    assert set(one.after.tokens[:, 0].tolist()) == {answer}
    each = swap(model, pairs, place, source=pairs.pairs()[0])
    assert each.metric_after == pytest.approx(swap(model, pairs, place).metric_after)


def test_a_prompt_from_itself_changes_nothing(model: Transformer, pairs: Batch) -> None:
    found = swap(model, pairs, cell("L0.z.h0"), source=pairs.tokens)
    assert found.change.mean == pytest.approx(0.0, abs=1e-6)
    assert found.before.tokens.tolist() == found.after.tokens.tolist()


def test_one_entry_of_a_pattern(model: Transformer, pairs: Batch) -> None:
    place = Cell(site=Site.parse("L0.pattern.h0"), dest=2, src=1)
    row = patch_each(model, pairs, sites="L0.pattern.h0", direction="noise").frame.query("dest == 2 and src == 1")
    assert swap(model, pairs, place).share.mean == pytest.approx(row["effect"].item(), abs=1e-5)


def test_no_headroom_gives_no_share(model: Transformer, pairs: Batch) -> None:
    same = replace(pairs, corrupt=pairs.tokens)
    found = swap(model, same, cell("L0.z.h0"))
    assert found.share is None
    assert found.summary()["share"] is None


def test_the_summary_and_the_table(model: Transformer, pairs: Batch) -> None:
    found = swap(model, pairs, cell("L0.z.h1"), metric="log_probability")
    summary = found.summary()
    assert (summary["site"], summary["position"], summary["n"], summary["metric"]) == (
        "L0.z.h1",
        2,
        9,
        "log_probability",
    )
    assert summary["change"] == found.change.mean
    (table,) = found.tables([f"t{token}" for token in range(8)])
    assert set(table.frame["run"]) == {"before", "after"}
    assert table.frame["answer"].iloc[0] == f"t{int(found.before.tokens[0, 0])}"
    assert found.tables()[0].frame["answer"].iloc[0] == str(int(found.before.tokens[0, 0]))


def test_mistakes_are_told(model: Transformer, pairs: Batch) -> None:
    with pytest.raises(WorkbenchError, match="give one for each pair, or one for all"):
        swap(model, pairs, cell("L0.z.h0"), source=pairs.tokens[:4])
    with pytest.raises(WorkbenchError, match="no counterfactual pairs"):
        swap(model, replace(pairs, corrupt=None, distractor=None), cell("L0.z.h0"))
