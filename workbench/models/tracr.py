"""RASP programs that Tracr compiled into transformers (Lindner et al. 2023), with the circuits that they are.

Every dimension of a compiled model's residual stream holds one value of one variable of the program, or a constant. So
its circuit follows from what each head and MLP reads and writes: an edge leads from the writers of a variable to its
readers. Edges that carry only constants (the direction `one`, the marks of BOS and padding) are kept apart: no
variable flows through them, yet whoever ablates them with zeros takes away what heads and MLPs rely on.

`tracr_fixtures/` holds the programs that ship with the package, and `compile.py`, which compiles any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from workbench.models.config import ModelConfig
from workbench.models.known import KnownCircuit
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, code_version, generator, nearest
from workbench.store import Provenance, load_tensors
from workbench.tasks.base import Batch

FIXTURES = Path(__file__).parent / "tracr_fixtures"
FORMAT = 1
READERS = {"q": "<q>", "k": "<k>", "v": "<v>", "in": ""}
"""What a component may read, and how its edges name it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompiledProgram:
    """A RASP program as a transformer, with what Tracr says of its parts and the RASP interpreter of its outputs."""

    name: str
    about: str
    model: Transformer
    vocab: tuple[str, ...]
    """What each token is: outputs first, then the other inputs, BOS, padding."""
    labels: tuple[str, ...]
    """What each dimension of the residual stream holds: `tokens:a`, `indices:3`, `one`."""
    constants: frozenset[str]
    """Labels that hold the same in every prompt."""
    components: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Variables that each head reads as `q`, `k` and `v`, each MLP as `in`, and that each writes as `out`."""
    readout: str
    """The variable that the logits are."""
    categorical: bool
    """Whether the output is a token; otherwise it is a number, the only logit."""
    tokens: Int[Tensor, "example pos"]
    """Inputs, padded."""
    outputs: Float[Tensor, "example pos"]
    """What the RASP interpreter says to them, as token or number; NaN where it says nothing."""

    def examples(self) -> Batch:
        """The inputs with the interpreter's answers, read wherever there is one."""
        read = ~self.outputs.isnan()
        targets = self.outputs.nan_to_num().long() if self.categorical else torch.zeros_like(self.tokens)
        return Batch(tokens=self.tokens, targets=targets, read=read)

    def pairs(self, n: int, seed: int) -> Batch:
        """`n` inputs, each with another of its length and, where there is one, of another output.

        Lengths are drawn evenly, then inputs of that length, with replacement.
        """
        draw = generator(seed, "tracr pairs", self.name)
        lengths = (self.tokens != self.model.config.pad_token).sum(1)
        groups = [group for n in lengths.unique() if len(group := (lengths == n).nonzero()[:, 0]) > 1]
        if not groups:
            raise WorkbenchError(f"Program {self.name!r} has no two inputs of one length, so there are no pairs.")
        answers = self.outputs.nan_to_num(-1.0)
        clean, corrupt = torch.empty(2, n, dtype=torch.long)
        for i in range(n):
            group = groups[_draw(len(groups), draw)]
            clean[i] = group[_draw(len(group), draw)]
            others = group[group != clean[i]]
            changed = others[(answers[others] != answers[clean[i]]).any(1)]
            others = changed if len(changed) else others
            corrupt[i] = others[_draw(len(others), draw)]
        examples = self.examples()
        return Batch(
            tokens=examples.tokens[clean],
            targets=examples.targets[clean],
            read=examples.read[clean] & examples.read[corrupt],
            corrupt=examples.tokens[corrupt],
            distractor=examples.targets[corrupt],
        )

    def edges(self) -> tuple[frozenset[str], frozenset[str]]:
        """Edges that carry a variable, and those that carry only constants."""
        carried = dict(self._carried())
        structural = {edge for edge, variables in carried.items() if variables - self.constants}
        return frozenset(structural), frozenset(carried.keys() - structural)

    def _carried(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Every edge that carries anything, with what it carries: readers meet the writers before them."""
        writers = {"embed": frozenset({"tokens", *self.constants}), "pos": frozenset({"indices"})}
        for step in range(self.model.config.n_steps):
            # The heads of a step do not read each other.
            for part in (f"a{step}.", f"m{step}"):
                named = {name: ports for name, ports in self.components.items() if name.startswith(part)}
                for name, ports in named.items():
                    for port, suffix in READERS.items():
                        yield from _edges(writers, name + suffix, ports.get(port, ()))
                writers |= {name: frozenset(ports["out"]) for name, ports in named.items()}
        yield from _edges(writers, "logits", (self.readout,))


def tracr_names() -> list[str]:
    """Names of the compiled programs that ship with the package."""
    return sorted(path.stem for path in FIXTURES.glob("*.json"))


def load_tracr(name_or_path: str | Path) -> KnownCircuit:
    """A compiled RASP program and its circuit: one that ships with the package, or a JSON file that `compile.py` wrote.

    Raises:
        WorkbenchError: there is no such program, or its files are damaged.
    """
    program = load_program(name_or_path)
    structural, constants = program.edges()
    return KnownCircuit(
        name=f"tracr-{program.name}",
        model=program.model,
        vocab=program.vocab,
        pairs=program.pairs,
        structural=structural,
        constants=constants,
        metric="squared_error",
        # The counterfactual has the same positions, so only zeros show what these are needed for.
        ablations=("zero",),
        about=program.about,
    )


def load_program(name_or_path: str | Path) -> CompiledProgram:
    """A compiled RASP program with all that its files say.

    Raises:
        WorkbenchError: there is no such program, or its files are damaged.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        if path.name not in tracr_names() or path.parent != Path("."):
            raise WorkbenchError(
                f"Unknown compiled program {str(name_or_path)!r}. {nearest(path.name, tracr_names())} "
                "For one of your own, give the path of the .json file that tracr_fixtures/compile.py wrote."
            )
        path = FIXTURES / f"{path.name}.json"
    try:
        program = _program(*load_tensors(path.with_suffix(".safetensors")))
        _check(program)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0].rstrip(".")
        raise WorkbenchError(
            f"{path} is no compiled program that can be loaded: {fault}. "
            "Compile it again with tracr_fixtures/compile.py."
        ) from error
    return program


def _program(tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> CompiledProgram:
    """The program as the files say it."""
    if card["format"] != FORMAT:
        raise WorkbenchError(f"format {card['format']} came, format {FORMAT} is known")
    fields = {**card["config"], "biases": tuple(card["config"]["biases"])}
    model = Transformer(ModelConfig(**fields), generator=None)
    for name, parameter in model.named_parameters():
        _fill(parameter, name, tensors)
    model.provenance = Provenance(
        code_version=code_version(), recipe=f"tracr-{card['name']}", parents=(card["sha256"],)
    )
    return CompiledProgram(
        name=card["name"],
        about=card["about"],
        model=model.eval(),
        vocab=tuple(card["vocab"]),
        labels=tuple(card["labels"]),
        constants=frozenset(card["constants"]),
        components={
            name: {port: tuple(variables) for port, variables in ports.items()}
            for name, ports in card["components"].items()
        },
        readout=card["readout"],
        categorical={"categorical": True, "numerical": False}[card["output"]],
        tokens=tensors["examples.tokens"].long(),
        outputs=tensors["examples.outputs"],
    )


@torch.no_grad()
def _fill(parameter: Tensor, name: str, tensors: Mapping[str, Tensor]) -> None:
    """A matrix from its nonzero entries; all zero where the file has none."""
    parameter.zero_()
    if f"{name}.at" not in tensors:
        return
    at, value = tensors[f"{name}.at"].long(), tensors[f"{name}.value"]
    if at.shape != (len(value), parameter.ndim) or bool((at < 0).any()):
        raise WorkbenchError(f"{name} has {len(value)} entries at places of shape {tuple(at.shape)}")
    parameter[tuple(at.T)] = value


def _check(program: CompiledProgram) -> None:
    """The parts fit each other."""
    config = program.model.config
    if (len(program.vocab), len(program.labels)) != (config.d_vocab, config.d_model):
        raise WorkbenchError(
            f"{len(program.vocab)} tokens and {len(program.labels)} labels came for a vocabulary of {config.d_vocab} "
            f"and a residual stream of {config.d_model}"
        )
    named = {program.readout, *(v for ports in program.components.values() for read in ports.values() for v in read)}
    missing = sorted(v for v in named if not any(f"{label}:".startswith(f"{v}:") for label in program.labels))
    if missing:
        raise WorkbenchError(f"no residual label is of the variables {missing}")
    parts = {f"m{step}": {"in", "out"} for step in range(config.n_steps)}
    parts |= {
        f"a{step}.h{head}": {"q", "k", "v", "out"} for step in range(config.n_steps) for head in range(config.n_heads)
    }
    for name, ports in program.components.items():
        if parts.get(name) != set(ports):
            raise WorkbenchError(f"component {name} with {sorted(ports)} is not in this model")
    tokens, outputs = program.tokens, program.outputs
    answers = outputs[~outputs.isnan()]
    if tokens.shape != outputs.shape or tokens.ndim != 2 or tokens.shape[1] > config.n_ctx or not answers.numel():
        raise WorkbenchError(f"examples of shape {tuple(tokens.shape)} came with answers of {tuple(outputs.shape)}")
    wrong = program.categorical and bool(((answers < 0) | (answers >= config.d_vocab_out)).any())
    if wrong or bool(((tokens < 0) | (tokens >= config.d_vocab)).any()):
        raise WorkbenchError("examples hold tokens outside the vocabulary")


def _edges(
    writers: Mapping[str, frozenset[str]], reader: str, read: tuple[str, ...]
) -> Iterator[tuple[str, frozenset[str]]]:
    for writer, written in writers.items():
        if shared := written.intersection(read):
            yield f"{writer}->{reader}", shared


def _draw(n: int, draw: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=draw))
