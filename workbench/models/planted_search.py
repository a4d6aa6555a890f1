"""A model wired by hand that searches a graph by merging paths: prompts of graph search, paths of up to three edges.

Layer 0 binds the ends of each edge by position: the row of a source takes the token of the row after it, that of a
target the token of the row before, and the last row that of the goal, two rows before it (`partner`). Layer 1 doubles
by matching tokens: the row of an edge u→v attends to all edges that leave v and takes their other ends (`far`), so that
it now holds paths of two edges; the last row attends to all edges that enter the goal and takes where they come from.
Layer 2 reads off: the last row attends to an edge that leaves the start and shares a vertex with what the last row has
gathered, and takes its target: the next vertex. Attention alone, no LayerNorm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.tasks.graph_prompts import EDGE_LENGTH, Layout
from workbench.tasks.graph_search import TAIL

SHARP = 20.0
"""Attention score by which a row is preferred."""
GAIN = 10.0
"""Logits of a whole answer."""
Spaces = Mapping[str, slice]


def path_doubling(layout: Layout) -> Transformer:
    """The model for prompts of a layout."""
    size, n_vertices = layout.size, layout.n_names
    sizes = {"token": n_vertices, "position": size, "source": 1, "target": 1, "end": 1, "sink": 1}
    sizes |= {"partner": n_vertices, "far": n_vertices, "out": n_vertices}
    spaces, width = {}, 0
    for name, each in sizes.items():
        spaces[name] = slice(width, width + each)
        width += each
    config = ModelConfig(
        n_layers=3,
        d_model=width,
        n_heads=1,
        d_head=width,
        d_mlp=0,
        n_ctx=size,
        d_vocab=len(layout.vocab),
        d_vocab_out=len(layout.vocab),
        causal=False,
        pad_token=layout.pad,
        biases=(),
    )
    model = Transformer(config, generator=generator(0, "planted search"))
    state = model.state_dict()
    for tensor in state.values():
        tensor.zero_()
    _embed(state, spaces, size, n_vertices)
    _bind(state, spaces, size)
    _double(state, spaces)
    _read_off(state, spaces, layout.n_edges)
    for layer in range(config.n_layers):
        # Scores are divided by the root of the head's width.
        state[f"weights.{layer}.attn.W_Q"] *= math.sqrt(width)
    return model


def _embed(state: Mapping[str, Tensor], spaces: Spaces, size: int, n_vertices: int) -> None:
    """A direction for each vertex and position; marks for sources, targets, the last row, and a row to rest on."""
    state["embed.W_E"][1 : n_vertices + 1, spaces["token"]] = torch.eye(n_vertices)
    positions = state["pos_embed.W_pos"]
    positions[:, spaces["position"]] = torch.eye(size)
    for mark, rows in (("source", _sources(size)), ("target", _targets(size))):
        positions[rows, spaces[mark]] = 1
    positions[size - 1, spaces["end"]] = 1
    positions[size - 2, spaces["sink"]] = 1
    state["unembed.W_U"][spaces["out"], 1 : n_vertices + 1] = GAIN * torch.eye(n_vertices)


def _sources(size: int) -> list[int]:
    return list(range(size - len(TAIL) - 2, 0, -EDGE_LENGTH))


def _targets(size: int) -> list[int]:
    return list(range(size - len(TAIL) - 1, 1, -EDGE_LENGTH))


def _bind(state: Mapping[str, Tensor], spaces: Spaces, size: int) -> None:
    """Sources attend to the next row, targets to the one before, the last row to the goal, all others to themselves."""
    looks_at = torch.arange(size)
    looks_at[_sources(size)] += 1
    looks_at[_targets(size)] -= 1
    looks_at[size - 1] = size - 3
    query, key = _attend(state, 0)
    query[spaces["position"], :size] = SHARP * torch.eye(size)[looks_at]
    key[spaces["position"], :size] = torch.eye(size)
    _copy(state, 0, spaces, "token", "partner")


def _double(state: Mapping[str, Tensor], spaces: Spaces) -> None:
    """Sources attend to sources that are their partner, the last row to targets that are; where none is, to the sink.

    A row that matches and bears the mark gets twice SHARP, the sink half as much more than SHARP, any other SHARP.
    """
    query, key = _attend(state, 1)
    n = spaces["token"].stop
    query[spaces["partner"], :n] = SHARP * torch.eye(n)
    key[spaces["token"], :n] = torch.eye(n)
    for row, (who, whom) in enumerate((("source", "source"), ("end", "target")), start=n):
        query[spaces[who], row] = SHARP
        key[spaces[whom], row] = 1
    query[spaces["position"], n + 2] = 1.5 * SHARP
    key[spaces["sink"], n + 2] = 1
    _copy(state, 1, spaces, "partner", "far")


def _read_off(state: Mapping[str, Tensor], spaces: Spaces, n_edges: int) -> None:
    """The last row attends to sources that are the start, by how much of what it gathered they hold.

    What a row gathered is spread over as many vertices as it attended to, fewer than edges fit: one shared vertex is
    worth SHARP at least, and all of them less than being a source and the start.
    """
    match = SHARP * n_edges**2
    query, key = _attend(state, 2)
    n = spaces["token"].stop
    query[spaces["token"], :n] = 5 * match * torch.eye(n)
    key[spaces["token"], :n] = torch.eye(n)
    for name in ("partner", "far"):
        query[spaces[name], n : 2 * n] = match * torch.eye(n)
        key[spaces[name], n : 2 * n] = torch.eye(n)
    query[spaces["end"], 2 * n] = 5 * match
    key[spaces["source"], 2 * n] = 1
    _copy(state, 2, spaces, "partner", "out")


def _attend(state: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """Weights of queries and keys of a layer, to write into."""
    return state[f"weights.{layer}.attn.W_Q"][0], state[f"weights.{layer}.attn.W_K"][0]


def _copy(state: Mapping[str, Tensor], layer: int, spaces: Spaces, source: str, into: str) -> None:
    """Values are what stands in some directions, written into others."""
    n = spaces[into].stop - spaces[into].start
    state[f"weights.{layer}.attn.W_V"][0, spaces[source], :n] = torch.eye(n)
    state[f"weights.{layer}.attn.W_O"][0, :n, spaces[into]] = torch.eye(n)
