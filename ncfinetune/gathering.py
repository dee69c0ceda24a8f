"""Sums over processes, and their rows together: each may have another number of them, or all the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def sum_of_all(number: Tensor) -> Tensor:
    """The sum of a number over the processes, in place; on CUDA the host does not wait for it."""
    dist.all_reduce(number)
    return number


def numbers_of_all(rows: Tensor) -> list[int]:
    """The number of rows of each process, in the order of the ranks; waits for the device."""
    counts = torch.empty(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    dist.all_gather(list(counts.unbind()), torch.full_like(counts[0], len(rows)))
    return counts.tolist()


def rows_of_all(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """The rows of all processes in the order of the ranks, on every process.

    Args:
        rows: This process's rows, ``(N, ...)``.
        numbers: What `numbers_of_all` says.
    """
    longest = max(numbers)
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = rows.new_empty(len(numbers), *rows.shape)
    dist.all_gather(list(parts.unbind()), rows.contiguous())
    if min(numbers) == longest:
        return parts.flatten(0, 1)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def rows_of_parts(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a stream, on every process, from the part that each has read; a stream that all read counts once.

    Args:
        features: This process's features, ``(N, d)``.
        labels: Their labels, ``(N, ...)``.
    """
    numbers = numbers_of_all(labels)
    joined = rows_of_all(features, numbers), rows_of_all(labels, numbers)
    parts = [torch.split(rows, numbers) for rows in joined]
    same = all(torch.equal(part, own[0]) for own in parts for part in own)
    return (parts[0][0], parts[1][0]) if same else joined
