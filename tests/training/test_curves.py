import pytest

from workbench.tasks.modular import Modular
from workbench.training.curves import HOLD, TrainLog


def log(test_accuracies, *, every=100, squared=None, memorised=0.99, solved=0.99, **more):
    rows = [
        {
            "step": index * every,
            "train_accuracy": 1.0 if index else 0.0,
            "test_accuracy": accuracy,
            "train_loss": 1.0,
            "test_loss": 2.0,
            "sum_squared_weights": 100.0 if squared is None else squared[index],
            **more,
        }
        for index, accuracy in enumerate(test_accuracies)
    ]
    return TrainLog(rows=rows, memorised_accuracy=memorised, solved_accuracy=solved)


def test_a_landmark_is_the_first_of_ten_evaluations_in_a_row():
    # Crosses at 200, falls back at 300, holds from 400.
    accuracies = [0.0, 0.5, 1.0, 0.98, *[0.99] * HOLD]
    assert log(accuracies).step_generalised == 400
    assert log(accuracies[:-1]).step_generalised is None
    assert log(accuracies).step_memorised == 100
    assert log(accuracies).landmarks() == {"memorised": 100, "generalised": 400}
    assert log(accuracies[:3]).landmarks() == {}


def test_each_split_has_a_threshold_of_its_own():
    accuracies = [0.0, *[0.9] * HOLD]
    assert log(accuracies).landmarks() == {"memorised": 100}
    assert log(accuracies, solved=0.9).landmarks() == {"memorised": 100, "generalised": 100}
    assert log(accuracies, memorised=1.01).landmarks() == {}
    task = Modular(p=13)
    assert TrainLog.of(task, []).memorised_accuracy == task.memorised_accuracy
    assert TrainLog.of(task, []).solved_accuracy == task.solved_accuracy


@pytest.mark.parametrize(("settled", "clean"), [(99.1, True), (98.9, False)])
def test_cleaned_up_when_weights_changed_by_less_than_one_percent_in_500_steps(settled, clean):
    squared = [100.0] * HOLD + [settled] * 5
    assert log([1.0] * 15, squared=squared).cleaned_up is clean


def test_not_cleaned_up_before_it_generalised_or_before_500_steps():
    assert not log([0.5] * 30).cleaned_up
    assert not log([1.0] * HOLD, every=10).cleaned_up
    assert log([1.0] * HOLD, every=60).cleaned_up


def test_curves_as_tables():
    loss, accuracy = log([0.0, 1.0]).tables()
    assert loss.frame.columns.tolist() == ["step", "split", "loss"]
    assert loss.log_y
    assert not accuracy.log_y
    assert set(accuracy.frame["accuracy"]) == {0.0, 1.0}
    assert loss.frame["split"].unique().tolist() == ["train", "test"]
    assert loss.caption == "Loss of the splits train and test at each evaluation."


def test_every_split_that_the_log_holds_has_a_curve():
    loss, accuracy = log([0.0, 1.0], test_ood_accuracy=0.25, test_ood_loss=5.0).tables()
    assert loss.frame["split"].unique().tolist() == ["train", "test", "test_ood"]
    assert accuracy.frame.query("split == 'test_ood'")["accuracy"].tolist() == [0.25, 0.25]
    assert accuracy.caption == "Accuracy of the splits train, test and test_ood at each evaluation."


def test_an_empty_log_has_no_landmarks():
    assert log([]).landmarks() == {}
