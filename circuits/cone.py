"""The causal cone of a patch: what it can change of a run, and nothing else.

A row is one cell patched in one example. It holds the residual stream only at the positions that it has changed so far;
everywhere else it is the cached run that was patched. So a row begins where its patch writes, spreads by attention
(forward, in a causal model), and is never computed elsewhere:

- A patch whose new value is the old one has no row: so, in a causal model, before the first differing token.
- A patch that amounts to another residual vector at one position begins as that one vector, after its own layer's part.
- A patch inside a norm or an attention goes through the hooked step once and begins after it.
- Positions after an example's last read are left out and, after the last attention, all that are not read.

All rows of a pass go through the model side by side, as one flat list of (row, position).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.instrument.passes import Fired, check_tokens, patch_edits, run
from workbench.instrument.sites import Site, SiteKind
from workbench.instrument.trace import FromTrace, Patch, Trace
from workbench.models.transformer import Block, Past, Transformer
from workbench.runtime import WorkbenchError

TOKENS = 2048
"""Changed (row, position) of one pass: enough to fill the cores, few enough that buffers are used again, not mapped."""
HIDDEN = 2**21
"""Neurons computed at a time: few enough to stay in the cache between the two matrices of an MLP."""
BEFORE = frozenset({SiteKind.embed, SiteKind.pos_embed, SiteKind.resid_pre})
BETWEEN = frozenset({SiteKind.z, SiteKind.attn_out, SiteKind.resid_mid})
AFTER = frozenset({SiteKind.pre, SiteKind.post, SiteKind.mlp_out, SiteKind.resid_post})
"""Kinds whose patch amounts to another residual vector before, in the middle of, or after their step."""
ATTENDED = (SiteKind.resid_pre, SiteKind.q, SiteKind.k, SiteKind.v)
"""What attention needs of the cached run where a row has not changed it."""
QKV: tuple[tuple[SiteKind, Literal["Q", "K", "V"]], ...] = ((SiteKind.q, "Q"), (SiteKind.k, "K"), (SiteKind.v, "V"))
PLAIN = (BEFORE | BETWEEN | AFTER | {kind for kind, _ in QKV}) - {SiteKind.embed, SiteKind.pos_embed}
"""Kinds that a forward pass comes by even if nothing is looked into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One thing to patch."""

    site: Site
    position: int | None = None
    dest: int | None = None
    src: int | None = None

    def patch(self, source: FromTrace, rows: Int[Tensor, " rows"]) -> Patch:
        """The patch of this cell in these rows."""
        positions = None if self.position is None else [self.position]
        return Patch(site=self.site, source=source, rows=rows, positions=positions, dest=self.dest, src=self.src)

    @property
    def start(self) -> int:
        """First position that the patch touches."""
        position = self.position if self.dest is None else self.dest
        assert position is not None
        return position


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Cells in examples, one a row, and the residual stream where they have changed it, as one flat list."""

    cell: Int[Tensor, " row"]
    example: Int[Tensor, " row"]
    row: Int[Tensor, " changed"]
    """In rising order."""
    position: Int[Tensor, " changed"]
    x: Float[Tensor, "changed d_model"]

    def at(self, chosen: Bool[Tensor, " changed"]) -> Rows:
        """The same rows with some of the positions that they have changed."""
        return replace(self, row=self.row[chosen], position=self.position[chosen], x=self.x[chosen])


Entries = Mapping[int, Sequence[Rows]]
"""Rows by the depth at which they begin, in half steps: 2l before attention, 2l + 1 before the MLP of step l."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cone:
    """One run that is patched, the run that patches it, and what can be skipped."""

    model: Transformer
    base: Trace
    other: Trace
    read: Bool[Tensor, "batch pos"]
    """Where logits are wanted."""
    matters: Bool[Tensor, "batch pos"]
    """Positions that can still reach a read."""
    differs: Bool[Tensor, "batch pos"]
    """Where the two runs can differ: in a causal model, from their first differing token on."""
    allowed: Bool[Tensor, "#batch dest src"]
    """Which position may attend to which."""

    @classmethod
    def of(cls, model: Transformer, base: Trace, other: Trace, read: Bool[Tensor, "batch pos"]) -> Cone:
        """The cone of patches from `other` into `base`; both hold `cached_sites` and the sites that are patched."""
        matters, differs = read, base.tokens.ne(other.tokens)
        if model.config.causal:
            matters, differs = matters.flip(1).cummax(1).values.flip(1), differs.cummax(1).values
        else:
            matters, differs = (mask.any(1, keepdim=True).expand_as(mask) for mask in (matters, differs))
        allowed = model.allowed(base.tokens)
        return cls(model=model, base=base, other=other, read=read, matters=matters, differs=differs, allowed=allowed)

    def reach(self, cells: Sequence[Cell]) -> Iterator[Rows]:
        """What each cell's patch makes of the last residual stream at the reads, in passes of bounded size."""
        with torch.no_grad():
            for chosen in self._passes(cells):
                yield self._run(self._entries({index: cells[index] for index in chosen}))

    def _passes(self, cells: Sequence[Cell]) -> Iterator[Sequence[int]]:
        """Cells that share a pass: those that change the same positions side by side, up to `TOKENS` of them."""
        n = self.read.shape[1]
        chosen, tokens = [], 0
        for index in sorted(range(len(cells)), key=lambda index: self._start(cells[index])):
            # Attention also holds what a row has not changed.
            needed = len(self.read) * max(n - self._start(cells[index]), n // 2)
            if chosen and tokens + needed > TOKENS:
                yield sorted(chosen)
                chosen, tokens = [], 0
            chosen.append(index)
            tokens += needed
        yield sorted(chosen)

    def _start(self, cell: Cell) -> int:
        return cell.start if self.model.config.causal else 0

    def _entries(self, cells: Mapping[int, Cell]) -> Entries:
        """The rows of some cells, where they begin."""
        vectors: dict[int, list[int]] = {}
        inner: dict[tuple[int, int], list[int]] = {}
        for index, cell in cells.items():
            depth = _depth(cell.site)
            if depth is None:
                inner.setdefault((_layer(cell.site), self._start(cell)), []).append(index)
            else:
                vectors.setdefault(depth, []).append(index)
        entries: dict[int, list[Rows]] = {}
        for depth, members in vectors.items():
            entries.setdefault(depth, []).append(self._begin(depth, {index: cells[index] for index in members}))
        for (step, start), members in inner.items():
            rows = self._step(step, start, {index: cells[index] for index in members})
            entries.setdefault(2 * step + 2, []).append(rows)
        return entries

    def _begin(self, depth: int, cells: Mapping[int, Cell]) -> Rows:
        """Rows that begin with another residual vector at one position."""
        changes = []
        for site, members in groupby(cells.values(), key=lambda cell: cell.site):
            positions = [cell.start for cell in members]
            new, old = (self._written(site, trace, positions) for trace in (self.other, self.base))
            changes.append((new - old).transpose(0, 1))
        change = torch.cat(changes)
        number, position = torch.tensor(list(cells)), torch.tensor([cell.start for cell in cells.values()])
        matters = self.differs & self._wanted(depth)
        # NaN is another value, too.
        member, example = (change.ne(0).any(-1) & matters.T[position]).nonzero().unbind(1)
        return Rows(
            cell=number[member],
            example=example,
            row=torch.arange(len(member)),
            position=position[member],
            x=self._stream(depth)[example, position[member]] + change[member, example],
        )

    def _written(self, site: Site, trace: Trace, positions: Sequence[int]) -> Float[Tensor, "batch positions d_model"]:
        """What a site's activation amounts to in the residual stream."""
        held = trace.activations[site.whole][:, positions]
        if site.kind is SiteKind.z:
            heads = slice(None) if site.head is None else slice(site.head, site.head + 1)
            return held[:, :, heads].flatten(2) @ self._weights(site).attn.W_O[heads].flatten(0, 1)
        if site.kind in (SiteKind.pre, SiteKind.post):
            mlp = self._weights(site).mlp
            assert mlp is not None
            neurons = slice(None) if site.neuron is None else slice(site.neuron, site.neuron + 1)
            active = mlp.activation(held[..., neurons]) if site.kind is SiteKind.pre else held[..., neurons]
            return active @ mlp.W_out[neurons]
        return held

    def _weights(self, site: Site) -> Block:
        return self.model.block(_layer(site))

    def _wanted(self, depth: int) -> Bool[Tensor, "batch pos"]:
        """Positions of the residual stream that matter at a depth: after the last attention only the reads."""
        return self.read if depth >= 2 * self.model.config.n_steps - 1 else self.matters

    def _stream(self, depth: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream of the run that is patched."""
        step, between = divmod(depth, 2)
        if step == self.model.config.n_steps:
            return self._held(SiteKind.resid_post, step - 1)
        return self._held(SiteKind.resid_mid if between else SiteKind.resid_pre, step)

    def _held(self, kind: SiteKind, step: int) -> Tensor:
        """What the run that is patched holds at a place."""
        return self.base.activations[Site(kind=kind, layer=step)]

    def _step(self, step: int, start: int, cells: Mapping[int, Cell]) -> Rows:
        """Rows whose patch lies inside a step, taken through that step as the hooked forward takes them."""
        examples = {index: self._differing(cell) for index, cell in cells.items()}
        patches, first = [], 0
        for index, example in examples.items():
            if len(example):
                rows = torch.arange(first, first + len(example))
                patches.append(cells[index].patch(FromTrace(self.other, example), rows))
                first += len(example)
        example = torch.cat(list(examples.values()))
        x = self._held(SiteKind.resid_pre, step)[example, start:]
        if patches:
            k, v = (self._held(kind, step)[example, :start] for kind in (SiteKind.k, SiteKind.v))
            fired = Fired(patches)
            edits = patch_edits(patches, batch=len(x), fired=fired, offsets={"pos": start, "dest": start})
            past = Past(k=k, v=v) if start else None
            x = self.model.advance(step, x, self.base.tokens[example], edits, past)
            fired.confirm()
        row, position = torch.ones(x.shape[:2], dtype=torch.bool).nonzero().unbind(1)
        cell = torch.cat([torch.full_like(members, index) for index, members in examples.items()])
        rows = Rows(cell=cell, example=example, row=row, position=position + start, x=x.flatten(0, 1))
        return rows.at(self._wanted(2 * step + 2)[rows.example[rows.row], rows.position])

    def _differing(self, cell: Cell) -> Int[Tensor, " differing"]:
        """Examples in which the cell's new value is another than the old one."""
        place = next(iter(cell.patch(FromTrace(self.other), torch.arange(len(self.read))).places(len(self.read))))
        old, new = (place.narrow(trace[cell.site.whole], {}) for trace in (self.base, self.other))
        return (old.ne(new).flatten(1).any(1) & self.differs[:, cell.start]).nonzero()[:, 0]

    def _run(self, entries: Entries) -> Rows:
        """All rows, from where they begin to the last residual stream at the reads."""
        none = torch.zeros(0, dtype=torch.long)
        rows = Rows(cell=none, example=none, row=none, position=none, x=self._stream(0)[none, none])
        begun = 0
        for depth in range(2 * self.model.config.n_steps + 1):
            new = entries.get(depth, ())
            rows, begun = _join([rows, *new]), begun + len(new)
            step, between = divmod(depth, 2)
            if len(rows.row) and step < self.model.config.n_steps:
                rows = self._add_mlp(step, rows) if between else self._attend(step, rows)
        if begun != sum(map(len, entries.values())):
            raise WorkbenchError(
                f"Some patches did not fire: rows begin at depths {sorted(entries)}, the model has "
                f"{2 * self.model.config.n_steps} half steps. The result would be that of an unpatched run."
            )
        return rows.at(self.read[rows.example[rows.row], rows.position])

    def _attend(self, step: int, rows: Rows) -> Rows:
        """The rows after a step's attention: every position that attends to a changed one has changed."""
        weights, width = self.model.block(step), rows.x.shape[1]
        row, position = self._spread(step, rows).nonzero().unbind(1)
        if not len(row):
            return rows.at(torch.zeros_like(rows.row, dtype=torch.bool))
        normed = rows.x if weights.ln1 is None else weights.ln1(rows.x)
        q, k, v = (weights.attn.project(normed, name).flatten(1) for _, name in QKV)
        first = int(rows.position.min()) if self.model.config.causal else 0
        near = self._filled(step, rows, {SiteKind.resid_pre: rows.x, SiteKind.q: q}, first)
        z = self._mix(near[..., width:], self._filled(step, rows, {SiteKind.k: k, SiteKind.v: v}, 0), rows.example)
        at = row * near.shape[1] + position - first
        x = near.flatten(0, 1)[:, :width].index_select(0, at) + weights.attn.merge(z.flatten(0, 1).index_select(0, at))
        return replace(rows, row=row, position=position, x=x)

    def _filled(
        self, step: int, rows: Rows, new: Mapping[SiteKind, Float[Tensor, "changed _"]], first: int
    ) -> Float[Tensor, "row near features"]:
        """From a position on, the rows' own values where they have changed and the cached run's elsewhere."""
        held = torch.cat([self._held(kind, step)[:, first:].flatten(2) for kind in new], 2)
        whole = held.index_select(0, rows.example)
        at = rows.row * whole.shape[1] + rows.position - first
        whole.flatten(0, 1).index_copy_(0, at, torch.cat(list(new.values()), 1))
        return whole

    def _spread(self, step: int, rows: Rows) -> Bool[Tensor, "row pos"]:
        """Positions that a step's attention changes and that matter afterwards."""
        changed = self.matters.new_zeros(len(rows.cell), self.matters.shape[1])
        changed[rows.row, rows.position] = True
        reached = changed.cummax(1).values if self.model.config.causal else changed.any(1, keepdim=True)
        return reached & self._wanted(2 * step + 1)[rows.example]

    def _mix(
        self,
        q: Float[Tensor, "row dest q"],
        kv: Float[Tensor, "row src kv"],
        example: Int[Tensor, " row"],
    ) -> Float[Tensor, "row dest head d_head"]:
        """The heads' outputs at the last positions, before they are merged."""
        heads = (self.model.config.n_heads, self.model.config.d_head)
        k, v = kv.unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        allowed = self.allowed if len(self.allowed) == 1 else self.allowed[example]
        allowed = allowed[:, None, allowed.shape[1] - q.shape[1] :]
        z = functional.scaled_dot_product_attention(q.unflatten(2, heads).transpose(1, 2), k, v, attn_mask=allowed)
        return z.transpose(1, 2)

    def _add_mlp(self, step: int, rows: Rows) -> Rows:
        """The rows after a step's MLP, which changes no further position."""
        weights = self.model.block(step)
        mlp = weights.mlp
        if mlp is None:
            return rows
        after = [
            part + mlp(part if weights.ln2 is None else weights.ln2(part))
            for part in rows.x.split(max(1, HIDDEN // self.model.config.d_mlp))
        ]
        return replace(rows, x=torch.cat(after))


def record_run(
    model: Transformer, tokens: Int[Tensor, "batch pos"], wanted: Set[Site], read: Bool[Tensor, "batch pos"]
) -> Trace:
    """What `run` records, without the hooked forward if only `PLAIN` kinds are wanted.

    Logits are then computed where they are read alone, and are no numbers elsewhere.
    """
    if any(site.kind not in PLAIN for site in wanted):
        return run(model, tokens, record=wanted)
    check_tokens(tokens, model)
    kept: dict[Site, Tensor] = {}

    def keep(kind: SiteKind, activation: Tensor) -> Tensor:
        site = Site(kind=kind, layer=step)
        if site in wanted:
            kept[site] = activation
        return activation

    with torch.no_grad():
        x, allowed = model.start(tokens, {}), model.allowed(tokens)[:, None]
        for step in range(model.config.n_steps):
            weights = model.block(step)
            normed = keep(SiteKind.resid_pre, x) if weights.ln1 is None else weights.ln1(keep(SiteKind.resid_pre, x))
            q, k, v = (keep(kind, weights.attn.project(normed, name)).transpose(1, 2) for kind, name in QKV)
            z = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + keep(SiteKind.attn_out, weights.attn.merge(keep(SiteKind.z, z.transpose(1, 2))))
            keep(SiteKind.resid_mid, x)
            if weights.mlp is not None:
                pre = keep(SiteKind.pre, weights.mlp.read(x if weights.ln2 is None else weights.ln2(x)))
                x = x + keep(SiteKind.mlp_out, weights.mlp.write(keep(SiteKind.post, weights.mlp.activation(pre))))
            keep(SiteKind.resid_post, x)
        logits = x.new_full((*tokens.shape, model.config.d_vocab_out), torch.nan)
        logits[read] = model.finish(x[read], {})
    return Trace(tokens=tokens, logits=logits, activations=kept, provenance=model.provenance)


def cached_sites(model: Transformer) -> list[Site]:
    """What a cone needs of the run that is patched."""
    last = Site(kind=SiteKind.resid_post, layer=model.config.n_steps - 1)
    kinds = (*ATTENDED, SiteKind.resid_mid)
    return [last, *(Site(kind=kind, layer=layer) for layer in range(model.config.n_steps) for kind in kinds)]


def in_cone(cell: Cell) -> bool:
    """Whether a cell stands before the last residual stream, so that a cone can begin there."""
    return cell.site.kind.layered or cell.site.kind in BEFORE


def some_logits(
    model: Transformer, x: Float[Tensor, "rows d_model"], tokens: Int[Tensor, "reads picked"], at: Int[Tensor, " rows"]
) -> Float[Tensor, "rows picked"]:
    """Logits of the tokens picked at each row's read, without the rest of the vocabulary."""
    normed = x if model.final_norm is None else model.final_norm(x)
    # Columns lie scattered in memory: each is fetched once, not once a row.
    columns = model.W_U.T[tokens]
    logits = torch.einsum("rd,rpd->rp", normed, columns[at])
    return logits if model.unembed.b_U is None else logits + model.unembed.b_U[tokens[at]]


def _depth(site: Site) -> int | None:
    """Half steps before the residual stream that a patch amounts to a change of; None if it amounts to none."""
    for kinds, half in ((BEFORE, 0), (BETWEEN, 1), (AFTER, 2)):
        if site.kind in kinds:
            return 2 * (site.layer or 0) + half
    return None


def _layer(site: Site) -> int:
    assert site.layer is not None
    return site.layer


def _join(parts: Sequence[Rows]) -> Rows:
    """Rows one after another."""
    if len(parts) == 1:
        return parts[0]
    first, rows = 0, []
    for part in parts:
        rows.append(part.row + first)
        first += len(part.cell)
    cell, example, position, x = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("cell", "example", "position", "x")
    )
    return Rows(cell=cell, example=example, row=torch.cat(rows), position=position, x=x)
