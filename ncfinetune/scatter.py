"""Sums of products ``z z^T`` of shifted features: the arithmetic behind the covariance within classes.

The arithmetic belongs to the device. On an accelerator products are float64: on cards whose float64 is slow, a layer of
2,048 features costs about 3 ms a batch of 512, a percent of a ResNet-50's step, and on others nothing. On a CPU float32
features are multiplied in float32, at twice the speed, while an estimate says that this is exact enough, and in float64
otherwise.

Legend: ``K`` classes, ``d`` feature width, ``m`` rows; ``z = h - c_k`` features less their class's shift, ``delta_k``
the mean of ``z`` over a class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Half a unit in the last place.
_ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass(frozen=True)
class ShiftedScatter:
    """``N Sigma_W = sum z z^T - sum_k n_k delta_k delta_k^T`` by its parts.

    Args:
        count: Samples a class, ``(K,)``.
        sums: Sums of ``z`` a class, ``(K, d)``.
        upper: The sum of ``z z^T``, ``(d, d)``; what lies below its diagonal blocks is not read.
        rounding: Rounding of the arithmetic times the diagonal of ``upper``, ``(d,)``.
    """

    count: Tensor
    sums: Tensor
    upper: Tensor
    rounding: Tensor

    def spread(self, rows: Tensor) -> Tensor:
        """``trace(R Sigma_W R^T)`` of rows ``R``, ``(m, d)``."""
        total = -((rows @ self.sums.T).square() / self.count.clamp(min=1)).sum()
        for block in _blocks(len(self.upper)):
            part = rows[:, block]
            products = part @ self.upper[block, block.start :]
            diagonal = torch.tensordot(products[:, : part.shape[1]], part)
            mirrored = torch.tensordot(products, rows[:, block.start :])
            total = total + 2 * mirrored - diagonal
        return (total / self.count.sum()).clamp(min=0)

    def doubt(self, rows: Tensor) -> Tensor:
        """How far rounding may have moved ``spread(rows)``.

        The error ``E`` of the matrix is taken for independent in its entries, of standard deviation
        ``u sqrt(S_ii S_jj)``; that of ``sum_ij E_ij P_ij`` with ``P = R^T R`` is then ``u |D P D|`` in the Frobenius
        norm, with ``D^2`` the diagonal of ``S``, which is that of ``R D^2 R^T``.
        """
        return ((rows * self.rounding) @ rows.T).norm() / self.count.sum()

    def written_out(self) -> Tensor:
        """``Sigma_W``, ``(d, d)``."""
        within = self.upper.clone()
        for rows in _blocks(len(within)):
            within[rows.stop :, rows] = within[rows, rows.stop :].T
        within.addmm_(self.sums.T, self.sums / self.count.clamp(min=1)[:, None], alpha=-1)
        return within.div_(self.count.sum().clamp(min=1))


def add_products(upper: Tensor, rounding: Tensor, z: Tensor) -> None:
    """Add ``z^T z`` to the blocks of ``upper`` that lie on and above its diagonal, in the arithmetic of ``z``.

    Args:
        upper: The sum so far, ``(d, d)``.
        rounding: Its rounding, ``(d,)``; grows with it.
        z: Shifted features, ``(m, d)``.
    """
    before = upper.diagonal().clone()
    with full_precision(z.device):
        for rows in _blocks(z.shape[1]):
            block = upper[rows, rows.start :]
            if z.dtype == upper.dtype:
                block.addmm_(z[:, rows].T, z[:, rows.start :])
            else:
                block += z[:, rows].T @ z[:, rows.start :]
    rounding.add_(upper.diagonal() - before, alpha=_ROUNDING[z.dtype])


def _blocks(width: int) -> Iterator[slice]:
    """Blocks of rows of the ``(d, d)`` state: enough to leave out near half of it, each enough for a fast product."""
    size = max(128, width // 8)
    return (slice(start, start + size) for start in range(0, width, size))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and float32 products in float32: neither TF32 nor bfloat16."""
    with _ieee_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend by itself, and torch refuses to mix the two ways
        backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
    else:
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
