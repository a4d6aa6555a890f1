"""What a training step costs: all of `Trainer.step` against plain eager PyTorch, and against TransformerLens' bridge.

The peer computes every position by the hooked forward, or the bridge's, and updates with torch's AdamW as it comes; it
is float32 in any case. The learning rate is too small to move a weight, so that every step of both sides has the same
gradients, which are compared; the batch is drawn before the peer's clock starts, and while ours runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from apps.bench import Benchmark, Run
from workbench.models.bridges import to_bridge
from workbench.models.config import ModelConfig
from workbench.models.program import Gumbel, TransformerProgram
from workbench.models.program_config import ProgramConfig
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.store import RunFolder
from workbench.tasks.composition import Composition
from workbench.tasks.graph_search import GraphSearch
from workbench.training.answer_loss import Dataset
from workbench.training.loop import Trainer
from workbench.training.program_recipes import program_reverse
from workbench.training.reasoner_recipes import composition
from workbench.training.recipe import Recipe, TrainConfig
from workbench.training.recipes import modular
from workbench.training.search_recipes import search_curriculum

TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 0.05}
"""How far gradients may be from the peer's, which are float32, by the precision of ours."""
STILL = 1e-30
"""A learning rate that leaves float32 weights where they are."""
Gradients = Mapping[str, Tensor]
Peer = Callable[[Trainer, Dataset], Run]
"""A trainer that is not touched and the batch of its steps, to a step of the peer's with the same weights."""


def training_step(
    name: str, make: Callable[[], Recipe], prepare: Peer, *, peer: str, target: float, gate: float
) -> Benchmark:
    """One step of a recipe's training, against a peer's step from the same weights on the same batch."""
    recipe = make()
    lower = " in bfloat16" if recipe.trainable().precision == "bfloat16" else ""
    return Benchmark(
        name=name,
        compares=f"A training step of {recipe.name}{lower}: batch, forward, backward, AdamW.",
        peer=peer,
        prepare=partial(_prepare, recipe, prepare),
        agreement=distance,
        tolerance=TOLERANCES[recipe.trainable().precision],
        precision=getattr(torch, recipe.trainable().precision),
        target=target,
        gate=gate,
        conditions={**_shape(recipe), "batch": recipe.trainable().batch_size or "the whole training split"},
    )


def still(recipe: Recipe) -> Recipe:
    """The recipe at a rate that leaves its weights where they are."""
    train = replace(recipe.trainable(), learning_rate=STILL, clip_norm=None, curriculum=None)
    return replace(recipe, train=train)


def still_trainer(recipe: Recipe, accelerator: Accelerator) -> Trainer:
    """A recipe's trainer that leaves its weights where they are; not started, it writes nothing."""
    return Trainer(still(recipe), RunFolder(path=Path(recipe.name), reference=recipe.name), accelerator)


def _prepare(recipe: Recipe, peer: Peer) -> tuple[Run, Run]:
    trainer = still_trainer(recipe, Accelerator(cpu=True))

    def rewind() -> None:
        trainer.position.step = 0
        trainer.batch_generator.manual_seed(0)

    def ours() -> Gradients:
        rewind()
        trainer.step()
        return gradients(trainer.model)

    rewind()
    return peer(trainer, trainer.draw()[0]), ours


def eager(trainer: Trainer, data: Dataset) -> Run:
    """The hooked forward, with every activation in the open and nothing that looks at one."""
    model = deepcopy(trainer.model)
    step = plain_step(model, model, trainer.config, data)
    return lambda: (step(), gradients(model))[1]


def bridge(trainer: Trainer, data: Dataset) -> Run:
    """TransformerLens' native model; of its gradients, that of the position embedding is compared.

    Its other parameters are laid out differently, and a tied unembedding is a matrix of its own.
    """
    assert isinstance(trainer.model, Transformer)
    model = to_bridge(trainer.model)[0]
    step = plain_step(model, model, trainer.config, data)
    return lambda: (step(), {"pos_embed.W_pos": model.pos_embed.weight.grad})[1]


def materialised(trainer: Trainer, data: Dataset) -> Run:
    """The Transformer Program with its reads as the published code has them."""
    model, config = deepcopy(trainer.model), trainer.config
    assert isinstance(model, TransformerProgram)

    def forward(tokens: Tensor) -> Tensor:
        draw = generator(config.batch_seed, "gumbel", 0)
        with MaterialisedReads():
            return model.relaxed(tokens, Gumbel(temperature=config.temperature_at(0), generator=draw))

    step = plain_step(forward, model, config, data)
    return lambda: (step(), gradients(model))[1]


class MaterialisedReads(TorchFunctionMode):
    """Each read of one variable out of many as a matrix: the choice times the identity of the variable's values."""

    READS: Mapping[str, str] = {
        "hm,btmk->bhtk": "bta,hal->bhtl",
        "hm,bsmk->bhsk": "bta,hal->bhtl",
        "nrm,btmk->btnrk": "bta,nral->btnrl",
    }
    """Equation that reads without the matrix -> the equation that multiplies by it."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """As torch calls it."""
        if func is not torch.einsum or args[0] not in self.READS:
            return func(*args, **(kwargs or {}))
        equation, choice, variables = args
        values = torch.eye(variables.shape[-1], dtype=variables.dtype, device=variables.device)
        matrix = (choice[..., None, None] * values).flatten(-3, -2)
        return torch.einsum(self.READS[equation], variables.flatten(-2), matrix)


def plain_step(
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    config: TrainConfig,
    data: Dataset,
    *,
    rate: Callable[[], float] = lambda: STILL,
) -> Callable[[], None]:
    """A step as one writes it down: every position, the loss where it is read, AdamW as it comes."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=STILL, betas=config.betas, weight_decay=config.weight_decay)
    dtype = getattr(torch, config.loss_dtype)

    def step() -> None:
        logits = forward(data.batch.tokens)[data.batch.read]
        losses = functional.cross_entropy(logits.to(dtype), data.answers, reduction="none")
        loss = (data.weights * losses).mean()
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = rate()
        optimiser.step()

    return step


def gradients(model: nn.Module) -> Gradients:
    """Those that its parameters have."""
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def distance(theirs: Gradients, ours: Gradients) -> float:
    """Largest difference of what the peer gives, over the largest entry."""
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((gradient - ours[name]).abs().max()) for name, gradient in theirs.items()) / largest


def _shape(recipe: Recipe) -> dict[str, object]:
    model, names = recipe.model, ("n_layers", "d_model", "n_heads", "d_mlp", "n_ctx", "d_vocab", "cardinality")
    shape: dict[str, object] = {name: getattr(model, name) for name in names if hasattr(model, name)}
    if isinstance(model, ProgramConfig):
        shape["n_heads"] = model.categorical_heads + model.numerical_heads
    return shape


def wide_composition() -> Recipe:
    """Composition with 2,000 entities and 200 relations: 4 layers of width 256, 512 examples a step."""
    task = Composition(entities=2000, relations=200, out_degree=2, phi=1.0)
    small = composition()
    assert isinstance(small.model, ModelConfig)
    words = len(task.vocab)
    model = replace(
        small.model, n_layers=4, d_model=256, n_heads=4, d_head=64, d_mlp=1024, d_vocab=words, d_vocab_out=words
    )
    return replace(
        small, name="composition-wide", task=task, model=model, train=replace(small.trainable(), batch_size=512)
    )


def whole_composition() -> Recipe:
    """The recipe composition with all that is told at every step."""
    recipe = composition()
    return replace(recipe, train=replace(recipe.trainable(), batch_size=None))


def deep_search() -> Recipe:
    """Search in 64 tokens by 6 ordinary layers of width 64, 256 examples a step; padding is seen, as by the bridge."""
    recipe, task = search_curriculum(), GraphSearch(size=64)
    words = len(task.vocab)
    model = ModelConfig(
        n_layers=6, d_model=64, n_heads=1, d_head=64, d_mlp=256, n_ctx=64, d_vocab=words, d_vocab_out=words,
        normalization="LN", activation="gelu", biases=("attn", "mlp", "unembed"), causal=False,
    )  # fmt: skip
    return replace(
        recipe, name="search-deep", task=task, model=model, train=replace(recipe.trainable(), batch_size=256)
    )


def in_bfloat16(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """The same recipe, its products in bfloat16."""

    def lower() -> Recipe:
        recipe = make()
        return replace(recipe, train=replace(recipe.trainable(), precision="bfloat16"))

    return lower


EAGER = {"prepare": eager, "peer": "plain eager PyTorch"}
BRIDGE = {"prepare": bridge, "peer": "TransformerBridge.boot_native"}
MATERIALISED = {"prepare": materialised, "peer": "the same model with materialised reads"}
STEPS: Mapping[str, Callable[[], Benchmark]] = {
    name: partial(training_step, name, recipe, **peer, target=target, gate=0.85 * target)
    for name, recipe, peer, target in (
        ("step-modular", modular, EAGER, 5.2),
        ("step-modular-bridge", modular, BRIDGE, 6.1),
        ("step-composition", wide_composition, EAGER, 1.4),
        ("step-composition-bridge", wide_composition, BRIDGE, 1.5),
        ("step-composition-whole", whole_composition, EAGER, 3.0),
        ("step-search", deep_search, EAGER, 1.06),
        ("step-search-bridge", deep_search, BRIDGE, 1.25),
        ("step-modular-bfloat16", in_bfloat16(modular), EAGER, 9.6),
        ("step-modular-bridge-bfloat16", in_bfloat16(modular), BRIDGE, 11.5),
        ("step-composition-bfloat16", in_bfloat16(wide_composition), EAGER, 2.5),
        ("step-search-bridge-bfloat16", in_bfloat16(deep_search), BRIDGE, 2.2),
        ("step-program", program_reverse, MATERIALISED, 1.15),
    )
}
"""Training steps that can be measured, by name."""
