"""The architecture of a transformer, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from workbench.kernels.reference import ACTIVATIONS
from workbench.runtime import WorkbenchError

if TYPE_CHECKING:
    from workbench.instrument.sites import SiteKind

Bias = Literal["attn", "mlp", "unembed"]
BIASES: tuple[Bias, ...] = ("attn", "mlp", "unembed")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a transformer. A value: building one does nothing."""

    n_layers: int
    """Blocks with weights of their own."""
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    """Neurons of each MLP; 0 makes an attention-only model."""
    n_ctx: int
    """Longest prompt."""
    d_vocab: int
    d_vocab_out: int
    """Tokens that can be predicted, the first ones of the vocabulary."""
    normalization: Literal["LN"] | None = None
    """LayerNorm before attention, MLP and unembedding, or none anywhere."""
    activation: Literal["relu", "gelu", "gelu_new"] = "relu"
    embedding: Literal["learned", "one_hot"] = "learned"
    """Whether embeddings are learned, or fixed: a one-hot token in the stream's first d_vocab dimensions, a one-hot
    position in its last n_ctx, and zeros between them (Saparov et al. 2025, section 3)."""
    tied: bool = False
    """Unembed with the embedding's transpose."""
    biases: tuple[Bias, ...] = ("mlp",)
    """Parts that have biases; LayerNorms always do."""
    causal: bool = True
    pad_token: int | None = None
    """Token whose positions no other position attends to."""
    schedule: tuple[int, ...] | None = None
    """Block to run at each step; None runs each block once, in order."""
    init: Literal["fan_in", "gpt2", "uniform"] = "fan_in"
    """How matrices are drawn: from N(0, 1/d_model) (Nanda et al. 2023, appendix A); as GPT-2's from N(0, 0.02²), those
    that write to the residual stream divided by √(2 · n_layers) (Radford et al. 2019, section 2.3); or, with the biases
    of attention and MLP, evenly between ±1/√d_model, as PyTorch draws a linear layer of that width."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_head", "n_ctx", "d_vocab", "d_vocab_out"):
            if getattr(self, name) < 1:
                raise WorkbenchError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.d_mlp < 0:
            raise WorkbenchError(f"d_mlp must be 0 (attention only) or more, got {self.d_mlp}.")
        if self.activation not in ACTIVATIONS:
            raise WorkbenchError(f"Unknown activation {self.activation!r}. Known: {', '.join(ACTIVATIONS)}.")
        if self.normalization not in ("LN", None):
            raise WorkbenchError(f"Unknown normalization {self.normalization!r}. Known: LN, None.")
        if self.init not in ("fan_in", "gpt2", "uniform"):
            raise WorkbenchError(f"Unknown init {self.init!r}. Known: fan_in, gpt2, uniform.")
        if self.embedding not in ("learned", "one_hot"):
            raise WorkbenchError(f"Unknown embedding {self.embedding!r}. Known: learned, one_hot.")
        if self.embedding == "one_hot" and self.d_model < self.d_vocab + self.n_ctx:
            raise WorkbenchError(
                f"One-hot embeddings of {self.d_vocab} tokens and {self.n_ctx} positions need d_model of at least "
                f"{self.d_vocab + self.n_ctx}, got {self.d_model}."
            )
        if unknown := set(self.biases) - set(BIASES):
            raise WorkbenchError(f"Unknown biases {sorted(unknown)}. Known: {', '.join(BIASES)}.")
        if self.d_vocab_out > self.d_vocab or (self.tied and self.d_vocab_out != self.d_vocab):
            raise WorkbenchError(
                f"d_vocab_out {self.d_vocab_out} must be at most d_vocab {self.d_vocab}, and equal to it when tied."
            )
        if self.pad_token is not None and not 0 <= self.pad_token < self.d_vocab:
            raise WorkbenchError(f"pad_token {self.pad_token} is outside the vocabulary of {self.d_vocab} tokens.")
        if self.schedule is not None and (not self.schedule or set(self.schedule) != set(range(self.n_layers))):
            raise WorkbenchError(
                f"schedule {self.schedule} must run every block of 0 to {self.n_layers - 1} at least once, "
                "and no other."
            )
        # One order, so that equal sets of biases are equal configs.
        object.__setattr__(self, "biases", tuple(bias for bias in BIASES if bias in self.biases))

    @property
    def steps(self) -> tuple[int, ...]:
        """Block that runs at each step."""
        return tuple(range(self.n_layers)) if self.schedule is None else self.schedule

    def heads_of(self, kind: SiteKind) -> int:
        """As many at every site that has heads."""
        return self.n_heads

    @property
    def n_steps(self) -> int:
        """Layers that are executed."""
        return len(self.steps)

    def to_json(self) -> dict[str, object]:
        """The fields."""
        return asdict(self)
