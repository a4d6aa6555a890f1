"""Circuits and scores as files: the workbench's own, and those that other tools read and write.

    NAME.json                  the workbench's own: every graph, terms, method, rule; nothing is lost
    NAME.eap.json, NAME.pt     the graph of EAP-IG, with scores and the edges that are kept (Hanna et al. 2024)
    FOLDER                     a submission to MIB: scores, or one circuit a size (Mueller et al. 2025)
    NAME.graphml, NAME.dot     for graph tools and for drawing; written only

What is read says itself which of the first two it is. The EAP format knows component graphs of GPT-2's shape and
nothing of the terms under which its numbers hold: those the reader gives as `Foreign`. Its scores are the change of a
metric when the edge is corrupted, ours what the clean run has over the ablated one, so signs turn on the way; where
they were computed with `loss=True`, as in MIB's own scripts, they do not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from circuits import eap_files, own_files
from circuits.circuit import Circuit, EdgeScores, Terms
from circuits.drawing import dot, graphml
from circuits.eap_files import EapGraph
from circuits.graph import CircuitGraph
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance, digest, read_json, write_atomic

ChangeOf = Literal["metric", "loss"]
SUFFIXES = (".json", ".eap.json", ".pt", ".graphml", ".dot")
MIB_SIZES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Per cent of all edges that a circuit of a MIB submission may keep."""
MIB_SCORES = "importances.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """What a file of the EAP format does not say of itself."""

    terms: Terms
    change_of: ChangeOf | None
    """What a score is the change of when the edge is corrupted: the metric of the terms, or the loss that it makes
    (`loss=True`, MIB's own files). None for scores that only rank edges, as learned masks and information flow do."""
    method: str = "imported"


def save_circuit(path: Path | str, item: Circuit | EdgeScores, *, change_of: ChangeOf = "metric") -> None:
    """Write a circuit, or the scores of all edges, in the format that the file's name asks for.

    Args:
        path: one that ends in .json, .eap.json, .pt, .graphml or .dot.
        item: what to write; a circuit takes its scores along.
        change_of: what the scores of an EAP file shall be the change of. Those that only rank edges stay as they
            are.

    Raises:
        WorkbenchError: a format that there is not, or that cannot hold this graph.
    """
    path = Path(path)
    kind = _suffix(path)
    if isinstance(item, Circuit) and item.scores is not None:
        item.graph.check_same(item.scores.graph)
    if kind == ".json":
        content = own_files.to_json(item)
    elif kind == ".graphml":
        content = graphml(item)
    elif kind == ".dot":
        content = dot(item).encode()
    else:
        eap = _eap(item, change_of)
        content = eap.pt() if kind == ".pt" else eap.json()
    write_atomic(path, content)


def load_circuit(path: Path | str, graph: CircuitGraph | None = None, *, foreign: Foreign | None = None) -> Circuit:
    """The circuit in a file, with its scores where it has them.

    Of an EAP file, edges without which every answer is the same are pruned; under resample ablation these are the ones
    that EAP-IG prunes before it evaluates. `requested` counts what the file keeps.

    Args:
        path: a file of the workbench or of the EAP format.
        graph: of the model that it shall belong to. An EAP file needs it; None takes the file's.
        foreign: what an EAP file does not say.

    Raises:
        WorkbenchError: the file is damaged, holds no circuit, or belongs to another model.
    """
    found = _read(Path(path), graph, foreign)
    if isinstance(found, EdgeScores):
        raise WorkbenchError(f"{path} holds scores and no circuit. Read it with load_scores and choose edges by them.")
    return found


def load_scores(path: Path | str, graph: CircuitGraph | None = None, *, foreign: Foreign | None = None) -> EdgeScores:
    """The scores in a file, or of the circuit in it; of a MIB folder, its one file's.

    Which edges are live, an EAP file does not say: all count as live.

    Raises:
        WorkbenchError: the file is damaged, holds no scores, or belongs to another model.
    """
    path = _only(Path(path)) if Path(path).is_dir() else Path(path)
    found = _read(path, graph, foreign)
    scores = found.scores if isinstance(found, Circuit) else found
    if scores is None:
        raise WorkbenchError(f"{path} holds a circuit without scores. Read it with load_circuit.")
    return scores


def save_mib(folder: Path | str, item: EdgeScores | Mapping[float, Circuit]) -> None:
    """Write what MIB takes for one task and model: scores, or a circuit for each size.

    Scores are written as MIB's own scripts do, as the change of the loss: an edge that helps is positive.

    Args:
        folder: called after task and model, as in `ioi_gpt2`; without circuits of an earlier submission in it.
        item: scores, or for each of MIB_SIZES a circuit of no more than that per cent of the edges.

    Raises:
        WorkbenchError: sizes are missing, a circuit is too large, or there are other files in the folder.
    """
    folder = Path(folder)
    files: dict[str, Circuit | EdgeScores] = {}
    if isinstance(item, EdgeScores):
        files[MIB_SCORES] = item
    else:
        if tuple(sorted(item)) != MIB_SIZES:
            raise WorkbenchError(f"MIB takes a circuit for each of {_sizes()} % of the edges, got {sorted(item)}.")
        for size in MIB_SIZES:
            _check_size(size, item[size], "this circuit")
            files[f"{size:g}.json"] = item[size]
    if others := sorted(set(map(str, _files(folder))) - {str(folder / name) for name in files}):
        raise WorkbenchError(f"{folder} holds other circuits, such as {others[0]}. A submission needs an empty folder.")
    for name, each in files.items():
        write_atomic(folder / name, _eap(each, "loss").json())


def load_mib(folder: Path | str, graph: CircuitGraph, *, foreign: Foreign) -> dict[float, Circuit]:
    """The circuits of a MIB submission by their size in per cent; files may have any name, the smallest comes first.

    Raises:
        WorkbenchError: there are not as many circuits as sizes, or one is too large for its size.
    """
    files = _files(Path(folder))
    if len(files) != len(MIB_SIZES):
        raise WorkbenchError(
            f"{folder} holds {len(files)} circuits; MIB wants one for each of {_sizes()} % of the edges. "
            "A single file of scores is read with load_scores."
        )
    circuits = {file: load_circuit(file, graph, foreign=foreign) for file in files}
    by_size = sorted(files, key=lambda file: (circuits[file].requested or 0, file))
    for size, file in zip(MIB_SIZES, by_size, strict=True):
        _check_size(size, circuits[file], str(file))
    return {size: circuits[file] for size, file in zip(MIB_SIZES, by_size, strict=True)}


def _suffix(path: Path) -> str:
    kind = ".eap.json" if path.name.endswith(".eap.json") else path.suffix
    if kind not in SUFFIXES:
        raise WorkbenchError(f"No format for {path.name!r}: a circuit's file ends in {', '.join(SUFFIXES)}.")
    return kind


def _read(path: Path, graph: CircuitGraph | None, foreign: Foreign | None) -> Circuit | EdgeScores:
    kind = _suffix(path)
    if kind in (".graphml", ".dot"):
        raise WorkbenchError(f"{path.name!r} is for drawing and says too little to be read back. Give the .json.")
    content = eap_files.read_tensors(path) if kind == ".pt" else read_json(path)
    with _reading(path):
        if "format" in content:
            return own_files.from_json(content, graph)
        return _from_eap(path, content, graph, foreign)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which file an error is about, and turn what a damaged one leads to into the user's error."""
    try:
        yield
    except WorkbenchError as error:
        raise WorkbenchError(f"{path}: {error}") from error
    except KeyError as error:
        raise WorkbenchError(f"{path} is no circuit of the workbench or of EAP-IG: it lacks {error}.") from error
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise WorkbenchError(f"{path} is damaged: {reason}. Export it again.") from error


def _turn(terms: Terms, change_of: ChangeOf | None) -> int:
    """What turns a score of a file into one of ours, and back: clean minus ablated."""
    if change_of is None:
        return 1
    # The loss of a metric is its negative where higher is better.
    return 1 if change_of == "loss" and terms.better == "higher" else -1


def _eap(item: Circuit | EdgeScores, change_of: ChangeOf) -> EapGraph:
    scores = item.scores if isinstance(item, Circuit) else item
    keep = item.keep if isinstance(item, Circuit) else torch.zeros(len(item.graph.edges), dtype=torch.bool)
    if scores is None:
        return eap_files.encode(item.graph, torch.zeros(len(keep)), keep)
    of = change_of if scores.scale == scores.terms.unit else None
    # Adding zero turns a negative zero into zero.
    return eap_files.encode(item.graph, _turn(scores.terms, of) * scores.score + 0.0, keep)


def _from_eap(path: Path, content: dict[str, Any], graph: CircuitGraph | None, foreign: Foreign | None) -> Circuit:
    if graph is None or foreign is None:
        raise WorkbenchError(
            "It is of the EAP format, which says neither to which model it belongs nor under which ablation and metric "
            "its numbers hold. Give graph= and foreign=."
        )
    found = eap_files.decode(content, graph)
    provenance = Provenance(code_version=code_version(), parents=(digest(path.read_bytes()),))
    scores = _imported_scores(path, found, foreign, provenance) if bool(found.score.any()) else None
    return Circuit(
        graph=graph,
        keep=graph.pruned(found.keep, foreign.terms.ablation),
        terms=foreign.terms,
        method=foreign.method,
        rule=f"read from {path.name}, less what dangles",
        requested=int(found.keep.sum()),
        scores=scores,
        provenance=provenance,
    )


def _imported_scores(path: Path, found: EapGraph, foreign: Foreign, provenance: Provenance) -> EdgeScores:
    turn = _turn(foreign.terms, foreign.change_of)
    told = f"change of the {foreign.change_of} when an edge is corrupted" if foreign.change_of else "a ranking of edges"
    return EdgeScores(
        graph=found.graph,
        terms=foreign.terms,
        method=foreign.method,
        score=turn * found.score + 0.0,
        live=torch.ones(len(found.score), dtype=torch.bool),
        scale=foreign.terms.unit if foreign.change_of else f"score of {foreign.method}",
        reference="not said by the file",
        rule=f"read from {path.name} as {told}, sign {'turned' if turn < 0 else 'kept'}; live edges not known",
        seconds=math.nan,
        provenance=provenance,
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in (".json", ".pt") and path.name[0] != ".")


def _only(folder: Path) -> Path:
    files = _files(folder)
    if len(files) != 1:
        raise WorkbenchError(f"{folder} holds {len(files)} files; scores are one. Circuits are read with load_mib.")
    return files[0]


def _check_size(size: float, circuit: Circuit, name: str) -> None:
    """Raise a WorkbenchError if a circuit keeps more than a size allows of the edges that EAP-IG counts."""
    n_edges = len(eap_files.with_mlps(circuit.graph).edges)
    # A hundredth of a per cent is the finest size: whole numbers, so that no rounding decides.
    allowed = round(size * 100) * n_edges // 10_000
    if circuit.size > allowed:
        raise WorkbenchError(
            f"{name[0].upper()}{name[1:]} keeps {circuit.size} edges; {size:g} % of {n_edges} are {allowed}. "
            "Prune it, or choose fewer edges."
        )


def _sizes() -> str:
    return ", ".join(f"{size:g}" for size in MIB_SIZES)
