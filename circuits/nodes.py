"""Scores of nodes: what a place of a model, over all positions, is worth to a metric.

A node is a site or a head of it. *Exact*: the model runs once for each node, with another value in the node's place;
all that lies behind the node sees the change. *Attribution* (Nanda 2023; Syed et al. 2023) estimates the same for all
nodes from one gradient: the difference of the two values times the slope of the metric, a straight line where the
model is none. *Attribution-ig* averages the slope along the straight path of the model's inputs from the ablated to the
clean run, so that it is no longer blind where one of the two saturates (after Hanna et al. 2024, who do so for edges);
the points of the path are rows of one batch. Only sites are asked of the model, so this works on anything instrumented.

A score is the mean metric of the clean run minus that with the node ablated: positive where ablating lowers the metric.
Taken at the corrupt run it is what the node's clean value adds there, the same sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.circuit import Terms
from circuits.experiment import HEADROOM
from circuits.patching import LOGITS, ROWS, Judge
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, SiteKind, select_sites
from workbench.instrument.trace import FromTrace, Patch, Trace, Value, Zero
from workbench.intervals import paired_bootstrap
from workbench.metrics import Metric
from workbench.metrics import metric as find_metric
from workbench.models.known import ABLATIONS, Ablation
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, check_choice

Method = Literal["exact", "attribution", "attribution-ig"]
Reference = Literal["clean", "corrupt"]
Taken = Literal["clean", "corrupt", "path"]
TAKEN: dict[Taken, str] = {
    "clean": "the clean run",
    "corrupt": "the corrupt run",
    "path": "the path from the ablated to the clean run",
}
POINTS = 5
"""Points of an integration path, as Hanna et al. found enough for edges."""
WRITERS = (SiteKind.embed, SiteKind.pos_embed, SiteKind.z, SiteKind.mlp_out)
"""Sites through which everything enters the residual stream."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NodeScores:
    """A score for each node."""

    sites: tuple[Site, ...]
    """The nodes: whole sites, and heads or neurons of sites."""
    score: Float[Tensor, " node"]
    """Mean metric of the clean run minus that with the node ablated, or an estimate of it."""
    examples: Float[Tensor, "batch node"]
    """The same for each example."""
    low: Float[Tensor, " node"]
    high: Float[Tensor, " node"]
    method: Method
    terms: Terms
    reference: Taken
    """The run that is changed, or at which the gradient is taken; or the path along which it is."""
    rule: str
    """How, in words."""
    clean: float
    """Mean metric of the clean run."""
    ablated: float
    """Mean metric of the counterfactual run, or with every node ablated at once."""
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.score.shape != (len(self.sites),):
            raise WorkbenchError(f"Scores of shape {list(self.score.shape)} came for {len(self.sites)} nodes.")
        lost = (~self.examples.isfinite()).any(0).nonzero()[:, 0].tolist()
        if lost:
            raise WorkbenchError(
                f"{len(lost)} scores of method {self.method!r} are not finite, such as that of {self.sites[lost[0]]}. "
                "Look at the model's logits, leave the site out, or choose another metric."
            )

    @property
    def frame(self) -> pd.DataFrame:
        """One row a node, in order of depth."""
        return pd.DataFrame(list(self._rows()))

    def tables(self) -> Sequence[Table]:
        """The scores, the largest first."""
        order = self.score.abs().argsort(descending=True, stable=True).tolist()
        return [
            Table(
                name=f"node_scores_{self.method.replace('-', '_')}",
                frame=self.frame.iloc[order].reset_index(drop=True),
                kind="bar",
                axes={"x": "node", "y": "score", "low": "low", "high": "high"},
                unit=self.terms.unit,
                caption=(
                    f"Score of every node by {self.method} ({self.rule}; taken at {TAKEN[self.reference]}): "
                    f"{self.terms.metric} lost by {self.terms.ablation} ablation of the node, of {self.clean:.3g} "
                    f"against {self.ablated:.3g}. n = {self.terms.n} examples, 95 % paired bootstrap intervals."
                ),
            )
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "nodes": list(self._rows()),
            "method": self.method,
            "ablation": self.terms.ablation,
            "metric": self.terms.metric,
            "scale": self.terms.unit,
            "reference": self.reference,
            "rule": self.rule,
            "clean": self.clean,
            "ablated": self.ablated,
            "n": self.terms.n,
        }

    def _rows(self) -> Iterator[dict[str, object]]:
        for place, site in enumerate(self.sites):
            yield {
                "node": str(site),
                "layer": site.layer,
                "head": site.head,
                "neuron": site.neuron,
                "score": float(self.score[place]),
                "low": float(self.low[place]),
                "high": float(self.high[place]),
            }


RULES: dict[tuple[Method, Taken], str] = {
    ("exact", "clean"): "each node ablated by itself in the clean run",
    ("exact", "corrupt"): "each node given its clean value by itself in the corrupt run",
    ("attribution", "clean"): "clean minus ablated value, times the gradient at the clean run",
    ("attribution", "corrupt"): "clean minus ablated value, times the gradient at the corrupt run",
    ("attribution-ig", "path"): "clean minus ablated value, times the mean gradient: left Riemann sum of {} points on "
    "the inputs",
}


def score_nodes(
    model: Instrumented,
    batch: Batch,
    *,
    sites: str | Iterable[str | Site] | None = None,
    method: Method = "exact",
    metric: str | Metric = "logit_difference",
    ablation: Ablation = "resample",
    reference: Reference | None = None,
    points: int = POINTS,
    seed: int = 0,
) -> NodeScores:
    """Score every node by what ablating it over all positions takes from the metric.

    Args:
        model: any instrumented model.
        batch: examples, with counterfactuals where the ablation or the metric needs them.
        sites: as `select_sites` takes them; None is everything that writes: embeddings, heads, MLPs.
        method: `exact` measures, `attribution` estimates with one gradient, `attribution-ig` with the mean of several
            along a path.
        metric: a metric or its name.
        ablation: what stands in a node's place: its value in the counterfactual run, its mean over the clean examples
            at each position, or zero.
        reference: the run that is changed, or at which the gradient is taken: the clean one unless given. `corrupt`
            needs resample ablation, and a path takes none.
        points: of the path: `ablated + k/points * (clean - ablated)` of the inputs, k = 0 … points-1.
        seed: of the bootstrap.

    Raises:
        WorkbenchError: an unknown site, metric or option, pairs that do not align, a gradient of a metric that has
            none, no headroom, or scores that are not finite.
    """
    _check(batch, method, ablation, reference, points)
    taken: Taken = "path" if method == "attribution-ig" else reference or "clean"
    nodes = select_sites(_writers(model) if sites is None else sites, model)
    clean, ablated = _both(model, batch, nodes, ablation)
    judge = Judge(measure=find_metric(metric), batch=batch, reference=clean.logits[batch.read])
    full, empty = judge.of_run(clean), judge.of_run(ablated)
    _check_headroom(full, empty, judge.measure, ablation)
    if method == "attribution":
        examples = _attributed(model, nodes, clean, ablated, judge, taken)
    elif method == "attribution-ig":
        examples = _integrated(model, nodes, clean, ablated, judge, points)
    elif taken == "clean":
        examples = full[:, None] - _measured(model, nodes, clean, ablated, judge)
    else:
        examples = _measured(model, nodes, ablated, clean, judge) - empty[:, None]
    low, high = paired_bootstrap(examples, seed=seed)
    measure = judge.measure
    return NodeScores(
        sites=nodes,
        score=examples.mean(0),
        examples=examples,
        low=low,
        high=high,
        method=method,
        terms=Terms(ablation=ablation, metric=measure.name, unit=measure.unit, better=measure.better, n=len(batch)),
        reference=taken,
        rule=RULES[method, taken].format(points),
        clean=float(full.mean()),
        ablated=float(empty.mean()),
        provenance=model.provenance,
    )


def _check(batch: Batch, method: str, ablation: str, reference: str | None, points: int) -> None:
    check_choice("method", method, get_args(Method))
    check_choice("ablation", ablation, ABLATIONS)
    if reference is not None:
        check_choice("reference", reference, get_args(Reference))
    if method == "attribution-ig" and reference is not None:
        raise WorkbenchError(
            f"Method 'attribution-ig' goes from the ablated to the clean run: leave reference={reference!r} out, or "
            "say method='attribution'."
        )
    if points < 1:
        raise WorkbenchError(f"A path needs at least 1 point, got {points}.")
    if reference == "corrupt" and ablation != "resample":
        raise WorkbenchError(
            f"The corrupt run is the other end of resample ablation, not of {ablation} ablation. "
            "Say reference='clean', or ablation='resample'."
        )
    if not len(batch):
        raise WorkbenchError("Scores need at least one example; the batch is empty.")


def _writers(model: Instrumented) -> list[Site]:
    """Every site of the model through which something enters the residual stream."""
    found = [site for site in model.sites if site.kind in WRITERS]
    if not found:
        raise WorkbenchError(
            f"This model names none of the sites {', '.join(kind.name for kind in WRITERS)}. "
            "Name the nodes to score with sites=; list all with model.sites."
        )
    return found


def _both(model: Instrumented, batch: Batch, nodes: Sequence[Site], ablation: Ablation) -> tuple[Trace, Trace]:
    """The clean run, and one whose activations stand in for its own and whose logits are those of nothing left."""
    writers = {site for site in model.sites if site.kind in WRITERS}
    wanted = {node.whole for node in nodes} | writers | set(_inputs(model))
    clean = run(model, batch.tokens, record=wanted)
    present = _present(model, batch.tokens)
    if ablation == "resample":
        corrupt, _ = batch.pairs()
        if not torch.equal(present, _present(model, corrupt)):
            raise WorkbenchError(
                "Some pairs differ in length: a counterfactual has padding where its clean prompt has none. "
                "Give pairs of one length."
            )
        return clean, run(model, corrupt, record=wanted)
    values = {
        site: torch.zeros_like(kept) if ablation == "zero" else _mean(site, kept, present)
        for site, kept in clean.activations.items()
    }
    ablated = replace(clean, activations=values)
    nothing = run(model, batch.tokens, patches=[Patch(site=site, source=FromTrace(ablated)) for site in values])
    return clean, replace(ablated, logits=nothing.logits)


def _present(model: Instrumented, tokens: Tensor) -> Tensor:
    """Where a prompt has tokens, not padding."""
    pad_token = getattr(model.config, "pad_token", None)
    return torch.ones_like(tokens, dtype=torch.bool) if pad_token is None else tokens != pad_token


def _mean(site: Site, kept: Tensor, present: Tensor) -> Tensor:
    """The mean over the examples that have a token at the position, for each position."""
    shape = [1] * kept.ndim
    axis = site.axis("dest" if "dest" in site.kind.dims else "pos")
    shape[0], shape[axis] = present.shape
    weights = present.to(kept).view(shape)
    return ((kept * weights).sum(0, keepdim=True) / weights.sum(0, keepdim=True).clamp(min=1)).expand_as(kept)


def _check_headroom(
    full: Float[Tensor, " batch"], empty: Float[Tensor, " batch"], measure: Metric, ablation: Ablation
) -> None:
    size = max(float(full.abs().mean()), float(empty.abs().mean()), HEADROOM)
    if not abs(float(full.mean() - empty.mean())) > HEADROOM * size:
        raise WorkbenchError(
            f"No headroom: mean {measure.name} is {float(full.mean()):.4g} on the clean run and "
            f"{float(empty.mean()):.4g} with everything ablated ({ablation}, n = {len(full)}). "
            "Choose pairs that the model tells apart, or another metric."
        )


def _measured(
    model: Instrumented, nodes: Sequence[Site], base: Trace, other: Trace, judge: Judge
) -> Float[Tensor, "batch node"]:
    """The metric after each node of a run took the other's value: whole runs, the nodes stacked as rows."""
    n = len(base.tokens)
    every = torch.arange(n)
    per_pass = _copies(base)
    found = []
    for first in range(0, len(nodes), per_pass):
        some = nodes[first : first + per_pass]
        patches = [
            Patch(site=node, source=FromTrace(other, every), rows=every + row * n) for row, node in enumerate(some)
        ]
        trace = run(model, base.tokens.repeat(len(some), 1), patches=patches)
        logits = trace.logits[judge.batch.read.repeat(len(some), 1)]
        found.append(judge.of(logits.unflatten(0, (len(some), -1))))
    return torch.cat(found).T


def _inputs(model: Instrumented) -> list[Site]:
    """Where the input enters: what the embeddings write, or else the stream into the first layer."""
    embeddings = [site for site in model.sites if site.kind in (SiteKind.embed, SiteKind.pos_embed)]
    stream = [site for site in model.sites if site.kind is SiteKind.resid_pre and site.layer == 0]
    return embeddings or stream


def _attributed(
    model: Instrumented, nodes: Sequence[Site], clean: Trace, ablated: Trace, judge: Judge, reference: Taken
) -> Float[Tensor, "batch node"]:
    """The change of each node times the slope of the metric: one backward pass for all nodes."""
    if judge.measure.needs_reference and reference == "clean":
        raise WorkbenchError(
            f"Metric {judge.measure.name!r} compares with the clean run, so that it is at its best there and has no "
            "slope. Say reference='corrupt', or method='exact'."
        )
    base = clean if reference == "clean" else ablated
    slopes = run(model, base.tokens, record=nodes, gradient_of=partial(_total, judge, 1)).gradients
    return _products(nodes, clean, ablated, slopes)


def _integrated(
    model: Instrumented, nodes: Sequence[Site], clean: Trace, ablated: Trace, judge: Judge, points: int
) -> Float[Tensor, "batch node"]:
    """The change of each node times the mean slope along the path of the inputs, the points stacked as rows."""
    inputs = _inputs(model)
    if not inputs:
        raise WorkbenchError(
            "This model names neither its embeddings nor the stream into its first layer, so that no path leads along "
            "its inputs. Use method='attribution'."
        )
    n = len(clean.tokens)
    total = {node.whole: torch.zeros_like(clean.activations[node.whole]) for node in nodes}
    for shares in (torch.arange(points) / points).split(_copies(clean)):
        patches = [Patch(site=site, source=Value(_mixed(clean, ablated, site, shares))) for site in inputs]
        tokens = clean.tokens.repeat(len(shares), 1)
        slopes = run(model, tokens, record=nodes, patches=patches, gradient_of=partial(_total, judge, len(shares)))
        for site, gradient in slopes.gradients.items():
            total[site] += gradient.unflatten(0, (-1, n)).sum(0)
    return _products(nodes, clean, ablated, {site: gradient / points for site, gradient in total.items()})


def _copies(base: Trace) -> int:
    """How often the rows of a run fit into one pass."""
    return max(1, min(ROWS // len(base.tokens), LOGITS // base.logits.numel()))


def _mixed(clean: Trace, ablated: Trace, site: Site, shares: Float[Tensor, " point"]) -> Tensor:
    """What a site holds between two runs, the points one after another as rows."""
    start, end = ablated.activations[site], clean.activations[site]
    return (start + shares.to(end).view(-1, *[1] * end.ndim) * (end - start)).flatten(0, 1)


def _total(judge: Judge, copies: int, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, ""]:
    """The metric's sum over so many copies of the batch.

    Raises:
        WorkbenchError: it has no gradient.
    """
    batch = judge.batch.select(torch.arange(len(judge.batch)).repeat(copies))
    value = judge.measure(logits[batch.read], batch, judge.reference.repeat(copies, 1)).sum()
    if not value.requires_grad:
        raise WorkbenchError(
            f"Metric {judge.measure.name!r} has no gradient: it counts top tokens. Use method='exact', or a metric "
            "such as 'logit_difference' or 'loss'."
        )
    return value


def _products(
    nodes: Sequence[Site], clean: Trace, ablated: Trace, slopes: Mapping[Site, Tensor]
) -> Float[Tensor, "batch node"]:
    """The change of each node between two runs times a slope, summed over all that the node holds."""
    found = [
        (_part(clean.activations, node) - _part(ablated.activations, node)) * _part(slopes, node) for node in nodes
    ]
    return torch.stack([products.double().flatten(1).sum(1) for products in found], 1)


def _part(tensors: Mapping[Site, Tensor], node: Site) -> Tensor:
    """What of a whole site is a node's."""
    whole = tensors[node.whole]
    [place] = Patch(site=node, source=Zero()).places(len(whole))
    return place.narrow(whole, {})
