import json
import math

import pytest
import torch

from probes.fourier import fourier
from probes.progress import Landmarks, landmarks, progress
from workbench.runtime import WorkbenchError
from workbench.tasks.modular import Modular

TASK, KEY = Modular(p=13), (2, 5)


class Between:
    """Logits on the way from one model to another; neurons, embedding and all else are the second's."""

    def __init__(self, start, end, share):
        self.start, self.end, self.share = start, end, share
        self.config, self.sites, self.provenance = end.config, end.sites, end.provenance

    def forward(self, tokens, edits=None):
        return (1 - self.share) * self.start.forward(tokens) + self.share * self.end.forward(tokens, edits)


@pytest.fixture
def path(planted, by_heart):
    """Checkpoints that go over from knowing the training pairs by heart to the planted circuit."""
    start, end = by_heart(TASK), planted(TASK, KEY)
    test = TASK.examples("test").tokens[:, :2].unbind(1)
    start.noise[test] = start.noise[test] * 0
    return [(100 * i, Between(start, end, i / 10)) for i in range(11)]


def test_measures_follow_the_circuit_as_it_forms(path):
    found = progress(path, TASK, KEY)
    first, *_, last = found.rows
    assert [row["step"] for row in found.rows] == list(range(0, 1001, 100))
    assert first["train_loss"] < 0.1
    assert first["excluded_loss"] == pytest.approx(first["train_loss"], abs=0.05)
    assert last["excluded_loss"] == pytest.approx(math.log(13), abs=0.01)
    assert first["restricted_loss"] > 1.0
    assert last["restricted_loss"] == pytest.approx(last["test_loss"], rel=1e-3)
    assert (first["logits_explained"] < 0.1, last["logits_explained"]) == (True, pytest.approx(1.0, abs=1e-5))
    explained = [row["logits_explained"] for row in found.rows]
    assert explained == sorted(explained)
    # Restricted and excluded loss announce what the test loss shows later.
    assert found.landmarks.restricted_halves <= found.landmarks.test_halves
    assert found.landmarks.excluded_doubles is not None


def test_wrong_key_frequencies_miss_the_circuit(path):
    # Mutant: measured along frequencies that the final network does not use, nothing forms.
    last = progress(path[-1:], TASK, [1, 3]).rows[0]
    assert last["restricted_loss"] == pytest.approx(math.log(13), abs=0.05)
    assert last["excluded_loss"] == pytest.approx(last["train_loss"], rel=1e-3)


def test_rows_agree_with_the_analysis_of_one_checkpoint(transformer):
    task = Modular(operation="mul", p=11)
    model = transformer(task)
    row = progress([(7, model)], task, [1, 4]).rows[0]
    whole = fourier(model, task, key_frequencies=[1, 4])
    summary = whole.summary()
    assert row["step"] == 7
    assert row["test_loss"] == pytest.approx(summary["loss"])
    assert row["restricted_loss"] == pytest.approx(summary["loss_without_other_frequencies"])
    shared = (
        "neurons_explained",
        "logits_explained",
        "gini_W_E",
        "gini_W_L",
        "sum_squared_weights",
        "gradient_symmetricity",
        "distance_irrelevance",
    )
    assert {name: row[name] for name in shared} == {name: summary[name] for name in shared}
    assert row["embedding_norm"] == pytest.approx(whole.embedding_norm.tolist(), rel=1e-4)
    assert row["logit_coefficient"] == pytest.approx(whole.logits.coefficient.tolist(), rel=1e-4)


def test_rows_are_json_and_reported_one_by_one(path, planted):
    told = []
    models = iter([(0, planted(TASK, KEY, mlp=False, name="first")), (5, planted(TASK, KEY, mlp=False, name="last"))])
    found = progress(models, TASK, KEY, on_step=told.append)
    assert told == list(found.rows)
    assert json.loads(json.dumps(told)) == told
    assert told[0]["neurons_explained"] is None
    assert told[0]["gini_W_L"] is None
    assert found.provenance.parents == ("first", "last")
    assert json.loads(json.dumps(found.summary()))["key_frequencies"] == list(KEY)


def test_tables(path):
    tables = {table.name: table for table in progress(path[:3], TASK, KEY).tables()}
    losses = tables["progress_loss"]
    assert losses.log_y
    assert sorted(losses.frame.measure.unique()) == ["excluded_loss", "restricted_loss", "test_loss", "train_loss"]
    assert len(losses.frame) == 3 * 4
    # The planted model has no weights to square: an empty curve is left out of the figure's rows, not drawn as 0.
    assert tables["progress_weights"].frame.empty
    assert len(tables["progress_embedding"].frame) == 3 * 6
    assert all(table.csv() for table in tables.values())


def test_no_checkpoints():
    with pytest.raises(WorkbenchError, match="need checkpoints, and this run has none"):
        progress([], TASK, KEY)
    with pytest.raises(WorkbenchError, match="Frequencies go from 1 to 6"):
        progress([], TASK, [7])


def rows(**series):
    return [
        {"step": 10 * i} | dict(zip(series, values, strict=True))
        for i, values in enumerate(zip(*series.values(), strict=True))
    ]


def test_landmarks_by_hand():
    found = landmarks(
        rows(
            excluded_loss=[4.0, 1.0, 1.9, 2.0, 5.0, 5.0],
            restricted_loss=[4.0, 9.0, 6.0, 4.5, 1.0, 0.1],
            test_loss=[4.0, 8.0, 10.0, 9.0, 5.1, 1.0],
        )
    )
    assert found == Landmarks(excluded_doubles=30, restricted_halves=30, test_halves=50)
    summary = found.summary(memorised=10, generalised=50)
    assert summary["excluded_lead"] == 0.5
    assert summary["restricted_lead"] == 0.5


def test_landmarks_that_were_not_reached():
    flat = landmarks(rows(excluded_loss=[4.0, 2.0, 3.0], restricted_loss=[1.0, 4.0, 3.0], test_loss=[1.0, 2.0, 3.0]))
    assert flat == Landmarks(excluded_doubles=None, restricted_halves=None, test_halves=None)
    assert flat.summary(memorised=1, generalised=2)["excluded_lead"] is None
    assert landmarks([]) == flat


@pytest.mark.parametrize(("memorised", "generalised"), [(None, 50), (10, None), (50, 50), (60, 50)])
def test_no_lead_without_a_way_to_go(memorised, generalised):
    marks = Landmarks(excluded_doubles=10, restricted_halves=None, test_halves=40)
    assert marks.lead(10, memorised=memorised, generalised=generalised) is None
    assert marks.lead(None, memorised=10, generalised=50) is None
    assert marks.lead(10, memorised=10, generalised=50) == 0.75


def test_spectra_in_rows_are_rounded(planted):
    row = progress([(0, planted(TASK, KEY))], TASK, KEY).rows[0]
    assert len(row["embedding_norm"]) == len(row["logit_coefficient"]) == 6
    assert all(value == float(f"{value:.5g}") for value in row["embedding_norm"])
    assert torch.tensor(row["logit_coefficient"])[[1, 4]].tolist() == pytest.approx([20.0, 20.0], rel=1e-4)
