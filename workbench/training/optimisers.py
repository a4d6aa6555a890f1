"""What turns gradients into updates: AdamW, or a rule that looks at nothing but momentum.

Signum (Bernstein et al. 2018) steps by the sign of the momentum. Muon (Jordan et al. 2024) steps by the momentum of
each matrix with its singular values brought near 1; at the scale of Liu et al. 2025, section 2.2, its updates are as
large as AdamW's, so that both take the same learning rate. torch's own Muon takes one matrix a parameter and computes
in bfloat16; here the heads' matrices lie in one tensor, and processors without bfloat16 are served too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from workbench.kernels.dispatch import kernels_for
from workbench.kernels.reference import Group
from workbench.models.kinds import Model
from workbench.runtime import WorkbenchError

if TYPE_CHECKING:
    from workbench.training.recipe import TrainConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x³ + c x⁵ that lifts small singular values fastest (Jordan et al. 2024)."""
ITERATIONS = 5
TINY = 1e-7
RMS = 0.2
"""Root mean square of AdamW's updates, about."""


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with Grokfast's filter before it or without, by the kernels of where the weights lie."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        grokfast: tuple[float, float] | None,
    ) -> None:
        """As torch's; the filter's decay, and how many times over its mean is added."""
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.grokfast = grokfast

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        groups = [group for each in self.param_groups if (group := self._with_gradients(each)).weights]
        if groups:
            kernels = kernels_for(groups[0].weights[0].device)
            kernels.adamw(groups, self.defaults["betas"], self.defaults["eps"], self.grokfast)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            WorkbenchError: the filter's mean is wanted and not there, as in states of earlier versions.
        """
        if self.grokfast is not None and any("slow" not in each for each in state_dict["state"].values()):
            raise WorkbenchError(
                "This state holds no running mean of Grokfast's: an earlier version saved it. Train the run anew."
            )
        super().load_state_dict(state_dict)

    def _with_gradients(self, group: Mapping[str, Any]) -> Group:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in weights:
            if not self.state[parameter]:
                self.state[parameter] = self._beginning(parameter, parameter.grad)

        def remembered(name: str) -> list[Tensor]:
            return [self.state[parameter][name] for parameter in weights]

        return Group(
            weights=weights,
            gradients=[_lying_as(parameter, parameter.grad) for parameter in weights],
            means=remembered("exp_avg"),
            squares=remembered("exp_avg_sq"),
            steps=remembered("step"),
            slow=[] if self.grokfast is None else remembered("slow"),
            rate=group["lr"],
            decay=group["weight_decay"],
        )

    def _beginning(self, parameter: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Before the first update; the number of updates is on the device, so that a step waits for nothing."""
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        slow = {} if self.grokfast is None else {"slow": gradient.clone()}
        return {"step": torch.zeros((), device=parameter.device), **moments, **slow}


def _lying_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the weight's order of memory: PyTorch's fused update walks over both side by side."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


class Momentum(Optimizer, ABC):
    """Decoupled weight decay and a running mean of the gradients; what is made of both is the rule's."""

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float) -> None:
        """As torch's optimisers; `momentum` is the running mean's decay."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                mean = state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * self.direction(parameter.grad, mean, group["momentum"]))

    @staticmethod
    @abstractmethod
    def direction(
        gradient: Float[Tensor, "*shape"], mean: Float[Tensor, "*shape"], momentum: float
    ) -> Float[Tensor, "*shape"]:
        """What the learning rate is multiplied with."""


class Signum(Momentum):
    """The sign of the momentum."""

    @staticmethod
    def direction(
        gradient: Float[Tensor, "*shape"], mean: Float[Tensor, "*shape"], momentum: float
    ) -> Float[Tensor, "*shape"]:
        """1 or -1 at every weight, 0 where the momentum is."""
        return mean.sign()


class Muon(Momentum):
    """The momentum (Nesterov's), each matrix of it made nearly orthogonal."""

    @staticmethod
    def direction(
        gradient: Float[Tensor, "*batch n_in n_out"], mean: Float[Tensor, "*batch n_in n_out"], momentum: float
    ) -> Float[Tensor, "*batch n_in n_out"]:
        """Entries with a root mean square near that of AdamW's updates."""
        return RMS * max(mean.shape[-2:]) ** 0.5 * orthogonalise(gradient.lerp(mean, momentum))


def orthogonalise(matrix: Float[Tensor, "*batch n_in n_out"]) -> Float[Tensor, "*batch n_in n_out"]:
    """Each matrix with the same singular vectors and singular values between about 0.7 and 1.2, those near 0 excepted.

    By Newton-Schulz iteration: odd polynomials of a matrix act on its singular values alone.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def optimisers_of(model: Model, config: TrainConfig) -> tuple[Optimizer, ...]:
    """The optimiser that a recipe names, over all parameters that have a gradient.

    Muon updates the matrices inside the blocks; embeddings, biases and LayerNorms keep AdamW, as its authors advise.
    """
    lr, weight_decay, momentum = config.learning_rate, config.weight_decay, config.betas[0]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimiser == "signum":
        return (Signum(_by_decay(parameters, model, config), lr=lr, momentum=momentum, weight_decay=weight_decay),)
    if config.optimiser == "sgd":
        return (SGD(_by_decay(parameters, model, config), lr=lr, weight_decay=weight_decay),)
    inner = {id(matrix) for matrix in model.block_matrices} if config.optimiser == "muon" else set()
    rest = [parameter for parameter in parameters if id(parameter) not in inner]
    adamw = AdamW(
        _by_decay(rest, model, config),
        lr=lr,
        betas=config.betas,
        weight_decay=weight_decay,
        grokfast=config.grokfast if filters_itself(config) else None,
    )
    return (
        (Muon(model.block_matrices, lr=lr, momentum=momentum, weight_decay=weight_decay), adamw) if inner else (adamw,)
    )


def filters_itself(config: TrainConfig) -> bool:
    """Whether the optimiser applies Grokfast: AdamW does where nothing else comes in between."""
    return config.optimiser == "adamw" and config.clip_norm is None and not config.orthogonal_gradient


def _by_decay(parameters: list[nn.Parameter], model: Model, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters in groups of one weight decay each."""
    if config.decay == "all":
        return [{"params": parameters}]
    matrices = {id(matrix) for matrix in model.matrices}
    return [
        {"params": [parameter for parameter in parameters if id(parameter) in matrices]},
        {"params": [parameter for parameter in parameters if id(parameter) not in matrices], "weight_decay": 0.0},
    ]
