"""Circuits for graph tools: GraphML with every edge, DOT with the edges that are kept."""

from __future__ import annotations

import io

from circuits.circuit import Circuit, EdgeScores
from circuits.graph import CircuitGraph, Edge

# Okabe and Ito's blue and vermilion: told apart by all readers.
HELPS, HURTS, PLAIN = "#0072B2", "#D55E00", "#000000"


def graphml(item: Circuit | EdgeScores) -> bytes:
    """All nodes and edges; the edges with their slot, score and whether they are kept, where that is known."""
    import networkx as nx

    graph, scores = item.graph, item.scores if isinstance(item, Circuit) else item
    drawn = nx.MultiDiGraph(key=graph.key, method=item.method, ablation=item.terms.ablation, metric=item.terms.metric)
    for place, edge in enumerate(graph.edges):
        writer, reader = graph.writers[edge.writer], graph.ports[edge.port]
        drawn.add_node(edge.source, part=writer.part, step=writer.step)
        drawn.add_node(_reader(graph, edge), part=reader.node.part, step=reader.node.step)
        said: dict[str, object] = {"name": edge.name, "slot": reader.slot or ""}
        if scores is not None:
            said["score"] = float(scores.score[place])
        if isinstance(item, Circuit):
            said["kept"] = bool(item.keep[place])
        drawn.add_edge(edge.source, _reader(graph, edge), **said)
    stream = io.BytesIO()
    nx.write_graphml(drawn, stream)
    return stream.getvalue()


def dot(item: Circuit | EdgeScores) -> str:
    """A drawing from the inputs up to the logits, for Graphviz: of a circuit what it keeps, of scores all edges.

    Width is the size of the score; blue edges help, vermilion ones hurt.
    """
    graph, scores = item.graph, item.scores if isinstance(item, Circuit) else item
    kept = item.keep.tolist() if isinstance(item, Circuit) else [True] * len(graph.edges)
    caption = (
        f"{sum(kept)} of {len(graph.edges)} edges, {item.method}: {item.terms.metric}, {item.terms.ablation} ablation"
    )
    lines = ["digraph circuit {", f"  label={_quoted(caption)};", "  rankdir=BT;", "  node [shape=box];"]
    importance = None if scores is None else scores.importance.tolist()
    largest = max((abs(value) for value in importance or ()), default=0.0)
    for place, edge in enumerate(graph.edges):
        if not kept[place]:
            continue
        marks = {"label": graph.ports[edge.port].slot or "", "color": PLAIN, "penwidth": "1"}
        if importance is not None:
            marks["color"] = HELPS if importance[place] >= 0 else HURTS
            marks["penwidth"] = f"{0.5 + 3.5 * abs(importance[place]) / (largest or 1):.3g}"
            marks["tooltip"] = f"{edge.name}: {importance[place]:.4g}"
        said = ", ".join(f"{name}={_quoted(value)}" for name, value in marks.items())
        lines.append(f"  {_quoted(edge.source)} -> {_quoted(_reader(graph, edge))} [{said}];")
    return "\n".join([*lines, "}", ""])


def _reader(graph: CircuitGraph, edge: Edge) -> str:
    """The node that reads, without its slot."""
    slot = graph.ports[edge.port].slot
    return edge.target if slot is None else edge.target.replace(f"<{slot}>", "", 1)


def _quoted(text: str) -> str:
    """A string of DOT, in which quotes and the backslashes of labels are escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
