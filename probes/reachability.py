"""What the residual stream at each edge of a search graph knows of reachability, by layer.

A prompt of graph search names a vertex `u` at the source and at the target of every edge. From the stream at such a
row one linear map (ridge regression on the activations) tells for every vertex `w` of the graph whether `w` can be
reached from `u` (forward), or reaches `u` (backward). Its scores are judged by the exact distance between the two: of
distance 1 the edge itself speaks, of more only a model that has searched.

The measure is the AUROC within a row: the share of its (reachable at this distance, unreachable) pairs of vertices
that the scores order rightly. Only vertices that the graph has take part, and never `u` itself. Names are random, so
that a row which holds what is near, and no more, orders all that is farther by chance. A row that counts how often each
vertex is named does better without any search: the start is named often, and reaches much. So the line to beat is the
same probe on an untrained model, whose rows are such counts. Beside it stands a control task (Hewitt & Liang 2019,
section 2): every edge and vertex have a distance of their own, drawn at random from the true distances and the same in
all prompts, which says what a probe can learn by heart.

No graph is in both parts, whatever its start, its goal and the order of its edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, SiteKind
from workbench.intervals import Estimate, columns_of, mean_of
from workbench.runtime import WorkbenchError, derive_seed, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.graph_search import GraphSearch
from workbench.tasks.graphs import distances

Direction = Literal["forward", "backward"]
Side = Literal["source", "target"]
TEST_GRAPHS = 0.25
"""Share of the graphs that the probe is scored on."""
FEWEST_GRAPHS = 8
FEWEST_PROMPTS = 20
"""Distances that fewer prompts of the test part have are left out."""
RIDGE = 1.0
"""Penalty of a probe on features of variance 1, beside sums over all rows."""
AFTER, EMBEDDED = "after", "embedding"
NEVER = 0
"""Stands for no path, where else a distance is."""
LEFT_OUT = -1
"""Stands for a vertex that is not asked about: the row's own, or one that the graph does not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What the rows of one side know at one site of the vertices at one distance."""

    site: Site
    side: Side
    """Whether the row is the source or the target of its edge."""
    direction: Direction
    distance: int
    """Edges of the shortest path between the row's vertex and the other."""
    auroc: Estimate
    """On graphs that the probe never saw; 0.5 is chance."""
    control: Estimate | None
    """Of the control task; None where too few prompts drew such a distance."""
    untrained: Estimate | None
    """On the untrained model; None where none was given."""
    n: int
    """Prompts of the test part that have such a pair."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReachabilityMap:
    """What every site knows of reachability, by distance."""

    known: tuple[Known, ...]
    n_train: int
    n_test: int
    """Prompts of each part."""
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each site, side, direction and distance."""
        rows = [
            {
                "site": str(each.site),
                "side": each.side,
                "direction": each.direction,
                "distance": each.distance,
                **columns_of("auroc", each.auroc),
                **columns_of("control", each.control),
                **columns_of("untrained", each.untrained),
                "n": each.n,
            }
            for each in self.known
        ]
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        frame = self.frame.astype(object)
        cells = frame.where(frame.notna(), None).to_dict("records")
        return {"cells": cells, "n_train": self.n_train, "n_test": self.n_test}

    def tables(self) -> Sequence[Table]:
        """A curve over sites for each direction, sources and targets apart, and everything in one table."""
        return reachability_tables(self.summary())


def reachability_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a summary, which may have been kept."""
    frame = pd.DataFrame(summary["cells"])
    about = (
        f"Ridge probes fitted on {summary['n_train']} prompts and scored on {summary['n_test']} of other graphs: AUROC "
        "within a row of vertices at a distance against unreachable ones, 0.5 is chance. 95 % bootstrap intervals over "
        "the n prompts that have such pairs."
    )
    says = {"forward": "can be reached from the row's vertex", "backward": "reaches the row's vertex"}
    curves = [
        Table(
            name=f"reachability_{direction}",
            frame=_curves(frame.loc[frame["direction"] == direction]),
            kind="curve",
            axes={
                "x": AFTER,
                "y": "auroc",
                "series": "distance",
                "low": "auroc_low",
                "high": "auroc_high",
                "facet": "rows",
            },
            unit="AUROC",
            caption=f"Whether a vertex {says[direction]}. {about}",
        )
        for direction in get_args(Direction)
    ]
    caption = f"{about} In the control task edges and vertices have distances drawn at random."
    return [*curves, Table(name="reachability", frame=frame, kind="table", axes={}, unit="", caption=caption)]


def _curves(frame: pd.DataFrame) -> pd.DataFrame:
    """The trained model's values, then the untrained one's where there are any, a panel for each side."""
    panels = []
    for suffix, column in (("", "auroc"), (", untrained", "untrained")):
        values = {end: frame[f"{column}{end}"] for end in ("", "_low", "_high")}
        shown = pd.DataFrame(
            {
                AFTER: [_place(site) for site in frame["site"]],
                "rows": frame["side"] + suffix,
                "distance": [f"{each} edge{'s' if each > 1 else ''} away" for each in frame["distance"]],
                **{f"auroc{end}": column.astype(float) for end, column in values.items()},
                "n": frame["n"],
            }
        )
        panels.append(shown.dropna(subset=["auroc"]))
    return pd.concat(panels, ignore_index=True)


def _place(site: str) -> str:
    found = Site.parse(site)
    return EMBEDDED if found.kind is SiteKind.resid_pre else f"layer {found.layer}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Rows:
    """The rows of one side of all prompts, one an edge, and what each is asked."""

    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    distance: Mapping[Direction, Int[Tensor, "row name"]]
    """To every vertex name, or `NEVER`, or `LEFT_OUT`."""
    control: Mapping[Direction, Int[Tensor, "row name"]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Probe:
    """An affine map from a row to a score for each vertex name."""

    mean: Float[Tensor, " d_model"]
    weight: Float[Tensor, "d_model name"]
    """Of features less their mean."""
    bias: Float[Tensor, " name"]

    @classmethod
    def fit(cls, features: Float[Tensor, "row d_model"], distance: Int[Tensor, "row name"]) -> _Probe:
        """Ridge regression of being reachable, for each name on the rows that are asked about it."""
        mean, deviation = features.mean(0), features.std(0)
        # What never changes says nothing, and must not be divided by nothing.
        deviation = torch.where(deviation > 0, deviation, 1.0)
        x = (features - mean) / deviation
        weight, bias = x.new_zeros(x.shape[1], distance.shape[1]), x.new_zeros(distance.shape[1])
        penalty = RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        for name, labels in enumerate(distance.T):
            asked = labels != LEFT_OUT
            if asked.any():
                rows, target = x[asked], (labels[asked] != NEVER).to(x.dtype)
                centred = rows - rows.mean(0)
                weight[:, name] = torch.linalg.solve(
                    centred.T @ centred + penalty, centred.T @ (target - target.mean())
                )
                bias[name] = target.mean() - rows.mean(0) @ weight[:, name]
        return cls(mean=mean, weight=weight / deviation[:, None], bias=bias)

    def score(self, features: Float[Tensor, "row d_model"]) -> Float[Tensor, "row name"]:
        """Higher where the vertex of that name seems reachable."""
        return (features - self.mean) @ self.weight + self.bias


def reachability(
    model: Instrumented, task: GraphSearch, batch: Batch, *, untrained: Instrumented | None = None, seed: int = 0
) -> ReachabilityMap:
    """What the stream at every edge knows of reachability, before the first layer and after each.

    Args:
        model: any instrumented model that reads the task's prompts.
        task: whose prompts they are.
        batch: prompts, of a few hundred graphs or more.
        untrained: a model of the same sites whose weights are random.
        seed: of the split and the control task.

    Raises:
        WorkbenchError: too few different graphs, or none with anything to tell.
    """
    test = _split(task, batch, seed)
    first = Site(kind=SiteKind.resid_pre, layer=0)
    sites = [site for site in model.sites if site == first or site.kind is SiteKind.resid_post]
    models = {"trained": model} if untrained is None else {"trained": model, "untrained": untrained}
    traces = {name: run(each, batch.tokens, record=sites) for name, each in models.items()}
    known: list[Known] = []
    for side in get_args(Side):
        rows = _rows(task, batch, side, seed)
        for site in sites:
            states = {name: trace[site][rows.prompt, rows.position].cpu().double() for name, trace in traces.items()}
            for direction in get_args(Direction):
                known += _known(rows, states, test, site, side, direction)
    if not known:
        raise WorkbenchError(
            f"No distance has {FEWEST_PROMPTS} prompts in the test part, which has {int(test.sum())}. Give more "
            "prompts, of graphs with branches."
        )
    return ReachabilityMap(
        known=tuple(known), n_train=int((~test).sum()), n_test=int(test.sum()), provenance=model.provenance
    )


def all_distances(task: GraphSearch, batch: Batch) -> Int[Tensor, "batch vertex vertex"]:
    """Edges of the shortest path from each vertex to each other, by name: 0 where there is none or they are one.

    `LEFT_OUT` where either is not in the graph.
    """
    children = task.graphs(batch).children
    width = children.shape[1]
    columns = [distances(children, np.full(len(children), vertex)) for vertex in range(width)]
    found = torch.from_numpy(np.stack(columns, 1)).clamp(min=NEVER)
    vertex = torch.arange(width)
    used = (batch.tokens[:, :, None] == vertex).any(1)
    return found.masked_fill(~(used[:, :, None] & used[:, None]), LEFT_OUT)


def placements(score: Float[Tensor, "row name"], distance: Int[Tensor, "row name"]) -> Float[Tensor, "row name"]:
    """Share of a row's unreachable vertices whose score is below each vertex', ties counted half; NaN without any.

    Their mean over the vertices at a distance is the AUROC at that distance.
    """
    unreachable = distance == NEVER
    ordered = score.masked_fill(~unreachable, torch.inf).sort(1).values
    below, upto = (torch.searchsorted(ordered, score, right=right) for right in (False, True))
    return (below + upto) / (2 * unreachable.sum(1, keepdim=True))


def _split(task: GraphSearch, batch: Batch, seed: int) -> Bool[Tensor, " batch"]:
    """Which prompts are in the test part: those of a quarter of the graphs."""
    group = np.unique(task.graphs(batch).children, axis=0, return_inverse=True)[1].ravel()
    n_graphs = int(group.max(initial=-1)) + 1
    if n_graphs < FEWEST_GRAPHS:
        raise WorkbenchError(
            f"These {len(batch)} prompts are of {n_graphs} different graphs; a probe needs {FEWEST_GRAPHS} or more, "
            "some to fit and others to score. Draw more."
        )
    from sklearn.model_selection import GroupShuffleSplit

    state = derive_seed(seed, "reachability split") % 2**32
    split = GroupShuffleSplit(n_splits=1, test_size=TEST_GRAPHS, random_state=state)
    _, test = next(split.split(np.zeros(len(batch)), groups=group))
    return torch.isin(torch.arange(len(batch)), torch.from_numpy(test))


def _rows(task: GraphSearch, batch: Batch, side: Side, seed: int) -> _Rows:
    """All rows of one side, with the distances of their vertices and those of the control task."""
    layout, tokens = task.layout, batch.tokens
    prompt, edge = (tokens == layout.edge).nonzero(as_tuple=True)
    position = edge + {"source": 1, "target": 2}[side]
    vertex = tokens[prompt, position]
    to = all_distances(task, batch)
    own = torch.arange(to.shape[1]) == vertex[:, None]
    distance: dict[Direction, Tensor] = {
        "forward": to[prompt, vertex].masked_fill(own, LEFT_OUT),
        "backward": to[prompt, :, vertex].masked_fill(own, LEFT_OUT),
    }
    which = tokens[prompt, edge + 1] * to.shape[1] + tokens[prompt, edge + 2]
    control: dict[Direction, Tensor] = {}
    for name, found in distance.items():
        control[name] = _drawn(found, which, generator(seed, "control", side, name))
    return _Rows(prompt=prompt, position=position, distance=distance, control=control)


def _drawn(
    distance: Int[Tensor, "row name"], which: Int[Tensor, " row"], rng: torch.Generator
) -> Int[Tensor, "row name"]:
    """A random distance for each kind of row and name, from those that there are; left out what is left out."""
    pool = distance[distance != LEFT_OUT]
    kinds, kind = which.unique(return_inverse=True)
    drawn = pool[torch.randint(0, len(pool), (len(kinds), distance.shape[1]), generator=rng)]
    return torch.where(distance == LEFT_OUT, LEFT_OUT, drawn[kind])


def _known(
    rows: _Rows,
    states: Mapping[str, Float[Tensor, "row d_model"]],
    test: Bool[Tensor, " batch"],
    site: Site,
    side: Side,
    direction: Direction,
) -> Iterator[Known]:
    """What one site knows in one direction, a finding for each distance."""
    asked = {name: (features, rows.distance[direction]) for name, features in states.items()}
    asked["control"] = (states["trained"], rows.control[direction])
    found = {name: _by_distance(features, labels, rows.prompt, test) for name, (features, labels) in asked.items()}
    for distance, values in found["trained"].items():
        control, untrained = (found.get(name, {}).get(distance) for name in ("control", "untrained"))
        yield Known(
            site=site,
            side=side,
            direction=direction,
            distance=distance,
            auroc=mean_of(values),
            control=None if control is None else mean_of(control),
            untrained=None if untrained is None else mean_of(untrained),
            n=len(values),
        )


def _by_distance(
    features: Float[Tensor, "row d_model"],
    distance: Int[Tensor, "row name"],
    prompt: Int[Tensor, " row"],
    test: Bool[Tensor, " batch"],
) -> dict[int, Float[Tensor, " prompt"]]:
    """AUROC of each prompt of the test part, by distance; a prompt counts where it has both kinds of pair."""
    held = test[prompt]
    score, labels = _Probe.fit(features[~held], distance[~held]).score(features[held]), distance[held]
    placed = placements(score, labels)
    found = {}
    for each in range(1, int(labels.max()) + 1):
        here = (labels == each) & placed.isfinite()
        sums, counts = (
            placed.new_zeros(len(test)).index_add(0, prompt[held], values.sum(1))
            for values in (placed.where(here, 0.0), here.to(placed.dtype))
        )
        if int((counts > 0).sum()) >= FEWEST_PROMPTS:
            found[each] = (sums / counts)[counts > 0]
    return found
