"""The regions of several tasks in one model: how far they coincide, what the union keeps, what is lost elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from circuits.graft_judgement import Judged, overlaps, relative_gain
from circuits.graft_masks import Labelled
from circuits.grafting import Graft, Weights, union
from workbench.intervals import columns_of, mean_of, share_of
from workbench.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UnionJudgement:
    """A base with the regions of several donors, on the tests of each, and on tasks that none of them learnt."""

    weights: int
    """In the union: a weight that two regions share counts once."""
    density: float
    kept: Table
    """Of each donor: accuracy and relative gain, of its own graft and of the union."""
    elsewhere: Table
    """Of each other task: accuracy of the base and of the union, and their paired difference."""
    overlap: Table
    """Share of each region in each other one; that of two donors of one task is a ceiling for two tasks."""

    def tables(self) -> tuple[Table, ...]:
        """What is kept, what is lost, how far the regions coincide."""
        return self.kept, self.elsewhere, self.overlap

    def summary(self) -> dict[str, object]:
        """The size and all rows."""
        kept, elsewhere, overlap = (table.frame.to_dict("records") for table in self.tables())
        size = {"weights": self.weights, "density": self.density}
        return {**size, "kept": kept, "elsewhere": elsewhere, "overlap": overlap}


def judge_union(
    grafts: Mapping[str, Graft], tests: Mapping[str, Labelled], elsewhere: Mapping[str, Labelled]
) -> UnionJudgement:
    """Judge the union of several donors' grafts on each donor's test, and on tests of other tasks.

    Args:
        grafts: by the donor's name; of one base.
        tests: of each donor.
        elsewhere: tests of tasks that none of the donors learnt, by name.

    Raises:
        WorkbenchError: the grafts are not of one base.
    """
    first = next(iter(grafts.values()))
    together = union(grafts.values())
    size = sum(
        int(torch.stack([graft.mask[name] for graft in grafts.values()]).any(0).sum()) for name in first.delta.change
    )
    kept = [_kept(name, graft, tests[name], together) for name, graft in grafts.items()]
    lost = [_lost(name, examples, first.delta.base, together) for name, examples in elsewhere.items()]
    return UnionJudgement(
        weights=size,
        density=size / len(first.delta),
        kept=Table(
            name="union_kept",
            frame=pd.DataFrame(kept),
            kind="table",
            axes={},
            unit="share of the donor's gain",
            caption=(
                f"What each donor's own graft and the union of all {len(grafts)} have of the donor's gain in accuracy, "
                "95 % paired bootstrap."
            ),
        ),
        elsewhere=Table(
            name="union_elsewhere",
            frame=pd.DataFrame(lost, columns=ELSEWHERE),
            kind="table",
            axes={},
            unit="accuracy",
            caption="What the union changes in tasks that none of the donors learnt, 95 % paired bootstrap.",
        ),
        overlap=overlaps(grafts),
    )


ELSEWHERE = ["task", "n", "base", "union", "change", "change_low", "change_high"]


def _kept(name: str, graft: Graft, test: Labelled, together: Weights) -> dict[str, object]:
    found = {
        who: Judged(name=who, weights=0, logits=test.logits(weights), answers=test.answers)
        for who, weights in {
            "base": graft.delta.base,
            "donor": graft.delta.uniform(1.0),
            "graft": graft.weights(),
            "union": together,
        }.items()
    }
    return {
        "donor": name,
        "n": len(test),
        **{f"{who}_accuracy": share_of(each.right).mean for who, each in found.items()},
        **columns_of("graft_gain", relative_gain(found["graft"], found["base"], found["donor"])),
        **columns_of("union_gain", relative_gain(found["union"], found["base"], found["donor"])),
    }


def _lost(name: str, test: Labelled, base: Weights, together: Weights) -> dict[str, object]:
    before, after = ((test.logits(weights).argmax(1) == test.answers).double() for weights in (base, together))
    return {
        "task": name,
        "n": len(test),
        "base": float(before.mean()),
        "union": float(after.mean()),
        **columns_of("change", mean_of(after - before)),
    }
