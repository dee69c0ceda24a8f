"""Accumulation of features batch by batch: rows are collected in a buffer, without reading from an accelerator.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width, ``m`` rows in the buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ncfinetune.inputs import check_finite, check_labels, check_shapes, may_look, raise_flags, sound_samples

Self = TypeVar("Self", bound="Accumulator")

# Numbers in the buffer (2**22 are 16 MB in float32), and its least and largest number of rows: enough rows for a matrix
# product at full speed, and few enough for float32 sums. An accelerator takes more, since launches dominate there.
BUFFER, ROWS = 2**22, (256, 2048)
ACCELERATOR = (2, 4)
# Numbers between a row and the next on a CPU, a line of its cache in float32: rows that lie a power of two apart, as
# those of 512 or 2,048 features do, share few sets of that cache, and their products can take up to a fifth longer.
_GAP = 16


def capacity(width: int, device: torch.device) -> int:
    """Number of rows of the buffer for features of this width."""
    numbers, rows = (1, 1) if device.type == "cpu" else ACCELERATOR
    return max(ROWS[0], min(rows * ROWS[1], numbers * BUFFER // width))


def spaced(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows ``(m, d)`` for a matrix product, with a gap between them on a CPU; not initialised."""
    number, width = shape
    gap = _GAP if device.type == "cpu" else 0
    return torch.empty(number, width + gap, dtype=dtype, device=device)[:, :width]


class Accumulator(ABC):
    """Accumulates samples batch by batch in constant memory. Abstract.

    Rows are collected in one buffer on the accumulator's device, which is flushed when it is full, so that the result
    does not depend on how samples are divided into batches. On an accelerator an update does not synchronise: invalid
    samples (labels out of range, nan or inf) are counted on the device and left out, and `check` raises. On a CPU they
    are refused at once.

    Args:
        num_classes: Number of classes ``K``.
        ignore_index: Samples with this label are left out.
    """

    # Names of the tensors that hold the whole state.
    names: tuple[str, ...]

    count: Tensor
    flags: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.count = torch.zeros(0)
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        with torch.inference_mode(False):
            device = self.count.device
            self.count = torch.zeros(self.num_classes, dtype=torch.float64, device=device)
            # Numbers of samples with labels out of range, and of samples with nan or inf.
            self.flags = torch.zeros(2, dtype=torch.int64, device=device)
            self.rows, self.labels = torch.zeros(0, 0, device=device), self.flags.new_zeros(0)
            self._reset()
        self.batches = 0

    @abstractmethod
    def _reset(self) -> None:
        """Initialise the states other than the counts, for an unknown width."""

    @abstractmethod
    def _widen(self, width: int) -> None:
        """Allocate the state for the width of the features, if that has not been done."""

    @abstractmethod
    def _add(self, rows: Tensor, labels: Tensor, keep: Tensor | None) -> None:
        """Add samples ``(m, d)``, whose memory may be overwritten; only those of ``keep``, if it is not None."""

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.count.device

    @property
    @abstractmethod
    def width(self) -> int:
        """Feature width ``d``, 0 while it is not known."""

    @property
    def rows(self) -> Tensor:
        """Features in the buffer, ``(m, d)``."""
        return self._rows if self._waiting == len(self._rows) else self._rows[: self._waiting]

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self._rows, self._waiting = rows, len(rows)

    @property
    def labels(self) -> Tensor:
        """Labels in the buffer, ``(m,)``."""
        return self._labels if self._waiting == len(self._labels) else self._labels[: self._waiting]

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        self._labels = labels

    def to(self: Self, device: torch.device | str) -> Self:
        """Move to a device. MPS has no float64, so that the state stays on the CPU for it."""
        device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        with torch.inference_mode(False):  # a copy made in inference mode could not be added to outside it
            for name in self.names:
                setattr(self, name, getattr(self, name).to(device))
        return self

    def state(self) -> dict[str, Tensor]:
        """The state of all samples so far, buffered ones included, as a dictionary of tensors."""
        return {name: getattr(self, name).clone() for name in self.names}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a result of `state`."""
        with torch.inference_mode(False):
            for name in self.names:
                setattr(self, name, state[name].clone())

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples.

        Args:
            features: Pooled features, ``(N, d)``, of any floating-point type.
            labels: Integer labels in ``0..K-1``, ``(N,)``.

        Raises:
            ValueError: Wrong shapes, a width that changes; on a CPU also labels outside ``0..K-1``.
            NonFiniteFeaturesError: On a CPU: nan or inf.
            TypeError: Labels that are no integers, features that are no floats.
        """
        self.batches += 1
        check_shapes(features, labels)
        if self.width not in (0, features.shape[1]):
            raise ValueError(f"expected features of width {self.width} as in earlier batches, got {features.shape[1]}")
        with torch.inference_mode(False), torch.no_grad():
            features, labels = features.detach(), labels.detach()
            if may_look(features) or may_look(self.count):
                check_labels(labels, self.num_classes, self.ignore_index)
                kept = features if self.ignore_index is None else features[labels != self.ignore_index]
                check_finite(kept, self.batches)
            self._widen(features.shape[1])
            self._wait(features, labels)

    def _wait(self, features: Tensor, labels: Tensor) -> None:
        """Copy rows into the buffer, and flush it whenever it is full."""
        width = features.shape[1]
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        full, number = capacity(width, self.device), features.shape[0]
        if self._rows.dtype != dtype:
            self.flush()
        if number and self._rows.shape[0] < full:
            rows, waiting = self.rows, self.labels
            self._rows = spaced((full, width), dtype, self.device)
            self._labels = torch.empty(full, dtype=torch.int64, device=self.device)
            self._rows[: len(rows)], self._labels[: len(rows)] = rows.view(-1, width), waiting
        start = 0
        while start < number:
            stop = min(number, start + full - self._waiting)
            room = slice(self._waiting, self._waiting + stop - start)
            self._rows[room].copy_(features[start:stop])
            self._labels[room].copy_(labels[start:stop])
            self._waiting, start = room.stop, stop
            if self._waiting == full:
                self._add_waiting()

    def flush(self) -> None:
        """Add the buffered samples to the sums, and free the buffer."""
        with torch.inference_mode(False), torch.no_grad():
            self._add_waiting()
            if len(self._rows):
                self._rows, self._labels = self._rows.new_zeros(0, 0), self._labels.new_zeros(0)

    def trim(self) -> None:
        """Free the unused part of the buffer."""
        with torch.inference_mode(False):
            self._rows, self._labels = self.rows.clone(), self.labels.clone()

    def __getstate__(self) -> dict[str, Any]:
        self.trim()
        return self.__dict__

    def _add_waiting(self) -> None:
        if self._waiting:
            rows, labels = self.rows, self.labels
            self._waiting = 0
            self._add(rows, *self._kept(rows, labels))

    def _kept(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels in the range of indices, ``(m,)``, and a mask of valid samples, or None if all are; sets the flags."""
        if may_look(self.count) and self.ignore_index is None:
            return labels, None
        keep, flags = sound_samples(rows, labels, self.num_classes, self.ignore_index)
        self.flags += flags
        return labels.where(keep, 0), keep

    def check(self, name: str) -> None:
        """Raise if invalid samples were left out; reads the device.

        Args:
            name: Name of the measured features, for the message.

        Raises:
            ValueError: Labels outside ``0..K-1``.
            NonFiniteFeaturesError: nan or inf.
        """
        raise_flags(self.flags, int(self.count.sum()), self.num_classes, name)
