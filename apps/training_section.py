"""The section of a report that says how the run was trained."""

from __future__ import annotations

from apps.sections import Section
from workbench.training.checkpoints import Run
from workbench.training.recipe import TrainConfig


def training_section(run: Run) -> Section | None:
    """The recipe's optimiser and loss in words, and the curves; None for a run that came trained."""
    if not run.log.rows:
        return None
    train = run.recipe.train
    how, cited = ("", ()) if train is None else (_how(train), _cited(train))
    return Section(
        title="Training",
        text=f"{how}{len(run.log.rows)} evaluations. A landmark is the first evaluation from which an accuracy stays "
        f"for ten evaluations at {run.log.memorised_accuracy:g} or above on the training split (memorised), at "
        f"{run.log.solved_accuracy:g} or above on the test split (generalised).",
        tables=tuple(run.log.tables()),
        landmarks=run.log.landmarks(),
        references=("power2022grokking", *cited),
    )


def _how(train: TrainConfig) -> str:
    batch = "the whole training split at every step" if train.batch_size is None else f"batches of {train.batch_size}"
    decayed = "" if train.decay == "all" else " of matrices alone"
    dropped = f", dropout {train.dropout:g}" if train.dropout else ""
    loss = "log-softmax" if train.loss == "cross_entropy" else "StableMax"
    rate = f"learning rate {train.learning_rate:g}, decoupled weight decay {train.weight_decay:g}{decayed}"
    averaged = {
        "adamw": f"AdamW with {rate} and betas {train.betas[0]:g} and {train.betas[1]:g}",
        "muon": f"Muon on the blocks' matrices and AdamW on the rest, with {rate}, momentum {train.betas[0]:g} and "
        f"second beta {train.betas[1]:g}",
        "signum": f"Signum with {rate} and momentum {train.betas[0]:g}",
    }[train.optimiser]
    return f"{averaged}{dropped}, on {batch}; {loss} in {train.loss_dtype}{_accelerated(train)}. "


def _accelerated(train: TrainConfig) -> str:
    grokfast = (
        ""
        if train.grokfast is None
        else "; Grokfast adds {1:g} times the gradients' running mean (decay {0:g})".format(*train.grokfast)
    )
    orthogonal = "; gradients orthogonal to the parameters" if train.orthogonal_gradient else ""
    return grokfast + orthogonal


def _cited(train: TrainConfig) -> tuple[str, ...]:
    used = {
        "jordan2024muon": train.optimiser == "muon",
        "liu2025muon": train.optimiser == "muon",
        "bernstein2018signsgd": train.optimiser == "signum",
        "lee2024grokfast": train.grokfast is not None,
        "prieto2025grokking": train.loss == "stablemax" or train.orthogonal_gradient,
    }
    return tuple(key for key, is_used in used.items() if is_used)
