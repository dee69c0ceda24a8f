"""Heads of the fine-tuner, and the classifier that starts from class means."""

import pytest
import torch

from ncfinetune.collapse import class_moments
from ncfinetune.heads import ClosedForm, SkipHead, classifier_of, nearest_mean_classifier, streamed_moments


def test_joins_by_hand() -> None:
    features, skipped = torch.randn(2, 3), torch.randn(2, 5)
    pad, linear, concat, only = heads = [SkipHead(3, [5], 4, join) for join in ("pad", "linear", "concat", "only")]
    wide = skipped.clone()
    wide[:, :3] += features
    assert torch.equal(pad.joined(features, skipped), wide)
    assert torch.allclose(linear.joined(features, skipped), features + skipped @ linear.project[0].weight.T)
    assert torch.equal(concat.joined(features, skipped)[:, 3:], skipped)
    assert torch.equal(only.joined(features, skipped), skipped)
    assert [head.fc.in_features for head in heads] == [5, 3, 8, 5]
    for head in heads:
        joined = head.joined(features, skipped)
        assert torch.allclose(head(features, skipped), joined @ head.fc.weight.T + head.fc.bias)


def test_joins_of_several_layers_by_hand() -> None:
    features, one, two = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 2)
    pad, linear, concat, only = (SkipHead(3, [5, 2], 4, join) for join in ("pad", "linear", "concat", "only"))
    sides = one.clone()
    sides[:, :3] += features
    sides[:, :2] += two
    assert torch.allclose(pad.joined(features, one, two), sides)
    mapped = features + one @ linear.project[0].weight.T + two @ linear.project[1].weight.T
    assert torch.allclose(linear.joined(features, one, two), mapped)
    assert torch.equal(concat.joined(features, one, two), torch.cat([features, one, two], 1))
    assert torch.equal(only.joined(features, one, two), torch.cat([one, two], 1))


def _isotropic(sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three classes in four dimensions whose unbiased covariance is exactly sigma^2 I, and their means."""
    means = torch.tensor([[2.0, 0, 0, 7], [-1, 1, 0, 7], [-1, -1, 0, 7]], dtype=torch.float64)
    cross = torch.cat([torch.eye(4), -torch.eye(4)]).double()  # scatter 2 I a class, of 8 samples
    scale = sigma * ((3 * 8 - 3) / (3 * 2)) ** 0.5
    features = (means[:, None] + scale * cross).flatten(0, 1)
    return features, torch.arange(3).repeat_interleave(8), means


def test_nearest_mean_is_the_posterior_of_isotropic_gaussians() -> None:
    features, labels, means = _isotropic(sigma=0.5)
    weight, bias = nearest_mean_classifier(class_moments(features, labels, 3))
    points = torch.randn(20, 4, dtype=torch.float64)
    expected = (-torch.cdist(points, means).square() / (2 * 0.5**2)).softmax(1)
    assert torch.allclose((points @ weight.T + bias).softmax(1), expected, atol=1e-12)


@pytest.mark.parametrize("images", [1, 4])
def test_means_without_variation_have_the_scale_of_their_distance(images: int) -> None:
    features = torch.tensor([[3.0], [-3.0]], dtype=torch.float64).repeat(images, 1) + 3
    weight, bias = nearest_mean_classifier(class_moments(features, torch.arange(2).repeat(images), 2))
    assert weight.flatten().tolist() == pytest.approx([1 / 3, -1 / 3])  # 1 / tr(Sigma_B) = 1 / 9
    assert (weight @ torch.tensor([3.0]).double() + bias).tolist() == pytest.approx([-1 / 2, -1 / 2])


@pytest.mark.parametrize("images", [1, 6])
def test_nearest_mean_decides_by_distance_whatever_the_covariance(images: int) -> None:
    labels = torch.arange(5).repeat(images)
    features = torch.randn(5 * images, 7).double() * torch.logspace(-2, 1, 7) + torch.randn(5, 7).double()[labels]
    moments = class_moments(features, labels, 5)
    weight, bias = nearest_mean_classifier(moments)
    points = torch.randn(200, 7).double() * 3
    assert torch.equal((points @ weight.T + bias).argmax(1), torch.cdist(points, moments.mean).argmin(1))


@pytest.mark.parametrize("kind", ["mean", "etf"])
def test_a_class_without_images_is_never_decided_for_and_changes_nothing(kind: ClosedForm) -> None:
    """An independent reference is the classifier of the other classes alone."""
    labels = torch.tensor([0] * 40 + [1] * 5 + [2] * 10)  # uneven, so that the mean is not the mean of the means
    features = torch.randn(3, 7).double()[labels] + 1.5 * torch.randn(55, 7).double() + 5
    alone, bias_alone = classifier_of(kind, [(features, labels)], 3)
    weight, bias = classifier_of(kind, [(features, torch.tensor([0, 1, 3])[labels])], 5)
    assert torch.equal(weight[[2, 4]], torch.zeros(2, 7).double())
    assert torch.allclose(weight[[0, 1, 3]], alone)
    assert torch.allclose(bias[[0, 1, 3]], bias_alone)
    anywhere = 100 * torch.randn(1000, 7).double()
    assert not torch.isin((anywhere @ weight.T + bias).argmax(1), torch.tensor([2, 4])).any()
    assert (features @ weight.T + bias).isfinite().all()


def test_classes_with_images_are_equally_probable_at_the_mean_of_their_means() -> None:
    labels = torch.tensor([0] * 40 + [1] * 5 + [3] * 10)
    features = torch.randn(4, 7).double()[labels] + torch.randn(55, 7).double()
    weight, bias = classifier_of("etf", [(features, labels)], 4)
    centre = torch.stack([features[labels == label].mean(0) for label in (0, 1, 3)]).mean(0)
    assert torch.allclose((weight @ centre + bias)[[0, 1, 3]], torch.zeros(3).double(), atol=1e-12)
    norms = torch.linalg.vector_norm(weight, dim=1)[[0, 1, 3]]
    assert torch.allclose(norms, norms[0].expand(3))


@pytest.mark.parametrize("kind", ["mean", "etf"])
def test_a_single_class_has_no_classifier(kind: ClosedForm) -> None:
    with pytest.raises(ValueError, match="expected samples of at least two classes, got 1"):
        classifier_of(kind, [(torch.randn(6, 4), torch.ones(6).long())], 3)


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected features to take class moments of, got none"):
        streamed_moments([], 3)
