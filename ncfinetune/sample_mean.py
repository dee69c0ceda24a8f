"""The mean of a number over the samples of all batches and all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Mean of a number over the samples of all batches and all processes, each of which counts once.

    Lightning's own mean of logged tensors averages the processes' sample counts as integers, which is wrong if the
    processes have different numbers of samples. Here the sums of values and of samples are added over the processes
    when the mean is computed. They stay in float64 (float32 on MPS, which has no float64) when the module is cast.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, samples: int | Tensor) -> None:
        """Add a batch.

        Args:
            values: A number for each sample, ``(N,)``, or their mean.
            samples: Number of samples in the batch.
        """
        self.total = self.total + values.detach().to(self.total.dtype).mean() * samples
        self.samples = self.samples + samples

    def compute(self) -> Tensor:
        """The mean, in float32."""
        return (self.total / self.samples).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Follow the module to its device, but not to its precision."""

        def moved(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=state.device)).device
            return state.to(device, torch.float32 if device.type == "mps" else torch.float64)

        return super()._apply(moved, *args, **kwargs)
