"""What one place of one run holds: how large it is, what it says in tokens, and what it adds directly to the answer.

A residual stream is read by the logit lens. What a head, an attention layer, an MLP or a neuron wrote is brought into
the stream by the matrix it is written with, and read through the final norm (its scale held at its value) and the
unembedding: which tokens it speaks for, and which against. Queries, keys, values and what enters a nonlinearity have no
such reading; of these the norm is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from probes.attribution import Granularity, direct_logit_attribution
from probes.logit_lens import STREAM, lens_logits
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, SiteKind
from workbench.instrument.trace import Trace
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

TOP = 5
NEURONS = 12
"""Neurons of a place that are listed, those with the largest direct effect or activation first."""
WRITERS = (SiteKind.embed, SiteKind.pos_embed, SiteKind.z, SiteKind.attn_out, SiteKind.post, SiteKind.mlp_out)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlaceReading:
    """What a place holds in one run."""

    site: Site
    position: int
    norm: float
    tokens: tuple[tuple[str, float], ...]
    """Tokens it says most loudly, with their value; empty where a place has no reading in tokens."""
    unit: str
    """`probability` where it is the logit lens, `logits` where it is what was written there."""
    direct_effect: float | None
    """What it adds directly to the answer's lead over the distractor; None where the answer is not read here, or the
    place writes nothing."""
    neurons: pd.DataFrame | None
    """For an MLP's neurons: the ones that matter most, with activation and direct effect."""
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {
            "site": str(self.site),
            "position": self.position,
            "norm": self.norm,
            "tokens": [{"token": token, "value": value} for token, value in self.tokens],
            "unit": self.unit,
            "direct_effect": self.direct_effect,
            "neurons": None if self.neurons is None else self.neurons.to_dict("records"),
        }

    def tables(self) -> Sequence[Table]:
        """The tokens, and the neurons where there are any."""
        found = []
        if self.tokens:
            found.append(
                Table(
                    name="place_tokens",
                    frame=pd.DataFrame(self.tokens, columns=["token", "value"]),
                    kind="bar",
                    axes={"x": "token", "y": "value"},
                    unit=self.unit,
                    caption=f"What {self.site} says at position {self.position}, norm {self.norm:.3g}.",
                )
            )
        if self.neurons is not None:
            found.append(
                Table(
                    name="place_neurons",
                    frame=self.neurons,
                    kind="table",
                    axes={},
                    unit="",
                    caption=f"Neurons of {self.site} at position {self.position} that matter most here.",
                )
            )
        return found


def read_place(
    model: Instrumented, batch: Batch, site: Site, position: int, *, names: Sequence[str] | None = None
) -> PlaceReading:
    """What a place holds in the run of one prompt.

    Args:
        model: any instrumented model; only one of our own has a reading in tokens.
        batch: one prompt, with its counterfactual if the direct effect is wanted.
        site: the place; a head or neuron, or a whole site.
        position: where in the prompt.
        names: the tokens' names.

    Raises:
        WorkbenchError: more than one prompt, or a position that the prompt does not have.
    """
    if len(batch) != 1:
        raise WorkbenchError(f"A place is read in one prompt; this batch has {len(batch)}. Take batch.select(…).")
    if not 0 <= position < batch.tokens.shape[1] or "pos" not in site.kind.dims:
        raise WorkbenchError(
            f"No place {site} at position {position}: positions go from 0 to {batch.tokens.shape[1] - 1}, "
            "and patterns have none."
        )
    scale = [each for each in model.sites if each.kind is SiteKind.ln_final_scale]
    trace = run(model, batch.tokens, record=[site, *scale])
    vector = trace[site][0, position]
    values, unit = _in_tokens(model, trace, site, position, vector)
    read_here = bool(batch.read[0, position]) and batch.distractor is not None and isinstance(model, Transformer)
    return PlaceReading(
        site=site,
        position=position,
        norm=float(vector.norm()),
        tokens=() if values is None else _loudest(values, names),
        unit=unit,
        direct_effect=_direct_effect(model, batch, site) if read_here else None,
        neurons=_neurons(model, batch, site, vector, read_here) if _holds_neurons(site) else None,
        provenance=trace.provenance,
    )


def _in_tokens(
    model: Instrumented, trace: Trace, site: Site, position: int, vector: Float[Tensor, "*width"]
) -> tuple[Float[Tensor, " vocab"] | None, str]:
    if site.kind in STREAM:
        return lens_logits(model, trace, [site])[0, 0, position].softmax(-1), "probability"
    if site.kind not in WRITERS or not isinstance(model, Transformer):
        return None, "logits"
    written = _written(model, site, vector)
    if model.final_norm is not None:
        centred = written - written.mean()
        written = centred / trace["ln_final_scale"][0, position] * model.final_norm.w
    return (written @ model.W_U).detach(), "logits"


def _written(model: Transformer, site: Site, vector: Float[Tensor, "*width"]) -> Float[Tensor, " d_model"]:
    """What a place adds to the residual stream, without its layer's bias."""
    if site.layer is None or site.kind not in (SiteKind.z, SiteKind.post):
        return vector
    block = model.block(site.layer)
    if site.kind is SiteKind.z:
        W_O = block.attn.W_O if site.head is None else block.attn.W_O[site.head]
        return vector.flatten() @ W_O.reshape(-1, W_O.shape[-1])
    assert block.mlp is not None
    return vector @ block.mlp.W_out if site.neuron is None else vector * block.mlp.W_out[site.neuron]


def _loudest(values: Float[Tensor, " vocab"], names: Sequence[str] | None) -> tuple[tuple[str, float], ...]:
    top, tokens = values.topk(min(TOP, len(values)))
    called = [names[token] if names else str(token) for token in tokens.tolist()]
    return tuple((str(name), float(value)) for name, value in zip(called, top.tolist(), strict=True))


def _direct_effect(model: Instrumented, batch: Batch, site: Site) -> float | None:
    by: Granularity = "neuron" if site.neuron is not None else "head" if site.head is not None else "component"
    found = direct_logit_attribution(model, batch, by=by)
    return float(found.effect[found.parts.index(str(site))]) if str(site) in found.parts else None


def _holds_neurons(site: Site) -> bool:
    return "d_mlp" in site.kind.dims and site.neuron is None


def _neurons(
    model: Instrumented, batch: Batch, site: Site, activations: Float[Tensor, " d_mlp"], read_here: bool
) -> pd.DataFrame:
    frame = pd.DataFrame({"neuron": range(len(activations)), "activation": activations.tolist()})
    order = "activation"
    if read_here and site.kind is SiteKind.post:
        found = direct_logit_attribution(model, batch, by="neuron")
        effects = dict(zip(found.parts, found.effect.tolist(), strict=True))
        frame["direct_effect"] = [effects[f"{site}.n{neuron}"] for neuron in frame["neuron"]]
        order = "direct_effect"
    return frame.sort_values(order, key=abs, ascending=False).head(NEURONS).reset_index(drop=True)
