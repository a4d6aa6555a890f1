"""What the cone computes, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.cone import PLAIN, Cell, Cone, cached_sites, in_cone, record_run, some_logits
from workbench.instrument.passes import run
from workbench.instrument.sites import Site, SiteKind, select_sites
from workbench.instrument.trace import FromTrace
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError

KINDS = "embed,resid_pre,ln1_scale,q,k,v,pattern,z,attn_out,resid_mid,ln2_normalized,pre,L0.post.n*,mlp_out,resid_post"
PAD = 0


def transformer(**changes) -> Transformer:
    config = {
        "n_layers": 3, "d_model": 12, "n_heads": 2, "d_head": 5, "d_mlp": 7, "n_ctx": 4, "d_vocab": 9, "d_vocab_out": 9,
        "normalization": "LN", "biases": ("attn", "mlp", "unembed"),
    } | changes  # fmt: skip
    model = Transformer(ModelConfig(**config), generator=torch.Generator().manual_seed(0)).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def runs(model, tokens, corrupt, sites=KINDS):
    wanted = {site.whole for site in select_sites(sites, model)} | set(cached_sites(model))
    return run(model, tokens, record=wanted), run(model, corrupt, record=wanted)


def cells_of(model, sites=KINDS, pos=4):
    cells = []
    for site in select_sites(sites, model):
        if "dest" in site.kind.dims:
            reach = [(dest, src) for dest in range(pos) for src in range(dest + 1 if model.config.causal else pos)]
            cells += [Cell(site=site, dest=dest, src=src) for dest, src in reach]
        else:
            cells += [Cell(site=site, position=position) for position in range(pos)]
    return cells


def logits_by_cone(model, cells, base, other, read):
    """Logits of every cell's run at the reads; the cached ones where no row came by."""
    logits = base.logits.repeat(len(cells), 1, 1, 1)
    for rows in Cone.of(model, base, other, read).reach(cells):
        logits[rows.cell[rows.row], rows.example[rows.row], rows.position] = model.finish(rows.x, {})
    return logits[:, read]


def logits_by_whole_runs(model, cells, base, other, read):
    every = torch.arange(len(read))
    whole = [run(model, base.tokens, patches=[cell.patch(FromTrace(other), every)]).logits for cell in cells]
    return torch.stack(whole)[:, read]


def reads(*rows: str):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


@pytest.fixture
def pair():
    """Three prompts: their pairs differ everywhere, at one place, and at the last place, behind a pad."""
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [3, 1, PAD, 2]])
    corrupt = torch.tensor([[4, 3, 2, 1], [5, 2, 7, 8], [3, 1, PAD, 6]])
    return tokens, corrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"pad_token": PAD},
        {"pad_token": PAD, "causal": False},
        {"schedule": (0, 1, 2, 0, 1)},
        {"normalization": None, "biases": (), "activation": "gelu"},
        {"n_layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("read", [reads("...x", "...x", "...x"), reads("x..x", ".x..", "..xx")], ids=["last", "ragged"])
def test_cone_is_the_whole_run(pair, changes, read):
    model = transformer(**changes)
    sites = KINDS if model.config.normalization else KINDS.replace("ln1_scale,", "").replace("ln2_normalized,", "")
    base, other = runs(model, *pair, sites)
    cells = cells_of(model, sites)
    found = logits_by_cone(model, cells, base, other, read)
    torch.testing.assert_close(found, logits_by_whole_runs(model, cells, base, other, read), rtol=1e-10, atol=1e-10)


def test_attention_only(pair):
    model, read = transformer(d_mlp=0, biases=("attn",)), reads("..xx", "...x", ".x..")
    base, other = runs(model, *pair, "resid_pre,z,v")
    cells = cells_of(model, "resid_pre,z,v")
    found = logits_by_cone(model, cells, base, other, read)
    torch.testing.assert_close(found, logits_by_whole_runs(model, cells, base, other, read), rtol=1e-10, atol=1e-10)


MUTANTS = {
    "attention does not spread": ("_spread", lambda self, step, rows: _own_positions(self, rows)),
    "everything differs nowhere": ("_begin", lambda self, depth, cells: _without_rows(self, depth, cells)),
    "the unpatched stream": ("_written", lambda self, site, trace, positions: _of_base(self, site, positions)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(pair, name, monkeypatch):
    model, read = transformer(), reads("...x", "...x", "...x")
    base, other = runs(model, *pair)
    cells = cells_of(model, "resid_pre,z")
    monkeypatch.setattr(Cone, *MUTANTS[name])
    found = logits_by_cone(model, cells, base, other, read)
    assert (found - logits_by_whole_runs(model, cells, base, other, read)).abs().max() > 1e-3


def _own_positions(cone, rows):
    changed = torch.zeros(len(rows.cell), 4, dtype=torch.bool)
    changed[rows.row, rows.position] = True
    return changed


BEGIN = Cone._begin


def _without_rows(cone, depth, cells):
    rows = BEGIN(cone, depth, cells)
    nothing = torch.zeros(len(rows.row), dtype=torch.bool)
    return rows.at(nothing)


def _of_base(cone, site, positions):
    held = cone.base.activations[site.whole][:, positions]
    return held if site.kind is SiteKind.resid_pre else torch.zeros(len(held), len(positions), 12).double()


def count_tokens(monkeypatch, half):
    """(row, position) that each step's half is computed for."""
    counted, inner = {}, getattr(Cone, half)

    def counting(self, step, rows):
        counted[step] = counted.get(step, 0) + len(rows.row)
        return inner(self, step, rows)

    monkeypatch.setattr(Cone, half, counting)
    return counted


def test_only_the_cone_is_computed(monkeypatch):
    """One pair of 4 positions that differ everywhere, 3 layers, the last position read: counted by hand."""
    model, read = transformer(), reads("...x")
    base, other = runs(model, torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, 8]]))
    attention, mlp = count_tokens(monkeypatch, "_attend"), count_tokens(monkeypatch, "_add_mlp")
    list(Cone.of(model, base, other, read).reach(cells_of(model, "resid_pre")))
    # Into attention: the 4 vectors that a layer's patches replace, and 4 + 3 + 2 + 1 for each earlier layer.
    assert attention == {0: 4, 1: 4 + 10, 2: 4 + 20}
    # Out of it all later positions have changed; in the last layer only the read one goes on, in each of 3 · 4 rows.
    assert mlp == {0: 10, 1: 20, 2: 12}


def test_what_stands_before_the_first_difference_has_no_row(pair, monkeypatch):
    model, read = transformer(), reads("...x", "...x", "...x")
    base, other = runs(model, *pair)
    rows = list(Cone.of(model, base, other, read).reach(cells_of(model, "L1.resid_pre")))
    begun = {(int(cell), int(example)) for each in rows for cell, example in zip(each.cell, each.example, strict=True)}
    # The cell's number is its position: everywhere, from 1 on, and at 3 alone.
    assert begun == {(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1), (3, 2)}


def test_what_stands_after_the_last_read_has_no_row(pair):
    model, read = transformer(), reads(".x..", "..x.", "....")
    base, other = runs(model, *pair)
    rows = list(Cone.of(model, base, other, read).reach(cells_of(model, "L1.resid_pre,L1.v.h0")))
    reached = {(int(e), int(p)) for each in rows for e, p in zip(each.example[each.row], each.position, strict=True)}
    assert reached == {(0, 1), (1, 2)}
    assert all((each.x == each.x).all() for each in rows)


def test_an_activation_that_is_not_a_number_is_not_passed_over(pair):
    model, read = transformer(), reads("...x", "...x", "...x")
    base, other = runs(model, *pair)
    site = Site(kind=SiteKind.resid_pre, layer=1)
    broken = other.activations[site].clone()
    broken[0, 2, 3] = float("nan")
    other = replace(other, activations={**other.activations, site: broken})
    logits = logits_by_cone(model, [Cell(site=site, position=2)], base, other, read)
    assert logits[0].isnan().any(1).tolist() == [True, False, False]


def test_rows_that_never_begin_are_an_error(pair):
    model, read = transformer(), reads("...x", "...x", "...x")
    cone = Cone.of(model, *runs(model, *pair), read)
    beyond = cone._begin(6, {0: Cell(site=Site(kind=SiteKind.resid_post, layer=2), position=3)})
    with pytest.raises(WorkbenchError, match=r"Some patches did not fire: rows begin at depths \[7\], the model has 6"):
        cone._run({7: [beyond]})


@pytest.mark.parametrize(
    "changes", [{}, {"causal": False, "pad_token": PAD}, {"schedule": (0, 1, 2, 0)}, {"normalization": None}], ids=str
)
def test_a_plain_run_is_what_the_hooked_one_records(pair, changes):
    model = transformer(**changes)
    wanted = {site for site in model.sites if site.kind in PLAIN}
    read = reads("x..x", ".x..", "....")
    found, hooked = record_run(model, pair[0], wanted, read), run(model, pair[0], record=wanted)
    assert set(found.activations) == wanted
    torch.testing.assert_close(found.logits[read], hooked.logits[read], rtol=1e-10, atol=1e-12)
    assert found.logits[~read].isnan().all()
    for site in wanted:
        torch.testing.assert_close(found[site], hooked[site], rtol=1e-10, atol=1e-12, msg=str(site))


def test_a_run_takes_the_hooked_way_where_it_must(pair):
    model = transformer()
    wanted = {Site(kind=SiteKind.embed), Site(kind=SiteKind.pattern, layer=1), Site(kind=SiteKind.z, layer=0)}
    found = record_run(model, pair[0], wanted, pair[0] > 0)
    assert set(found.activations) == wanted
    with pytest.raises(WorkbenchError, match="Token 11 is outside the vocabulary"):
        record_run(model, pair[0] + 3, {Site(kind=SiteKind.z, layer=0)}, pair[0] > 0)


def test_cells_behind_the_last_residual_stream_are_outside():
    outside = Cell(site=Site(kind=SiteKind.ln_final_scale), position=0)
    assert not in_cone(outside)
    assert in_cone(Cell(site=Site(kind=SiteKind.embed), position=0))


@pytest.mark.parametrize("changes", [{}, {"tied": True, "biases": ()}, {"normalization": None}], ids=str)
def test_some_logits_are_those_of_the_whole_vocabulary(changes):
    model, rng = transformer(**changes), torch.Generator().manual_seed(2)
    x = torch.randn(5, 12, generator=rng, dtype=torch.float64)
    tokens, at = torch.randint(0, 9, (3, 2), generator=rng), torch.tensor([2, 0, 0, 1, 2])
    torch.testing.assert_close(some_logits(model, x, tokens, at), model.finish(x, {}).gather(1, tokens[at]))
