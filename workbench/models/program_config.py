"""The architecture of a Transformer Program, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from workbench.instrument.sites import SiteKind
from workbench.runtime import WorkbenchError


@dataclass(frozen=True, kw_only=True)
class ProgramConfig:
    """Architecture of a Transformer Program (Friedman et al. 2023, section 3). A value: building one does nothing."""

    n_layers: int
    cardinality: int
    """Values of every categorical variable, k."""
    categorical_heads: int
    """Of each layer, as are the other numbers."""
    numerical_heads: int
    categorical_mlps: int
    numerical_mlps: int
    n_ctx: int
    """Longest prompt; positions are a categorical variable, so at most `cardinality`."""
    d_vocab: int
    d_vocab_out: int
    """Words that logits are given for."""
    outputs: tuple[int, ...]
    """Words that may be an answer; the logits of the others are -1e30."""
    pad_token: int
    """Padding on the right: no head sees it."""
    d_mlp: int = 64
    """Hidden neurons of each MLP."""
    columns: int = 1
    """Categorical variables of a token."""
    coded: bool = False
    """Whether a token's variables are codes that are learned (section 3.4); otherwise the one is its own number, and
    words numbered `cardinality` or more are words of answers alone."""
    causal: bool = False
    fallback: Literal["sum", "max"] = "sum"
    """How much of a copying head's look falls back on position 0 while choices are relaxed: `sum`, as the authors' code
    has it, only where matches add up to 1e-10 or less, so hardly before the temperature is at its end; `max`, as the
    paper has it, what the best match lacks of 1. Afterwards both are 1 where nothing matches and 0 elsewhere."""
    pooled: bool = False
    """Whether a prompt has one answer, by the mean of the votes at all its positions; it stands at each of them."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "cardinality", "n_ctx", "d_vocab", "d_vocab_out", "d_mlp", "columns"):
            if getattr(self, name) < 1:
                raise WorkbenchError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("categorical_heads", "numerical_heads", "categorical_mlps", "numerical_mlps"):
            if getattr(self, name) < 0:
                raise WorkbenchError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.written + self.numerical_heads == 0:
            raise WorkbenchError("A program whose layers write no variable computes nothing. Give it heads or MLPs.")
        if self.n_ctx > self.cardinality:
            raise WorkbenchError(
                f"Positions are a variable: {self.n_ctx} of them need a cardinality of at least {self.n_ctx}, "
                f"got {self.cardinality}."
            )
        if self.columns > 1 and not self.coded:
            raise WorkbenchError(f"A token that is not coded has one variable, got columns={self.columns}.")
        if not self.outputs or not 0 <= min(self.outputs) <= max(self.outputs) < self.d_vocab_out:
            raise WorkbenchError(f"outputs must be among the {self.d_vocab_out} words, got {self.outputs}.")
        if not 0 <= self.pad_token < self.d_vocab:
            raise WorkbenchError(f"pad_token {self.pad_token} is outside the vocabulary of {self.d_vocab} tokens.")

    @property
    def n_steps(self) -> int:
        """Layers that are executed."""
        return self.n_layers

    def heads_of(self, kind: SiteKind) -> int:
        """Variables that a site of this kind holds."""
        return {
            SiteKind.token_values: self.columns,
            SiteKind.position_values: 1,
            SiteKind.z: self.categorical_heads,
            SiteKind.sums: self.numerical_heads,
            SiteKind.codes: self.n_mlps,
        }[kind]

    @property
    def n_mlps(self) -> int:
        """MLPs of a layer."""
        return self.categorical_mlps + self.numerical_mlps

    @property
    def written(self) -> int:
        """Categorical variables that a layer writes: those of its categorical heads, then those of its MLPs."""
        return self.categorical_heads + self.n_mlps

    def to_json(self) -> dict[str, object]:
        """The fields."""
        return asdict(self)
