"""Sums of products ``z z^T`` of shifted features: the arithmetic behind the covariance within classes.

The precision depends on the device. On an accelerator products are float64: on cards with slow float64, a layer of
2,048 features costs about 3 ms per batch of 512, 1 % of a ResNet-50's step, and on others it is negligible. On a CPU
float32 features, unless they are few, are multiplied in float32, at twice the speed, while the estimated error is small
enough and the one found on the diagonal is no larger than usual, and otherwise in float64.

Legend: ``K`` classes, ``d`` feature width, ``m`` rows; ``z = h - c_k`` features less their class's shift, ``delta_k``
the mean of ``z`` over a class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ncfinetune.inputs import may_look

# Half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Squares of single features between these neither overflow nor vanish in float32.
SMALL, LARGE = 1e-24, 1e30
# Errors on the diagonal of float32 products, in units of roundoff: of features of even size their standard deviation is
# 1.3 to 2.3, and the largest of 512 up to 9. Where few rows exceed the others by far, long sums lose the small terms,
# all in one direction; products with a larger single or mean error than these are not taken.
_USUAL, _LARGEST, _MEAN = 2, 12, 4
# Rows whose products are summed before they are added to the sums so far. Sums of products may round each term at the
# size of the sum, so that the error of long ones grows with the root of their number, to 50 roundoffs at 50,000.
_TERMS = 512
# Rows of a block, at least, unless there are fewer: MKL makes products of a few rows with larger errors.
_BLOCK = 64
# Rows of a block on an accelerator, at most, unless there are eight: to launch a small product takes longer than the
# half of it that blocks omit.
_LAUNCHED = 512
# Number of random combinations of the directions that NC1 sums over, for the estimate.
_PROBES = 16


@dataclass(frozen=True)
class ShiftedScatter:
    """``N Sigma_W = sum z z^T - sum_k n_k delta_k delta_k^T``, kept as its terms.

    Args:
        count: Samples per class, ``(K,)``.
        sums: Sums of ``z`` per class, ``(K, d)``.
        upper: The sum of ``z z^T``, ``(d, d)``; entries below the diagonal are not used.
        rounding: Unit roundoff of the products times the diagonal of ``upper``, ``(d,)``.
    """

    count: Tensor
    sums: Tensor
    upper: Tensor
    rounding: Tensor

    def spread(self, rows: Tensor) -> Tensor:
        """``trace(R Sigma_W R^T)`` of rows ``R``, ``(m, d)``."""
        total = -((rows @ self.sums.T).square() / self.count.clamp(min=1)).sum()
        for block in _blocks(len(self.upper), _size(len(self.upper))):
            products = rows[:, block] @ self.upper[block, block.start :].triu()
            total = total + 2 * torch.tensordot(products, rows[:, block.start :])
        total = total - torch.tensordot(rows.square().sum(0), self.upper.diagonal(), 1)
        return (total / self.count.sum()).clamp(min=0)

    def rounding_error(self, rows: Tensor) -> Tensor:
        """Standard deviation of the rounding error of ``spread(rows)``.

        The errors ``E`` of the matrix are assumed to be independent between entries, with standard deviation
        ``u sqrt(S_ii S_jj)``; that of ``sum_ij E_ij P_ij`` with ``P = R^T R`` is then ``u |D P D|`` in the Frobenius
        norm, with ``D^2`` the diagonal of ``S``, which is that of ``R D^2 R^T``. Features that repeat each other have
        the same errors: of as many as have the same ``S_ii``, the estimate is larger by their number.
        """
        known = self.rounding[self.rounding > 0]
        repeated = torch.unique(known, return_counts=True)[1].max() if len(known) else 1
        return ((rows * self.rounding) @ rows.T).norm() * repeated / self.count.sum()

    def diagonal(self) -> Tensor:
        """The diagonal of ``Sigma_W``, ``(d,)``."""
        shifted = (self.sums.square() / self.count.clamp(min=1)[:, None]).sum(0)
        return (self.upper.diagonal() - shifted).clamp(min=0) / self.count.sum()

    def squares(self) -> Tensor:
        """Mean squares of ``z``, ``(d,)``: of features less their class's shift."""
        return self.upper.diagonal() / self.count.sum()

    def to(self, device: torch.device | str) -> ShiftedScatter:
        """The same on another device."""
        return ShiftedScatter(*(part.to(device) for part in (self.count, self.sums, self.upper, self.rounding)))

    def written_out(self) -> Tensor:
        """``Sigma_W``, ``(d, d)``."""
        within = self.upper.clone()
        for rows in _blocks(len(within), _size(len(within))):
            own = within[rows, rows].triu()
            within[rows, rows] = own + own.triu(1).T
            within[rows.stop :, rows] = within[rows, rows.stop :].T
        within.addmm_(self.sums.T, self.sums / self.count.clamp(min=1)[:, None], alpha=-1)
        return within.div_(self.count.sum().clamp(min=1))


def sum_of_products(rows: Tensor) -> Tensor:
    """``rows^T rows`` of rows ``(m, d)``, whose error does not grow with their number."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    with full_precision(rows.device):
        for part in torch.split(rows, _TERMS):
            total = total + part.T @ part
    return total


def add_products(upper: Tensor, rounding: Tensor, z: Tensor, given: torch.dtype) -> None:
    """Add ``z^T z`` to ``upper`` on and above its diagonal, multiplied in float64.

    Args:
        upper: The sum so far, ``(d, d)``.
        rounding: Its rounding, ``(d,)``; updated in place.
        z: Shifted features in float64, ``(m, d)``.
        given: The dtype that the features were rounded to.
    """
    before, width = upper.diagonal().clone(), z.shape[1]
    blocks = _blocks(width, _size(width, None if may_look(z) else math.ceil(width / _LAUNCHED)))
    with full_precision(z.device):
        for part in torch.split(z, _TERMS):
            for rows in blocks:
                upper[rows, rows.start :].add_(part[:, rows].T @ part[:, rows.start :])
    rounding.add_(upper.diagonal() - before, alpha=ROUNDING[given])


def add_float32_products(upper: Tensor, rounding: Tensor, z: Tensor, squares: Tensor) -> bool:
    """Add ``z^T z`` by products in float32, and in float64 where these are not exact enough.

    The diagonal is known in float64: its error in the products tells that of the entries beside it, and is removed.

    Args:
        upper: The sum so far, ``(d, d)``; updated in place on and above its diagonal.
        rounding: Its rounding, ``(d,)``; updated in place.
        z: Shifted features in float32, ``(m, d)``.
        squares: Their sums of squares in float64, from before they were rounded to float32, ``(d,)``.

    Returns:
        Whether float32 was exact enough for all blocks.
    """
    size, diagonal = _size(z.shape[1]), torch.empty_like(squares)
    blocks = _blocks(len(squares), size)
    with full_precision(z.device):
        for rows in blocks:
            product = z[:, rows].T @ z[:, rows.start :]
            upper[rows, rows.start :].add_(product)
            diagonal[rows] = product.diagonal()
    # One row a block, the last filled up with 0.
    both = torch.stack([diagonal - squares, ROUNDING[torch.float32] * squares])
    both = torch.nn.functional.pad(both, (0, -len(squares) % size)).view(2, -1, size)
    (errors, units), sums, (error_norm, unit_norm) = both, both.sum(2).abs(), both.norm(dim=2)
    # The mean over few features, or over many of which one has most of the variance, varies as single errors do.
    wrong = (sums[0] > torch.maximum(_MEAN * sums[1], _LARGEST * unit_norm)) | (errors.abs() > _LARGEST * units).any(1)
    right = not wrong.any()
    for block, rows in enumerate(blocks if not right else ()):
        if wrong[block]:
            with full_precision(z.device):  # the product in float32 is the same as before, bit for bit
                product = z[:, rows].T @ z[:, rows.start :]
                correction = z[:, rows].double().T @ z[:, rows.start :].double() - product
            upper[rows, rows.start :].add_(correction)
            errors[block, : len(product)] += correction.diagonal()
            error_norm[block] = errors[block].norm()
    usual = (_USUAL * unit_norm).clamp(min=torch.finfo(units.dtype).tiny)  # 0 where no feature varies
    units *= (error_norm / usual).clamp(min=1)[:, None]
    upper.diagonal().sub_(errors.flatten()[: len(squares)])
    rounding += units.flatten()[: len(squares)]
    return right


def float32_error(count: Tensor, shift: Tensor, sums: Tensor, squares: Tensor, upper: Tensor) -> float:
    """Estimated relative error of NC1 with float32 products; nan or inf if it cannot be estimated.

    The directions of `collapse.nc1` are rows ``T`` with ``T^T T = P = M^+ M^+^T``, for ``M`` the centred class
    means. Random combinations of them are drawn without an eigendecomposition: ``M^T (M M^T)^-1 g``, or ``L^-T g``
    with ``L L^T = M^T M`` where there are more classes than features, have the covariance ``P`` too.

    Args:
        count: Samples per class, ``(K,)``.
        shift: Shifts ``c_k``, ``(K, d)``.
        sums: Sums of ``z`` per class, ``(K, d)``.
        squares: Sums of ``|z|^2`` per class, ``(K,)``.
        upper: The sum of ``z z^T`` as in `ShiftedScatter`, ``(d, d)``.
    """
    present = count > 0
    means = shift[present] + sums[present] / count[present, None]
    means = means - means.mean(0)
    scale = means.abs().amax().item() if len(means) > 1 else 0.0
    square = float(squares.sum() / count.sum()) / shift.shape[1]
    if scale == 0 or not SMALL < square < LARGE:
        return math.inf
    means = (means / scale).float()
    wide = len(means) <= means.shape[1]
    with full_precision(means.device):
        gram = means @ means.T if wide else means.T @ means
        average = gram.diagonal().mean()
        gram.diagonal().add_(1e-6 * average)  # about the accuracy of small eigenvalues in float32
        factor, failed = torch.linalg.cholesky_ex(gram.add_(average / len(gram)) if wide else gram)
        noise = torch.randn(len(gram), _PROBES, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
        if wide:
            rows = torch.cholesky_solve(noise - noise.mean(0), factor).T @ means
        else:
            rows = torch.linalg.solve_triangular(factor.T, noise, upper=True).T
    rows = rows.double() / scale
    scatter = ShiftedScatter(count, sums, upper, upper.diagonal() * ROUNDING[torch.float32])
    return math.inf if failed else float(scatter.rounding_error(rows) / scatter.spread(rows))


def _size(width: int, number: int | None = None) -> int:
    """Rows of a block, for so many blocks, one to eight; by default for as many as make products on a CPU fastest.

    Eight blocks omit nearly half of the matrix. The last one has fewer rows, by less than there are blocks.
    """
    return math.ceil(width / max(1, min(8, width // _BLOCK if number is None else number)))


def _blocks(width: int, size: int) -> list[slice]:
    """Blocks of rows of the ``(d, d)`` state."""
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and float32 products in float32: neither TF32 nor bfloat16."""
    with _ieee_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # The global setting of older releases, read back, would give the settings of the two backends up for one.
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
    else:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
