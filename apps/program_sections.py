"""The sections of a report that only a Transformer Program has (Friedman et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from apps.program_evidence import ProgramEvidence
from apps.sections import Section
from circuits.decompile.decompiled import Decompiled
from workbench.intervals import columns_of
from workbench.models.program_config import ProgramConfig
from workbench.tables import Table

FRIEDMAN = "friedman2023learning"


def describe_program(config: ProgramConfig) -> str:
    """The model's size in words."""
    layers = f"{config.n_layers} layer{'s' if config.n_layers > 1 else ''}"
    heads = f"{config.categorical_heads} categorical and {config.numerical_heads} numerical heads"
    mlps = f"{config.categorical_mlps} categorical and {config.numerical_mlps} numerical MLPs"
    return (
        f"Model: a Transformer Program of {layers}, each of {heads} and {mlps}, {config.cardinality} values a variable."
    )


def program_sections(evidence: ProgramEvidence) -> tuple[Section, ...]:
    """What is right, how short the program can be, and what is proved."""
    found = (_size(evidence), _proof(evidence))
    return tuple(section for section in found if section is not None)


def sizes(modules: Mapping[float, Decompiled]) -> Table:
    """Length and accuracy of a program's modules, by the accuracy that could be lost to them."""
    rows = [
        {
            "budget": budget,
            "lines": found.lines,
            "literals": found.literals,
            **columns_of("accuracy", found.accuracy),
            **columns_of("sequence_accuracy", found.sequence_accuracy),
            "n": found.n,
            "agreement": found.agreement,
            "checked": found.checked,
        }
        for budget, found in modules.items()
    ]
    return Table(
        name="program_sizes",
        frame=pd.DataFrame(rows),
        kind="curve",
        axes={"x": "lines", "y": "accuracy", "low": "accuracy_low", "high": "accuracy_high"},
        unit="accuracy",
        caption="Length of the module and accuracy by letter on the test split, by the accuracy that could be lost; "
        "95 % bootstrap intervals over n sequences (score intervals for whole sequences). Agreement: share of the "
        "model's answers that the module gives.",
    )


def _size(evidence: ProgramEvidence) -> Section:
    whole = evidence.whole
    everything = "all sequences that there are" if whole.exhaustive else f"{whole.checked:,} sequences"
    domain = ""
    if whole.domain_accuracy is not None:
        domain = f" Of the answers on all sequences {whole.domain_accuracy:.4f} are right."
    votes = (
        "Votes are whole numbers on the coarsest scale that changes no answer. "
        if whole.domain_accuracy is not None
        else ""
    )
    return Section(
        title="The program",
        text="Every choice of the trained model is made for good, and what is left is written as a Python module: "
        "heads copy from the nearest position that they want or add up over all, tables say a value for two, and "
        f"votes are summed. {votes}Each module was run on {everything}, and says what its program says on "
        f"each.{domain}\n\n"
        "Where accuracy may be lost, variables whose votes are least missed lose them first, judged on training and "
        "validation; what only they needed goes too, and votes become coarser. Lines are those of the module as a "
        "formatter leaves it at 88 columns, votes included. "
        f"`workbench decompile {evidence.run.reference} --out FILE.py` writes it.",
        tables=(sizes(evidence.modules), *(table for table in _shortest(evidence).tables() if len(table.frame))),
        references=(FRIEDMAN, "wilson1927probable", "efron1979bootstrap"),
    )


def _shortest(evidence: ProgramEvidence) -> Decompiled:
    return evidence.modules[max(evidence.modules)]


def _proof(evidence: ProgramEvidence) -> Section | None:
    proof = evidence.proof
    if proof is None:
        return None
    last = proof.lengths[-1]
    said = f"Up to length {proof.proved_to} every answer on every sequence is the task's. " if proof.proved_to else ""
    if last.verdict == "refuted":
        # Only if no shorter length is unknown.
        which = "A shortest" if proof.proved_to == last.length - 1 else "A"
        said += f"{which} sequence with a wrong answer has length {last.length}: {last.counterexample}."
    return Section(
        title="What is proved",
        text="A solver looks for a sequence of each length at which the program's answers are not those of the task's "
        f"definition, on all sequences of letters, drawn in training or not. {said}",
        tables=tuple(proof.tables()),
        references=("demoura2008z3",),
    )
