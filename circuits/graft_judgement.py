"""What a graft is worth: accuracy, gain, agreement, likelihood and calibration, beside base, donor and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.graft_masks import STEPS, Labelled, OnProgress, find_graft, matched
from circuits.grafting import Delta, Graft, Weights, overlap
from workbench.calibration import calibration_error, debiased_calibration_error, fitted_temperature, reliability
from workbench.intervals import Estimate, columns_of, ratio_bootstrap, share_of
from workbench.runtime import generator
from workbench.store import Provenance
from workbench.tables import Table

SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))
"""Shares of the change that uniform interpolation tries."""
UNIFORM = "uniform "
"""What stands before a share in the name of the weights that have it."""
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1)
LEAST_GAIN = 0.1
"""Accuracy that fine-tuning must gain for a relative gain to mean anything."""
ENOUGH, TOO_MUCH = 0.9, 0.3
"""Relative gain of a region that carries a skill, at its lower end, and what is too much for a control."""
JUDGEMENT = "judgement.safetensors"
CONTROLS = ("matched random", "permuted", "foreign")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """One set of weights on the test examples."""

    name: str
    weights: int
    """Weights taken from the donor."""
    logits: Float[Tensor, "example label"]
    answers: Int[Tensor, " example"]

    @property
    def right(self) -> Bool[Tensor, " example"]:
        """Whether each example is answered rightly."""
        return self.logits.argmax(1) == self.answers

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats."""
        return float(functional.cross_entropy(self.logits.double(), self.answers))

    @property
    def bins(self) -> pd.DataFrame:
        """Confidence and accuracy in bins."""
        return reliability(self.logits, self.answers)


def relative_gain(graft: Judged, base: Judged, donor: Judged) -> Estimate | None:
    """(graft - base) / (donor - base) in accuracy, with its paired bootstrap; None where the donor gained nothing."""
    above = graft.right.double() - base.right.double()
    below = donor.right.double() - base.right.double()
    if below.mean() <= 0:
        return None
    low, high = ratio_bootstrap(above, below)
    return Estimate(mean=float(above.mean() / below.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True, eq=False)
class GraftJudgement:
    """A graft with everything that it is compared with, on the same test examples."""

    graft: Graft
    judged: tuple[Judged, ...]
    """Base, donor, graft, the donor without the region, and the controls."""
    temperature: float
    """By which the donor's logits are best divided, found on examples held out from the test."""
    examples: int
    """That the region was found on."""
    steps: int
    """Of the methods that learn."""
    provenance: Provenance

    def named(self, name: str) -> Judged:
        """The one of that name."""
        return next(each for each in self.judged if each.name == name)

    @property
    def uniform(self) -> Judged:
        """The whole change at the least share of it that is as accurate."""
        return next(each for each in self.judged if each.name.startswith(UNIFORM))

    @property
    def share(self) -> float:
        """That share, which is one of `SHARES`."""
        return float(self.uniform.name.removeprefix(UNIFORM))

    @property
    def objection(self) -> str | None:
        """What stands against calling the skill localised in the region; None if nothing does."""
        rows = self.rows.set_index("weights_of")
        gained = float(rows.loc["donor", "accuracy"]) - float(rows.loc["base", "accuracy"])
        if gained < LEAST_GAIN:
            return f"fine-tuning gained {gained:.3f} in accuracy, less than {LEAST_GAIN}, of which shares say little"
        low = float(rows.loc["graft", "relative_gain_low"])
        if low < ENOUGH:
            return f"the lower end of the relative gain is {low:.2f}, and {ENOUGH} is wanted"
        for name in CONTROLS:
            if name in rows.index and (control := float(rows.loc[name, "relative_gain"])) > TOO_MUCH:
                return f"the control '{name}' has {control:.2f} of the gain, more than {TOO_MUCH}"
        return None

    @property
    def localised(self) -> bool:
        """Whether the region alone carries the skill: a gain of 0.9 (lower end) where no control has more than 0.3."""
        return self.objection is None

    @cached_property
    def rows(self) -> pd.DataFrame:
        """A row for each set of weights."""
        base, donor = self.named("base"), self.named("donor")
        total = len(self.graft.delta)
        return pd.DataFrame(
            [
                {
                    "weights_of": each.name,
                    "weights": each.weights,
                    "density": each.weights / total,
                    **columns_of("accuracy", share_of(each.right)),
                    **columns_of("relative_gain", relative_gain(each, base, donor)),
                    **columns_of("agreement", share_of(each.logits.argmax(1) == donor.logits.argmax(1))),
                    "nll": each.nll,
                    "ece": calibration_error(each.bins),
                    "ece_debiased": debiased_calibration_error(each.bins),
                }
                for each in self.judged
            ]
        )

    def tables(self) -> tuple[Table, ...]:
        """Everything side by side, the region's places, and the reliability of base, donor and graft."""
        n = len(self.judged[0].answers)
        rows = self.rows
        shown = pd.concat([self.named(name).bins.assign(of=name) for name in ("base", "donor", "graft")])
        return (
            Table(
                name="graft_gain",
                frame=rows,
                kind="bar",
                axes={
                    "x": "weights_of",
                    "y": "relative_gain",
                    "low": "relative_gain_low",
                    "high": "relative_gain_high",
                },
                unit="share of the donor's gain",
                caption=(
                    f"Share of the donor's gain in accuracy that each set of weights has: n = {n:,} test examples, "
                    f"95 % paired bootstrap. The graft has {len(self.graft):,} of {len(self.graft.delta):,} weights."
                ),
            ),
            self.graft.where(),
            Table(
                name="reliability",
                frame=shown,
                kind="curve",
                axes={"x": "confidence", "y": "accuracy", "series": "of"},
                unit="accuracy",
                caption=f"Accuracy by confidence, n = {n:,}; a calibrated model lies on the diagonal.",
            ),
        )

    def files(self) -> dict[str, bytes]:
        """The region and all logits: what `read_judgement` makes the same judgement of."""
        from safetensors.torch import save

        tensors = {
            f"region.{name}": mask.flatten().nonzero()[:, 0].int().cpu() for name, mask in self.graft.mask.items()
        }
        tensors |= {f"logits.{place:02}.{each.name}": each.logits for place, each in enumerate(self.judged)}
        tensors |= {
            "answers": self.judged[0].answers,
            "weights": torch.tensor([each.weights for each in self.judged]),
            "scale and temperature": torch.tensor([self.graft.scale, self.temperature], dtype=torch.float64),
            "examples and steps": torch.tensor([self.examples, self.steps]),
        }
        return {JUDGEMENT: save({name: tensor.contiguous() for name, tensor in tensors.items()})}

    def summary(self) -> dict[str, object]:
        """The graft's figures, with the controls beside them."""
        rows = {row.pop("weights_of"): row for row in self.rows.to_dict("records")}
        graft = rows.pop("graft")
        return {
            "method": self.graft.method,
            "examples": self.examples,
            "steps": self.steps,
            **graft,
            "n": len(self.judged[0].answers),
            "base": rows.pop("base"),
            "donor": rows.pop("donor"),
            "controls": rows,
            "donor_temperature": self.temperature,
            "localised": self.localised,
            "objection": self.objection,
        }


def read_judgement(content: bytes, delta: Delta, *, method: str, provenance: Provenance) -> GraftJudgement:
    """A judgement from the file that `GraftJudgement.files` gave.

    Args:
        content: of the file.
        delta: the same that the graft is of.
        method: by which the region was found.
        provenance: of base and donor.
    """
    from safetensors.torch import load

    tensors = load(content)
    mask = {}
    for name, change in delta.change.items():
        flat = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
        flat[tensors[f"region.{name}"].long().to(change.device)] = True
        mask[name] = flat.reshape(change.shape)
    scale, temperature = tensors["scale and temperature"].tolist()
    examples, steps = tensors["examples and steps"].tolist()
    names = sorted(name for name in tensors if name.startswith("logits."))
    judged = [
        Judged(name=name.split(".", 2)[2], weights=count, logits=tensors[name], answers=tensors["answers"])
        for name, count in zip(names, tensors["weights"].tolist(), strict=True)
    ]
    return GraftJudgement(
        graft=Graft(delta=delta, mask=mask, method=method, scale=scale),
        judged=tuple(judged),
        temperature=temperature,
        examples=examples,
        steps=steps,
        provenance=provenance,
    )


def judge(
    graft: Graft,
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    provenance: Provenance,
    foreign: Delta | None = None,
    seed: int = 0,
    steps: int = STEPS,
    on_progress: OnProgress = lambda share: None,
) -> GraftJudgement:
    """Judge a graft on the test examples, beside controls of the same size.

    Controls: as many weights of each tensor at random, among all and among those that changed; the largest changes; a
    region learned in the same way on the same change permuted within tensors, and on another task's change if one is
    given; the least uniform share of the whole change that is as accurate on `val`; the donor with its temperature
    fitted on `val`.

    Args:
        graft: what is judged.
        train: what regions are found on.
        val: what controls are chosen on.
        test: what all are judged on; in none of the others.
        provenance: of base and donor.
        foreign: another task's change to the same base.
        seed: of what is drawn.
        steps: of the methods that learn, in the controls.
        on_progress: told the share that is done.
    """
    delta, size = graft.delta, len(graft)
    no_preference = {name: torch.zeros_like(tensor) for name, tensor in graft.mask.items()}
    changed = {name: tensor != 0 for name, tensor in delta.change.items()}
    rng = generator(seed, "graft matched")
    deltas = {"permuted": delta.permuted(generator(seed, "graft permuted"))}
    deltas |= {} if foreign is None else {"foreign": foreign}
    found: dict[str, tuple[int, Weights]] = {
        "base": (0, delta.base),
        "donor": (len(delta), delta.uniform(1.0)),
        "graft": (size, graft.weights()),
        "donor without it": (len(delta) - size, graft.removed()),
        "matched random": (size, delta.weights(matched(graft.mask, no_preference, rng))),
        "random among changed": (size, delta.weights(matched(graft.mask, changed, rng))),
    }
    method = {"density": graft.density, "seed": seed, "steps": steps}
    if graft.method != "magnitude":
        found["magnitude"] = (size, find_graft(delta, train, method="magnitude", **method).weights())
    for done, (name, control) in enumerate(deltas.items()):
        other = find_graft(control, train, method=graft.method, **method)
        found[name] = (len(other), other.weights())
        on_progress((done + 1) / (len(deltas) + 1))
    share = _uniform_share(delta, graft, val)
    found[f"{UNIFORM}{share:.2f}"] = (len(delta), delta.uniform(share))
    judged = [
        Judged(name=name, weights=count, logits=test.logits(weights), answers=test.answers)
        for name, (count, weights) in found.items()
    ]
    temperature = fitted_temperature(val.logits(delta.uniform(1.0)), val.answers)
    scaled = next(each for each in judged if each.name == "donor").logits / temperature
    judged.append(Judged(name="donor, temperature", weights=len(delta), logits=scaled, answers=test.answers))
    return GraftJudgement(
        graft=graft,
        judged=tuple(judged),
        temperature=temperature,
        examples=len(train),
        steps=steps,
        provenance=provenance,
    )


def over_densities(
    delta: Delta, train: Labelled, test: Labelled, *, densities: Sequence[float] = DENSITIES, seed: int = 0
) -> Table:
    """Relative gain by density: of learned regions, the largest changes, random ones, and a permuted change."""
    permuted = delta.permuted(generator(seed, "graft permuted"))
    ways = {
        "learned": (delta, "learned"),
        "magnitude": (delta, "magnitude"),
        "random": (delta, "random"),
        "learned, permuted change": (permuted, "learned"),
    }

    def judged(weights: Weights) -> Judged:
        return Judged(name="", weights=0, logits=test.logits(weights), answers=test.answers)

    base, donor = judged(delta.base), judged(delta.uniform(1.0))
    rows = []
    for way, (change, method) in ways.items():
        for density in densities:
            graft = find_graft(change, train, method=method, density=density, seed=seed)
            gain = relative_gain(judged(graft.weights()), base, donor)
            rows.append({"way": way, "density": density, "weights": len(graft), **columns_of("relative_gain", gain)})
    return Table(
        name="graft_sizes",
        frame=pd.DataFrame(rows),
        kind="curve",
        axes={"x": "density", "y": "relative_gain", "series": "way", "low": "relative_gain_low",
              "high": "relative_gain_high"},
        unit="share of the donor's gain",
        caption=f"Share of the donor's gain by the share of weights grafted; n = {len(test):,}, 95 % paired bootstrap.",
    )  # fmt: skip


def overlaps(grafts: Mapping[str, Graft]) -> Table:
    """How far the regions of several tasks coincide, against what chance gives."""
    rows = []
    for one, first in grafts.items():
        for other, second in grafts.items():
            shared, chance = overlap(first.mask, second.mask)
            rows.append({"region": one, "also_in": other, "overlap": shared, "chance": chance})
    return Table(
        name="graft_overlap",
        frame=pd.DataFrame(rows),
        kind="heatmap",
        axes={"x": "also_in", "y": "region", "value": "overlap"},
        unit="share of the column's region",
        caption="Share of each column's region that lies in the row's too (Panigrahi et al. 2023, figure 8).",
    )


def _uniform_share(delta: Delta, graft: Graft, val: Labelled) -> float:
    """The least share of the whole change that is as accurate as the graft, or all of it."""
    wanted = val.accuracy(graft.weights())
    return next((share for share in SHARES if val.accuracy(delta.uniform(share)) >= wanted), 1.0)
