"""Pre-training losses: contrastive, and the squared error on one-hot targets.

Legend: ``N`` samples, ``V`` views of each, ``K`` classes, ``p`` projection width.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ncfinetune.gathering import numbers_of_all, rows_of_all

# Similarities in memory at a time, which bounds the memory that the contrastive loss adds to a step; 2**22 are 16 MB.
_BLOCK = 2**22
# On a GPU a share of its memory instead, 160 MB of 80 GB: smaller blocks take less time than their launches.
_GPU_SHARE = 1 / 512
# From this temperature on, exp(similarity / temperature) is within exp(-50) and exp(50): float32 needs no shift.
_NO_SHIFT_FROM = 0.02


def contrastive_loss(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss of SupCon and SimCLR: L_out of Khosla et al. (2020, arXiv 2004.11362), equation 2, mean over all views.

    With ``labels = arange(N)`` it is NT-Xent of Chen et al. (2020, arXiv 2002.05709), equation 1. A view's positives
    are all other views of its class. They include the sample's own other views, so that a batch of samples of different
    classes has positives too; SupCon's loss then equals NT-Xent.

    Time grows with ``(N V)^2``, memory with ``N V``: similarities are computed in blocks, from which the gradient is
    formed too, and the sum over positives is computed from class sums.

    Under `torch.distributed` the views of all processes are keys for the views of this process, and gradients flow back
    to the process of each key. Each process returns its share; the mean of the shares is the loss of the global batch,
    and the mean of their gradients, which DistributedDataParallel takes, its gradient. Labels are compared across
    processes, so that for NT-Xent they must differ between processes, as in SimCLR.

        >>> z = torch.eye(2).repeat_interleave(2, 0).reshape(2, 2, 2)  # two views of each of two samples
        >>> contrastive_loss(z, labels=torch.tensor([0, 1]), temperature=1.0).item()  # log(1 + 2 / e)
        0.5514...

    Args:
        z: Projections, ``(N, V, p)``; they are normalised here. Half precision is converted to float32.
        labels: Integers, ``(N,)``.
        temperature: Divisor of the cosine similarities.

    Returns:
        A scalar of at least float32.

    Raises:
        ValueError: Shapes that do not fit, one view, one sample, or a temperature that is not positive.
    """
    _check_contrastive(z, labels, temperature)
    with torch.autocast(z.device.type, enabled=False):
        own = _Normalised.apply(z.to(torch.promote_types(z.dtype, torch.float32)))
        keys, labels, first = _gather(own, labels)
        _check_samples(len(keys))
        share = _processes() / (len(keys) * z.shape[1])
        loss: Tensor = _ContrastiveLoss.apply(keys, labels, first, len(own), temperature, share)
    return loss


def one_hot_mse(
    logits: Tensor, labels: Tensor, k: float = 1.0, m: float = 1.0, class_weight: Tensor | None = None
) -> Tensor:
    """Squared error on one-hot targets: the mean over samples and classes of ``k (logit_y - m)^2`` and ``logit_j^2``.

    ``k`` and ``m`` are the rescaling of Hui and Belkin (2021, arXiv 2006.07322), section 2: with many classes the only
    target that is not zero has little influence on the mean, so that they weigh its error by ``k`` and set the target
    to ``m``. They take 1 and 1 for few classes, and for ImageNet 15 and 30.

    Args:
        logits: ``(N, K)``.
        labels: Classes ``(N,)``, or probabilities of classes ``(N, K)``, which weigh the two kinds of target.
        k: Weight of the true class's error.
        m: Target of the true class.
        class_weight: Weights of the classes, ``(K,)``: the mean over samples is weighted by the weight of each sample's
            class, or with probabilities by the mean weight of its classes.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    share = F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels.to(logits.dtype)
    errors = k * share * (logits - m).square() + (1 - share) * logits.square()
    if class_weight is None:
        return errors.mean()
    weight = (share * class_weight).sum(1)  # a matrix product would be in half precision under autocast
    return (weight * errors.mean(1)).sum() / weight.sum()


class _Normalised(torch.autograd.Function):
    """`F.normalize` along the last axis, with a quarter of the kernel launches in its backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min_(1e-12)
        unit = z / norms
        ctx.save_for_backward(unit, norms)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, norms = ctx.saved_tensors
        along = (unit * grad).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).div_(norms)


class _ContrastiveLoss(torch.autograd.Function):
    """``share`` of the sum of L_out over the views of ``count`` samples from ``first`` on.

    Keys are all views, ``(N, V, p)``. The forward pass computes the gradient too, while the similarities are in memory;
    the backward pass scales it. Nothing synchronises, and launches are few, since they dominate for small batches.
    """

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, labels: Tensor, first: int, count: int, temperature: float, share: float
    ) -> Tensor:
        views, scale = keys.shape[1], _scale(keys, temperature)
        classes, fewer = _positives(labels, views)
        pull = _pull(keys, classes[::views], fewer[::views], slice(first, first + count))
        gradient = torch.zeros_like(keys) if ctx.needs_input_grad[0] else None
        rows = slice(first * views, (first + count) * views)
        flat = None if gradient is None else gradient.flatten(0, 1)
        spread = _sum_of_logsumexp(keys.flatten(0, 1), classes, fewer, rows, temperature, flat, share)
        ctx.save_for_backward(gradient)
        return torch.add(spread.mul_(share), pull, alpha=scale * share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None, None, None


def _positives(labels: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """An index of each view's class, and minus the number of the other views of that class, ``(N V,)``.

    A class is identified by the start of its labels in sorted order: unlike `torch.unique`, this does not synchronise.
    """
    ordered, of_views = labels.sort().values, labels.repeat_interleave(views)
    classes = torch.searchsorted(ordered, of_views)
    sizes = torch.searchsorted(ordered, of_views, right=True) - classes
    return classes, torch.rsub(sizes, 1, alpha=views)


def _pull(keys: Tensor, classes: Tensor, fewer: Tensor, own: slice) -> Tensor:
    """Minus the sum over own views of their mean similarity to the other keys of their class.

    That is ``sum_i z_i (S_i - z_i) / (1 - n_i)`` with the sum ``S_i`` and the number ``n_i`` of the class's views.

    Args:
        keys: All views, ``(N, V, p)``.
        classes: An index of each sample's class, ``(N,)``.
        fewer: ``1 - n_i`` of each sample, ``(N,)``.
        own: The samples of this process.
    """
    sums = torch.zeros_like(keys[:, 0]).index_add_(0, classes, keys.sum(1))
    others = sums[classes[own]].unsqueeze(1) - keys[own]
    return (others * keys[own]).sum((1, 2)).div_(fewer[own]).sum()


def _scale(keys: Tensor, temperature: float) -> float:
    """One over the temperature, limited to the range of the keys' dtype: torch refuses larger factors."""
    return min(1 / temperature, torch.finfo(keys.dtype).max)


def _sum_of_logsumexp(
    keys: Tensor, classes: Tensor, fewer: Tensor, rows: slice, temperature: float, gradient: Tensor | None, share: float
) -> Tensor:
    """Sum over rows of the logsumexp of their scaled similarities to all other keys, block by block.

    Args:
        keys: Unit vectors, ``(M, p)``.
        classes: An index of each key's class, ``(M,)``.
        fewer: One less the number of keys of that class, ``(M,)``.
        rows: The keys that are rows.
        temperature: Divisor of the similarities.
        gradient: Accumulates ``share`` times the gradient of the loss, the pull of positives included, ``(M, p)``; None
            if it is not needed. A positive's pull is subtracted from its weight before that is multiplied with the key:
            at collapse both are nearly the same, and their products too large to tell the difference.
        share: Factor of the gradient.
    """
    count, scale = rows.stop - rows.start, _scale(keys, temperature)
    # At least two blocks: a small batch then needs half the memory for its similarities, for a few more launches.
    size = math.ceil(count / max(2, math.ceil(count * len(keys) / _block(keys.device))))
    buffer, all_sums = keys.new_empty(size, len(keys)), keys.new_empty(count, 1)
    shifts: list[Tensor] = []
    for start in range(rows.start, rows.stop, size):
        part = slice(start, min(start + size, rows.stop))
        block, sums = keys[part], all_sums[start - rows.start : part.stop - rows.start]
        weights = buffer[: len(block)].addmm_(block, keys.T, beta=0, alpha=scale)
        weights.diagonal(start).fill_(-torch.inf)
        if temperature < _NO_SHIFT_FROM:
            highest = weights.amax(1, keepdim=True)
            weights.sub_(highest)
            shifts.append(highest.sum())
        torch.sum(weights.exp_(), 1, keepdim=True, out=sums)
        if gradient is not None:
            weights.addcmul_(classes[part, None] == classes, sums / fewer[part, None])
            weights.diagonal(start).zero_()
            gradient[part].addcdiv_(weights @ keys, sums, value=scale * share)
            gradient.addmm_(weights.T, block / sums, alpha=scale * share)
    return sum(shifts, start=all_sums.log_().sum())


@cache
def _block(device: torch.device) -> int:
    """Similarities in memory at a time, 4 bytes each."""
    if device.type != "cuda":
        return _BLOCK
    return int(torch.cuda.get_device_properties(device).total_memory * _GPU_SHARE) // 4


def _gather(own: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Views and labels of all processes, and the index of this process's first view.

    Several processes synchronise once to exchange their numbers of samples, which the shapes depend on.
    """
    if _processes() == 1:
        return own, labels, 0
    sizes = numbers_of_all(own)
    return _Gather.apply(own, sizes), rows_of_all(labels, sizes), sum(sizes[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """Rows of all processes; in the backward pass each process gets the sum of all gradients of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return rows_of_all(rows, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return torch.split(grad, ctx.sizes)[dist.get_rank()], None


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_contrastive(z: Tensor, labels: Tensor, temperature: float) -> None:
    if z.ndim != 3 or labels.shape != z.shape[:1]:
        raise ValueError(
            f"expected projections (N, V, p) and labels (N,), got {tuple(z.shape)} and {tuple(labels.shape)}"
        )
    if z.shape[1] < 2:
        raise ValueError(f"a contrastive loss needs at least 2 views of each sample, got {z.shape[1]}")
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise ValueError(
            f"a contrastive loss needs at least 2 samples a batch, got {samples}; "
            "a larger batch_size or drop_last=True fixes it"
        )
