"""Models wired by hand, so that the edges through which they compute are known (no LayerNorm anywhere).

Every wired head attends so sharply that what it leaks from elsewhere is below float32's rounding of its output, and
answers are right on every prompt of a model's domain. Each quantity has directions of the residual stream for itself,
named in the model's docstring. Beside the wired parts stand distractors: heads and neurons with random weights that
read everything and write into directions (`junk`) that only other distractors read, and heads with no weights at all.
Whatever a finder sees in them is a false alarm.

Edges from `pos` carry the same values in every prompt: they are part of how the model computes, but only zero ablation
can show it. Where they carry one number that is the same at every position too, they are listed as constants.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.models.config import Bias, ModelConfig
from workbench.models.high_level import PROGRAMS, differing_pairs, trained
from workbench.models.known import KnownCircuit
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.tasks.base import Batch

SHARP = 20.0
"""Attention score by which a wired head prefers the place it looks at."""
GAIN = 10.0
"""Logits of a whole answer."""
JUNK = 4
"""Directions that distractors write into."""
Spaces = Mapping[str, slice]

COPY_TOKENS, COPY_LENGTH = 6, 4
INDUCTION_TOKENS, INDUCTION_LENGTH = 8, 6
GATE_LENGTH, GATE_PLACES = 5, (1, 3)
MODULUS, FREQUENCIES = 13, (1, 3, 4)
PHASES = tuple(math.pi * turn / 3 for turn in range(3))
KNOTS = tuple(0.25 * knot for knot in range(8))
"""Where the piecewise linear square bends; arguments reach from -2 to 2."""
NEURONS = len(PHASES) * 2 * len(KNOTS) * 2
"""Neurons that one frequency takes: phases, sum or difference, knots, either side of zero."""
MLP_JUNK = 4
"""Distractor neurons of an MLP."""


def copy() -> KnownCircuit:
    """One layer, attention only: `a0.h1` copies the previous token to every position.

    Query: the direction of the position before; key: the own position. Value: the token, written where the
    unembedding reads. `a0.h0` is a distractor, `a0.h2` is empty.
    """
    spaces, width = _spaces(token=COPY_TOKENS, position=COPY_LENGTH, out=COPY_TOKENS, junk=JUNK)
    model, state = _blank(width, layers=1, heads=3, d_head=6, ctx=COPY_LENGTH, vocab=COPY_TOKENS, out=COPY_TOKENS)
    state["embed.W_E"][:, spaces["token"]] = torch.eye(COPY_TOKENS)
    state["pos_embed.W_pos"][:, spaces["position"]] = torch.eye(COPY_LENGTH)
    _previous_token_head(state, layer=0, head=1, spaces=spaces, length=COPY_LENGTH, into="out")
    state["unembed.W_U"][spaces["out"]] = GAIN * torch.eye(COPY_TOKENS)
    _distract(state, "copy", heads=((0, 0),), into=spaces["junk"])
    return KnownCircuit(
        name="copy",
        model=model,
        pairs=_copy_pairs,
        structural=_edges("embed->a0.h1<v>", "pos->a0.h1<q>", "pos->a0.h1<k>", "a0.h1->logits"),
        metric="logit_difference",
        about="Copies the previous token, at every position.",
        vocab=_letters(COPY_TOKENS),
    )


def induction() -> KnownCircuit:
    """Two layers, attention only: what followed the last token when it stood earlier in the prompt?

    `a0.h2` writes each token's predecessor beside it (`before`; the prompt begins with a token that embeds to nothing,
    since the first position can only look at itself). `a1.h0` looks from the last token for the place where `before` is
    that token, and copies the token there. `a0.h0` and `a1.h1` are distractors, the second of which reads the first and
    the circuit too; `a0.h1` and `a1.h2` are empty.
    """
    n = INDUCTION_TOKENS
    spaces, width = _spaces(token=n, position=INDUCTION_LENGTH, before=n, out=n, junk=JUNK)
    model, state = _blank(width, layers=2, heads=3, d_head=n, ctx=INDUCTION_LENGTH, vocab=n + 1, out=n)
    state["embed.W_E"][:n, spaces["token"]] = torch.eye(n)
    state["pos_embed.W_pos"][:, spaces["position"]] = torch.eye(INDUCTION_LENGTH)
    _previous_token_head(state, layer=0, head=2, spaces=spaces, length=INDUCTION_LENGTH, into="before")
    state["weights.1.attn.W_Q"][0, spaces["token"]] = SHARP * math.sqrt(n) * torch.eye(n)
    state["weights.1.attn.W_K"][0, spaces["before"]] = torch.eye(n)
    state["weights.1.attn.W_V"][0, spaces["token"]] = torch.eye(n)
    state["weights.1.attn.W_O"][0, :, spaces["out"]] = torch.eye(n)
    state["unembed.W_U"][spaces["out"]] = GAIN * torch.eye(n)
    _distract(state, "induction", heads=((0, 0), (1, 1)), into=spaces["junk"])
    first = _edges("embed->a0.h2<v>", "pos->a0.h2<q>", "pos->a0.h2<k>")
    second = _edges("embed->a1.h0<q>", "a0.h2->a1.h0<k>", "embed->a1.h0<v>", "a1.h0->logits")
    return KnownCircuit(
        name="induction",
        model=model,
        pairs=_induction_pairs,
        structural=first | second,
        metric="logit_difference",
        about="Finds where the last token stood before, and copies the token that followed it.",
        vocab=(*_letters(n), "BOS"),
    )


def and_gate() -> KnownCircuit:
    """Whether both of two bits are set, see `_gate`: either bit alone breaks the answer, neither alone brings it."""
    return _gate("and_gate", bias=(-1.0, 0.0), out=(1.0, 0.0), about="Whether the two bits that count are both set.")


def or_gate() -> KnownCircuit:
    """Whether one of two bits is set, see `_gate`: neither bit alone breaks the answer, either alone brings it."""
    return _gate("or_gate", bias=(0.0, -1.0), out=(1.0, -1.0), about="Whether one of the two bits that count is set.")


def _gate(name: str, *, bias: tuple[float, float], out: tuple[float, float], about: str) -> KnownCircuit:
    """Four bits and an end: bits 1 and 3 count, `a0.h0` and `a0.h2` bring them to the end, the MLP joins them.

    Queries are one constant, keys the position of the bit. Two neurons read the sum of the bits; `bias` and `out` are
    theirs: AND is relu(sum - 1), OR is relu(sum) - relu(sum - 1). `a0.h1` and four neurons are distractors. In the
    pairs both bits are set in the prompt and none in its counterfactual, so a single bit's part in OR is invisible to
    noising, and in AND to denoising. As all prompts have the same two bits, their mean ablates nothing: the truth is
    meant for resample and zero ablation.
    """
    spaces, width = _spaces(bit=1, position=GATE_LENGTH, one=1, left=1, right=1, out=1, junk=JUNK)
    model, state = _blank(
        width, layers=1, heads=3, d_head=2, ctx=GATE_LENGTH, vocab=3, out=2, mlp=2 + MLP_JUNK, biases=("mlp", "unembed")
    )
    state["embed.W_E"][1, spaces["bit"]] = 1
    _embed_positions(state, spaces, GATE_LENGTH)
    for head, place, moved in zip((0, 2), GATE_PLACES, ("left", "right"), strict=True):
        _fetching_head(state, head=head, place=place, spaces=spaces, source="bit", into=moved)
        state["weights.0.mlp.W_in"][spaces[moved], :2] = 1
    state["weights.0.mlp.b_in"][:2] = torch.tensor(bias)
    state["weights.0.mlp.W_out"][:2, spaces["out"]] = torch.tensor(out)[:, None]
    state["unembed.W_U"][spaces["out"]] = GAIN * torch.tensor([-1.0, 1.0])
    state["unembed.b_U"][:] = GAIN / 2 * torch.tensor([1.0, -1.0])
    _distract(state, name, heads=((0, 1),), neurons=slice(2, None), into=spaces["junk"])
    return KnownCircuit(
        name=name,
        model=model,
        pairs=partial(_gate_pairs, name),
        structural=_edges(*_fetched(0), *_fetched(2), "m0->logits"),
        constants=_edges("pos->a0.h0<q>", "pos->a0.h2<q>"),
        metric="logit_difference",
        ablations=("resample", "zero"),
        about=about,
        vocab=("0", "1", "="),
    )


def modular_addition() -> KnownCircuit:
    """(a + b) mod 13 in the Fourier basis, from prompts `a b =`.

    A token a is embedded as cos(wa) and sin(wa) for three frequencies w. `a0.h1` brings the first operand to the end,
    `a0.h2` the second one. The MLP multiplies: the square of a sum minus the square of a difference is four times the
    product, so for each phase f of three, piecewise linear squares of cos(wa + f) ± cos(wb + f) give
    2 cos(w(a + b) + 2f) + 2 cos(w(a - b)); summed over the phases with the weights cos 2f and -sin 2f, cos(w(a + b))
    and sin(w(a + b)) are left, and the unembedding gives each c the sum over w of cos(w(a + b - c)). Each frequency has
    neurons of its own: `frequency_clusters`. `a0.h0` and four neurons are distractors, `a0.h3` is empty.
    """
    basis = 2 * len(FREQUENCIES)
    spaces, width = _spaces(token=basis, position=3, one=1, first=basis, second=basis, out=basis, junk=JUNK)
    neurons = len(FREQUENCIES) * NEURONS + MLP_JUNK
    model, state = _blank(width, layers=1, heads=4, d_head=basis, ctx=3, vocab=MODULUS + 1, out=MODULUS, mlp=neurons)
    angles = 2 * math.pi / MODULUS * torch.outer(torch.arange(MODULUS), torch.tensor(FREQUENCIES))
    waves = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
    state["embed.W_E"][:MODULUS, spaces["token"]] = waves
    _embed_positions(state, spaces, 3)
    for head, place, moved in ((1, 0, "first"), (2, 1, "second")):
        _fetching_head(state, head=head, place=place, spaces=spaces, source="token", into=moved)
    for index in range(len(FREQUENCIES)):
        _multiply(state, index, spaces)
    state["unembed.W_U"][spaces["out"]] = GAIN / len(FREQUENCIES) * waves.T
    junk = slice(len(FREQUENCIES) * NEURONS, None)
    _distract(state, "modular_addition", heads=((0, 0),), neurons=junk, into=spaces["junk"])
    return KnownCircuit(
        name="modular_addition",
        model=model,
        pairs=_modular_pairs,
        structural=_edges(*_fetched(1), *_fetched(2), "m0->logits"),
        constants=_edges("pos->a0.h1<q>", "pos->a0.h2<q>"),
        metric="logit_difference",
        about=f"Adds two numbers modulo {MODULUS} as angles of {len(FREQUENCIES)} frequencies.",
        vocab=(*map(str, range(MODULUS)), "="),
    )


def frequency_clusters() -> tuple[tuple[int, ...], ...]:
    """Neurons of `modular_addition` by frequency, in the order of `FREQUENCIES`, and the distractors last."""
    starts = [index * NEURONS for index in range(len(FREQUENCIES) + 1)]
    sizes = [NEURONS] * len(FREQUENCIES) + [MLP_JUNK]
    return tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))


def _spaces(**sizes: int) -> tuple[Spaces, int]:
    """Directions of the residual stream for each quantity, and how many there are."""
    spaces, width = {}, 0
    for name, size in sizes.items():
        spaces[name] = slice(width, width + size)
        width += size
    return spaces, width


def _blank(
    width: int,
    *,
    layers: int,
    heads: int,
    d_head: int,
    ctx: int,
    vocab: int,
    out: int,
    mlp: int = 0,
    biases: tuple[Bias, ...] = ("mlp",),
) -> tuple[Transformer, dict[str, Tensor]]:
    """A model whose weights are all zero, and those weights to write into."""
    config = ModelConfig(
        n_layers=layers,
        d_model=width,
        n_heads=heads,
        d_head=d_head,
        d_mlp=mlp,
        n_ctx=ctx,
        d_vocab=vocab,
        d_vocab_out=out,
        biases=biases,
    )
    model = Transformer(config, generator=generator(0, "planted"))
    state = model.state_dict()
    for tensor in state.values():
        tensor.zero_()
    return model, state


def _letters(n: int) -> tuple[str, ...]:
    return tuple(string.ascii_lowercase[:n])


def _edges(*names: str) -> frozenset[str]:
    return frozenset(names)


def _fetched(head: int) -> tuple[str, str, str]:
    """Edges of a fetching head of the first layer that carry variables, to an MLP."""
    return f"embed->a0.h{head}<v>", f"pos->a0.h{head}<k>", f"a0.h{head}->m0"


def _embed_positions(state: Mapping[str, Tensor], spaces: Spaces, length: int) -> None:
    """Each position a direction of its own, and one that is the same everywhere."""
    state["pos_embed.W_pos"][:, spaces["position"]] = torch.eye(length)
    state["pos_embed.W_pos"][:, spaces["one"]] = 1


def _previous_token_head(
    state: Mapping[str, Tensor], *, layer: int, head: int, spaces: Spaces, length: int, into: str
) -> None:
    """Every position looks at the one before and writes its token."""
    d_head = state[f"weights.{layer}.attn.W_Q"].shape[-1]
    query, key = (state[f"weights.{layer}.attn.W_{name}"][head, spaces["position"]] for name in "QK")
    query[1:, :length] = SHARP * math.sqrt(d_head) * torch.eye(length)[:-1]
    key[:, :length] = torch.eye(length)
    tokens = torch.eye(spaces["token"].stop - spaces["token"].start, d_head)
    state[f"weights.{layer}.attn.W_V"][head, spaces["token"]] = tokens
    state[f"weights.{layer}.attn.W_O"][head, :, spaces[into]] = tokens.T


def _fetching_head(
    state: Mapping[str, Tensor], *, head: int, place: int, spaces: Spaces, source: str, into: str
) -> None:
    """Every position looks at one place, and writes what it holds."""
    d_head = state["weights.0.attn.W_Q"].shape[-1]
    state["weights.0.attn.W_Q"][head, spaces["one"], 0] = SHARP * math.sqrt(d_head)
    state["weights.0.attn.W_K"][head, spaces["position"].start + place, 0] = 1
    values = torch.eye(spaces[source].stop - spaces[source].start, d_head)
    state["weights.0.attn.W_V"][head, spaces[source]] = values
    state["weights.0.attn.W_O"][head, :, spaces[into]] = values.T


def _multiply(state: Mapping[str, Tensor], index: int, spaces: Spaces) -> None:
    """Neurons of one frequency: cos(w(a + b)) and sin(w(a + b)) from the waves of a and of b."""
    read, bias, write = (state[f"weights.0.mlp.{name}"] for name in ("W_in", "b_in", "W_out"))
    first, second, out = (spaces[name].start + 2 * index for name in ("first", "second", "out"))
    neuron = index * NEURONS
    for phase, sign, knot, side in itertools.product(PHASES, (1, -1), KNOTS, (1, -1)):
        turned = side * torch.tensor([math.cos(phase), -math.sin(phase)])
        read[first : first + 2, neuron] = turned
        read[second : second + 2, neuron] = sign * turned
        bias[neuron] = -knot
        # Slopes of the square between knots: KNOTS[1] at first, twice that more at each knot.
        slope = KNOTS[1] * (1 if knot == 0 else 2)
        turn_back = torch.tensor([math.cos(2 * phase), -math.sin(2 * phase)])
        write[neuron, out : out + 2] = sign * slope / len(PHASES) * turn_back
        neuron += 1


def _distract(
    state: Mapping[str, Tensor],
    name: str,
    *,
    heads: tuple[tuple[int, int], ...],
    neurons: slice | None = None,
    into: slice,
) -> None:
    """Random weights for these heads (layer, head) and neurons, which write where the circuit does not read."""
    draw = generator(0, "planted", name, "distractors")
    for layer, head in heads:
        for weight in ("W_Q", "W_K", "W_V"):
            state[f"weights.{layer}.attn.{weight}"][head].normal_(generator=draw)
        state[f"weights.{layer}.attn.W_O"][head, :, into].normal_(generator=draw)
    if neurons is not None:
        state["weights.0.mlp.W_in"][:, neurons].normal_(generator=draw)
        state["weights.0.mlp.b_in"][neurons].normal_(generator=draw)
        state["weights.0.mlp.W_out"][neurons, into].normal_(generator=draw)


def _copy_pairs(n: int, seed: int) -> Batch:
    """Other tokens at every position, so that each of the answers changes."""
    draw = generator(seed, "planted", "copy", "pairs")
    tokens = torch.randint(COPY_TOKENS, (n, COPY_LENGTH), generator=draw)
    corrupt = (tokens + torch.randint(1, COPY_TOKENS, tokens.shape, generator=draw)) % COPY_TOKENS
    read = torch.ones_like(tokens, dtype=torch.bool)
    read[:, 0] = False
    answers, distractor = tokens.roll(1, dims=1), corrupt.roll(1, dims=1)
    return Batch(tokens=tokens, targets=answers, read=read, corrupt=corrupt, distractor=distractor)


def _induction_pairs(n: int, seed: int) -> Batch:
    return differing_pairs(_induction_prompts, n, generator(seed, "planted", "induction", "pairs"))


def _induction_prompts(n: int, draw: torch.Generator) -> tuple[Int[Tensor, "n pos"], Int[Tensor, " n"]]:
    """The first token, four different ones, and one of them again that is not the last."""
    different = INDUCTION_LENGTH - 2
    words = torch.rand(n, INDUCTION_TOKENS, generator=draw).argsort(1)[:, :different]
    again = torch.randint(different - 1, (n, 1), generator=draw)
    begin = torch.full((n, 1), INDUCTION_TOKENS)
    return torch.cat([begin, words, words.gather(1, again)], 1), words.gather(1, again + 1)[:, 0]


def _gate_pairs(name: str, n: int, seed: int) -> Batch:
    """Both bits set in the prompt, none in its counterfactual; the other bits are drawn for each."""
    draw = generator(seed, "planted", name, "pairs")
    tokens, corrupt = torch.randint(2, (2, n, GATE_LENGTH), generator=draw)
    for prompts, value in ((tokens, 1), (corrupt, 0)):
        prompts[:, GATE_PLACES] = value
        prompts[:, -1] = 2
    read = torch.zeros_like(tokens, dtype=torch.bool)
    read[:, -1] = True
    return Batch(tokens=tokens, targets=read.long(), read=read, corrupt=corrupt, distractor=torch.zeros_like(tokens))


def _modular_pairs(n: int, seed: int) -> Batch:
    return differing_pairs(_modular_prompts, n, generator(seed, "planted", "modular_addition", "pairs"))


def _modular_prompts(n: int, draw: torch.Generator) -> tuple[Int[Tensor, "n pos"], Int[Tensor, " n"]]:
    operands = torch.randint(MODULUS, (n, 2), generator=draw)
    return torch.cat([operands, torch.full((n, 1), MODULUS)], 1), operands.sum(1) % MODULUS


WIRED: Mapping[str, Callable[[], KnownCircuit]] = MappingProxyType(
    {build.__name__: build for build in (copy, induction, and_gate, or_gate, modular_addition)}
)
"""Models wired by hand."""
PLANTED: Mapping[str, Callable[[], KnownCircuit]] = MappingProxyType(
    {**WIRED, **{f"trained_{name}": partial(trained, name) for name in PROGRAMS}}
)
"""All models whose circuit was planted: wired by hand, or trained to hold it."""
