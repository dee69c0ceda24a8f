"""Heads of the fine-tuner, and the classifier that starts from class means."""

import pytest
import torch

from ncfinetune.collapse import class_moments
from ncfinetune.heads import SkipHead, nearest_mean_classifier, streamed_moments


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


@pytest.mark.parametrize("images", [1, 6])
def test_nearest_mean_decides_by_distance_whatever_the_covariance(images: int) -> None:
    labels = torch.arange(5).repeat(images)
    features = torch.randn(5 * images, 7).double() * torch.logspace(-2, 1, 7) + torch.randn(5, 7).double()[labels]
    moments = class_moments(features, labels, 5)
    weight, bias = nearest_mean_classifier(moments)
    points = torch.randn(200, 7).double() * 3
    assert torch.equal((points @ weight.T + bias).argmax(1), torch.cdist(points, moments.mean).argmin(1))


def test_class_without_images_starts_at_zero() -> None:
    features, labels, _ = _isotropic(1.0)
    weight, bias = nearest_mean_classifier(class_moments(features, labels, 4))
    assert torch.equal(weight[3], torch.zeros(4).double())
    assert bias[3] == 0


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected features to take class moments of, got none"):
        streamed_moments([], 3)
