"""Amnesic projection: erasure by hand and by its theorem, on a model that reads one known place, and by a loop."""

import json
from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hops import WORLD, reasoner_run
from hypothesis import given
from torch.nn.functional import one_hot

from circuits.amnesic import HELD_OUT, Whitened, amnesic, erase
from workbench.instrument.sites import Site
from workbench.instrument.states import fit_line, read_cells, told_by_line
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tasks.base import Batch, Latent
from workbench.tasks.groups import in_several_groups, split_by_group

N, CLASSES, WIDTH = 600, 3, 16
SITE = Site.parse("embed")


class Reader:
    """Both positions hold the latent's one-hot among noise; the answer is read off position 0 alone."""

    config = SimpleNamespace(n_steps=0, n_heads=0, d_mlp=0, n_ctx=2, causal=True, d_vocab=N)
    sites = (SITE,)
    provenance = Provenance(code_version="test", parents=("reader",))

    def __init__(self):
        self.noise = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(1))

    def forward(self, tokens, edits=None):
        # A prompt is its class and which noise it has.
        kind, row = tokens.unbind(1)
        state = 0.3 * self.noise[row].clone()
        state[:, :CLASSES] += one_hot(kind, CLASSES)
        state = torch.stack([state, state], 1)
        state = edits[SITE](state) if edits and SITE in edits else state
        logits = 10 * state[:, :1, :CLASSES]
        return logits.expand(-1, 2, -1)


@pytest.fixture
def batch():
    kind = torch.randint(0, CLASSES, (N,), generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([kind, torch.arange(N)], 1)
    targets = torch.stack([kind, kind], 1)
    read = torch.tensor([False, True]).repeat(N, 1)
    latent = Latent(value=kind, position=0, group=torch.arange(N) // 10)
    return Batch(
        tokens=tokens,
        targets=targets,
        read=read,
        latents={"kind": latent},
        corrupt=tokens,
        distractor=(targets + 1) % CLASSES,
    )


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(3, 9))
def test_nothing_of_the_labels_is_left_in_the_covariance(seed, n_classes, width):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(80) % n_classes
    states = torch.randn(80, width, generator=rng, dtype=torch.float64) @ torch.randn(
        width, width, generator=rng, dtype=torch.float64
    )
    states += torch.randn(n_classes, width, generator=rng, dtype=torch.float64)[labels] + 5
    erased = erase(states, labels)
    left = erased(states)
    classes = one_hot(labels).double()
    together = (left - left.mean(0)).T @ (classes - classes.mean(0)) / 80
    assert together.abs().max() < 1e-9 * states.abs().max()
    assert erased.directions == min(width, n_classes - 1)
    # The mean stays, and a second time nothing more goes.
    torch.testing.assert_close(left.mean(0), states.mean(0))
    torch.testing.assert_close(erased(left), left, atol=1e-6, rtol=1e-6)


def test_erasure_by_hand():
    # Four points on a square, told apart by x alone, with no covariance of x and y: x goes to its mean.
    states = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    left = erase(states, torch.tensor([0, 0, 1, 1]))(states)
    torch.testing.assert_close(left, torch.tensor([[2.0, 0.0], [2.0, 2.0], [2.0, 0.0], [2.0, 2.0]]))


def test_the_change_is_the_smallest_in_the_metric_of_the_states():
    # x tells the class, y follows x: by y alone nothing could be told once what it shares with x is gone.
    rng = torch.Generator().manual_seed(0)
    x = torch.arange(200).double() % 2
    states = torch.stack([x + 0.1 * torch.randn(200, generator=rng), x + 0.1 * torch.randn(200, generator=rng)], 1)
    erased = erase(states, x.long())
    left = erased(states)
    assert erased.directions == 1
    # One direction of the two stays whole: the one that tells least.
    difference = states[:, 0] - states[:, 1]
    assert torch.corrcoef(torch.stack([left[:, 0] - left[:, 1], difference]))[0, 1] > 0.99


def test_what_is_read_is_needed_and_what_is_not_is_not(batch):
    found = amnesic(Reader(), batch, "kind", sites="embed")
    read, copy = found.places
    assert (read.position, copy.position) == (0, 1)
    for place in (read, copy):
        assert place.told.mean > 0.95
        assert place.told_after.mean < 0.5
        assert (place.directions, place.width, place.prompts, place.n) == (CLASSES - 1, WIDTH, HELD_OUT, 150)
        assert place.accuracy.mean > 0.95
    assert read.accuracy_after.mean < 0.5
    assert read.accuracy_random.mean > 0.8
    assert read.accuracy_lost.low > 0.3
    assert read.accuracy_lost.mean == pytest.approx(read.accuracy_random.mean - read.accuracy_after.mean)
    assert read.metric.mean - read.metric_after.mean > read.metric.mean - read.metric_random.mean > 0
    # Position 1 tells as much, and nothing reads it.
    assert copy.accuracy_after == copy.accuracy
    assert copy.accuracy_lost.mean == copy.metric_lost.mean == 0
    assert found.provenance.parents == ("reader",)


def test_a_random_direction_in_its_place_is_found_out(batch):
    # Mutant: as many directions, but not those of the latent.
    states = read_cells(Reader(), batch.tokens, sites=[SITE], positions=[0])[SITE, 0]
    labels = batch.latents["kind"].value
    half = N // 2
    told = {}
    for name, projection in {
        "latent": erase(states[:half], labels[:half]),
        "random": Whitened.of(states[:half]).without(torch.eye(WIDTH, dtype=torch.float64)[:, : CLASSES - 1]),
    }.items():
        line = fit_line(projection(states[:half]), labels[:half])
        told[name] = float(told_by_line(line, projection(states[half:]), labels[half:]).double().mean())
    assert told["latent"] < 0.5 < 0.8 < told["random"]


def test_fewer_directions_leave_more(batch):
    one, both = (
        amnesic(Reader(), batch, "kind", sites="embed", positions=[0], directions=n).places[0] for n in (1, None)
    )
    assert (one.directions, both.directions) == (1, 2)
    assert one.told_after.mean > both.told_after.mean
    assert one.accuracy_after.mean > both.accuracy_after.mean


def test_equals_one_prompt_at_a_time_on_a_trained_model():
    run = reasoner_run("composition")
    model, batch = run.model(), WORLD.contrast(WORLD.examples("train_inferred"), seed=0)
    batch = batch.select(in_several_groups(batch, "bridge"))
    found = amnesic(model, batch, "bridge", sites="L0.z.h1,L0.resid_post", positions=[1], directions=4, draws=1)
    split = split_by_group(batch, "bridge", seed=0)
    test = batch.select(split.test)
    for place in found.places:
        axis = (slice(None), 1) if place.site.head is None else (slice(None), 1, place.site.head)
        seen = {}
        with torch.no_grad():
            model(batch.tokens, {place.site.whole: lambda x, seen=seen: seen.setdefault("x", x)})
        projection = erase(seen["x"][axis][split.train], split.labels[split.train], directions=4)
        right = []
        for row in range(len(test)):

            def put(x, axis=axis, projection=projection):
                x = x.clone()
                x[axis] = projection(x[axis])
                return x

            with torch.no_grad():
                logits = model(test.tokens[row : row + 1], {place.site.whole: put})
            right.append(int(logits[0, -1].argmax()) == int(test.targets[row, -1]))
        assert place.accuracy_after.mean == pytest.approx(sum(right) / len(right))
        assert place.directions == 4


def test_other_prompts_are_judged_by_what_these_fitted(batch):
    half = torch.arange(N) < N // 2
    fitted, other = batch.select(half), batch.select(~half)
    found = amnesic(Reader(), fitted, "kind", sites="embed", positions=[0], others={"later": other})
    assert [place.prompts for place in found.places] == [HELD_OUT, "later"]
    assert found.places[1].n == N // 2
    assert found.places[1].accuracy_after.mean < 0.5 < found.places[1].accuracy_random.mean
    # A value that none of the fitted prompts has is told by no line.
    strange = replace(other, latents={"kind": replace(other.latents["kind"], value=torch.full((N // 2,), 77))})
    assert amnesic(Reader(), fitted, "kind", sites="embed", others={"x": strange}).places[1].told.mean == 0


def test_a_place_that_never_changes_has_nothing_to_forget(batch):
    class Constant(Reader):
        def forward(self, tokens, edits=None):
            state = torch.ones(len(tokens), 2, WIDTH)
            state = edits[SITE](state) if edits and SITE in edits else state
            return state[:, :, :CLASSES]

    (place,) = amnesic(Constant(), batch, "kind", sites="embed", positions=[0]).places
    assert place.directions == 0
    assert place.accuracy_after == place.accuracy


def test_rounding_tells_no_line_anything(batch):
    # Every class its own constant state: once they are apart no more, only rounding would be left to read.
    labels = batch.latents["kind"].value
    states = 100 * torch.rand(CLASSES, WIDTH, generator=torch.Generator().manual_seed(2))[labels]
    left = erase(states, labels)(states)
    assert len(left.unique(dim=0)) == 1
    told = told_by_line(fit_line(left, labels), left, labels).double().mean()
    assert float(told) == float(labels.bincount().max()) / N


def test_tables_and_summary(batch):
    found = amnesic(Reader(), batch, "kind", sites="embed", draws=2)
    heat, everything = found.tables()
    assert (heat.kind, everything.kind) == ("heatmap", "table")
    assert "up to 2 of 16 directions taken out, fitted on 450 prompts; n = 150 to 150" in heat.caption
    assert {"told_after", "accuracy_random_low", "metric_lost_high"} <= set(everything.frame.columns)
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert len(summary["cells"]) == 2
    assert summary["draws"] == 2
    assert summary["metric"] == "logit_difference"


def test_errors(batch):
    with pytest.raises(WorkbenchError, match="Unknown latent 'kin'"):
        amnesic(Reader(), batch, "kin", sites="embed")
    with pytest.raises(WorkbenchError, match="Nothing is forgotten with 0 directions"):
        amnesic(Reader(), batch, "kind", sites="embed", directions=0)
    with pytest.raises(WorkbenchError, match="needs one draw of random directions or more, got 0"):
        amnesic(Reader(), batch, "kind", sites="embed", draws=0)
    with pytest.raises(WorkbenchError, match="450 of 600 prompts of 'same' are among those"):
        amnesic(Reader(), batch, "kind", sites="embed", others={"same": batch})
    with pytest.raises(WorkbenchError, match="No position 2"):
        amnesic(Reader(), batch, "kind", sites="embed", positions=[2])
    bare = replace(batch, corrupt=None, distractor=None)
    with pytest.raises(WorkbenchError, match="needs counterfactual pairs"):
        amnesic(Reader(), bare, "kind", sites="embed")
    assert amnesic(Reader(), bare, "kind", sites="embed", metric="loss").metric == "loss"
