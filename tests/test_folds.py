"""Numbers of fold sums against the features that made them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from ncfinetune.folds import FoldMoments, folds_of
from ncfinetune.probes import ridge
from ncfinetune.transferability import h_score


def _data(samples: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    means = torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    return means[labels] + torch.randn(samples, dim, dtype=torch.float64, generator=generator), labels


def _filled(features: Tensor, labels: Tensor, classes: int, batch: int) -> tuple[FoldMoments, Tensor]:
    """The moments, and each sample's fold, told by an indicator column a sample that a second state takes along."""
    moments, marked = FoldMoments(classes, folds=3), FoldMoments(classes, folds=3)
    for some in torch.arange(len(labels)).split(batch):
        moments.update(features[some], labels[some])
        marked.update(torch.eye(len(labels), dtype=torch.float64)[some], labels[some])
    assert marked._state is not None
    shift, counts, sums, _, _ = marked._state
    members = sums.sum(1) + counts.sum(1)[:, None] * shift
    return moments, members.argmax(0)


@pytest.mark.parametrize(
    "fit",
    [FoldMoments(3).update, lambda x, y: ridge(x, y, 3), lambda x, y: h_score(x, y, 3)],
    ids=["sums", "fit", "score"],
)
def test_labels_that_would_be_cut_off_are_refused(fit: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(TypeError, match="expected integer labels, got torch.float32"):
        fit(torch.randn(12, 3), torch.tensor([0.0, 0.9, 1.7] * 4))


def test_class_means_that_coincide_leave_nc1_undefined() -> None:
    moments = FoldMoments(4)
    moments.update(torch.full((60, 3), 0.1), torch.arange(60) % 4)
    assert moments.nc1().isnan()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize(("samples", "dim", "classes"), [(90, 6, 4), (60, 30, 3), (80, 3, 6)])
def test_numbers_are_those_of_the_features(samples: int, dim: int, classes: int, offset: float) -> None:
    features, labels = _data(samples, dim, classes)
    features = features + offset
    moments, members = _filled(features, labels, classes, 40)
    assert members.bincount().tolist() == pytest.approx([samples / 3] * 3, abs=2)
    nc1, errors = 0.0, torch.zeros(3, dtype=torch.float64)
    lams = [0.1, 1.0, 30.0]
    for fold in range(3):
        held, kept = members == fold, members != fold
        means = torch.tensor(reference.class_means(features[kept].numpy(), labels[kept].numpy()))
        centred = (means - means.mean(0)).numpy()
        inverse = np.linalg.pinv(centred.T @ centred / classes, rcond=1e-9)
        residual = (features[held] - means[labels[held]]).numpy()
        nc1 += np.trace(residual.T @ residual @ inverse) / (classes * samples)
        for index, lam in enumerate(lams):
            head = ridge(features[kept], labels[kept], classes, lams=[lam])
            targets = torch.eye(classes, dtype=torch.float64)[labels[held]]
            errors[index] += (head.scores(features[held]) - targets).square().sum() / samples
    assert moments.nc1().item() == pytest.approx(nc1, rel=1e-7)
    found = moments.ridge(lams)
    torch.testing.assert_close(found.squared_error, errors, rtol=1e-9, atol=1e-9)
    whole = ridge(features, labels, classes, lams=[found.lam.item()])
    torch.testing.assert_close(found.weight, whole.weight)
    torch.testing.assert_close(found.bias, whole.bias)
    assert found.lam.item() == lams[int(errors.argmin())]


def test_default_strengths_are_those_of_ridge() -> None:
    features, labels = _data(90, 6, 4)
    moments = FoldMoments(4)
    moments.update(features.float(), labels.int())
    curve = ridge(features.float(), labels, 4).curve
    assert curve is not None
    torch.testing.assert_close(moments.ridge().lams, curve.lams)


def test_nc1_held_out_does_not_fall_to_zero_with_few_samples() -> None:
    features, labels = _data(40, 200, 4)
    moments = FoldMoments(4)
    moments.update(features, labels)
    assert moments.nc1().item() > 1.5 * reference.nc1(features.numpy(), labels.numpy())


def test_nc1_leaves_out_directions_that_are_rounding() -> None:
    """The features lie in a plane of eight dimensions but for the rounding of float32."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    noise = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    features = torch.randn(5, 2, generator=generator, dtype=torch.float64)[labels] + noise / 2
    turned = features @ torch.linalg.qr(torch.randn(8, 2, generator=generator, dtype=torch.float64))[0].T
    plane, rounded = FoldMoments(5), FoldMoments(5)
    plane.update(features, labels)
    rounded.update(turned.float(), labels)
    assert rounded.nc1().item() == pytest.approx(plane.nc1().item(), rel=1e-6)


def test_classes_of_one_batch_are_spread_over_the_folds() -> None:
    labels = torch.arange(60) % 5  # in step with the folds
    moments = FoldMoments(5, folds=5)
    moments.update(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), labels)
    assert moments._state is not None
    counts = moments._state[1]
    assert counts.max() - counts.min() <= 1


def test_single_samples_are_spread_over_the_folds() -> None:
    moments = FoldMoments(2, folds=3)
    for label in torch.arange(120) % 2:
        moments.update(torch.zeros(1, 3), label[None])
    assert moments._state is not None
    assert (moments._state.counts - 20).abs().max() < 14  # of binomial numbers, whose deviation is 3.7


def test_an_offset_costs_no_digits() -> None:
    features, labels = _data(90, 6, 4)
    features = (features * 2**20).round() / 2**20  # so that none is rounded by the offset
    near, far = FoldMoments(4), FoldMoments(4)
    near.update(features, labels)
    far.update(features + 2**27, labels)
    assert far.nc1().item() == pytest.approx(near.nc1().item(), rel=1e-9)


def test_folds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected no more folds than there are images, got 5 for 4"):
        folds_of(torch.tensor([0, 0, 1, 2]), 5)
    assert folds_of(torch.tensor([0, 0, 1, 2]), 4).sort().values.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="expected two images of some class at least, got one of each"):
        folds_of(torch.tensor([0, 1, 2, 3]), 2)


def test_absent_classes_change_nothing() -> None:
    features, labels = _data(90, 6, 4)
    few, many = FoldMoments(4), FoldMoments(9)
    few.update(features, labels)
    many.update(features, 2 * labels + 1)
    torch.testing.assert_close(few.nc1(), many.nc1())
    torch.testing.assert_close(few.ridge().squared_error, many.ridge().squared_error)


def test_input_without_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least two classes and two folds, got 3 and 1"):
        FoldMoments(3, folds=1)
    with pytest.raises(ValueError, match="expected at least two classes and two folds, got 1 and 5"):
        FoldMoments(1)
    moments = FoldMoments(3)
    with pytest.raises(ValueError, match="expected features to take moments of, got none"):
        moments.nc1()
    moments.update(torch.zeros(0, 4), torch.zeros(0).long())
    with pytest.raises(ValueError, match=r"expected features \(N, d\) and labels \(N,\), got \(3,\) and \(3,\)"):
        moments.update(torch.zeros(3), torch.zeros(3).long())
    features, labels = _data(30, 4, 3)
    moments.update(features, labels)
    with pytest.raises(ValueError, match="expected features of width 4 as before, got 5"):
        moments.update(torch.zeros(3, 5), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"expected lams of one or more positive, finite numbers, got \[-1.0\]"):
        moments.ridge([-1.0])


@pytest.mark.parametrize(
    ("features", "labels", "text"),
    [
        (
            torch.zeros(4, 2),
            torch.tensor([0, 1, 2, 3]),
            "expected labels from 0 to num_classes - 1 = 2, got labels out of range",
        ),
        (torch.full((4, 2), torch.nan), torch.tensor([0, 0, 1, 1]), "expected finite features, got nan or inf"),
        (torch.zeros(4, 2), torch.tensor([0, 0, 0, 0]), "expected samples of at least two classes, got one"),
        (torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]), "expected each class in two folds or more, got class 1 in one"),
    ],
)
def test_sums_without_sense_are_refused(features: Tensor, labels: Tensor, text: str) -> None:
    moments = FoldMoments(3)
    moments.update(features, labels)
    with pytest.raises(ValueError, match=text):
        moments.ridge()


def test_inference_mode_and_training_can_alternate() -> None:
    features, labels = _data(60, 5, 3)
    plain, mixed = FoldMoments(3), FoldMoments(3)
    for start in range(0, 60, 20):
        rows = slice(start, start + 20)
        plain.update(features[rows], labels[rows])
        with torch.inference_mode(mode=start != 20):
            mixed.update(features[rows].clone(), labels[rows].clone())
    assert torch.equal(mixed.nc1(), plain.nc1())
