"""What a report looks at in a Transformer Program, and which of the expected findings it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.claims import Claim
from apps.programs import prove_run, read_off_run, sequences_of
from circuits.decompile.decompiled import Decompiled, shorten
from workbench.runtime import WorkbenchError
from workbench.tasks.sequences import Sequences
from workbench.training.checkpoints import Run

if TYPE_CHECKING:
    from circuits.decompile.proof import Proof

BUDGETS = (0.0, 0.001, 0.01)
CHECKED = 20_000
"""Sequences that each module is run on: seconds. `workbench decompile` runs it on all."""
SECONDS = 20.0
"""For the proof of each length."""
LETTERS, WHOLE = 0.99, 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgramEvidence:
    """What was measured on a Transformer Program."""

    run: Run
    modules: Mapping[float, Decompiled]
    """By the accuracy that could be lost to them; 0 is the whole program."""
    proof: Proof | None
    """None where the solver is missing."""
    left_out: Mapping[str, str]
    """Why an analysis is not there, by its name."""

    @property
    def task(self) -> Sequences:
        """The run's task."""
        return sequences_of(self.run)

    @property
    def whole(self) -> Decompiled:
        """The module from which nothing was left out."""
        return self.modules[0.0]


def gather_program(run: Run) -> ProgramEvidence:
    """Write the program by budget, check it, and prove what can be proved."""
    whole = read_off_run(run, None, most=CHECKED)
    modules = {budget: shorten(whole, budget) for budget in BUDGETS}
    left_out = {}
    proof = None
    try:
        proof = prove_run(run, None, timeout=SECONDS)
    except WorkbenchError as error:
        left_out["proof"] = str(error)
    return ProgramEvidence(run=run, modules=modules, proof=proof, left_out=left_out)


def program_claims(evidence: ProgramEvidence) -> tuple[Claim, ...]:
    """The expected findings."""
    return tuple(_claims(evidence))


def _claims(evidence: ProgramEvidence) -> Iterator[Claim]:
    whole = evidence.whole
    for statement, estimate, bound in (
        ("share of the test's letters that are answered rightly", whole.accuracy, LETTERS),
        ("share of the test's sequences that are answered rightly throughout", whole.sequence_accuracy, WHOLE),
    ):
        yield Claim(
            statement=statement,
            wanted=f"≥ {bound:.4g}",
            found=estimate.mean,
            holds=estimate.mean >= bound,
            interval=estimate,
            n=whole.n,
        )
    yield Claim(
        statement="share of the whole module's answers that are the model's own, over n sequences",
        wanted="1",
        found=whole.agreement,
        holds=whole.agreement == 1,
        n=whole.checked,
        free=True,
    )
