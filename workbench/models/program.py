"""The Transformer Program: a transformer that is, after discretisation, a program (Friedman et al. 2023, section 3).

    variables: [tokens, positions | 1] -> each layer's heads append theirs, then its MLPs theirs -> votes everywhere

Every choice - which variable a part reads, which key a query matches, where a head looks, what a table says - is a
categorical distribution. In training each is relaxed with Gumbel noise at a temperature that falls; afterwards each is
its most likely value, and the model is one of `workbench.models.discrete`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.instrument.sites import Edit, Site, SiteKind
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    Layer,
    NumericalHead,
    NumericalMLP,
    ProgramShape,
)
from workbench.models.program_config import ProgramConfig
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance

NEVER = -1e30
"""Logit of what cannot be chosen."""
TINY = 1e-20
SELF = -2.0
"""Bias of a position towards itself: any other match comes first."""
CERTAIN = 10.0
"""Logit of a token's own value, and minus that of the others, where tokens are not coded."""
Choice = Callable[[Tensor], Tensor]
"""How distributions become values: logits to (nearly) one-hot weights along the last dimension."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gumbel:
    """A relaxed sample (Jang et al. 2017; Maddison et al. 2017).

    torch's own `gumbel_softmax` takes no generator, and a killed run could not draw the same noise again.
    """

    temperature: float | Float[Tensor, ""]
    generator: torch.Generator
    """Where noise is drawn: on its device."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Softmax of the noisy logits over the temperature."""
        uniform = torch.rand(logits.shape, generator=self.generator, device=self.generator.device, dtype=logits.dtype)
        uniform = uniform.clamp_min(TINY)
        noise = -torch.log(-torch.log(uniform).clamp_max(-torch.finfo(logits.dtype).tiny))
        return ((logits + noise.to(logits.device)) / self.temperature).softmax(-1)


def most_likely(logits: Tensor) -> Tensor:
    """The first of the largest."""
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)


class Heads(nn.Module):
    """Heads of one kind in one layer: what each reads, and which key each query matches."""

    def __init__(self, n: int, n_keys: int, n_values: int, cardinality: int, draw: torch.Generator | None) -> None:
        super().__init__()
        self.read_q, self.read_k = (_gate((n, n_keys), draw) for _ in "qk")
        self.read_v = _gate((n, n_values), draw)
        self.predicate = _gate((n, cardinality, cardinality), draw)

    def matches(
        self, variables: Float[Tensor, "batch pos variable value"], choose: Choice
    ) -> Float[Tensor, "batch head dest src"]:
        """How far each key is the one that the query wants."""
        query, key = (torch.einsum("hm,btmk->bhtk", choose(read), variables) for read in (self.read_q, self.read_k))
        return torch.einsum("bhqi,hij,bhsj->bhqs", query, choose(self.predicate), key)


class Tables(nn.Module):
    """MLPs of one kind in one layer: each reads two variables and writes a categorical one."""

    def __init__(self, n: int, n_reads: int, width: int, config: ProgramConfig, draw: torch.Generator | None) -> None:
        super().__init__()
        k, d = config.cardinality, config.d_mlp
        self.read = _gate((n, 2, n_reads), draw)
        self.W_in = _normal((n, 2 * width, d), 1 / math.sqrt(d), draw)
        self.b_in = nn.Parameter(torch.zeros(n, d))
        self.W_out = _normal((n, d, k), 1 / math.sqrt(k), draw)
        self.b_out = nn.Parameter(torch.zeros(n, k))

    def codes(self, read: Float[Tensor, "batch pos mlp width"], choose: Choice) -> Float[Tensor, "batch pos mlp value"]:
        """The values written, by what was read."""
        hidden = torch.einsum("btnw,nwd->btnd", read, self.W_in.to(read)) + self.b_in.to(read)
        logits = torch.einsum("btnd,ndk->btnk", hidden.relu(), self.W_out.to(read)) + self.b_out.to(read)
        return choose(logits.log_softmax(-1))


class ProgramLayer(nn.Module):
    """Heads that read what stands before the layer, then MLPs that read the heads' variables too."""

    def __init__(self, config: ProgramConfig, index: int, draw: torch.Generator | None) -> None:
        super().__init__()
        k = config.cardinality
        n_categorical = config.columns + 1 + index * config.written
        n_numerical = 1 + index * config.numerical_heads
        self.categorical = Heads(config.categorical_heads, n_categorical, n_categorical, k, draw)
        self.numerical = Heads(config.numerical_heads, n_categorical, n_numerical, k, draw)
        n_categorical += config.categorical_heads
        self.tables = Tables(config.categorical_mlps, n_categorical, k, config, draw)
        self.number_tables = Tables(config.numerical_mlps, n_numerical + config.numerical_heads, 1, config, draw)


class TransformerProgram(nn.Module):
    """The model; `forward` is that of the discretised one, as an `Instrumented` that can be looked into and changed."""

    allowed: Bool[Tensor, " vocab"]
    """The tokens that may be predicted."""

    def __init__(self, config: ProgramConfig, *, generator: torch.Generator | None) -> None:
        """Draw weights, or leave them to be loaded if there is no generator."""
        super().__init__()
        self.config = config
        k, m = config.cardinality, config.columns
        self.W_E = _normal((config.d_vocab, m, k), 1 / math.sqrt(m * k), generator)
        if not config.coded:
            self.W_E = nn.Parameter((2 * torch.eye(config.d_vocab, k) - 1)[:, None] * CERTAIN, requires_grad=False)
        self.layers = nn.ModuleList(ProgramLayer(config, index, generator) for index in range(config.n_layers))
        n_categorical = m + 1 + config.n_layers * config.written
        n_numerical = 1 + config.n_layers * config.numerical_heads
        scale = 1 / math.sqrt(config.d_vocab_out)
        self.W_categorical = _normal((n_categorical, k, config.d_vocab_out), scale, generator)
        self.W_numerical = _normal((n_numerical, config.d_vocab_out), scale, generator)
        allowed = torch.zeros(config.d_vocab_out, dtype=torch.bool)
        allowed[list(config.outputs)] = True
        self.register_buffer("allowed", allowed, persistent=False)
        self.provenance = Provenance(code_version=code_version(), recipe="", seed=None, parents=())

    @property
    def matrices(self) -> tuple[nn.Parameter, ...]:
        """Everything but biases."""
        return tuple(each for name, each in self.named_parameters() if not name.rpartition(".")[2].startswith("b_"))

    @property
    def block_matrices(self) -> tuple[nn.Parameter, ...]:
        """Those of the MLPs: what is left are distributions and votes."""
        return tuple(each for name, each in self.named_parameters() if name.endswith((".W_in", ".W_out")))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The variables of tokens and positions, then those that each layer writes."""
        config = self.config
        layered = [kind for kind in (SiteKind.z, SiteKind.sums, SiteKind.codes) if config.heads_of(kind)]
        single = [Site(kind=SiteKind.token_values), Site(kind=SiteKind.position_values)]
        return (*single, *(Site(kind=kind, layer=at) for at in range(config.n_layers) for kind in layered))

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits of the discretised model, in float64, with each edit applied to what flows through its site."""
        return self.pass_through(tokens, most_likely, torch.float64, edits or {})

    def relaxed(self, tokens: Int[Tensor, "batch pos"], choose: Choice) -> Float[Tensor, "batch pos vocab"]:
        """Logits in training: of one draw of all choices."""
        return self.pass_through(tokens, choose, torch.float32, {})

    def pass_through(
        self, tokens: Int[Tensor, "batch pos"], choose: Choice, dtype: torch.dtype, edits: Mapping[Site, Edit]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, by how choices are made."""
        config = self.config
        place = torch.eye(config.cardinality, dtype=dtype, device=tokens.device)[: tokens.shape[1]]
        categorical = torch.cat(
            [
                _edited(edits, Site(kind=SiteKind.token_values), choose(self.W_E)[tokens].to(dtype)),
                _edited(
                    edits, Site(kind=SiteKind.position_values), place[None, :, None].expand(len(tokens), -1, 1, -1)
                ),
            ],
            2,
        )
        numerical = torch.ones(*tokens.shape, 1, dtype=dtype, device=tokens.device)
        seen = self.seen(tokens)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ProgramLayer)
            categorical, numerical = self._run_layer(layer, index, categorical, numerical, seen, choose, edits)
        logits = torch.einsum("btmk,mkv->btv", categorical, self.W_categorical.to(dtype))
        logits = logits + numerical @ self.W_numerical.to(dtype)
        if config.pooled:
            real = (tokens != config.pad_token)[:, :, None].to(dtype)
            logits = ((logits * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(logits)
        return logits.masked_fill(~self.allowed, NEVER)

    def seen(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch dest src"]:
        """Which position each may look at; padding sees and is seen by none."""
        real = tokens != self.config.pad_token
        seen = real[:, :, None] & real[:, None, :]
        return seen.tril() if self.config.causal else seen

    def discrete_program(self, vocab: tuple[str, ...]) -> DiscreteProgram:
        """The program that the most likely choices are.

        Args:
            vocab: words of the tokens, which are those of the answers too.
        """
        config = self.config
        return DiscreteProgram(
            shape=ProgramShape(
                cardinality=config.cardinality, n_ctx=config.n_ctx, causal=config.causal, pooled=config.pooled
            ),
            vocab=vocab,
            classes=vocab[: config.d_vocab_out],
            pad_token=config.pad_token,
            embedding=self.W_E.detach().argmax(-1).numpy(),
            layers=tuple(_discrete_layer(layer) for layer in self.layers),
            W_categorical=self.W_categorical.detach().double().numpy(),
            W_numerical=self.W_numerical.detach().double().numpy(),
            allowed=tuple(self.allowed.tolist()),
        )

    def _run_layer(
        self,
        layer: ProgramLayer,
        index: int,
        categorical: Float[Tensor, "batch pos variable value"],
        numerical: Float[Tensor, "batch pos number"],
        seen: Bool[Tensor, "batch dest src"],
        choose: Choice,
        edits: Mapping[Site, Edit],
    ) -> tuple[Tensor, Tensor]:
        dtype = categorical.dtype
        copied = self._copy(layer.categorical, categorical, seen, choose)
        copied = _edited(edits, Site(kind=SiteKind.z, layer=index), copied)
        matched = layer.numerical.matches(categorical, _in(dtype, choose)) * seen[:, None]
        summed = torch.einsum("bhqs,hm,bsm->bqh", matched, choose(layer.numerical.read_v).to(dtype), numerical)
        summed = _edited(edits, Site(kind=SiteKind.sums, layer=index), summed)
        categorical, numerical = torch.cat([categorical, copied], 2), torch.cat([numerical, summed], 2)
        read = torch.einsum("nrm,btmk->btnrk", choose(layer.tables.read).to(dtype), categorical)
        numbers = torch.einsum("nrm,btm->btnr", choose(layer.number_tables.read).to(dtype), numerical)
        codes = [layer.tables.codes(read.flatten(3), choose), layer.number_tables.codes(numbers, choose)]
        coded = _edited(edits, Site(kind=SiteKind.codes, layer=index), torch.cat(codes, 2))
        return torch.cat([categorical, coded], 2), numerical

    def _copy(
        self,
        heads: Heads,
        variables: Float[Tensor, "batch pos variable value"],
        seen: Bool[Tensor, "batch dest src"],
        choose: Choice,
    ) -> Float[Tensor, "batch pos head value"]:
        """What each categorical head takes from the nearest match, or from position 0 where nothing matches."""
        match = heads.matches(variables, _in(variables.dtype, choose))
        matched = match * seen[:, None]
        if self.config.fallback == "max":
            missing = (1 - matched.amax(-1)).relu()
        else:
            total = matched.sum(-1)
            missing = (1 - total / (total + 1e-10)).relu()
        default = torch.zeros_like(match)
        default[..., 0] = missing
        logits = torch.log(match + default + TINY) + self._nearness(match)
        logits = logits.masked_fill(~seen[:, None], NEVER)
        pattern = choose(logits / math.sqrt(self.config.cardinality))
        value = torch.einsum("hm,bsmk->bhsk", choose(heads.read_v).to(variables), variables)
        return torch.einsum("bhqs,bhsk->bqhk", pattern, value)

    def _nearness(self, match: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "dest src"]:
        """Bias in favour of near positions, at equal distance of the earlier one, and last of the position itself."""
        n = self.config.n_ctx
        place = torch.arange(match.shape[-1], dtype=match.dtype, device=match.device)
        ahead = place[None, :] - place[:, None]
        bias = torch.where(ahead > 0, -(ahead - 1) / max(1, n - 2), -(-ahead - 1) / max(1, n - 1))
        return torch.where(ahead == 0, SELF, bias)


def variable_site(config: ProgramConfig, place: int) -> Site:
    """The site of a categorical variable, by its place among all of them in the order of `workbench.models.discrete`.

    Raises:
        WorkbenchError: there are not so many.
    """
    if place < config.columns:
        return Site(kind=SiteKind.token_values, head=place)
    if place == config.columns:
        return Site(kind=SiteKind.position_values, head=0)
    layer, at = divmod(place - config.columns - 1, max(1, config.written))
    if layer >= config.n_layers or config.written == 0:
        raise WorkbenchError(f"This program has no categorical variable {place}.")
    if at < config.categorical_heads:
        return Site(kind=SiteKind.z, layer=layer, head=at)
    return Site(kind=SiteKind.codes, layer=layer, head=at - config.categorical_heads)


def _edited(edits: Mapping[Site, Edit], site: Site, tensor: Tensor) -> Tensor:
    return edits[site](tensor) if site in edits else tensor


def _as_they_are(logits: Tensor) -> Tensor:
    return logits


def _in(dtype: torch.dtype, choose: Choice) -> Choice:
    return lambda logits: choose(logits).to(dtype)


def _gate(shape: tuple[int, ...], draw: torch.Generator | None) -> nn.Parameter:
    return _normal(shape, 1 / math.sqrt(shape[-1]), draw)


def _normal(shape: tuple[int, ...], scale: float, draw: torch.Generator | None) -> nn.Parameter:
    if draw is None:
        return nn.Parameter(torch.empty(shape))
    return nn.Parameter(scale * torch.randn(shape, generator=draw))


def _discrete_layer(layer: nn.Module) -> Layer:
    assert isinstance(layer, ProgramLayer)
    copies = [CategoricalHead(**each) for each in _heads(layer.categorical)]
    sums = [NumericalHead(**each) for each in _heads(layer.numerical)]
    k = layer.tables.b_out.shape[-1]
    values = torch.eye(k, dtype=torch.float64)
    pairs = torch.cat([values[:, None].expand(k, k, k), values[None].expand(k, k, k)], -1)
    logits = layer.tables.codes(pairs[:, :, None].expand(-1, -1, len(layer.tables.read), -1), _as_they_are)
    codes = logits.detach().argmax(-1).numpy()
    reads = layer.tables.read.detach().argmax(-1).tolist()
    tables = [CategoricalTable(reads=(one, two), table=codes[:, :, at]) for at, (one, two) in enumerate(reads)]
    return Layer(
        categorical_heads=tuple(copies),
        numerical_heads=tuple(sums),
        categorical_mlps=tuple(tables),
        numerical_mlps=tuple(_number_table(layer.number_tables, at) for at in range(len(layer.number_tables.read))),
    )


def _heads(heads: Heads) -> list[dict[str, Any]]:
    reads = [read.detach().argmax(-1).tolist() for read in (heads.read_q, heads.read_k, heads.read_v)]
    predicates = heads.predicate.detach().argmax(-1).numpy()
    return [
        {"query": q, "key": k, "value": v, "predicate": predicate}
        for q, k, v, predicate in zip(*reads, predicates, strict=True)
    ]


def _number_table(tables: Tables, index: int) -> NumericalMLP:
    weights = {
        name: getattr(tables, name)[index].detach().double().numpy() for name in ("W_in", "b_in", "W_out", "b_out")
    }
    first, second = tables.read[index].detach().argmax(-1).tolist()
    return NumericalMLP(reads=(first, second), **weights)
