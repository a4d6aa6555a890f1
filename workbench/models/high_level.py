"""High-level programs: small causal models of what a trained model computes, and the models trained to hold one.

A program names the variables between a prompt and its answer and says how each follows from the earlier ones. Setting
a variable to its value on another prompt says what the answer would be then; a model that holds the program answers the
same when the part that carries the variable is interchanged between the two prompts (Geiger et al. 2021).
`workbench.training.interchange` trains models to do so; two of them ship with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.models.config import ModelConfig
from workbench.models.known import KnownCircuit
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator, nearest
from workbench.store import load_tensors
from workbench.tasks.base import Batch

FIXTURES = Path(__file__).parent / "planted_fixtures"
Values = Mapping[str, Int[Tensor, " batch"]]
Prompts = Callable[[int, torch.Generator], tuple[Int[Tensor, "n pos"], Int[Tensor, " n"]]]
"""Draws prompts and their answers."""

REDRAWS = 1000

BITS, BIT_PLACES = 4, (0, 2)
ENTITIES, BRIDGES, RELATIONS = 8, 4, 2
BRIDGE_OF = (2, 0, 3, 1, 1, 3, 0, 2)
"""Entity -> bridge."""
ANSWER_OF = ((1, 3, 0, 2), (3, 2, 1, 0))
"""Relation, bridge -> answer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HighLevel:
    """A causal model over prompts."""

    name: str
    about: str
    """What it computes, in one sentence."""
    vocab: tuple[str, ...]
    """What each token reads as."""
    draw: Callable[[int, torch.Generator], Int[Tensor, "n pos"]]
    """Draws prompts."""
    variables: Mapping[str, Callable[[Int[Tensor, "batch pos"], Values], Int[Tensor, " batch"]]]
    """Each variable from the prompt and the earlier variables; the last one is the answer, read at the end."""

    def run(self, tokens: Int[Tensor, "batch pos"], fixed: Values = MappingProxyType({})) -> Values:
        """Every variable's value, those in `fixed` held at what is given.

        Raises:
            WorkbenchError: the program has no such variable.
        """
        for name in fixed:
            if name not in self.variables:
                raise WorkbenchError(f"Program {self.name!r} has no variable {name!r}. {nearest(name, self.variables)}")
        values: dict[str, Tensor] = {}
        for name, compute in self.variables.items():
            values[name] = fixed[name] if name in fixed else compute(tokens, values)
        return values

    def answer(self, tokens: Int[Tensor, "batch pos"], fixed: Values = MappingProxyType({})) -> Int[Tensor, " batch"]:
        """The last variable's value."""
        return self.run(tokens, fixed)[list(self.variables)[-1]]

    def prompts(self, n: int, draw: torch.Generator) -> tuple[Int[Tensor, "n pos"], Int[Tensor, " n"]]:
        """Prompts with their answers."""
        tokens = self.draw(n, draw)
        return tokens, self.answer(tokens)


def differing_pairs(prompts: Prompts, n: int, draw: torch.Generator) -> Batch:
    """Prompts, and for each another one whose answer differs; the answer is read at the end.

    Raises:
        WorkbenchError: some prompts found no partner in a thousand draws.
    """
    tokens, answers = prompts(n, draw)
    corrupt, others = prompts(n, draw)
    for _ in range(REDRAWS):
        same = others == answers
        if not same.any():
            break
        corrupt[same], others[same] = prompts(int(same.sum()), draw)
    else:
        raise WorkbenchError(
            f"{int(same.sum())} of {n} prompts found only others of the same answer, {REDRAWS} times drawn. "
            "Draw prompts whose answers vary."
        )
    read = torch.zeros_like(tokens, dtype=torch.bool)
    read[:, -1] = True
    targets, distractor = (read * wanted[:, None] for wanted in (answers, others))
    return Batch(tokens=tokens, targets=targets, read=read, corrupt=corrupt, distractor=distractor)


def trained(name: str) -> KnownCircuit:
    """The model that was trained to hold this program, with its circuit.

    The circuit is what training was told: the nodes that carry the variables, joined as the program joins them, a head
    through its values. Where its heads look, from the positions through queries and keys, is the same on every prompt:
    no interchange tells which of the two is needed, so these edges are listed as constants. All other edges were cut at
    random while it trained. The model may still have learnt a second way to look somewhere, as real models do.

    Raises:
        WorkbenchError: no model was trained for a program of that name, or its file is damaged.
    """
    if name not in PROGRAMS:
        raise WorkbenchError(f"No trained model holds a program {name!r}. {nearest(name, PROGRAMS)}")
    program = PROGRAMS[name]
    weights, card = load_tensors(FIXTURES / f"{name}.safetensors")
    plan: Mapping[str, Any] = card["plan"]
    model = Transformer(ModelConfig(**_tuples(plan["model"])), generator=generator(0, "overwritten"))
    model.load_state_dict(weights)
    model.provenance = replace(model.provenance, recipe=f"planted:{name}", seed=card["seed"], parents=(card["sha256"],))
    return KnownCircuit(
        name=f"trained_{name}",
        model=model,
        pairs=partial(_program_pairs, name),
        structural=frozenset(plan["edges"]),
        constants=frozenset(plan["constants"]),
        metric="logit_difference",
        ablations=tuple(plan["ablations"]),
        about=program.about,
        vocab=program.vocab,
    )


def _program_pairs(name: str, n: int, seed: int) -> Batch:
    return differing_pairs(PROGRAMS[name].prompts, n, generator(seed, "planted", name, "pairs"))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _bits(n: int, draw: torch.Generator) -> Int[Tensor, "n pos"]:
    """Bits and an end."""
    return torch.cat([torch.randint(2, (n, BITS), generator=draw), torch.full((n, 1), 2)], 1)


def _questions(n: int, draw: torch.Generator) -> Int[Tensor, "n pos"]:
    """The entity asked about, another one, a relation."""
    entities = torch.randint(ENTITIES, (n, 2), generator=draw)
    return torch.cat([entities, ENTITIES + torch.randint(RELATIONS, (n, 1), generator=draw)], 1)


XOR = HighLevel(
    name="xor",
    about="Whether exactly one of two bits is set, among others that do not count.",
    vocab=("0", "1", "="),
    draw=_bits,
    variables=MappingProxyType(
        {
            "x": lambda tokens, _: tokens[:, BIT_PLACES[0]],
            "y": lambda tokens, _: tokens[:, BIT_PLACES[1]],
            "differ": lambda _, values: values["x"] ^ values["y"],
        }
    ),
)
TWO_HOP = HighLevel(
    name="two_hop",
    about="Looks up an entity's bridge, and then the answer to a relation of the bridge.",
    vocab=(*(f"entity {n}" for n in range(ENTITIES)), *(f"relation {n}" for n in range(RELATIONS))),
    draw=_questions,
    variables=MappingProxyType(
        {
            "bridge": lambda tokens, _: torch.tensor(BRIDGE_OF)[tokens[:, 0]],
            "answer": lambda tokens, values: torch.tensor(ANSWER_OF)[tokens[:, 2] - ENTITIES, values["bridge"]],
        }
    ),
)
PROGRAMS: Mapping[str, HighLevel] = MappingProxyType({program.name: program for program in (XOR, TWO_HOP)})
"""Programs for which a trained model ships."""
