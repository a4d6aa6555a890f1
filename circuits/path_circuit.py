"""The operations of a traced input as a circuit of the model's graph, to be drawn and exported like any other.

An edge of that graph is what one component writes at a position and another reads there. An operation is finer: one row
of one head's pattern. So the circuit holds the way that sets take, and no more: the values that merged operations copy,
the MLPs of the rows between them, and what the last row hands to the logits. Where a head looks is not in it (queries
and keys are left out), so that it is no circuit to ablate the rest of: `path_ablation` does that, entry by entry.
"""

from __future__ import annotations

import torch

from circuits.circuit import Circuit, Terms
from circuits.graph import LOGITS, Node, Port, circuit_graph
from circuits.path_merging import PathTrace
from workbench.models.transformer import Transformer


def merge_circuit(model: Transformer, trace: PathTrace) -> Circuit:
    """The strict merge of one input: columns are positions, named by position and token."""
    prompt = trace.prompt
    names = prompt.layout.vocab
    columns = [f"{position}:{names[int(token)]}" for position, token in enumerate(prompt.padded)]
    graph = circuit_graph(model, columns=columns)
    ways = _Ways(trace=trace, position=prompt.position.tolist())
    keep = [
        ways.writes(graph.writers[edge.writer], edge.column) and ways.reads(graph.ports[edge.port], edge.column)
        for edge in graph.edges
    ]
    return Circuit(
        graph=graph,
        keep=torch.tensor(keep),
        terms=Terms(ablation="zero", metric="lead of the answer", unit="logits", better="higher", n=1),
        method="path-merging",
        rule="values of operations whose merge has a cause",
        provenance=trace.provenance,
    )


class _Ways:
    """Who writes and who reads on the way of the sets."""

    def __init__(self, *, trace: PathTrace, position: list[int]) -> None:
        operations, held = trace.strict.operations, trace.strict.held
        self._heads = {(each.layer, position[each.dest]) for each in operations}
        self._values = {(each.layer, position[each.src]) for each in operations}
        self._inputs = {position[row] for row in held[0]}
        self._mlps = {(layer, position[row]) for layer, rows in enumerate(held[1:]) for row in rows}
        self._last = position[-1]

    def writes(self, node: Node, column: int) -> bool:
        """Whether a set that flows into the answer is carried by what the node writes there."""
        if node.part == "input":
            return column in self._inputs
        return (node.step, column) in (self._heads if node.part == "head" else self._mlps)

    def reads(self, port: Port, column: int) -> bool:
        """Whether the port takes in such a set there."""
        if port.node.part == LOGITS:
            return column == self._last
        if port.slot is None:
            return (port.node.step, column) in self._mlps
        return port.slot == "v" and (port.node.step, column) in self._values
