"""Weights and activations in one table: a component's weights are grafted, and its activation is patched.

For each head and each MLP of the base, two ways to give it what the donor's has: its weights, which then read whatever
the base's stream holds, or what it wrote in the donor on the same prompt, whatever its weights. Where both mend the
answer the component itself was changed; where only the activation does, what it reads was.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from circuits.grafting import Delta
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.instrument.trace import FromTrace, Patch
from workbench.intervals import columns_of, share_of
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.training.finetune import with_weights

HEADS = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "attn.b_Q", "attn.b_K", "attn.b_V")
"""Tensors of a block whose first dimension is the head."""


def component_grafts(base: Transformer, delta: Delta, batch: Batch) -> Table:
    """Accuracy with each head's and each MLP's weights grafted, and with its activation patched from the donor.

    Args:
        base: the model that components are given to.
        delta: to the donor.
        batch: prompts with their answers.

    Raises:
        WorkbenchError: blocks of the model run more than once, so that weights and passes do not correspond.
    """
    if base.config.schedule is not None:
        raise WorkbenchError("The model's blocks run by a schedule: a block's weights then have several activations.")
    donor = with_weights(base, delta.uniform(1.0))
    sites = [Site.parse(f"L{layer}.{kind}") for layer in range(base.config.n_layers) for kind in ("z", "mlp_out")]
    clean = run(donor, batch.tokens, record=sites)
    rows = [_row("base", "-", _right(base, batch), None), _row("donor", "-", _right(donor, batch), None)]
    for site, mask in _components(base, delta):
        grafted = _right(with_weights(base, delta.weights(mask)), batch)
        patched = run(base, batch.tokens, patches=[Patch(site=site, source=FromTrace(clean))])
        rows.append(_row(str(site), str(site.layer), grafted, _is_right(patched.logits, batch)))
    return Table(
        name="component_grafts",
        frame=pd.DataFrame(rows),
        kind="table",
        axes={},
        unit="accuracy",
        caption=(
            f"Accuracy with one component's weights from the donor, and with its activation from the donor; "
            f"n = {len(batch):,}, 95 % score intervals."
        ),
    )


def _components(model: Transformer, delta: Delta) -> list[tuple[Site, dict[str, Tensor]]]:
    """Each head and each MLP: where it writes, and a mask of its weights."""
    found = []
    for layer in range(model.config.n_layers):
        for head in range(model.config.n_heads):
            mask = _nothing(delta)
            for name in HEADS:
                if (full := f"weights.{layer}.{name}") in mask:
                    mask[full][head] = True
            found.append((Site.parse(f"L{layer}.z.h{head}"), mask))
        if model.config.d_mlp:
            mask = {name: tensor | name.startswith(f"weights.{layer}.mlp.") for name, tensor in _nothing(delta).items()}
            found.append((Site.parse(f"L{layer}.mlp_out"), mask))
    return found


def _nothing(delta: Delta) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in delta.change.items()}


def _row(component: str, layer: str, grafted: Tensor, patched: Tensor | None) -> dict[str, object]:
    return {
        "component": component,
        "layer": layer,
        **columns_of("weights_grafted", share_of(grafted)),
        **columns_of("activation_patched", None if patched is None else share_of(patched)),
    }


def _right(model: Transformer, batch: Batch) -> Tensor:
    with torch.no_grad():
        return _is_right(model(batch.tokens), batch)


def _is_right(logits: Tensor, batch: Batch) -> Tensor:
    return logits[batch.read].argmax(1) == batch.targets[batch.read]
