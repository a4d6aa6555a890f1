"""A mask over edges, learned: gates between 0 and 1 that keep what the metric needs, at a budget.

Each edge has a hard-concrete gate (Louizos et al. 2018), drawn anew for each example, which mixes what is computed with
the ablated value. Lagrange multipliers pull the gates' expected number towards the budget (Bhaskar et al. 2024, §3);
it ends within a few gates of it, and the edges with the largest gates are the circuit, as many as were asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import terms_of
from circuits.circuit import EdgeScores
from circuits.components import inputs_of, run_parts, weighted
from circuits.experiment import Experiment
from workbench.runtime import WorkbenchError, generator

STEPS = 300
LEARNING_RATE = 0.1
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Of the hard-concrete distribution, as Louizos et al. chose them."""
FIRST = 2.0
"""Where every gate's log alpha begins: mostly open."""
ELEMENTS = 2**24


def learned_mask(
    plan: Experiment,
    edges: int,
    *,
    steps: int = STEPS,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> EdgeScores:
    """Log alpha of each edge's gate, learned for a circuit of so many edges.

    What is minimised is the mean distance of the metric from the whole model's, example by example, as a share of the
    mean headroom.

    Args:
        plan: the experiment.
        edges: budget, of live edges.
        steps: of Adam, each on as many examples as fit in memory.
        seed: of the gates' noise and the examples.
        on_progress: told the share of steps that are done.

    Raises:
        WorkbenchError: the metric has no gradient.
    """
    begun = time.perf_counter()
    live = plan.live.nonzero()[:, 0]
    rng = generator(seed, "learned mask")
    log_alpha = torch.full((len(live),), FIRST, dtype=plan.clean.dtype, requires_grad=True)
    multipliers = torch.zeros(2, dtype=plan.clean.dtype, requires_grad=True)
    optimiser = torch.optim.Adam(
        [{"params": [log_alpha]}, {"params": [multipliers], "maximize": True}], lr=LEARNING_RATE
    )
    for step in range(steps):
        optimiser.zero_grad()
        # The budget tightens over the first half, so that edges are weighed against each other before they must go.
        target = len(live) + (min(edges, len(live)) - len(live)) * min(1.0, 2 * (step + 1) / steps)
        excess = (_expected(log_alpha) - target) / len(live)
        loss = _distance(plan, live, log_alpha, rng) + multipliers[0] * excess + multipliers[1] * excess.square()
        loss.backward()
        optimiser.step()
        if on_progress:
            on_progress((step + 1) / steps)
    learned = log_alpha.detach()
    score = plan.full.new_full((len(plan.graph.edges),), float(learned.min()) - 1)
    score[live] = learned
    return EdgeScores(
        graph=plan.graph,
        terms=terms_of(plan),
        method="mask",
        score=score,
        live=plan.live,
        scale="log alpha",
        reference="circuits drawn from the gates",
        rule=f"hard-concrete gates, {steps} steps of Adam, budget {edges}, seed {seed}",
        seconds=time.perf_counter() - begun,
        provenance=plan.provenance,
    )


def _expected(log_alpha: Float[Tensor, " live"]) -> Float[Tensor, ""]:
    """Expected number of gates that are not closed (Louizos et al. 2018, eq. 12)."""
    return (log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().sum()


def _distance(plan: Experiment, live: Tensor, log_alpha: Float[Tensor, " live"], rng: torch.Generator) -> Tensor:
    """Mean distance from the whole model's metric with gates drawn for each example."""
    # Of each row every port's stream is held, and for each step all outputs so far.
    held = len(plan.graph.ports) + plan.graph.n_steps * len(plan.graph.writers)
    fit = max(1, ELEMENTS // (plan.batch.tokens.shape[1] * held * plan.graph.d_model))
    rows = torch.randperm(len(plan.batch), generator=rng)[:fit].sort().values
    noise = torch.rand(len(rows), len(live), generator=rng, dtype=log_alpha.dtype).clamp(1e-6, 1 - 1e-6)
    soft = ((noise.logit() + log_alpha) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW
    keep = soft.new_zeros(len(rows), len(plan.graph.edges)).index_copy(1, live, soft.clamp(0, 1))
    batch = plan.batch.select(rows)
    inputs = inputs_of(plan.model, plan.graph, batch.tokens).detach()
    mix = weighted(plan.graph, keep, plan.ablated[rows])
    stream = run_parts(plan.model, plan.graph, batch.tokens, inputs, mix)[1]
    logits = plan.model.finish(stream[batch.read], {})
    values = plan.metric(logits, batch, plan.reference[torch.isin(plan.batch.read.nonzero()[:, 0], rows)])
    if not values.requires_grad:
        raise WorkbenchError(
            f"Metric {plan.metric.name!r} has no gradient, so that no mask can be learned with it. "
            "Use 'logit_difference' or 'loss', or the methods 'exact', 'acdc' and 'greedy'."
        )
    return (values - plan.full[rows]).abs().mean() / abs(plan.headroom)
