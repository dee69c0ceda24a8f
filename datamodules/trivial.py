"""TrivialAugment (Mueller and Hutter 2021, arXiv 2103.10158) on batches: one change per image, of one strength.

The changes and their ranges are those of the wide space, as in torchvision's ``TrivialAugmentWide``; tests compare each
change with torchvision's.

Legend: ``N`` images, ``C`` channels, ``H W`` height and width, ``m`` strength of a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .transforms import blend, on_some, solarise, where

_STEPS = 31
# Maps images and a row of numbers for each, ``(N, C, H, W)`` and ``(N, 6)``, to changed images.
_Change = Callable[[Tensor, Tensor], Tensor]
# Maps strengths ``(N,)`` and the images' height and width to those numbers, up to six.
_Numbers = Callable[[Tensor, int, int], Sequence[Tensor | float]]


def draw_trivial(count: int, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a change for each of ``count`` images, with equal chances, and one of 31 equal steps of its strength.

    Returns:
        Index into `CHANGES`, -1 where there is no change, and strength m; both ``(N,)``.
    """
    change = torch.randint(len(CHANGES), (count,), generator=generator)
    step = torch.randint(_STEPS, (count,), generator=generator) / (_STEPS - 1)
    sign = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    low, high, signed = torch.tensor(list(CHANGES.values()))[change].unbind(1)
    strength = (low + step * (high - low)) * torch.where(signed > 0, sign, 1.0)
    kept = torch.rand(count, generator=generator) >= probability
    return change.masked_fill_(kept, -1), strength


def apply_trivial(images: Tensor, change: Tensor, strength: Tensor) -> None:
    """Make the drawn changes on float images ``(N, C, H, W)`` in 0..1, in place."""
    index, numbers, counts = plan_trivial(change, strength, *images.shape[2:])
    make_trivial(images, index.to(images.device), numbers.to(images.device), counts)


def plan_trivial(change: Tensor, strength: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, list[int]]:
    """The arguments of `make_trivial` for the drawn changes, computed on the CPU, so that no device synchronises.

    Returns:
        Indices of the images that change, group by group, a row of six numbers for each, and the groups' sizes.
    """
    if (change < 0).all():
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 6), [0] * len(_GROUPS)
    indices, rows, counts = [], [], []
    for _, members in _GROUPS:
        counts.append(0)
        for name, numbers in members.items():
            index = where(change == _NUMBERS[name])
            counts[-1] += len(index)
            row = torch.zeros(6, len(index))
            for place, value in enumerate(numbers(strength[index], height, width)):
                row[place] = value
            indices.append(index)
            rows.append(row)
    return torch.cat(indices), torch.cat(rows, dim=1).T.contiguous(), counts


def make_trivial(images: Tensor, index: Tensor, numbers: Tensor, counts: list[int]) -> None:
    """Make the changes of `plan_trivial` on images, in place; all tensors are on the images' device."""
    parts = zip(_GROUPS, torch.split(index, counts), torch.split(numbers, counts), strict=True)
    for (change, _), some, own in parts:

        def changed(chosen: Tensor, _: Tensor, change: _Change = change, own: Tensor = own) -> Tensor:
            return change(chosen, own)

        on_some(images, some, changed)


def _on_grid(matrix: _Numbers) -> _Numbers:
    """The matrix from pixels to pixels, in the coordinates of `_sample`."""

    def numbers(m: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
        a, b, c, d, e, f = matrix(m, height, width)
        x, y = 2 / width, 2 / height
        return a * x, b * x, c * x - 1, d * y, e * y, f * y - 1

    return numbers


def _shear_x(m: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
    """Move each row to the left by m times its distance from the upper edge."""
    return 1, m, 0, 0, 1, 0


def _shear_y(m: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
    """Move each column up by m times its distance from the left edge."""
    return 1, 0, 0, m, 1, 0


def _translate_x(m: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
    """Move to the right by m pixels, rounded towards 0."""
    return 1, 0, -m.trunc(), 0, 1, 0


def _translate_y(m: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
    """Move down by m pixels, rounded towards 0."""
    return 1, 0, 0, 0, 1, -m.trunc()


def _rotate(m: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
    """Turn about the centre by m degrees, anticlockwise."""
    cos, sin = torch.cos(m * (math.pi / 180)), torch.sin(m * (math.pi / 180))
    y, x = height / 2, width / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def _strength(m: Tensor, height: int, width: int) -> Sequence[Tensor | float]:
    return (m,)


def _sample(images: Tensor, source: Tensor) -> Tensor:
    """Sample for each pixel the pixel nearest to its source point, black outside the image.

    Args:
        images: Images, ``(N, C, H, W)``.
        source: Matrices of two rows and three columns, ``(N, 6)``, that map (x, y, 1), a pixel's centre in pixels from
            the upper left corner, to its source point (x, y), where -1..1 are the image's edges.
    """
    height, width = images.shape[2:]
    x = (torch.arange(width, device=images.device) + 0.5).view(-1, 1)
    y = (torch.arange(height, device=images.device) + 0.5).view(-1, 1, 1)
    along, down, start = source.view(-1, 2, 3)[:, None, None].unbind(4)
    grid = torch.addcmul(torch.addcmul(start, down, y), along, x)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def _blend(images: Tensor, shares: Tensor) -> Tensor:
    return blend(images, *shares.T[:3])


def _sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """Blend with a version smoothed over 3x3 pixels, whose share is -m; the outermost pixels stay."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    channels = images.shape[1]
    smooth = F.conv2d(images, (kernel / 13).expand(channels, 1, 3, 3), groups=channels)
    factor = (1 + numbers[:, 0]).view(-1, 1, 1, 1)
    sharp = images.clone()
    inner = images[:, :, 1:-1, 1:-1]
    sharp[:, :, 1:-1, 1:-1] = (factor * inner + (1 - factor) * smooth).clamp_(0, 1)
    return sharp


def _posterise(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper ``bits`` of each pixel's eight."""
    step = torch.exp2(8 - bits[:, 0].round()).view(-1, 1, 1, 1)
    return (images * 255).round_().div_(step).floor_().mul_(step / 255)


def _solarise(images: Tensor, threshold: Tensor) -> Tensor:
    return solarise(images, threshold[:, 0])


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0..1; a channel with a single value is not changed."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-12), images)


def _equalise(images: Tensor, _: Tensor) -> Tensor:
    """Equalise the histogram of each channel over 256 levels; a channel with too few levels is not changed."""
    levels = (images * 255).round_().long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    flat = table.gather(2, levels).view_as(images) / 255
    return torch.where(step.unsqueeze(3) > 0, flat, images)


# Smallest and largest strength of each change, and whether its sign is random.
CHANGES = {
    "identity": (0.0, 0.0, 0.0),
    "shear_x": (0.0, 0.99, 1.0),
    "shear_y": (0.0, 0.99, 1.0),
    "translate_x": (0.0, 32.0, 1.0),
    "translate_y": (0.0, 32.0, 1.0),
    "rotate": (0.0, 135.0, 1.0),
    "brightness": (0.0, 0.99, 1.0),
    "colour": (0.0, 0.99, 1.0),
    "contrast": (0.0, 0.99, 1.0),
    "sharpness": (0.0, 0.99, 1.0),
    "posterise": (8.0, 2.0, 0.0),
    "solarise": (1.0, 0.0, 0.0),
    "autocontrast": (0.0, 0.0, 0.0),
    "equalise": (0.0, 0.0, 0.0),
}
_NUMBERS = {name: number for number, name in enumerate(CHANGES)}
# Changes that are the same function with other numbers are made together.
_GROUPS: tuple[tuple[_Change, Mapping[str, _Numbers]], ...] = (
    (
        _sample,
        {
            "shear_x": _on_grid(_shear_x),
            "shear_y": _on_grid(_shear_y),
            "translate_x": _on_grid(_translate_x),
            "translate_y": _on_grid(_translate_y),
            "rotate": _on_grid(_rotate),
        },
    ),
    (
        _blend,
        {
            "brightness": lambda m, height, width: (1 + m,),
            "colour": lambda m, height, width: (1 + m, -m),
            "contrast": lambda m, height, width: (1 + m, 0, -m),
        },
    ),
    (_sharpness, {"sharpness": _strength}),
    (_posterise, {"posterise": _strength}),
    (_solarise, {"solarise": _strength}),
    (_autocontrast, {"autocontrast": _strength}),
    (_equalise, {"equalise": _strength}),
)
