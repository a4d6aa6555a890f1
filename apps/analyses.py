"""The analyses that command line, pages and report share: a run and a step in, a result out.

Each names its arguments and its defaults once. `kept` runs one unless the same call on the same weights by the same
code was kept before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

import torch

from apps.reasoner_rows import Reasoner
from apps.reasoning import ReasoningMeasures, measured_steps, reasoning_through
from circuits.patching import PatchMap, patch_each
from probes.attribution import Attribution, direct_logit_attribution
from probes.fourier import FourierResult, fourier
from probes.logit_lens import Trajectory, logit_lens
from probes.progress import ProgressMeasures, progress
from probes.tuned_lens import TunedLens, tuned_lens
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.store import Result, RunFolder, load_summary, result_key, save_result, write_atomic
from workbench.tasks.base import Batch
from workbench.tasks.modular import Modular
from workbench.training.checkpoints import MEASURES, Run

PATCH_SITES = "resid_pre,attn_out,mlp_out,z,sums,codes"
PAIRS = 64
TUNED_PROMPTS = 1000
LENS_SITES = "L0.resid_pre,resid_post"
SEED = 0


def fourier_of(run: Run, step: int | None = None) -> FourierResult:
    """Fourier analysis of one checkpoint, its key frequencies those of the final one."""
    final = fourier(run.model(), modular_task(run))
    if step is None or step == run.checkpoint().step:
        return final
    return fourier(run.model(step), modular_task(run), key_frequencies=final.key_frequencies)


def shuffled_fourier_of(run: Run) -> FourierResult:
    """The control: the same analysis with the residues relabelled at random must find next to nothing."""
    return fourier(run.model(), modular_task(run), shuffle_seed=SEED)


def patch_of(
    run: Run,
    step: int | None = None,
    *,
    sites: str = PATCH_SITES,
    direction: Literal["denoise", "noise", "both"] = "both",
    n: int = PAIRS,
    split: str = "test",
    metric: str = "logit_difference",
) -> PatchMap:
    """Activation patching over pairs of a split; of the default sites those that the model has."""
    model = run.instrumented(step)
    kinds = {site.kind.name for site in model.sites}
    usual = ",".join(kind for kind in PATCH_SITES.split(",") if kind in kinds)
    return patch_each(
        model,
        pairs_of(run, n, split),
        sites=usual if sites == PATCH_SITES else sites,
        metric=metric,
        direction=direction,
        position_labels=run.task.position_labels,
    )


def lens_of(run: Run, step: int | None = None, *, n: int = PAIRS, split: str = "test") -> Trajectory:
    """Logit lens over prompts of a split."""
    return logit_lens(run.model(step), pairs_of(run, n, split), position_labels=run.task.position_labels)


def tuned_lens_of(run: Run, step: int | None = None, *, n: int = TUNED_PROMPTS, split: str = "test") -> TunedLens:
    """Tuned lens beside the logit lens, fitted at this checkpoint; on fewer prompts where the split has no more."""
    examples = run.task.examples(split)
    order = torch.randperm(len(examples), generator=generator(SEED, "tuned lens prompts", split))
    return tuned_lens(run.model(step), examples.select(order[:n]), sites=LENS_SITES, seed=SEED)


def attribution_of(run: Run, step: int | None = None, *, n: int = PAIRS, split: str = "test") -> Attribution:
    """Direct logit attribution by component over pairs of a split."""
    return direct_logit_attribution(run.model(step), pairs_of(run, n, split))


def pairs_of(run: Run, n: int, split: str) -> Batch:
    """The pairs that every analysis of a run looks at."""
    return run.task.sample(n, split=split, seed=SEED)


def measure(
    run: Run, on_progress: Callable[[float], None] = lambda share: None
) -> ProgressMeasures | ReasoningMeasures | None:
    """What the run's task is measured by through its checkpoints, written beside the log; None where that is nothing.

    A run on modular arithmetic gets its progress measures, one on composition or comparison those of its reasoning.
    """
    told = count(1)

    def step_of(total: int) -> Callable[[], None]:
        return lambda: on_progress(next(told) / total)

    if isinstance(run.task, Modular):
        measures = measures_of(run, step_of(len(run.checkpoints)))
    elif isinstance(run.task, Reasoner):
        measures = reasoning_through(run, on_step=step_of(len(measured_steps(run))))
    else:
        return None
    lines = "".join(json.dumps(row) + "\n" for row in measures.rows)
    write_atomic(run.folder.path / MEASURES, lines.encode())
    return measures


def measures_of(run: Run, on_step: Callable[[], None] | None = None) -> ProgressMeasures:
    """Progress measures at every checkpoint, the key frequencies fixed from the last."""
    task = modular_task(run)
    key_frequencies = fourier(run.model(), task).key_frequencies
    return progress(_models(run), task, key_frequencies, on_step=lambda row: on_step() if on_step else None)


def modular_task(run: Run) -> Modular:
    """The run's task, where the analysis knows only modular arithmetic.

    Raises:
        WorkbenchError: the run learnt something else.
    """
    if not isinstance(run.task, Modular):
        raise WorkbenchError(
            f"Fourier analysis needs a run on modular arithmetic; {run.reference!r} learnt {run.task.name!r}."
        )
    return run.task


def kept(
    run: Run, name: str, compute: Callable[..., Result], step: int | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of an analysis at a step: the kept one if there is one, else computed and kept."""
    checkpoint = run.checkpoint(step)
    key = key_of(run, name, step, arguments)
    summary = kept_under(run.folder, key, lambda: compute(run, checkpoint.step, **arguments))
    return {"run": run.reference, "step": checkpoint.step, **summary}


def kept_of_several(
    runs: Sequence[Run], name: str, compute: Callable[..., Result], step: int | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of an analysis of several runs at a step, kept with the first of them: as `kept`."""
    checkpoints = [run.checkpoint(step) for run in runs]
    told = {"references": [run.recipe.to_json() for run in runs], "runs": [run.reference for run in runs], **arguments}
    key = result_key(name, told, [each.sha256 for each in checkpoints])
    summary = kept_under(runs[0].folder, key, lambda: compute(runs, step, **arguments))
    return {"runs": told["runs"], "steps": [each.step for each in checkpoints], **summary}


def kept_under(folder: RunFolder, key: str, compute: Callable[[], Result]) -> dict[str, Any]:
    """The summary under a key in a folder: the kept one if there is one, else computed and kept."""
    summary = load_summary(folder, key)
    if summary is None:
        save_result(folder, key, compute())
        summary = load_summary(folder, key)
        assert summary is not None
    return summary


def key_of(run: Run, name: str, step: int | None, arguments: Mapping[str, Any]) -> str:
    """Under which an analysis at a step is kept."""
    parents = [run.checkpoint(step).sha256, run.checkpoint().sha256]
    return result_key(name, {"reference": run.recipe.to_json(), **arguments}, parents)


def _models(run: Run) -> Iterator[tuple[int, Transformer]]:
    for checkpoint in run.checkpoints:
        yield checkpoint.step, run.model(checkpoint.step)
