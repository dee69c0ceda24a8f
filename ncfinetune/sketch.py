"""Sketches of each class's features, for the numerical rank.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width, ``r`` rows of a sketch, ``m`` rows in the buffer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ncfinetune.accumulator import Accumulator


class ClassSketches(Accumulator):
    """Frequent Directions sketches ``(K, r, d)`` (Liberty 2013, arXiv 1206.0594) and exact energies of each class.

    An update does not synchronise; flushing a full buffer reads its labels once.

    Args:
        num_classes: Number of classes ``K``.
        size: Rows ``r`` of a class's sketch.
        ignore_index: Samples with this label are left out.
    """

    names = ("count", "energy", "sketch", "flags", "rows", "labels")

    energy: Tensor
    sketch: Tensor

    def __init__(self, num_classes: int, size: int, ignore_index: int | None = None) -> None:
        self.size = size
        super().__init__(num_classes, ignore_index)

    def _reset(self) -> None:
        self.energy = torch.zeros_like(self.count)
        self.sketch = self.count.new_zeros(self.num_classes, self.size, 0)

    @property
    def width(self) -> int:
        """Feature width ``d``, 0 while it is not known."""
        return self.sketch.shape[2]

    def _widen(self, width: int) -> None:
        if self.width != width:
            self.sketch = self.count.new_zeros(self.num_classes, self.size, width)

    def _add(self, rows: Tensor, labels: Tensor, keep: Tensor | None) -> None:
        rows = rows.double() if keep is None else rows.double().masked_fill_(~keep[:, None], 0)
        weight = torch.ones_like(labels, dtype=torch.float64) if keep is None else keep.double()
        self.energy.index_add_(0, labels, rows.square().sum(1))
        self.count.index_add_(0, labels, weight)
        numbers = torch.bincount(labels, minlength=self.num_classes).tolist()
        for label, part in enumerate(torch.split(rows[labels.argsort(stable=True)], numbers)):
            for some in torch.split(part, 4 * self.size):
                if len(some):
                    self.sketch[label] = _shrunk(torch.cat([self.sketch[label], some]), self.size)

    def merge(self, others: Iterable[ClassSketches]) -> None:
        """Merge other accumulators."""
        with torch.inference_mode(False), torch.no_grad():
            parts = [self, *others]
            for part in parts:
                part.flush()
            for name in ("energy", "count", "flags"):
                setattr(self, name, torch.stack([getattr(part, name).to(self.device) for part in parts]).sum(0))
            sketches = [part.sketch.to(self.device) for part in parts if part.width]
            if sketches:
                self.sketch = torch.stack([_shrunk(torch.cat(rows), self.size) for rows in zip(*sketches, strict=True)])

    def numerical_rank(self) -> Tensor:
        """Mean over present classes of the energy over the sketch's largest squared singular value."""
        self.flush()
        present = self.count > 0
        largest = torch.linalg.matrix_norm(self.sketch[present], 2).square()
        return (self.energy[present] / largest).mean()


def _shrunk(stack: Tensor, rows: int) -> Tensor:
    """A step of Frequent Directions, ``(m, d)`` to ``(rows, d)``: singular values squared less the largest left out."""
    if len(stack) <= rows:
        return stack
    squares, vectors = torch.linalg.eigh(stack @ stack.T)
    left_out = squares[-rows - 1].clamp(min=0)
    squares, vectors = squares[-rows:], vectors[:, -rows:]
    kept = ((squares - left_out) / squares).clamp(min=0).nan_to_num(0).sqrt()
    return (kept * vectors).T @ stack
