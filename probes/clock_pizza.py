"""Two measures that tell the Clock from the Pizza (Zhong, Liu, Tegmark, Andreas 2023, arXiv 2306.17844, section 4).

Both algorithms put the operands on circles. The *Clock* multiplies them: the angle of the product is the sum of the
angles. The *Pizza* only averages them: the mean of two points on a circle lies at half the sum of their angles, at a
distance |cos(w (a - b) / 2)| from the centre that dims the right answer's logit with the distance of a and b. So

- gradient symmetricity: does the model treat its operands alike? For the Pizza the gradients of a logit with respect
  to the two embeddings agree (0.99 in the paper), for the Clock they do not (0.33);
- distance irrelevance: how much does the right answer's logit vary while the distance stays? Where the distance
  explains it all, as for the Pizza, little (0.17; typically below 0.4), for the Clock as much as ever (0.85).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from probes.modular import PairGrid
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented
from workbench.runtime import generator

TRIPLES = 500
"""Triples (a, b, c) that the gradients are averaged over; the paper takes 100."""


def gradient_symmetricity(model: Instrumented, grid: PairGrid, *, seed: int = 0) -> float:
    """Mean cosine of the gradients of logit c by the embeddings of a and b, over random triples (definition 4.1).

    The answer c is drawn at random too: it need not be right. A gradient that vanishes counts as orthogonal.
    """
    rng = generator(seed, "gradient symmetricity")
    batch = grid.batch.select(torch.randint(grid.order**2, (TRIPLES,), generator=rng))
    answer = grid.residue[torch.randint(grid.order, (TRIPLES,), generator=rng)]

    def chosen_logits(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, ""]:
        # Examples do not meet in the model, so the gradient of the sum is each one's own.
        return logits[batch.read].gather(1, answer[:, None]).sum()

    gradient = run(model, batch.tokens, record=["embed"], gradient_of=chosen_logits).gradient("embed")
    by_a, by_b = (gradient[:, batch.latents[name].position] for name in ("a", "b"))
    return float(functional.cosine_similarity(by_a, by_b).mean())


def distance_irrelevance(logits: Float[Tensor, "order order vocab"], grid: PairGrid) -> float:
    """Spread of the right answer's logit at a fixed distance x - y, averaged, over its whole spread (definition 4.2).

    Near 0 the distance determines the logit; 1 says that it is irrelevant, also where the logit never varies. In a
    group of even order, as for multiplication, a distance leaves only the sums of its parity: 1 is not met exactly.
    """
    correct = logits.flatten(0, 1).gather(1, grid.answers[:, None]).double().view(grid.order, grid.order)
    element = torch.arange(grid.order)
    by_distance = correct[element, (element + element[:, None]) % grid.order]
    whole = float(correct.std(correction=0))
    return float(by_distance.std(1, correction=0).mean()) / whole if whole else 1.0
