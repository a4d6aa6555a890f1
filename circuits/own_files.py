"""Circuits and scores in the workbench's own JSON, which loses nothing: graph, terms, method, rule, numbers.

Edges are named, numbers are written so that they are read back to the last bit, and the graph comes with its key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from circuits.circuit import Circuit, EdgeScores, Terms
from circuits.graph import CircuitGraph, graph_from_json
from workbench.models.known import ABLATIONS
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tasks.base import check_choice

FORMAT = "interp-workbench circuit"
VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def to_json(item: Circuit | EdgeScores) -> bytes:
    """The file's content.

    Raises:
        WorkbenchError: the scores of examples are not all finite; JSON has no such numbers.
    """
    circuit, scores = (item, item.scores) if isinstance(item, Circuit) else (None, item)
    if scores is not None and scores.examples is not None and not bool(scores.examples.isfinite().all()):
        raise WorkbenchError("The scores of some examples are not finite. Look at the model's logits.")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "key": item.graph.key,
        "graph": item.graph.to_json(),
        "circuit": None if circuit is None else _fields_json(circuit),
        "scores": None if scores is None else _fields_json(scores),
    }
    return json.dumps(content, allow_nan=False).encode()


def from_json(content: Mapping[str, Any], graph: CircuitGraph | None) -> Circuit | EdgeScores:
    """The circuit or scores in a file's content, which has been read but not looked at.

    Raises:
        WorkbenchError: the file is of another version or damaged, or its graph is not the one given.
    """
    if content["format"] != FORMAT or content["version"] != VERSION:
        raise WorkbenchError(
            f"It is {content['format']!r} of version {content['version']}; this version of the workbench reads "
            f"{FORMAT!r} of version {VERSION}."
        )
    own = graph_from_json(content["graph"])
    if own.key != content["key"]:
        raise WorkbenchError(f"It is damaged: its graph is {own.key} and not {content['key']}. Export it again.")
    if graph is not None:
        graph.check_same(own)
        own = graph
    scores = None if content["scores"] is None else EdgeScores(graph=own, **_fields_from(content["scores"], own))
    if content["circuit"] is not None:
        return Circuit(graph=own, scores=scores, **_fields_from(content["circuit"], own))
    if scores is None:
        raise WorkbenchError("It holds neither a circuit nor scores. Export it again.")
    return scores


def scores_by_edge(scores: Mapping[str, Any], graph: CircuitGraph, dtype: torch.dtype) -> Tensor:
    """Scores by edge name in the graph's order.

    Raises:
        WorkbenchError: an edge is unknown or lacks, or a score is not a finite number.
    """
    graph.mask(scores)
    if missing := [edge.name for edge in graph.edges if edge.name not in scores]:
        raise WorkbenchError(f"It lacks {len(missing)} of {len(graph.edges)} edges, such as {missing[0]}.")
    score = torch.tensor([scores[edge.name] for edge in graph.edges], dtype=dtype)
    check_finite(score, graph)
    return score


def check_finite(score: Tensor, graph: CircuitGraph) -> None:
    """Raise a WorkbenchError that names an edge whose score is not a finite number."""
    if lost := graph.names(~score.isfinite()):
        raise WorkbenchError(
            f"It holds {len(lost)} scores that are not finite numbers, such as that of {lost[0]}. Compute them again."
        )


def _fields_json(item: Circuit | EdgeScores) -> dict[str, object]:
    """Every field but the graph, which both share, and the scores, which lie beside the circuit."""
    return {
        field.name: _field_json(field.name, getattr(item, field.name), item.graph)
        for field in fields(item)
        if field.name not in ("graph", "scores")
    }


def _field_json(name: str, value: object, graph: CircuitGraph) -> object:
    if isinstance(value, Terms | Provenance):
        return asdict(value)
    if not isinstance(value, Tensor):
        # What was imported took a time that is not known: not a number, which JSON does not have.
        return None if isinstance(value, float) and math.isnan(value) else value
    if value.dtype == torch.bool:
        return graph.names(value)
    values = dict(zip(graph.index, value.tolist(), strict=True)) if value.ndim == 1 else value.tolist()
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": values}


def _fields_from(content: Mapping[str, Any], graph: CircuitGraph) -> dict[str, Any]:
    read: dict[str, Callable[[Any], object]] = {
        "terms": _terms,
        "provenance": lambda said: Provenance(**{**said, "parents": tuple(said["parents"])}),
        "keep": graph.mask,
        "live": graph.mask,
        "score": lambda said: scores_by_edge(said["values"], graph, DTYPES[said["dtype"]]),
        "examples": lambda said: said and _examples(said, graph),
        "seconds": lambda said: math.nan if said is None else said,
    }
    return {name: read[name](said) if name in read else said for name, said in content.items()}


def _examples(content: Mapping[str, Any], graph: CircuitGraph) -> Tensor:
    return torch.tensor(content["values"], dtype=DTYPES[content["dtype"]]).view(-1, len(graph.edges))


def _terms(content: Mapping[str, Any]) -> Terms:
    check_choice("ablation", content["ablation"], ABLATIONS)
    check_choice("direction", content["better"], ("higher", "lower"))
    return Terms(**content)
