"""Losses of pre-training: contrastive, and the squared error on one-hot targets.

Legend: ``N`` samples, ``V`` views of each, ``K`` classes, ``p`` projection width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Similarities in memory at a time, which bounds what the contrastive loss adds to a step: 4 million are 16 MB.
_BLOCK = 2**22


def contrastive_loss(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss of SupCon and SimCLR: L_out of Khosla et al. (2020, arXiv 2004.11362), equation 2, mean over all views.

    With ``labels = arange(N)`` it is NT-Xent of Chen et al. (2020, arXiv 2002.05709), equation 1. A view's positives
    are all other views of its class. They include the sample's own other views, so that a batch in which every sample
    is of another class has positives too, and SupCon's loss is NT-Xent there.

    Time grows with ``(N V)^2``, memory with ``N V``: similarities are taken in blocks, which also form the gradient,
    and the sum over positives goes through sums over classes.

    Where `torch.distributed` runs, the views of every process are keys for those of this one, and gradients flow back
    to where a key came from. Each process returns its share; their mean is the loss of the global batch, and the mean
    of their gradients, which DistributedDataParallel takes, is its gradient. Labels are compared across processes, so
    that for NT-Xent each process needs numbers of its own, as SimCLR has them.

    Args:
        z: Projections, ``(N, V, p)``; they are normalised here. Half precision is taken to float32.
        labels: Whole numbers, ``(N,)``.
        temperature: What the cosine similarities are divided by.

    Returns:
        A scalar of at least single precision.

    Raises:
        ValueError: Shapes that do not fit, one view, one sample, or a temperature that is not positive.
    """
    _check_contrastive(z, labels, temperature)
    with torch.autocast(z.device.type, enabled=False):
        rows = F.normalize(z.flatten(0, 1).to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        keys, key_labels, first = _gather_views(rows, labels.repeat_interleave(z.shape[1]))
        _check_samples(len(keys) // z.shape[1])
        spread = _SumOfLogSumExp.apply(rows, keys, first, temperature)
        pull = _positives(rows, keys, key_labels, first) / temperature
    return (spread - pull) * (_processes() / len(keys))


def one_hot_mse(logits: Tensor, labels: Tensor, k: float = 1.0, m: float = 1.0) -> Tensor:
    """Squared error on one-hot targets: the mean over samples and classes of ``k (logit_y - m)^2`` and ``logit_j^2``.

    ``k`` and ``m`` are the rescaling of Hui and Belkin (2021, arXiv 2006.07322), section 2: with many classes the one
    target that is not zero is lost in the mean, so they weigh its error (``k``) and move it away from zero (``m``).
    They take 1 and 1 for few classes, and for ImageNet 15 and 30.

    Args:
        logits: ``(N, K)``.
        labels: Classes ``(N,)``, or probabilities of classes ``(N, K)``, which weigh the two kinds of target.
        k: Weight of the true class's error.
        m: Target of the true class.
    """
    share = F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (k * share * (logits - m).square() + (1 - share) * logits.square()).mean()


def _positives(rows: Tensor, keys: Tensor, labels: Tensor, first: int) -> Tensor:
    """Sum over rows of their mean similarity to the other keys of their class."""
    classes, members = torch.unique(labels, return_inverse=True)
    sums = keys.new_zeros(len(classes), keys.shape[1]).index_add(0, members, keys)
    own = members[first : first + len(rows)]
    others = members.bincount()[own] - 1
    return ((rows * (sums[own] - rows)).sum(1) / others).sum()


class _SumOfLogSumExp(torch.autograd.Function):
    """Sum over rows of the logsumexp of their scaled similarities to all keys but themselves, the keys from ``first``.

    Forward forms the gradients, block by block, while the similarities are there; backward scales them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, first: int, temperature: float) -> Tensor:
        needed = any(ctx.needs_input_grad)
        total, to_rows, to_keys = rows.new_zeros(()), torch.empty_like(rows), torch.zeros_like(keys)
        size = max(1, _BLOCK // len(keys))
        for start in range(0, len(rows), size):
            block = rows[start : start + size] / temperature
            weights = block @ keys.T
            weights.diagonal(first + start).fill_(-torch.inf)
            highest = weights.amax(1, keepdim=True)
            weights.sub_(highest).exp_()
            sums = weights.sum(1, keepdim=True)
            total += (sums.log() + highest).sum()
            if needed:
                torch.mm(weights, keys, out=to_rows[start : start + size]).div_(sums * temperature)
                to_keys.addmm_(weights.T, block / sums)
        ctx.save_for_backward(to_rows, to_keys)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_rows, to_keys = ctx.saved_tensors
        return grad * to_rows, grad * to_keys, None, None


def _gather_views(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows and labels of all processes, and where those of this one begin."""
    if _processes() == 1:
        return rows, labels, 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(_processes())]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    return _Gather.apply(rows, sizes), _gathered(labels, sizes), sum(sizes[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """Rows of all processes; each gets back the sum of what all of them say about its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _gathered(rows, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return torch.split(grad, ctx.sizes)[dist.get_rank()], None


def _gathered(rows: Tensor, sizes: list[int]) -> Tensor:
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


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
            "a larger batch_size or drop_last=True mends it"
        )
