"""The graph files of EAP-IG and MIB, as JSON and as torch's `.pt` (Hanna et al. 2024; Mueller et al. 2025).

The format knows models of GPT-2's shape: one input, in each layer heads and then one MLP, edges over all positions. Its
matrices hold the writers in their order by the readers in theirs, and these are the orders of our own graph. A model
without MLPs is written as one whose MLPs have edges of score 0, all of them left out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from circuits.graph import LOGITS, CircuitGraph
from circuits.own_files import check_finite, scores_by_edge
from workbench.runtime import WorkbenchError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EapGraph:
    """What the format says of every edge, MLPs included."""

    graph: CircuitGraph
    score: Float[Tensor, " edge"]
    keep: Bool[Tensor, " edge"]

    def config(self) -> dict[str, object]:
        """The model's shape."""
        graph = self.graph
        sizes = {"n_layers": graph.n_steps, "n_heads": graph.n_heads}
        return {**sizes, "parallel_attn_mlp": False, "d_model": graph.d_model}

    def nodes(self) -> Bool[Tensor, " writer"]:
        """Writers that have a kept edge on either side; the input has none before it."""
        matrix = self.matrix(self.keep)
        of_node = {node.name: place for place, node in enumerate(self.graph.writers)}
        hears = torch.zeros(len(of_node), dtype=torch.bool)
        hears[0] = True
        for port, heard in zip(self.graph.ports, matrix.any(0).tolist(), strict=True):
            if heard and port.node.part != LOGITS:
                hears[of_node[port.node.name]] = True
        return hears & matrix.any(1)

    def matrix(self, values: Shaped[Tensor, " edge"]) -> Shaped[Tensor, "writer port"]:
        """Values of edges by writer and reader; zero where there is no edge."""
        found = values.new_zeros(len(self.graph.writers), len(self.graph.ports))
        found[_places(self.graph)] = values
        return found

    def json(self) -> bytes:
        """The file as JSON."""
        names = [node.name for node in self.graph.writers]
        nodes = {name: {"in_graph": kept} for name, kept in zip(names, self.nodes().tolist(), strict=True)}
        marks = zip(self.graph.edges, self.score.tolist(), self.keep.tolist(), strict=True)
        content = {
            "cfg": self.config(),
            "nodes": {**nodes, LOGITS: {"in_graph": True}},
            "edges": {edge.name: {"score": score, "in_graph": kept} for edge, score, kept in marks},
        }
        return json.dumps(content, allow_nan=False).encode()

    def pt(self) -> bytes:
        """The file as torch writes it."""
        content = {
            "cfg": self.config(),
            "src_nodes": [node.name for node in self.graph.writers],
            "dst_nodes": [port.name for port in self.graph.ports],
            "edges_scores": self.matrix(self.score),
            "edges_in_graph": self.matrix(self.keep),
            "nodes_in_graph": self.nodes(),
        }
        stream = io.BytesIO()
        torch.save(content, stream)
        return stream.getvalue()


def encode(graph: CircuitGraph, score: Float[Tensor, " edge"], keep: Bool[Tensor, " edge"]) -> EapGraph:
    """Scores and kept edges of a graph, with the MLPs that it may lack.

    Raises:
        WorkbenchError: the format cannot hold the graph.
    """
    whole = with_mlps(graph)
    places = _places_in(whole, graph)
    scores = torch.zeros(len(whole.edges), dtype=score.dtype)
    kept = torch.zeros(len(whole.edges), dtype=torch.bool)
    scores[places], kept[places] = score.detach().cpu(), keep.cpu()
    return EapGraph(graph=whole, score=scores, keep=kept)


def decode(content: Mapping[str, Any], graph: CircuitGraph) -> EapGraph:
    """Scores and kept edges of this graph in a file's content, which has been read but not looked at.

    Raises:
        WorkbenchError: of another model, of edges that the graph lacks, or with scores of nodes or neurons.
    """
    whole = with_mlps(graph)
    _check_config(content["cfg"], whole)
    found = _from_names(content, whole) if "edges" in content else _from_matrices(content, whole)
    places = _places_in(whole, graph)
    used = found.keep | (found.score != 0)
    used[places] = False
    if used.any():
        raise WorkbenchError(
            f"It has {int(used.sum())} edges of MLPs, such as {whole.names(used)[0]}, and this model has no MLP "
            "there. It belongs to another model."
        )
    return EapGraph(graph=graph, score=found.score[places], keep=found.keep[places])


def with_mlps(graph: CircuitGraph) -> CircuitGraph:
    """The graph of the format that holds this one: the same, with an MLP in each layer.

    Raises:
        WorkbenchError: there is none, with every reason.
    """
    reasons = {
        f"its input is split into {' and '.join(graph.inputs)}": graph.inputs != ("input",),
        f"it tells apart {len(graph.columns)} columns of positions": bool(graph.columns),
        "it splits MLPs into clusters of neurons": any(graph.split(step) for step in range(graph.n_steps)),
        f"its blocks run as {graph.schedule} and not each once": graph.schedule is not None,
    }
    if given := ", ".join(reason for reason, holds in reasons.items() if holds):
        raise WorkbenchError(
            "The EAP format has one node for all inputs, one for each head and each MLP of a layer, and cannot hold "
            f"this graph: {given}. Use .json, which holds all."
        )
    clusters = (((),),) * graph.n_steps
    return graph if graph.clusters == clusters else replace(graph, clusters=clusters)


def read_tensors(path: Path) -> dict[str, Any]:
    """What torch wrote, with nothing in it run.

    Raises:
        WorkbenchError: it cannot be read or is no dictionary.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    # Out of a damaged file torch's reader raises nearly anything: IndexError, UnicodeDecodeError, AssertionError, …
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkbenchError(f"Cannot read {path} as a graph of EAP-IG: {reason}") from error
    if not isinstance(content, dict):
        raise WorkbenchError(f"{path} holds a {type(content).__name__}, not a graph of EAP-IG.")
    return content


def _from_names(content: Mapping[str, Any], whole: CircuitGraph) -> EapGraph:
    nodes, edges = content["nodes"], content["edges"]
    known = {LOGITS, *(node.name for node in whole.writers)}
    if unknown := sorted(set(nodes) - known):
        raise WorkbenchError(f"It names node {unknown[0]!r}, which is not in this model.")
    _check_edges_alone(any({"score", "neurons", "neurons_scores"} & set(node) for node in nodes.values()))
    marks = list(edges.values())
    if not all(isinstance(mark["in_graph"], bool) for mark in marks):
        raise TypeError("in_graph must be true or false")
    # MIB's binary circuits may do without scores.
    scored = any("score" in mark for mark in marks)
    scores = {name: mark["score"] if scored else 0.0 for name, mark in edges.items()}
    return EapGraph(
        graph=whole,
        score=scores_by_edge(scores, whole, torch.float64),
        keep=whole.mask(name for name, mark in edges.items() if mark["in_graph"]),
    )


def _from_matrices(content: Mapping[str, Any], whole: CircuitGraph) -> EapGraph:
    _check_edges_alone(bool({"nodes_scores", "neurons_in_graph", "neurons_scores"} & set(content)))
    names = {"src_nodes": [node.name for node in whole.writers], "dst_nodes": [port.name for port in whole.ports]}
    for key, expected in names.items():
        if list(content[key]) != expected:
            raise WorkbenchError(f"It orders its {key} in another way than EAP-IG, so that no edge has its place.")
    n_writers, n_ports = len(whole.writers), len(whole.ports)
    shapes = {
        "edges_scores": [n_writers, n_ports],
        "edges_in_graph": [n_writers, n_ports],
        "nodes_in_graph": [n_writers],
    }
    for key, expected in shapes.items():
        if list(content[key].shape) != expected:
            raise WorkbenchError(f"It has {key} of shape {list(content[key].shape)}; for this model it is {expected}.")
    places = _places(whole)
    score = content["edges_scores"][places]
    check_finite(score, whole)
    return EapGraph(graph=whole, score=score, keep=content["edges_in_graph"][places].bool())


def _places(graph: CircuitGraph) -> tuple[Tensor, Tensor]:
    """Row and column of each edge in the format's matrices."""
    return torch.tensor([edge.writer for edge in graph.edges]), torch.tensor([edge.port for edge in graph.edges])


def _places_in(whole: CircuitGraph, graph: CircuitGraph) -> Tensor:
    return torch.tensor([whole.index[edge.name] for edge in graph.edges])


def _check_config(config: Mapping[str, Any], graph: CircuitGraph) -> None:
    if config["parallel_attn_mlp"]:
        raise WorkbenchError("It is of a model whose heads and MLPs run in parallel; this one runs them in turn.")
    theirs = {name: config[name] for name in ("n_layers", "n_heads", "d_model")}
    mine = {"n_layers": graph.n_steps, "n_heads": graph.n_heads, "d_model": graph.d_model}
    if theirs != mine:
        raise WorkbenchError(f"It belongs to another model's graph: it says {theirs}, this one has {mine}.")


def _check_edges_alone(more: bool) -> None:
    if more:
        raise WorkbenchError("It scores nodes or neurons. Only graphs at the level of edges can be read.")
