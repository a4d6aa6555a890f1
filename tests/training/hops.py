"""Reasoners for tests: one wired by hand, of which every answer is known, and a tiny one that was trained."""

import re
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from torch import nn

from workbench.instrument.sites import Site
from workbench.store import Provenance, new_run
from workbench.tasks.comparison import Comparison
from workbench.tasks.composition import Composition
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

WORLD = Composition(entities=20, relations=6, out_degree=4, ood_fraction=0.2, test_fraction=0.2, phi=2.0)
REGISTER = Comparison(entities=20, values=4, ood_fraction=0.2, phi=5.0)
TINY = ("model.n_layers=2", "d_model=32", "n_heads=2", "d_head=16", "d_mlp=64")
KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


class Shape:
    """What a model without any transformer inside must say of itself."""

    n_steps, d_mlp, n_ctx, causal = 2, 1, 3, True

    def __init__(self, d_vocab):
        self.d_vocab = d_vocab

    def heads_of(self, kind):
        return 1


class Hops(nn.Module):
    """Two lookups in a residual stream that holds one token at each position.

    Layer 0 looks up the bridge and puts it at r1; layer 1 looks up the answer and puts it at r2. Where a lookup finds
    nothing it gives padding, which is never right. Another model answers chains from their tokens alone.
    """

    def __init__(self, task, *, first_ood=True, second_ood=True, memorises=False):
        """`first_ood`, `second_ood`: whether that lookup knows OOD facts, too."""
        super().__init__()
        self.task, self.memorises = task, memorises
        self.first, self.second = (
            task._world.table if knows else task._world.id_table for knows in (first_ood, second_ood)
        )
        self.config = Shape(len(task.vocab))
        self.sites = tuple(sorted(Site.parse(f"L{layer}.{kind}") for layer in (0, 1) for kind in KINDS))
        self.provenance = Provenance(code_version="test")
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, tokens, edits=None):
        edits = edits or {}
        x = self._held(tokens)
        for layer in (0, 1):
            x = self._visit(f"L{layer}.resid_pre", x, edits)
            after = x.clone()
            if layer == 0:
                after[:, 1] = self._held(self._look_up(self.first, x[:, 0], x[:, 1]))
            if x.shape[1] > 2:
                after[:, 2] = self._second(x, layer)
            attended = self._visit(f"L{layer}.attn_out", torch.zeros_like(x), edits)
            written = self._visit(f"L{layer}.mlp_out", after - x, edits)
            x = self._visit(f"L{layer}.resid_post", x + attended + written, edits)
        return self.finish(x, {})

    def finish(self, x, edits):
        return x.clone()

    def _second(self, x, layer):
        chain = x[:, 2].argmax(-1) != self.task.pad_token
        if self.memorises:
            # At once, in layer 0: nothing is read at r1.
            if layer == 1:
                return x[:, 2]
            bridge = self._look_up(self.task._world.table, x[:, 0], x[:, 1])
            answer = self._look_up(self.task._world.table, self._held(bridge), x[:, 2])
        else:
            answer = self._look_up(self.second, x[:, 1], x[:, 2])
        return torch.where(chain[:, None] & (layer == 1 or self.memorises), self._held(answer), x[:, 2])

    def _look_up(self, table, head, relation):
        head, relation = head.argmax(-1), relation.argmax(-1) - self.task.entities
        asked = (head < self.task.entities) & (relation >= 0) & (relation < self.task.relations)
        found = table[head.where(asked, 0), relation.where(asked, 0)]
        return found.where(asked & (found >= 0), self.task.pad_token)

    def _held(self, tokens):
        return nn.functional.one_hot(tokens, len(self.task.vocab)).float()

    def _visit(self, name, x, edits):
        site = Site.parse(name)
        return edits[site](x) if site in edits else x


@cache
def reasoner_run(kind, *settings):
    """A finished run of a tiny model, in a folder that goes with the process; nobody writes to it."""
    world = [f"task.{name}={value}" for name, value in asdict(WORLD if kind == "composition" else REGISTER).items()]
    recipe = find_recipe(f"{kind}-smoke").override([*world, *TINY, "steps=250", "learning_rate=3e-3", *settings])
    name = re.sub(r"\W", "-", " ".join((kind, *settings)))
    return train(recipe, new_run(name, Path(_folder().name)))


@cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="reasoners")
