import pytest
import torch

from workbench.calibration import calibration_error, debiased_calibration_error, fitted_temperature, reliability


def certain(confidence):
    """Two logits whose first has this probability."""
    return torch.tensor([confidence, 1 - confidence]).log()


def drawn(n, *, heat=1.0, seed=0):
    """Answers drawn from the logits' own probabilities, then the logits divided by a temperature."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 2, generator=rng)
    answers = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
    return logits / heat, answers


def test_the_error_is_the_one_worked_by_hand():
    # Two bins: 3 examples at 0.9 of which 2 are right, 1 at 0.6 that is wrong.
    logits = torch.stack([certain(0.9)] * 3 + [certain(0.6)])
    bins = reliability(logits, torch.tensor([0, 0, 1, 1]), bins=10)
    assert bins["n"].tolist() == [1, 3]
    assert bins["accuracy"].tolist() == pytest.approx([0, 2 / 3])
    assert calibration_error(bins) == pytest.approx((3 * (0.9 - 2 / 3) + 0.6) / 4)


def test_a_certain_answer_has_a_bin():
    bins = reliability(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    assert bins["confidence"].tolist() == [1]


def test_chance_is_taken_off_a_calibrated_model_and_a_fault_is_left():
    plain, debiased = [], []
    for seed in range(20):
        bins = reliability(*drawn(300, seed=seed))
        plain.append(calibration_error(bins))
        debiased.append(debiased_calibration_error(bins))
    assert sum(debiased) < 0.7 * sum(plain)
    bins = reliability(*drawn(20_000, heat=0.25))
    assert debiased_calibration_error(bins) == pytest.approx(calibration_error(bins), abs=0.01)


@pytest.mark.parametrize("heat", [0.3, 1.0, 3.0])
def test_the_temperature_undoes_what_made_logits_hot_or_cold(heat):
    logits, answers = drawn(20_000, heat=heat)
    assert fitted_temperature(logits, answers) == pytest.approx(1 / heat, rel=0.1)
