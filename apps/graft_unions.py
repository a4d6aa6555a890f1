"""`workbench union`: the regions of several donors in one base."""

from __future__ import annotations

import argparse

from apps.graft_pairs import open_pairs, tests_elsewhere
from apps.printing import Printout, as_columns, share_bar, stopwatch
from circuits.graft_masks import find_graft
from circuits.graft_unions import UnionJudgement, judge_union
from workbench.runtime import WorkbenchError

KEPT = ("donor", "n", "base_accuracy", "donor_accuracy", "graft_gain", "union_gain", "union_gain_low",
        "union_gain_high")  # fmt: skip
OVERLAP = ("region", "also_in", "overlap", "chance")


def union(options: argparse.Namespace) -> Printout:
    """Find the region of each donor, put all into the base, and say what is kept and what is lost."""
    with stopwatch() as clock, share_bar(f"union {', '.join(options.donors)}") as on_progress:
        pairs = {pair.reference: pair for pair in open_pairs(options.base, options.donors, options.runs)}
        if len(pairs) < 2:
            raise WorkbenchError(f"A union needs two donors or more, got {len(pairs)}.")
        grafts = {}
        for name, pair in pairs.items():
            grafts[name] = find_graft(
                pair.delta(),
                pair.examples_to_learn(options.examples),
                method=options.method,
                density=options.density,
                seed=options.seed,
                steps=options.steps,
            )
            on_progress(len(grafts) / (len(pairs) + 1))
        tests = {name: pair.examples("test") for name, pair in pairs.items()}
        found = judge_union(grafts, tests, tests_elsewhere(options.base, options.elsewhere, options.runs))
    content = {"base": options.base, "method": options.method, **found.summary(), **clock}
    return Printout(content=content, text=_as_text(found))


def _as_text(found: UnionJudgement) -> str:
    """What is kept, what is lost and how far regions coincide, a table each."""
    apart = [row for row in found.overlap.frame.to_dict("records") if row["region"] != row["also_in"]]
    parts = [
        f"union of {found.weights:,} weights, density {found.density:.4g}",
        as_columns(found.kept.frame.to_dict("records"), KEPT),
        as_columns(apart, OVERLAP),
    ]
    if len(found.elsewhere.frame):
        parts.append(as_columns(found.elsewhere.frame.to_dict("records"), list(found.elsewhere.frame.columns)))
    return "\n\n".join(parts)
