"""What the tracer must find where the answer is known, or must not find: the controls of path merging.

Each is one prompt traced with one thing changed, by the same rule and thresholds. The model that was wired to merge
paths must be explained. The model at its initialisation, with as many operations in each layer as the trained one;
random operations, as many in each layer; and the trained model's operations judged by a wrong graph, in which vertices
changed places, must not. The rival, that a layer takes only one hop, is scored as the hypothesis is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from circuits.attention_ops import (
    PUBLISHED,
    SHARE,
    EditedPass,
    Operation,
    count_by_layer,
    important_operations,
    strongest_operations,
)
from circuits.path_merging import PathTrace, Tracer, trace_paths
from circuits.search_prompts import SearchPrompt
from workbench.models.transformer import Transformer
from workbench.runtime import generator

MODEL = "model"
CONTROLS = ("hand_built", "untrained", "random_operations", "wrong_graph", "one_hop")
FACTORS = (0.5, 2.0)
SWEEP = (*(f"thresholds_x{factor:g}" for factor in FACTORS), "published_thresholds")


def trace_variants(
    model: Transformer, untrained: Transformer, hand_built: Transformer, prompt: SearchPrompt, *, seed: int
) -> dict[str, PathTrace]:
    """One prompt traced in the model, in its controls, and at other thresholds.

    Args:
        model: the trained one.
        untrained: the same before training.
        hand_built: a model that is known to merge paths.
        prompt: the input; without two vertices beside start and goal there is no wrong graph.
        seed: of the random operations and the wrong graph.

    Raises:
        WorkbenchError: a model that cannot be traced, or no vertex to stand for another.
    """
    tracer = Tracer.of(model, prompt)
    found = important_operations(tracer.edited, SHARE)
    traces = {
        MODEL: tracer.trace(found),
        "hand_built": trace_paths(hand_built, prompt),
        "untrained": _as_many(Tracer.of(untrained, prompt), found),
        "random_operations": tracer.trace(random_operations(found, len(prompt), seed=seed)),
        "one_hop": tracer.trace(found, hypothesis="one hop"),
        "published_thresholds": trace_paths(model, prompt, PUBLISHED),
    }
    for name, factor in zip(SWEEP, FACTORS, strict=False):
        scaled = SHARE.times(factor)
        traces[name] = tracer.trace(important_operations(tracer.edited, scaled), scaled)
    if len(prompt.graph.vertices) >= 4:
        traces["wrong_graph"] = tracer.trace(found, prompt=prompt.relabelled(seed))
    return traces


def random_operations(like: Sequence[Operation], n_rows: int, *, seed: int | torch.Generator) -> list[Operation]:
    """As many copies in each layer as these operations, between rows at random; in the last layer into the last row."""
    draw, counts = generator(seed, "random operations"), count_by_layer(like)
    last, found = max(counts), []
    for layer, count in counts.items():
        places = torch.randperm(n_rows if layer == last else n_rows**2, generator=draw)[:count].tolist()
        for place in places:
            dest, src = (n_rows - 1, place) if layer == last else divmod(place, n_rows)
            found.append(Operation(layer=layer, dest=dest, src=src, sign=1, strength=0.0))
    return found


def _as_many(tracer: Tracer, like: Sequence[Operation]) -> PathTrace:
    edited: EditedPass = tracer.edited
    return tracer.trace(strongest_operations(edited, count_by_layer(like), SHARE))
