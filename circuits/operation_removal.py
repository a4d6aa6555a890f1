"""What a model answers when some of the attention operations of a traced prompt are undone.

An operation is undone as the tracer measures it: the entry of one that copies is set to zero, that of an inhibited one
to the largest of its column in the unchanged pass. The rows are not normalised again, and all later layers see it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from circuits.attention_ops import Operation
from circuits.search_prompts import SearchPrompt
from workbench.instrument.passes import run
from workbench.instrument.sites import Site, SiteKind
from workbench.instrument.trace import Patch, Value
from workbench.models.transformer import Transformer


def logits_without(
    model: Transformer, prompt: SearchPrompt, operations: Sequence[Operation]
) -> Float[Tensor, " vocab"]:
    """Logits where the answer is read, these operations undone; with none, the model's own.

    Raises:
        WorkbenchError: the model cannot read the prompt, or lacks an operation's layer.
    """
    tokens, position = prompt.padded[None], prompt.position
    sites = {each.layer: Site(kind=SiteKind.pattern, layer=each.layer) for each in operations}
    clean = run(model, tokens, record=sites.values())
    patches = []
    for each in operations:
        column = clean[sites[each.layer]][0, 0, position, position[each.src]]
        patches.append(
            Patch(
                site=sites[each.layer],
                source=Value(column.new_zeros(()) if each.sign == 1 else column.max()),
                dest=int(position[each.dest]),
                src=int(position[each.src]),
            )
        )
    return (run(model, tokens, patches=patches) if patches else clean).logits[0, -1]
