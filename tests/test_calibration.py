"""The temperature against a general minimiser, and calibration errors that can be said beforehand."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ncfinetune.calibration import calibration_error, fit_temperature, reliability


def _scores(samples: int, classes: int, gain: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    noise = torch.randn(samples, classes, dtype=torch.float64, generator=generator)
    return noise + gain * torch.eye(classes, dtype=torch.float64)[labels], labels


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("gain", [0.3, 2.0, 20.0])
@pytest.mark.parametrize(("samples", "classes"), [(200, 2), (50, 7), (400, 100)])
def test_temperature_has_the_highest_likelihood(samples: int, classes: int, gain: float, scale: float) -> None:
    scores, labels = _scores(samples, classes, gain)
    smooth = 1 / (samples + 1)
    targets = (1 - smooth) * np.eye(classes)[labels] + smooth / classes

    def loss(log_temperature: float) -> float:
        return -float((targets * (scores / np.exp(log_temperature)).log_softmax(1).numpy()).sum())

    least = minimize_scalar(loss, bounds=(-8, 8), method="bounded", options={"xatol": 1e-9})
    expected = np.exp(least.x)
    assert fit_temperature(scale * scores, labels).item() == pytest.approx(scale * expected, rel=1e-5)


@pytest.mark.parametrize("scores", [torch.zeros(4, 2), torch.tensor([[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 2)])
def test_scores_no_better_than_chance_give_infinity(scores: Tensor) -> None:
    temperature = fit_temperature(scores, torch.tensor([0, 0, 1, 1]))
    assert temperature.item() == torch.inf
    assert torch.softmax(scores / temperature, 1).eq(0.5).all()


def test_offsets_of_rows_do_not_matter() -> None:
    scores, labels = _scores(50, 5, 2.0)
    offset = 1e3 * torch.arange(50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(fit_temperature(scores + offset, labels), fit_temperature(scores, labels))


def test_repeats_of_samples_count_once() -> None:
    """Smoothing is by one sample of all, also where every label has the highest score."""
    scores, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.5, 0.5]]), torch.tensor([0, 1, 0])
    found = fit_temperature(scores.repeat(7, 1), labels.repeat(7), repeats=7)
    torch.testing.assert_close(found, fit_temperature(scores, labels))


def test_classes_that_are_ruled_out_take_no_part() -> None:
    scores, labels = _scores(50, 5, 2.0)
    wider = torch.cat([scores, torch.full((50, 1), -torch.inf)], 1)
    alone = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, -torch.inf]])
    found = fit_temperature(torch.cat([wider, alone]), torch.cat([labels, torch.tensor([5])]))
    torch.testing.assert_close(found, fit_temperature(scores, labels))


def test_calibration_error_of_two_bins() -> None:
    probabilities = torch.tensor([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = torch.tensor([0] * 7 + [1] * 3 + [1] * 6 + [0] * 4)
    assert calibration_error(probabilities, labels).item() == pytest.approx(0.5 * 0.2, abs=1e-6)
    assert calibration_error(probabilities, labels, bins=1).item() == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "samples"),
    [
        ([[0.5, 0.5], [0.75, 0.25]], [0, 1, 1, 0]),  # each is the upper end of its bin
        ([[0.0, 0.0], [1.0, 0.0]], [1, 0, 0, 1]),
        ([[1 + 1e-7, 0.0], [0.0, 1 + 1e-7]], [0, 0, 0, 2]),  # as rounding of a softmax leaves it
    ],
)
def test_bins_exclude_their_lower_end_but_for_zero(rows: list[list[float]], samples: list[int]) -> None:
    found, confidence, _ = reliability(torch.tensor(rows, dtype=torch.float64), torch.tensor([0, 1]), bins=4)
    assert found.tolist() == samples
    assert confidence.isnan().tolist() == [number == 0 for number in samples]


@pytest.mark.parametrize(
    ("scores", "labels", "text"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"expected scores \(N, K\) and labels \(N,\), got \(3,\) and \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), r"expected scores \(N, K\) and labels \(N,\), got \(0, 2\) and"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "expected labels from 0 to 1, got 0 to 2"),
        (torch.full((3, 2), torch.nan), torch.zeros(3).long(), "expected scores that are finite or -inf, got nan or"),
        (torch.full((3, 2), -torch.inf), torch.zeros(3).long(), "expected a sample whose own class has a score"),
    ],
)
def test_scores_without_sense_are_refused(scores: Tensor, labels: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit_temperature(scores, labels)


def test_probabilities_without_sense_are_refused() -> None:
    for row in ([-0.1, 0.6], [1.4, 0.1]):
        with pytest.raises(ValueError, match="expected probabilities from 0 to 1, got values outside: take the softm"):
            calibration_error(torch.tensor([row]), torch.tensor([0]))
    with pytest.raises(ValueError, match="expected at least one bin, got 0"):
        calibration_error(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), bins=0)
