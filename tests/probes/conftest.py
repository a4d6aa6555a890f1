"""Models of modular arithmetic whose circuit is known because it is written down here."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from probes.modular import pair_grid
from workbench.instrument.sites import Edit, Site
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.store import Provenance
from workbench.tasks.modular import Modular

EMBED, POST = Site.parse("embed"), Site.parse("L0.post")
PHASES = 5


class Planted:
    """Operands on circles, then the Clock's product of angles or the Pizza's midpoint; neurons of one frequency each.

    Logits are `scale * sum_k cos(w_k (x + y - z))`, for the Pizza dimmed by |cos(w_k (x - y) / 2)|, plus `answer_bias`.
    """

    def __init__(
        self,
        task: Modular,
        frequencies: Sequence[int],
        *,
        pizza: bool = False,
        mlp: bool = True,
        scale: float = 20.0,
        answer_bias: float = 0.0,
        name: str = "planted",
    ) -> None:
        grid = pair_grid(task)
        self.task, self.grid, self.pizza, self.scale = task, grid, pizza, scale
        self.config = SimpleNamespace(
            n_steps=1, n_heads=1, d_mlp=PHASES * len(frequencies) * mlp, n_ctx=3, d_vocab=task.p + 1
        )
        self.sites = (EMBED, POST) if mlp else (EMBED,)
        self.provenance = Provenance(code_version="test", parents=(name,))
        angle = 2 * math.pi / grid.order * torch.tensor(frequencies).outer(torch.arange(grid.order))
        self.cos, self.sin = angle.cos(), angle.sin()
        self.sign = 1 if task.operation in ("add", "mul") else -1
        self.W_E = torch.zeros(task.p + 1, 2, len(frequencies))
        self.W_E[grid.residue] = torch.stack([self.cos, self.sin]).permute(2, 0, 1)
        rng = torch.Generator().manual_seed(0)
        self.bias = answer_bias * torch.randn(grid.order, generator=rng)

    def forward(self, tokens: Tensor, edits: Mapping[Site, Edit] | None = None) -> Tensor:
        edits = edits or {}
        embedded = self.W_E[tokens].flatten(2)
        if EMBED in edits:
            embedded = edits[EMBED](embedded)
        a, b = embedded.unflatten(2, (2, -1))[:, :2].unbind(1)
        b = b * torch.tensor([1.0, self.sign])[:, None]
        if POST in self.sites:
            post = self.neurons(a, b)[:, None].expand(-1, tokens.shape[1], -1)
            if POST in edits:
                edits[POST](post)
        if self.pizza:
            middle = a + b
            length = middle.square().sum(1).sqrt()
            cos = (middle[:, 0].square() - middle[:, 1].square()) / length / 2
            sin = middle[:, 0] * middle[:, 1] / length
        else:
            cos, sin = a[:, 0] * b[:, 0] - a[:, 1] * b[:, 1], a[:, 1] * b[:, 0] + a[:, 0] * b[:, 1]
        logits = torch.full((len(tokens), self.task.p), -5.0)
        logits[:, self.grid.residue] = self.scale * (cos @ self.cos + sin @ self.sin) + self.bias
        return logits[:, None].expand(-1, tokens.shape[1], -1)

    def neurons(self, a: Tensor, b: Tensor) -> Tensor:
        """cos(w x + phase) cos(w y + phase) + cos(w x + phase) / 2: degree 2 in one frequency."""
        phase = torch.arange(PHASES) * 2 * math.pi / PHASES
        first, second = (turned[:, 0, :, None] * phase.cos() - turned[:, 1, :, None] * phase.sin() for turned in (a, b))
        return (first * second + first / 2).flatten(1)


class Table:
    """A model that knows every pair by heart: logits from a table, and neurons that follow nothing."""

    def __init__(self, task: Modular, *, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(n_steps=1, n_heads=1, d_mlp=40, n_ctx=3, d_vocab=task.p + 1)
        self.sites, self.provenance = (EMBED, POST), Provenance(code_version="test")
        self.W_E = torch.randn(task.p + 1, 8, generator=rng)
        self.noise = torch.randn(task.p, task.p, task.p, generator=rng)
        self.post = torch.randn(task.p, task.p, 40, generator=rng).relu()
        batch = task.examples("all")
        self.noise[batch.tokens[:, 0], batch.tokens[:, 1], batch.targets[:, 2]] += 12

    def forward(self, tokens: Tensor, edits: Mapping[Site, Edit] | None = None) -> Tensor:
        edits = edits or {}
        embedded = self.W_E[tokens]
        if EMBED in edits:
            embedded = edits[EMBED](embedded)
        a, b = tokens[:, 0], tokens[:, 1]
        if POST in edits:
            edits[POST](self.post[a, b][:, None].expand(-1, 3, -1))
        return self.noise[a, b][:, None].expand(-1, 3, -1) + 0 * embedded.sum(-1, keepdim=True)


class Shown:
    """A model whose `embed` is a given tensor of two positions, whatever it reads; it answers nothing."""

    def __init__(self, states: Tensor) -> None:
        self.states, self.sites = states, (EMBED,)
        self.config = SimpleNamespace(n_steps=0, n_heads=0, d_mlp=0, n_ctx=2, causal=True, d_vocab=100)
        self.provenance = Provenance(code_version="test", parents=("shown",))

    def forward(self, tokens: Tensor, edits: Mapping[Site, Edit] | None = None) -> Tensor:
        if edits and EMBED in edits:
            edits[EMBED](self.states)
        return torch.zeros(*tokens.shape, 100)


class Foreign:
    """Our own transformer seen from outside: everything that `Instrumented` asks for, and no weights."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.config, self.sites, self.provenance = model, model.config, model.sites, model.provenance
        self.forward = model.forward


@pytest.fixture
def planted() -> type[Planted]:
    return Planted


@pytest.fixture
def by_heart() -> type[Table]:
    return Table


@pytest.fixture
def shown() -> type[Shown]:
    return Shown


@pytest.fixture
def foreign() -> type[Foreign]:
    return Foreign


@pytest.fixture
def transformer() -> Callable[..., Transformer]:
    """Makes small transformers for modular arithmetic whose every parameter, biases too, is random."""

    def make(task: Modular, **changes: object) -> Transformer:
        fields = {
            "n_layers": 1,
            "d_model": 16,
            "n_heads": 2,
            "d_head": 8,
            "d_mlp": 24,
            "n_ctx": 3,
            "d_vocab": task.p + 1,
            "d_vocab_out": task.p,
        }
        rng = torch.Generator().manual_seed(0)
        model = Transformer(ModelConfig(**{**fields, **changes}), generator=rng)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
        return model

    return make
