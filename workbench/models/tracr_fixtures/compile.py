# pyright: reportMissingImports=false
"""Compile RASP programs with Tracr (Lindner et al. 2023) into files that `workbench.models.tracr` loads.

Tracr brings JAX, so this script runs in an environment of its own and imports nothing of the workbench:

    python3 -m venv tracr-env
    tracr-env/bin/pip install tracr-pypi==1.0.0 safetensors
    tracr-env/bin/python compile.py                                              every program of PROGRAMS
    tracr-env/bin/python compile.py hist sort                                    these
    tracr-env/bin/python compile.py mine.py:double --vocab a b c --max-length 6  the SOp that double() returns

Two files a program: NAME.safetensors holds the matrices' nonzero entries and a table of inputs with what the RASP
interpreter says to each, NAME.json the rest. Nothing is written unless the compiled model agrees with the interpreter
on the whole table.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tracr.compiler import (
    assemble,
    basis_inference,
    craft_graph_to_model,
    craft_model_to_transformer,
    expr_to_craft_graph,
    lib,
    rasp_to_graph,
    validating,
)
from tracr.craft import bases
from tracr.craft.transformers import MLP
from tracr.rasp import causal_eval, rasp

FORMAT = 1
MADE_WITH = "tracr-pypi 1.0.0"
BOS, PAD = "BOS", "PAD"
CONSTANTS = ("one", f"tokens:{BOS}", f"tokens:{PAD}")
EXHAUSTIVE = 400
"""Lengths with at most this many inputs are tabled whole,"""
LONGER = 200
"""and the others get this many together."""
TOLERANCE = 1e-2
"""How far a numerical output may be from the interpreter's: softmax with Tracr's temperature is not quite hard."""

log = logging.getLogger("compile")
Matrices = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A RASP program and the inputs that it is compiled for."""

    build: Callable[[], rasp.SOp]
    vocab: tuple[Any, ...]
    max_length: int
    about: str
    causal: bool = False
    distinct: bool = False
    """Whether no token may occur twice in an input."""


LETTERS, NUMBERS = tuple("abcd"), (1, 2, 3, 4)
PROGRAMS = {
    "hist": Program(
        build=lib.make_hist, vocab=LETTERS, max_length=8, about="At each position, how often its token occurs."
    ),
    "reverse": Program(
        build=lambda: lib.make_reverse(rasp.tokens), vocab=LETTERS, max_length=8, about="The input backwards."
    ),
    "frac_prevs": Program(
        build=lambda: lib.make_frac_prevs(rasp.tokens == "x"),
        vocab=tuple("wxyz"),
        max_length=8,
        about="At each position, which fraction of the tokens up to it is x.",
    ),
    "length": Program(build=lib.make_length, vocab=LETTERS, max_length=8, about="How long the input is."),
    "count": Program(
        build=lambda: lib.make_count(rasp.tokens, "a"),
        vocab=tuple("abc"),
        max_length=8,
        about="How often a occurs in the input.",
    ),
    "shift_by": Program(
        build=lambda: lib.shift_by(1, rasp.tokens),
        vocab=LETTERS,
        max_length=8,
        about="At each position, the token before it.",
    ),
    "sort_unique": Program(
        build=lambda: lib.make_sort_unique(rasp.tokens, rasp.tokens),
        vocab=(1, 2, 3, 4, 5),
        max_length=5,
        about="The input sorted, where no token occurs twice.",
        distinct=True,
    ),
    "sort": Program(
        build=lambda: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=6, min_key=1),
        vocab=NUMBERS,
        max_length=6,
        about="The input sorted.",
    ),
    "count_less_freq": Program(
        build=lambda: lib.make_count_less_freq(2),
        vocab=LETTERS,
        max_length=6,
        about="At how many positions the token occurs at most twice.",
    ),
    "detect": Program(
        build=lambda: lib.detect_pattern(rasp.tokens, "abc"),
        vocab=tuple("abc"),
        max_length=8,
        about="At each position, whether abc ends there.",
    ),
    "pair_balance": Program(
        build=lambda: lib.make_pair_balance(rasp.tokens, "(", ")"),
        vocab=tuple("()ab"),
        max_length=8,
        about="At each position, the fraction of opening less that of closing parentheses up to it.",
    ),
    "sort_freq": Program(
        build=lambda: lib.make_sort_freq(5),
        vocab=NUMBERS,
        max_length=5,
        about="The input sorted by how often each token occurs, the most frequent first.",
    ),
    "shuffle_dyck1": Program(
        build=lambda: lib.make_shuffle_dyck(["()"]),
        vocab=tuple("()"),
        max_length=6,
        about="Whether the parentheses are balanced.",
    ),
    "shuffle_dyck2": Program(
        build=lambda: lib.make_shuffle_dyck(["()", "{}"]),
        vocab=tuple("(){}"),
        max_length=6,
        about="Whether two kinds of parentheses are balanced, each by itself.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program as Tracr compiled it, in the workbench's names and vocabulary."""

    config: dict[str, Any]
    vocab: list[Any]
    """Outputs first, as the model predicts the first tokens of its vocabulary; then the other inputs, BOS, PAD."""
    inputs: dict[Any, int]
    outputs: dict[Any, int] | None
    """Token of each output; None where the output is a number."""
    labels: list[str]
    components: dict[str, dict[str, list[str]]]
    readout: str
    matrices: Matrices


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the programs asked for."""
    parser = argparse.ArgumentParser(description="Compile RASP programs with Tracr.")
    parser.add_argument("programs", nargs="*", help=f"of {', '.join(PROGRAMS)}; or FILE.py:FUNCTION; default: all")
    parser.add_argument("--vocab", nargs="+", help="tokens of FILE.py:FUNCTION; numbers where all are")
    parser.add_argument("--max-length", type=int, help="longest input of FILE.py:FUNCTION, without BOS")
    parser.add_argument("--causal", action="store_true", help="compile FILE.py:FUNCTION for causal attention")
    parser.add_argument("--distinct", action="store_true", help="FILE.py:FUNCTION takes no token twice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("jax").setLevel(logging.ERROR)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.programs or PROGRAMS:
        if ":" in name:
            if not asked.vocab or not asked.max_length:
                parser.error(f"{name} needs --vocab and --max-length")
            write(name.rpartition(":")[2], own_program(name, asked), asked.out)
        elif name in PROGRAMS:
            write(name, PROGRAMS[name], asked.out)
        else:
            parser.error(f"unknown program {name!r}; known: {', '.join(PROGRAMS)}")
    return 0


def own_program(reference: str, asked: argparse.Namespace) -> Program:
    """The program that a user's function returns."""
    path, _, function = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_program", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, function)
    try:
        vocab = tuple(int(token) for token in asked.vocab)
    except ValueError:
        vocab = tuple(asked.vocab)
    return Program(
        build=build,
        vocab=vocab,
        max_length=asked.max_length,
        about=(build.__doc__ or f"The RASP program {function}.").strip().splitlines()[0],
        causal=asked.causal,
        distinct=asked.distinct,
    )


def write(name: str, program: Program, folder: Path) -> None:
    """Compile, compare with the interpreter on a table of inputs, write both files."""
    expression = program.build()
    compiled = compile_program(program, expression)
    tokens, outputs = table(program, expression, compiled)
    compare(name, compiled, tokens, outputs)
    small = np.uint8 if len(compiled.vocab) < 256 else np.int16
    tensors = {"examples.tokens": tokens.astype(small), "examples.outputs": outputs.astype(np.float32)}
    for matrix, weights in compiled.matrices.items():
        if weights.any():
            at = np.argwhere(weights)
            tensors[f"{matrix}.at"] = at.astype(np.uint8 if at.max() < 256 else np.int16)
            tensors[f"{matrix}.value"] = weights[tuple(at.T)].astype(np.float32)
    # safetensors writes the memory as it lies.
    content = save({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()})
    card = {
        "format": FORMAT,
        "made_with": MADE_WITH,
        "name": name,
        "about": program.about,
        "config": compiled.config,
        "output": "numerical" if compiled.outputs is None else "categorical",
        "vocab": [str(token) for token in compiled.vocab],
        "labels": compiled.labels,
        "constants": list(CONSTANTS),
        "components": compiled.components,
        "readout": compiled.readout,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / f"{name}.safetensors").write_bytes(content)
    (folder / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    log.info("%s: %d inputs, %d bytes", name, len(tokens), len(content))


def compile_program(program: Program, expression: rasp.SOp) -> Compiled:
    """Tracr's compiler, step by step, since the model that it returns no longer says which component is what."""
    if unsupported := validating.static_validate(expression):
        raise SystemExit("\n".join(f"{found.expr.name}: {found.reason}" for found in unsupported))
    renumber(expression)
    extracted = rasp_to_graph.extract_rasp_graph(expression)
    graph, sink = extracted.graph, extracted.sink
    basis_inference.infer_bases(graph, sink, set(program.vocab), program.max_length)
    expr_to_craft_graph.add_craft_components_to_rasp_graph(graph, bos_dir=bases.BasisDirection("tokens", BOS))
    craft = craft_graph_to_model.craft_graph_to_model(graph, extracted.sources)
    model = craft_model_to_transformer.craft_model_to_transformer(
        craft, graph, sink, program.max_length, compiler_bos=BOS, compiler_pad=PAD, causal=program.causal
    )
    readout = sink["EXPR"].label
    categorical = rasp.is_categorical(sink["EXPR"])
    predicted = [direction.value for direction in sink["OUTPUT_BASIS"]] if categorical else [readout]
    vocab, inputs = join_vocabularies(predicted, list(program.vocab))
    config = {
        "n_layers": model.model_config.num_layers,
        "d_model": len(model.residual_labels),
        "n_heads": model.model_config.num_heads,
        "d_head": model.model_config.key_size,
        "d_mlp": model.model_config.mlp_hidden_size,
        "n_ctx": program.max_length + 1,
        "d_vocab": len(vocab),
        "d_vocab_out": len(predicted),
        "biases": [],
        "causal": program.causal,
        "pad_token": inputs[PAD],
    }
    labels = list(model.residual_labels)
    return Compiled(
        config=config,
        vocab=vocab,
        inputs=inputs,
        outputs={value: index for index, value in enumerate(predicted)} if categorical else None,
        labels=labels,
        components=dict(components(craft)),
        readout=readout,
        matrices=matrices(model, config, inputs, [labels.index(str(d)) for d in sink["OUTPUT_BASIS"]]),
    )


def renumber(expression: rasp.SOp) -> None:
    """Number the program's parts from 1, so that their labels do not depend on what was compiled before."""
    rasp.RASPExpr._ids = itertools.count(1)
    found = [expression]
    for part in found:
        vars(part).pop("unique_id", None)
        found.extend(child for child in part.children if not any(child is known for known in found))


def join_vocabularies(predicted: list[Any], tokens: list[Any]) -> tuple[list[Any], dict[Any, int]]:
    """One vocabulary: what is predicted, then what else is read. A token that is both has one place."""
    vocab = list(predicted)
    inputs: dict[Any, int] = {}
    for token in [*tokens, BOS, PAD]:
        # 1, 1.0 and True are equal in Python, and different tokens.
        known = [i for i, other in enumerate(vocab) if type(other) is type(token) and other == token]
        inputs[token] = known[0] if known else len(vocab)
        if not known:
            vocab.append(token)
    return vocab, inputs


def components(craft: Any) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """What each head and MLP reads and writes, by the program's variables."""
    _, modules = assemble._get_model_config_and_module_names(craft)
    for module, block in zip(modules, craft.blocks, strict=True):
        layer = int(module.split("_")[1].split("/")[0])
        if isinstance(block, MLP):
            yield f"m{layer}", {"in": variables(block.fst.input_space), "out": variables(block.snd.output_space)}
        else:
            for head, part in enumerate(block.as_multi().heads()):
                yield (
                    f"a{layer}.h{head}",
                    {
                        "q": variables(part.w_qk.left_space),
                        "k": variables(part.w_qk.right_space),
                        "v": variables(part.w_ov.input_space),
                        "out": variables(part.w_ov.output_space),
                    },
                )


def variables(space: Any) -> list[str]:
    """Names of the variables that a subspace holds; constants are directions of their own."""
    return sorted({str(d) if str(d) in CONSTANTS else str(d.name) for d in space.basis})


def matrices(model: Any, config: dict[str, Any], inputs: dict[Any, int], readout: list[int]) -> Matrices:
    """The compiled weights under the workbench's names."""
    heads = config["n_heads"]
    params = {key: {part: np.asarray(w) for part, w in value.items()} for key, value in model.params.items()}
    assert not any(value["b"].any() for value in params.values() if "b" in value), "Tracr compiles no biases"
    embed = np.zeros((config["d_vocab"], config["d_model"]), np.float32)
    for token, row in model.input_encoder.encoding_map.items():
        embed[inputs[token]] = params["token_embed"]["embeddings"][row]
    unembed = np.zeros((config["d_model"], config["d_vocab_out"]), np.float32)
    unembed[readout, range(len(readout))] = 1
    named = {"embed.W_E": embed, "pos_embed.W_pos": params["pos_embed"]["embeddings"], "unembed.W_U": unembed}
    for layer in range(config["n_layers"]):
        attention, mlp = (f"transformer/layer_{layer}/{part}" for part in ("attn", "mlp"))
        for ours, theirs in (("Q", "query"), ("K", "key"), ("V", "value")):
            weights = params[f"{attention}/{theirs}"]["w"]
            named[f"weights.{layer}.attn.W_{ours}"] = np.stack(np.split(weights, heads, axis=1))
        named[f"weights.{layer}.attn.W_O"] = np.stack(np.split(params[f"{attention}/linear"]["w"], heads))
        named[f"weights.{layer}.mlp.W_in"] = params[f"{mlp}/linear_1"]["w"]
        named[f"weights.{layer}.mlp.W_out"] = params[f"{mlp}/linear_2"]["w"]
    return named


def table(program: Program, expression: rasp.SOp, compiled: Compiled) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with BOS, padded, and the interpreter's outputs: token or number, NaN where there is none."""
    evaluate = causal_eval.evaluate if program.causal else lambda expr, xs: expr(xs)
    generator = random.Random(0)
    lengths = range(1, program.max_length + 1)
    longer = sum(count(program, length) > EXHAUSTIVE for length in lengths)
    draw = generator.sample if program.distinct else generator.choices
    rows = []
    for length in lengths:
        whole = count(program, length) <= EXHAUSTIVE
        drawn = every(program, length) if whole else (draw(program.vocab, k=length) for _ in range(20 * LONGER))
        answered = [(row, tuple(evaluate(expression, list(row)))) for row in dict.fromkeys(map(tuple, drawn))]
        rows += answered if whole else spread(answered, -(-LONGER // longer))
    shape = (len(rows), program.max_length + 1)
    tokens, outputs = np.full(shape, compiled.inputs[PAD]), np.full(shape, np.nan)
    for index, (row, answer) in enumerate(rows):
        tokens[index, : len(row) + 1] = [compiled.inputs[token] for token in (BOS, *row)]
        outputs[index, 1 : len(row) + 1] = [
            np.nan if value is None else value if compiled.outputs is None else compiled.outputs[value]
            for value in answer
        ]
    return tokens, outputs


def every(program: Program, length: int) -> Iterable[tuple[Any, ...]]:
    """Every input of a length."""
    if program.distinct:
        return itertools.permutations(program.vocab, length)
    return itertools.product(program.vocab, repeat=length)


def count(program: Program, length: int) -> int:
    """How many inputs of a length there are."""
    return math.perm(len(program.vocab), length) if program.distinct else len(program.vocab) ** length


def spread(answered: list[tuple[Any, Any]], wanted: int) -> list[tuple[Any, Any]]:
    """`wanted` rows with as many different answers as possible: few strings of parentheses are balanced."""
    groups: dict[Any, list[tuple[Any, Any]]] = defaultdict(list)
    for row in answered:
        groups[row[1]].append(row)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    return [row for row in turns if row is not None][:wanted]


def compare(name: str, compiled: Compiled, tokens: np.ndarray, outputs: np.ndarray) -> None:
    """Refuse a compiled model that does not say what the interpreter says."""
    length = (tokens != compiled.inputs[PAD]).sum(1)
    wrong = 0
    for n in np.unique(length):
        rows = length == n
        logits, said = forward(compiled, tokens[rows, :n]), outputs[rows, :n]
        far = np.abs(logits[..., 0] - said) > TOLERANCE if compiled.outputs is None else logits.argmax(-1) != said
        wrong += int((far & ~np.isnan(said)).any(1).sum())
    if wrong:
        raise SystemExit(f"{name}: the compiled model disagrees with the RASP interpreter on {wrong} inputs")


def forward(compiled: Compiled, tokens: np.ndarray) -> np.ndarray:
    """Logits of inputs of one length, as the workbench computes them."""
    config, w = compiled.config, compiled.matrices
    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    allowed = np.ones((tokens.shape[1],) * 2, bool)
    allowed = np.tril(allowed) if config["causal"] else allowed
    for layer in range(config["n_layers"]):
        q, k, v = (np.einsum("bpd,hde->bhpe", x, w[f"weights.{layer}.attn.W_{name}"]) for name in "QKV")
        scores = np.where(allowed, q @ k.swapaxes(-1, -2) / config["d_head"] ** 0.5, -1e5)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        z = (pattern / pattern.sum(-1, keepdims=True)) @ v
        x = x + np.einsum("bhpe,hed->bpd", z, w[f"weights.{layer}.attn.W_O"])
        x = x + np.maximum(x @ w[f"weights.{layer}.mlp.W_in"], 0) @ w[f"weights.{layer}.mlp.W_out"]
    return x @ w["unembed.W_U"]


if __name__ == "__main__":
    sys.exit(main())
