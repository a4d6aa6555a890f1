"""A model's weights in whole parts: heads, neurons of the MLPs, layers. A structured graft takes a part or leaves it.

A head's part is what makes its queries, keys and values and what reads its output; a neuron's, what it reads, its
bias, and what it writes. Both are slices of a block's tensors, found by the tensors' names: ours, and those of BERT and
Llama, where keys and values that several heads share belong to none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.grafting import place_of
from workbench.runtime import WorkbenchError

PartKind = Literal["heads", "neurons", "layers"]
SLICED: dict[str, dict[str, int]] = {
    "heads": {
        **dict.fromkeys(("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "attn.b_Q", "attn.b_K", "attn.b_V"), 0),
        **{f"attention.self.{each}.{kind}": 0 for each in ("query", "key", "value") for kind in ("weight", "bias")},
        "attention.output.dense.weight": 1,
        "self_attn.q_proj.weight": 0,
        "self_attn.o_proj.weight": 1,
    },
    "neurons": {
        "mlp.W_in": 1,
        "mlp.b_in": 0,
        "mlp.W_out": 0,
        "intermediate.dense.weight": 0,
        "intermediate.dense.bias": 0,
        "output.dense.weight": 1,
        "mlp.gate_proj.weight": 0,
        "mlp.up_proj.weight": 0,
        "mlp.down_proj.weight": 1,
    },
}
"""By component, the dimension along which a tensor is cut into heads or neurons."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parts:
    """Which part each weight belongs to."""

    number: Mapping[str, Int[Tensor, "..."]]
    """Of each weight's part; -1 for weights of none."""
    count: int


def parts_of(tensors: Mapping[str, Float[Tensor, "..."]], kind: PartKind, module: nn.Module) -> Parts:
    """The parts of a kind, in the order of the tensors.

    Args:
        tensors: what may be grafted, by name.
        kind: heads, neurons or layers.
        module: the model, which knows how many heads it has.

    Raises:
        WorkbenchError: none of the tensors has such parts, or the model does not say how many heads it has.
    """
    numbers: dict[tuple[str, int], int] = {}
    found = {}
    for name, tensor in tensors.items():
        layer, component = place_of(name)
        found[name] = torch.full(tensor.shape, -1, device=tensor.device)
        if kind == "layers" and layer != "-":
            found[name].fill_(numbers.setdefault((layer, 0), len(numbers)))
        elif kind != "layers" and component in SLICED[kind]:
            dim = SLICED[kind][component]
            length = tensor.shape[dim]
            each = length // n_heads_of(module) if kind == "heads" else 1
            for place in range(length):
                part = numbers.setdefault((layer, place // each), len(numbers))
                found[name].select(dim, place).fill_(part)
    if not numbers:
        raise WorkbenchError(f"None of the weights lies in {kind}. Choose another method.")
    return Parts(number=found, count=len(numbers))


def best_parts(parts: Parts, scores: Mapping[str, Float[Tensor, "..."]], size: int) -> dict[str, Tensor]:
    """A mask of whole parts, those of the largest mean score first, as many as `size` has room for but at least one."""
    total, weights = (torch.zeros(parts.count, dtype=torch.float64) for _ in range(2))
    for name, number in parts.number.items():
        inside = number >= 0
        total.index_add_(0, number[inside].cpu(), scores[name][inside].double().cpu())
        weights += number[inside].cpu().bincount(minlength=parts.count)
    order = (total / weights).argsort(descending=True, stable=True)
    fits = max(1, int((weights[order].cumsum(0) <= size).sum()))
    chosen = torch.zeros(parts.count + 1, dtype=torch.bool)
    chosen[order[:fits]] = True
    # The last place is that of weights of no part, whose number is -1.
    return {name: chosen.to(number.device)[number] for name, number in parts.number.items()}


def n_heads_of(module: nn.Module) -> int:
    """How many heads each of a model's layers has, as its own configuration or that of a module in it says.

    Raises:
        WorkbenchError: none says so.
    """
    for part in module.modules():
        config = getattr(part, "config", None)
        for name in ("n_heads", "num_attention_heads"):
            if isinstance(count := getattr(config, name, None), int):
                return count
    raise WorkbenchError("The model does not say how many heads it has: it needs a config with n_heads.")
