"""The graph of a model: who writes to the residual stream, who reads from it, and every edge between the two.

Writers are the inputs, each head, and each MLP (or cluster of its neurons). Readers are each head's q, k and v, each
MLP (or cluster), and the logits. Because the residual stream is a sum, a reader's input is the sum of what the writers
before it wrote, and an edge is one term of one such sum (Elhage et al. 2021; Wang et al. 2022; Conmy et al. 2023). A
graph is built from the model: its layers are the steps that are executed, so a block that runs twice has two of each.

Names are those of the EAP format: `input->a0.h1<k>`, `a0.h1->m0`, `m0->logits`; a split graph adds `embed` and `pos`,
`m0.c2`, and `@column`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.instrument.sites import EdgeReadable, SiteKind, Slot
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError, nearest
from workbench.store import digest

SLOTS: tuple[Slot, ...] = get_args(Slot)
LOGITS = "logits"
Part = Literal["input", "head", "mlp", "logits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A component: one of the inputs, a head, an MLP or a cluster of its neurons, or the logits."""

    name: str
    part: Part
    step: int
    """Layer as executed; -1 for inputs, the number of steps for the logits."""
    index: int = 0
    """Which input, head or cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """Where a node reads: a head has three, an MLP or the logits one."""

    node: Node
    slot: Slot | None
    n_writers: int
    """How many writers come before it: the first ones of the graph."""

    @property
    def name(self) -> str:
        """The node's name, with the slot of a head."""
        return self.node.name if self.slot is None else f"{self.node.name}<{self.slot}>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """One writer's part of what one port reads, everywhere or in one column of positions."""

    writer: int
    port: int
    column: int
    source: str
    target: str

    @property
    def name(self) -> str:
        """`writer->reader`."""
        return f"{self.source}->{self.target}"


@dataclass(frozen=True, kw_only=True, eq=False)
class CircuitGraph:
    """Every edge of a model. A value that depends on the model's shape alone, not on its weights."""

    n_heads: int
    n_steps: int
    d_model: int
    inputs: tuple[str, ...]
    """`("input",)`, or `("embed", "pos")` where token and position are told apart."""
    clusters: tuple[tuple[tuple[int, ...], ...], ...]
    """For each step the clusters of its MLP's neurons: none without an MLP, one empty cluster for an MLP left whole."""
    schedule: tuple[int, ...] | None = None
    """Block that runs at each step, where that is not each once."""
    columns: tuple[str, ...] = ()
    """Names of the columns of positions, in order; none where an edge stands for all positions."""
    column_of: tuple[int, ...] = ()
    """Column of each position, where there are columns."""

    def __post_init__(self) -> None:
        if bool(self.columns) != bool(self.column_of) or set(self.column_of) != set(range(len(self.columns))):
            raise WorkbenchError(
                f"Every position needs a column and every column a position: got {len(self.columns)} columns "
                f"and the positions' columns {self.column_of}."
            )
        if len(set(self.columns)) != len(self.columns):
            raise WorkbenchError(f"Columns need names of their own, got {', '.join(self.columns)}.")

    @functools.cached_property
    def writers(self) -> tuple[Node, ...]:
        """All that writes, in order of depth."""
        found = [Node(name=name, part="input", step=-1, index=index) for index, name in enumerate(self.inputs)]
        for step in range(self.n_steps):
            found += [Node(name=f"a{step}.h{head}", part="head", step=step, index=head) for head in range(self.n_heads)]
            found += self._mlp_nodes(step)
        return tuple(found)

    @functools.cached_property
    def ports(self) -> tuple[Port, ...]:
        """All that reads, in order of depth: of each step q of all heads, then k, then v, then the MLP."""
        found: list[Port] = []
        before = len(self.inputs)
        for step in range(self.n_steps):
            heads = [node for node in self.writers if node.part == "head" and node.step == step]
            found += [Port(node=node, slot=slot, n_writers=before) for slot in SLOTS for node in heads]
            before += self.n_heads
            mlp = self._mlp_nodes(step)
            found += [Port(node=node, slot=None, n_writers=before) for node in mlp]
            before += len(mlp)
        end = Node(name=LOGITS, part="logits", step=self.n_steps)
        return (*found, Port(node=end, slot=None, n_writers=before))

    @functools.cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge: by port, then by column, then by writer."""
        return tuple(
            Edge(
                writer=writer,
                port=port,
                column=column,
                source=self._at(self.writers[writer].name, column),
                target=self._at(reader.name, column),
            )
            for port, reader in enumerate(self.ports)
            for column in range(self.n_columns)
            for writer in range(reader.n_writers)
        )

    @property
    def n_columns(self) -> int:
        """Columns of positions; one where positions are not told apart."""
        return len(self.columns) or 1

    @functools.cached_property
    def index(self) -> Mapping[str, int]:
        """Edge name -> its place in `edges`."""
        return {edge.name: place for place, edge in enumerate(self.edges)}

    @functools.cached_property
    def first_edge(self) -> tuple[int, ...]:
        """Where each port's edges begin; they are `n_columns * n_writers` in a row."""
        firsts, total = [], 0
        for port in self.ports:
            firsts.append(total)
            total += self.n_columns * port.n_writers
        return tuple(firsts)

    @functools.cached_property
    def key(self) -> str:
        """Digest of the graph: circuits of equal graphs can be compared."""
        return digest(json.dumps(self.to_json(), sort_keys=True).encode())[:16]

    def of_port(self, port: int) -> slice:
        """The edges that a port reads."""
        first = self.first_edge[port]
        return slice(first, first + self.n_columns * self.ports[port].n_writers)

    @functools.cached_property
    def ports_of(self) -> tuple[tuple[int, ...], ...]:
        """For each writer the ports that its node reads: none for an input, three for a head, one for an MLP."""
        found: dict[str, list[int]] = {node.name: [] for node in self.writers}
        for place, port in enumerate(self.ports[:-1]):
            found[port.node.name].append(place)
        return tuple(tuple(ports) for ports in found.values())

    def heard(self, port: int, column: int) -> list[int]:
        """The edges into a port that can matter to what its node writes in a column: keys and values of all columns."""
        edges, n_writers = self.of_port(port), self.ports[port].n_writers
        if self.ports[port].slot in ("k", "v"):
            return list(range(edges.start, edges.stop))
        first = edges.start + column * n_writers
        return list(range(first, first + n_writers))

    def neurons(self, node: Node) -> Int[Tensor, " neuron"] | None:
        """The neurons of a cluster; None stands for a whole MLP."""
        chosen = self.clusters[node.step][node.index]
        return torch.tensor(chosen) if chosen else None

    def split(self, step: int) -> bool:
        """Whether a step's MLP is told apart in clusters, so that its output bias belongs to none of them."""
        return any(self.clusters[step])

    def mask(self, names: Iterable[str]) -> Bool[Tensor, " edge"]:
        """The edges with these names.

        Raises:
            WorkbenchError: the graph has no such edge.
        """
        chosen = torch.zeros(len(self.edges), dtype=torch.bool)
        for name in names:
            if name not in self.index:
                raise WorkbenchError(
                    f"Edge {name!r} is not in this graph of {len(self.edges)} edges. " + self._near(name)
                )
            chosen[self.index[name]] = True
        return chosen

    def names(self, keep: Bool[Tensor, " edge"]) -> list[str]:
        """Names of the edges that are kept, in the graph's order."""
        return [self.edges[place].name for place in keep.nonzero()[:, 0].tolist()]

    def connected(self, keep: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        """The kept edges that lie on a path from an input to the logits; the others dangle."""
        forward = self._reached_from_inputs(keep)
        return forward & self.reaching(forward)

    def reaching(self, keep: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        """The kept edges whose reader passes on to the logits."""
        heard = torch.zeros(len(self.writers), self.n_columns, dtype=torch.bool)
        useful = torch.zeros_like(keep)
        places = {node.name: place for place, node in enumerate(self.writers)}
        for port in reversed(range(len(self.ports))):
            reader = self.ports[port]
            if reader.node.part == LOGITS:
                listening = torch.ones(self.n_columns, dtype=torch.bool)
            else:
                of_node = heard[places[reader.node.name]]
                listening = of_node.any().expand(self.n_columns) if reader.slot in ("k", "v") else of_node
            of_port = keep[self.of_port(port)].view(self.n_columns, reader.n_writers) & listening[:, None]
            useful[self.of_port(port)] = of_port.flatten()
            heard[: reader.n_writers] |= of_port.T
        return useful

    def pruned(self, keep: Bool[Tensor, " edge"], ablation: Ablation) -> Bool[Tensor, " edge"]:
        """The kept edges less those that dangle, without which every answer is the same.

        Under resample ablation a node that reads nothing kept writes what it writes in the other run, so that an edge
        must lie on a path from an input to the logits. Under zero and mean ablation such a node still writes a
        constant, so that an edge must only reach the logits.
        """
        return self.connected(keep) if ablation == "resample" else self.reaching(keep)

    def check_same(self, other: CircuitGraph) -> None:
        """Raise a WorkbenchError unless the other graph is this one."""
        if self.key != other.key:
            raise WorkbenchError(
                f"This belongs to another model's graph ({other.key}, {len(other.edges)} edges); this one is "
                f"{self.key} with {len(self.edges)} edges. Build both from the same model with the same splits."
            )

    def to_json(self) -> dict[str, object]:
        """The fields that rebuild the graph."""
        return {
            "n_heads": self.n_heads,
            "n_steps": self.n_steps,
            "d_model": self.d_model,
            "inputs": list(self.inputs),
            "clusters": [[list(cluster) for cluster in step] for step in self.clusters],
            "schedule": None if self.schedule is None else list(self.schedule),
            "columns": list(self.columns),
            "column_of": list(self.column_of),
        }

    def _mlp_nodes(self, step: int) -> list[Node]:
        clusters = self.clusters[step]
        return [
            Node(name=f"m{step}.c{index}" if cluster else f"m{step}", part="mlp", step=step, index=index)
            for index, cluster in enumerate(clusters)
        ]

    def _at(self, name: str, column: int) -> str:
        return f"{name}@{self.columns[column]}" if self.columns else name

    def _near(self, name: str) -> str:
        target = name.partition("->")[2]
        same = [edge.name for edge in self.edges if edge.target == target]
        return nearest(name, same or [edge.name for edge in self.edges[:1000]])

    def _reached_from_inputs(self, keep: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        """Kept edges whose writer has something of an input to pass on."""
        writing = torch.zeros(len(self.writers), self.n_columns, dtype=torch.bool)
        writing[: len(self.inputs)] = True
        passing = torch.zeros_like(keep)
        places = {node.name: place for place, node in enumerate(self.writers)}
        for port, reader in enumerate(self.ports):
            of_port = keep[self.of_port(port)].view(self.n_columns, reader.n_writers)
            arriving = of_port & writing[: reader.n_writers].T
            passing[self.of_port(port)] = arriving.flatten()
            if reader.node.name in places:
                columns = arriving.any(1)
                # Keys and values of one column are read from every other.
                writing[places[reader.node.name]] |= columns.any() if reader.slot in ("k", "v") else columns
        return passing


def circuit_graph(
    model: EdgeReadable,
    *,
    split_inputs: bool = False,
    columns: Sequence[str] | None = None,
    clusters: Mapping[int, Sequence[Sequence[int]]] | None = None,
) -> CircuitGraph:
    """The graph of a model.

    Args:
        model: whose parts can be run one by one.
        split_inputs: tell token and position embedding apart (`embed`, `pos`); else both are `input`.
        columns: name of the column of each position, one name for all positions of a role; None does not tell
            positions apart.
        clusters: step -> clusters of its MLP's neurons, which must hold each neuron once; other MLPs are whole.

    Raises:
        WorkbenchError: clusters that do not hold each neuron of their MLP once, or a step without an MLP.
    """
    config = model.config
    whole: tuple[tuple[int, ...], ...] = ((),) if config.d_mlp else ()
    split = dict(clusters or {})
    for step, groups in split.items():
        held = sorted(neuron for group in groups for neuron in group)
        if not 0 <= step < config.n_steps or not config.d_mlp or held != list(range(config.d_mlp)):
            raise WorkbenchError(
                f"Clusters of step {step} must hold each of its MLP's {config.d_mlp} neurons once; they hold "
                f"{len(held)}. Steps are 0 to {config.n_steps - 1}."
            )
    names = tuple(dict.fromkeys(columns or ()))
    schedule = getattr(config, "schedule", None)
    return CircuitGraph(
        n_heads=config.heads_of(SiteKind.z),
        n_steps=config.n_steps,
        d_model=model.write_inputs(torch.zeros(1, 1, dtype=torch.long))[0].shape[-1],
        inputs=("embed", "pos") if split_inputs else ("input",),
        clusters=tuple(
            tuple(tuple(group) for group in split[step] if group) if step in split else whole
            for step in range(config.n_steps)
        ),
        schedule=None if schedule == tuple(range(config.n_steps)) else schedule,
        columns=names,
        column_of=tuple(names.index(name) for name in columns or ()),
    )


def graph_from_json(content: Mapping[str, object]) -> CircuitGraph:
    """The graph that `to_json` wrote."""

    def tuples(value: object) -> object:
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    try:
        return CircuitGraph(**{name: tuples(value) for name, value in content.items()})  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise WorkbenchError(f"This is not a graph of the workbench: {error}.") from error
