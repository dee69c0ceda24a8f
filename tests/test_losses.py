"""The contrastive loss against its formula term by term, and the squared error against closed forms."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ddp import run
from launches import Launches
from torch import Tensor

from ncfinetune import losses
from ncfinetune.losses import contrastive_loss, one_hot_mse


def _l_out(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Khosla et al. (2020), equation 2, as it stands there: sums over anchors, positives and all others."""
    views, classes = [v / v.norm() for v in z.flatten(0, 1)], labels.repeat_interleave(z.shape[1]).tolist()
    total = z.new_zeros(())
    for i, anchor in enumerate(views):
        others = [a for a in range(len(views)) if a != i]
        denominator = sum(torch.exp(anchor @ views[a] / temperature) for a in others)
        positives = [a for a in others if classes[a] == classes[i]]
        for p in positives:
            total = total - torch.log(torch.exp(anchor @ views[p] / temperature) / denominator) / len(positives)
    return total / len(views)


def _projections(n: int, views: int, p: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, views, p, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 1], [7, 7, 7, 7, 7], [3, -1, 3, 10, 2]])
@pytest.mark.parametrize("block", [1, 25, 2**22])
def test_value_and_gradient_are_those_of_the_formula(
    views: int, labels: list[int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_block", lambda device: block)
    z, y = _projections(5, views), torch.tensor(labels)
    loss, expected = contrastive_loss(z, y, 0.2), _l_out(z, y, 0.2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,), (reference,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_nt_xent_of_orthogonal_pairs_has_a_closed_form() -> None:
    z = torch.eye(4).repeat_interleave(2, 0).view(4, 2, 4)
    expected = math.log(math.exp(1 / 0.5) + 6) - 1 / 0.5
    assert contrastive_loss(z, torch.arange(4), 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_samples_each_of_another_class_have_their_other_views_for_positives() -> None:
    z = _projections(5, 2)
    assert torch.equal(contrastive_loss(z, torch.tensor([4, 8, 1, 0, 3])), contrastive_loss(z, torch.arange(5)))


def test_scale_of_projections_does_not_matter_and_zero_ones_are_finite() -> None:
    z = _projections(5, 2).detach()
    loss = contrastive_loss(z, torch.arange(5))
    torch.testing.assert_close(contrastive_loss(z * torch.rand(5, 2, 1) * 1e3, torch.arange(5)), loss)
    zero = torch.zeros(3, 2, 4, requires_grad=True)
    contrastive_loss(zero, torch.arange(3)).backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("close", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_temperatures_and_half_precision(temperature: float, close: float, dtype: torch.dtype) -> None:
    z = _projections(32, 2, 16).detach() * close + 1
    y = torch.arange(32) % 4
    half = z.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(half, y, temperature)
    assert loss.dtype == torch.float32
    exact = half.detach().double().requires_grad_()
    expected = contrastive_loss(exact, y, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    loss.backward()
    assert torch.isfinite(half.grad).all()


def test_nothing_is_kept_for_a_gradient_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    z = _projections(5, 2)
    expected = contrastive_loss(z, torch.arange(5)).item()
    monkeypatch.setattr(Tensor, "addcdiv_", None)  # what forms the gradient
    with torch.no_grad():
        assert contrastive_loss(z, torch.arange(5)).item() == expected


def _masked(z: Tensor, labels: Tensor) -> Tensor:
    """SupCon as it is usually written, with masks of ``N V x N V``."""
    z, y = torch.nn.functional.normalize(z.flatten(0, 1), dim=1), labels.repeat_interleave(z.shape[1])
    logits = z @ z.T / 0.1
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = ~torch.eye(len(z), dtype=torch.bool)
    positives = (y[:, None] == y) & others
    shares = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positives * shares).sum(1) / positives.sum(1)).mean()


def test_gradient_has_its_digits_where_classes_have_collapsed() -> None:
    """There the pull and the push of a view are nearly the same: their difference is lost if they are formed apart."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(200) % 10
    means = torch.eye(10, 32, dtype=torch.float64) - 0.1
    z = (means[labels][:, None] + 3e-4 * torch.randn(200, 2, 32, generator=generator)).requires_grad_()
    single = z.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(_masked(z, labels), z)
    (ours,) = torch.autograd.grad(contrastive_loss(single, labels), single)
    assert (ours - exact).norm() < 1e-5 * exact.norm()


def _counted(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, labels: Tensor) -> Launches:
    with Launches() as counted:
        loss(z, labels).backward()
    return counted


def test_it_waits_for_nothing_and_launches_less_than_the_masked_loss_in_a_fifth_of_its_memory() -> None:
    z, labels = torch.randn(512, 2, 32, requires_grad=True), torch.arange(512) % 10
    ours, masked = _counted(contrastive_loss, z, labels), _counted(_masked, z, labels)
    assert not ours.looks
    assert ours.total <= masked.total
    assert ours.peak < masked.peak / 5
    # A tensor without values cannot be looked at.
    z, labels = torch.randn(6, 2, 4, device="meta", requires_grad=True), torch.arange(6, device="meta")
    losses._ContrastiveLoss.apply(losses._Normalised.apply(z), labels, 0, 6, 0.1, 1 / 12).backward()
    assert z.grad is not None


def test_block_is_a_share_of_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert losses._block.__wrapped__(torch.device("cuda", 0)) == 40 * 2**20
    assert losses._block.__wrapped__(torch.device("cpu")) == 2**22


@pytest.mark.parametrize(
    ("shape", "count", "temperature", "message"),
    [
        ((4, 6), 4, 0.1, r"expected projections \(N, V, p\) and labels \(N,\), got \(4, 6\) and \(4,\)"),
        ((4, 2, 6), 8, 0.1, r"got \(4, 2, 6\) and \(8,\)"),
        ((4, 1, 6), 4, 0.1, "a contrastive loss needs at least 2 views of each sample, got 1"),
        ((1, 2, 6), 1, 0.1, "at least 2 samples a batch, got 1; a larger batch_size or drop_last=True fixes it"),
        ((4, 2, 6), 4, 0.0, "expected a temperature above 0, got 0.0"),
        ((4, 2, 6), 4, float("nan"), "expected a temperature above 0, got nan"),
    ],
)
def test_wrong_arguments(shape: tuple[int, ...], count: int, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive_loss(torch.randn(shape), torch.arange(count), temperature)


@pytest.mark.parametrize("split", [[8, 8], [5, 11], [1, 15], [6, 4, 6]])
@pytest.mark.parametrize("supervised", [True, False])
def test_processes_have_the_gradient_of_the_global_batch(split: list[int], supervised: bool, tmp_path: Path) -> None:
    images = torch.randn(16, 2, 5, dtype=torch.float64)
    labels = torch.arange(16) % 3 if supervised else torch.arange(16)
    weight = torch.randn(5, 4, dtype=torch.float64)

    def task(rank: int) -> Any:
        own = torch.arange(16).split(split)[rank]
        w = weight.clone().requires_grad_()
        loss = contrastive_loss(images[own] @ w, labels[own])
        loss.backward()
        return loss.item(), w.grad.numpy()

    shares = run(len(split), tmp_path, task)
    w = weight.clone().requires_grad_()
    loss = contrastive_loss(images @ w, labels)
    loss.backward()
    assert sum(value for value, _ in shares) / len(split) == pytest.approx(loss.item(), rel=1e-12)
    gradient = sum(torch.from_numpy(gradient) for _, gradient in shares) / len(split)
    torch.testing.assert_close(gradient, w.grad, rtol=1e-10, atol=1e-12)


def test_one_sample_a_process_is_a_batch(tmp_path: Path) -> None:
    z = _projections(2, 2).detach()
    values = run(2, tmp_path, lambda rank: contrastive_loss(z[rank : rank + 1], torch.tensor([rank])).item())
    assert sum(values) / 2 == pytest.approx(contrastive_loss(z, torch.arange(2)).item())


@pytest.mark.parametrize(("k", "m"), [(1.0, 1.0), (15.0, 30.0)])
def test_squared_error_on_one_hot_targets(k: float, m: float) -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        expected += sum(k * (v - m) ** 2 if j == label else v**2 for j, v in enumerate(row)) / 4
    assert one_hot_mse(logits, labels, k, m).item() == pytest.approx(expected / 6, rel=1e-5)
    soft = torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(one_hot_mse(logits, soft, k, m), one_hot_mse(logits, labels, k, m))
    mixed = 0.3 * soft + 0.7 * soft.flip(0)
    both = 0.3 * one_hot_mse(logits, labels, k, m) + 0.7 * one_hot_mse(logits, labels.flip(0), k, m)
    torch.testing.assert_close(one_hot_mse(logits, mixed, k, m), both)


def test_class_weights_of_probabilities_are_the_mean_weight_of_the_classes() -> None:
    logits, shares = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5])
    total = norm = 0.0
    for row, share in zip(logits.tolist(), shares.tolist(), strict=True):
        weight = sum(s * w for s, w in zip(share, weights.tolist(), strict=True))
        total += weight * sum(s * 3 * (v - 2) ** 2 + (1 - s) * v**2 for s, v in zip(share, row, strict=True)) / 4
        norm += weight
    assert one_hot_mse(logits, shares, 3.0, 2.0, weights).item() == pytest.approx(total / norm, rel=1e-5)


def test_a_temperature_whose_inverse_is_too_large_for_the_type_is_taken() -> None:
    z = torch.eye(4).repeat_interleave(2, 0).view(4, 2, 4).requires_grad_()
    contrastive_loss(z, torch.arange(4), 1e-40).backward()
    assert torch.equal(z.grad, torch.zeros(4, 2, 4))  # each view is at its positive already, and far from all others
