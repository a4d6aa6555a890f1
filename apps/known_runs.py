"""Known circuits as runs: a model whose circuit is known, with its pairs, and the truth beside its weights.

    RUN/truth/ABLATION.json    the known circuit, one file for each ablation that it is meant for

The edges are named in the graph that tells token from position, so what is compared with them has that granularity.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from apps.circuits_of_runs import Granularity
from circuits.circuit import Circuit, Terms
from circuits.exchange import load_circuit
from circuits.graph import CircuitGraph, circuit_graph
from circuits.own_files import to_json
from circuits.truths import ablations_of, load_known
from workbench.metrics import metric
from workbench.models.known import ABLATIONS, Ablation, KnownCircuit
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.tasks.pairs import Pairs
from workbench.training.checkpoints import Run
from workbench.training.imports import Findings, keep_as_run

PREFIX = "known:"
DRAWN, SEED = 256, 0
"""Pairs that are drawn, of which each is kept once, and the seed that draws them."""
FOLDER = "truth"
GRANULARITY: Granularity = "inputs"


def import_known(reference: str, *, name: str | None = None, runs: Path | None = None) -> tuple[Run, Findings]:
    """A run of a known model and its pairs, with the truth.

    Args:
        reference: `known:NAME`, a name of the score card's set.
        name: of the run; the model's unless given.
        runs: the runs folder.

    Raises:
        WorkbenchError: there is none of that name, its answers are read at several places, or the run exists.
    """
    known = load_known(reference.removeprefix(PREFIX))
    assert isinstance(known.model, Transformer)
    task = _pairs(known)
    files = {
        f"{FOLDER}/{ablation}.json": to_json(_truth(known, ablation, n=len(task.clean)))
        for ablation in ablations_of(known)
    }
    shows = f"{known.about} Its circuit is known."
    return keep_as_run(known.model, task, name=name or known.name, shows=shows, files=files, runs=runs)


def known_ablations(run: Run) -> list[Ablation]:
    """The ablations for which a circuit is known of a run; none of most runs."""
    return [ablation for ablation in ABLATIONS if _file(run, ablation).is_file()]


def known_circuit(run: Run, graph: CircuitGraph, terms: Terms) -> Circuit:
    """The known circuit of a run under the ablation of these terms; how a model computes holds under any metric.

    Raises:
        WorkbenchError: none is known for this ablation, its file is damaged, or the graph is another.
    """
    return replace(load_circuit(_file(run, terms.ablation), graph), terms=terms)


def _file(run: Run, ablation: Ablation) -> Path:
    return run.folder.path / FOLDER / f"{ablation}.json"


def _pairs(known: KnownCircuit) -> Pairs:
    """Each of the drawn pairs once."""
    batch = known.pairs(DRAWN, SEED)
    if bool((batch.read.sum(1) != 1).any()):
        raise WorkbenchError(
            f"Known circuit {known.name!r} is read at several places of a prompt, and a run's pairs at one. "
            f"`workbench scorecard --circuits {known.name}` scores it."
        )
    assert isinstance(known.model, Transformer)
    config, (corrupt, distractor) = known.model.config, batch.pairs()
    vocab = known.vocab or map(str, range(config.d_vocab))
    lengths = (batch.read.int().argmax(1) + 1).tolist()
    prompts = (
        [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths, strict=True)]
        for tokens in (batch.tokens, corrupt)
    )
    answers = (tokens[batch.read].tolist() for tokens in (batch.targets, distractor))
    clean, corrupted, answer, other = zip(*dict.fromkeys(zip(*prompts, *answers, strict=True)), strict=True)
    return Pairs(
        # Typed prompts split at blanks.
        vocab=tuple(word.replace(" ", "_") for word in vocab),
        clean=clean,
        corrupt=corrupted,
        answer=answer,
        distractor=other,
        pad_token=config.pad_token,
        predictable=config.d_vocab_out,
    )


def _truth(known: KnownCircuit, ablation: Ablation, *, n: int) -> Circuit:
    """The edges through which the model computes; under zero ablation also those that carry constants."""
    graph, judged = circuit_graph(known.model, split_inputs=True), metric(known.metric)
    constants = known.constants if ablation == "zero" else frozenset[str]()
    return Circuit(
        graph=graph,
        keep=graph.mask(known.structural | constants),
        terms=Terms(ablation=ablation, metric=judged.name, unit=judged.unit, better=judged.better, n=n),
        method="known",
        rule=f"edges that carry a variable{', or a constant' if ablation == 'zero' else ''}",
        provenance=known.model.provenance,
    )
