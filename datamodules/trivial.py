"""TrivialAugment (Mueller and Hutter 2021, arXiv 2103.10158) on batches: one change an image, of one strength.

The changes and their ranges are those of the wide space, as torchvision's ``TrivialAugmentWide`` has them; tests hold
each change against torchvision's.

Legend: ``N`` images, ``C`` channels, ``H W`` height and width, ``m`` strength of a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .transforms import brightness, contrast, on_some, saturation, solarise

_STEPS = 31
_Change = Callable[[Tensor, Tensor], Tensor]


def draw_trivial(count: int, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a change for each of ``count`` images, with equal chances, and one of 31 equal steps of its strength.

    Returns:
        Index into `CHANGES`, -1 where there is no change, and strength m; both ``(N,)``.
    """
    change = torch.randint(len(CHANGES), (count,), generator=generator)
    step = torch.randint(_STEPS, (count,), generator=generator) / (_STEPS - 1)
    sign = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    low, high, signed = torch.tensor([ranges for _, ranges in CHANGES.values()])[change].unbind(1)
    strength = (low + step * (high - low)) * torch.where(signed > 0, sign, 1.0)
    spared = torch.rand(count, generator=generator) >= probability
    return change.masked_fill_(spared, -1), strength


def apply_trivial(images: Tensor, change: Tensor, strength: Tensor) -> None:
    """Make the drawn changes on float images ``(N, C, H, W)`` in 0..1, where they lie."""
    for number, (function, _) in enumerate(CHANGES.values()):
        if function is not None:
            on_some(images, change == number, partial(_changed, function, strength))


def _changed(change: _Change, strength: Tensor, images: Tensor, index: Tensor) -> Tensor:
    return change(images, strength[index])


def _shear_x(images: Tensor, m: Tensor) -> Tensor:
    """Move each row to the left by m times its distance from the upper edge."""
    one, none = torch.ones_like(m), torch.zeros_like(m)
    return _sample(images, [[one, m, none], [none, one, none]])


def _shear_y(images: Tensor, m: Tensor) -> Tensor:
    """Move each column up by m times its distance from the left edge."""
    one, none = torch.ones_like(m), torch.zeros_like(m)
    return _sample(images, [[one, none, none], [m, one, none]])


def _translate_x(images: Tensor, m: Tensor) -> Tensor:
    """Move to the right by m pixels, rounded towards 0."""
    one, none = torch.ones_like(m), torch.zeros_like(m)
    return _sample(images, [[one, none, -m.trunc()], [none, one, none]])


def _translate_y(images: Tensor, m: Tensor) -> Tensor:
    """Move down by m pixels, rounded towards 0."""
    one, none = torch.ones_like(m), torch.zeros_like(m)
    return _sample(images, [[one, none, none], [none, one, -m.trunc()]])


def _rotate(images: Tensor, m: Tensor) -> Tensor:
    """Turn about the centre by m degrees, anticlockwise."""
    cos, sin = torch.cos(m * (math.pi / 180)), torch.sin(m * (math.pi / 180))
    y, x = images.shape[2] / 2, images.shape[3] / 2
    return _sample(images, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _sample(images: Tensor, source: list[list[Tensor]]) -> Tensor:
    """The nearest pixel to where each pixel comes from, black if that is outside.

    Args:
        images: Images, ``(N, C, H, W)``.
        source: Two rows of three entries ``(N,)``: they make of (x, y, 1), pixels from the upper left corner to a
            pixel's centre, the point (x, y) that it comes from.
    """
    height, width = images.shape[2:]
    x = (torch.arange(width, device=images.device) + 0.5).view(1, 1, -1)
    y = (torch.arange(height, device=images.device) + 0.5).view(1, -1, 1)
    rows = [[entry.to(images.device, images.dtype).view(-1, 1, 1) for entry in row] for row in source]
    from_x, from_y = (a * x + b * y + c for a, b, c in rows)
    grid = torch.stack([from_x * (2 / width) - 1, from_y * (2 / height) - 1], dim=-1)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def _sharpness(images: Tensor, m: Tensor) -> Tensor:
    """Blend with a version smoothed over 3x3 pixels, whose share is -m; the outermost pixels stay."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    channels = images.shape[1]
    smooth = F.conv2d(images, (kernel / 13).expand(channels, 1, 3, 3), groups=channels)
    factor = (1 + m).to(images.device, images.dtype).view(-1, 1, 1, 1)
    sharp = images.clone()
    inner = images[:, :, 1:-1, 1:-1]
    sharp[:, :, 1:-1, 1:-1] = (factor * inner + (1 - factor) * smooth).clamp_(0, 1)
    return sharp


def _posterise(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper ``bits`` of each pixel's eight."""
    step = 2.0 ** (8 - bits.round().to(images.device, images.dtype).view(-1, 1, 1, 1))
    return (images * 255).round_().div_(step).floor_().mul_(step / 255)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0..1; a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-12), images)


def _equalise(images: Tensor, _: Tensor) -> Tensor:
    """Make each channel's histogram flat, as far as 256 levels allow; a channel of too few levels stays."""
    levels = (images * 255).round_().long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    flat = table.gather(2, levels).view_as(images) / 255
    return torch.where(step.unsqueeze(3) > 0, flat, images)


# Each change, and its weakest strength, its greatest, and whether it is drawn with either sign.
CHANGES = {
    "identity": (None, (0.0, 0.0, 0.0)),
    "shear_x": (_shear_x, (0.0, 0.99, 1.0)),
    "shear_y": (_shear_y, (0.0, 0.99, 1.0)),
    "translate_x": (_translate_x, (0.0, 32.0, 1.0)),
    "translate_y": (_translate_y, (0.0, 32.0, 1.0)),
    "rotate": (_rotate, (0.0, 135.0, 1.0)),
    "brightness": (lambda images, m: brightness(images, 1 + m), (0.0, 0.99, 1.0)),
    "colour": (lambda images, m: saturation(images, 1 + m), (0.0, 0.99, 1.0)),
    "contrast": (lambda images, m: contrast(images, 1 + m), (0.0, 0.99, 1.0)),
    "sharpness": (_sharpness, (0.0, 0.99, 1.0)),
    "posterise": (_posterise, (8.0, 2.0, 0.0)),
    "solarise": (solarise, (1.0, 0.0, 0.0)),
    "autocontrast": (_autocontrast, (0.0, 0.0, 0.0)),
    "equalise": (_equalise, (0.0, 0.0, 0.0)),
}
