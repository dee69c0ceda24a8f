"""Transforms of whole batches of images, with separate parameters for each image; pure functions, on any device.

Random parameters are drawn in `recipes`; here the same arguments give the same images. Pixels are floats in 0..1, and
every function gives what torchvision's function of that purpose gives for a single image.

Legend: ``N`` images, ``C`` channels (1 or 3), ``H W`` height and width, ``S`` side of the images after a crop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Luma of ITU-R BT.601, as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)


def on_some(images: Tensor, index: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change some of the images in place.

    Args:
        images: Images, ``(N, C, H, W)``.
        index: Indices of the images to change, on the images' device.
        change: Maps these images and ``index`` to changed images.
    """
    if len(index):
        images.index_copy_(0, index, change(images.index_select(0, index), index))


def where(chosen: Tensor) -> Tensor:
    """Indices of the True entries of ``chosen``, ``(N,)``, which must be on the CPU, so that no device synchronises."""
    return chosen.nonzero().squeeze(1)


def crop_lines(boxes: Tensor, height: int, width: int, size: int) -> Tensor:
    """Positions of the ``S`` columns and the ``S`` rows of crops, for `crop_along`.

    Args:
        boxes: Top, left, height and width in pixels, ``(N, 4)``.
        height: Height of the images.
        width: Width of the images.
        size: Side ``S``.

    Returns:
        For columns and rows: the first position, where -1..1 are the image's edges, the step, and the least and the
        largest position, half a pixel inside the box, ``(4, N, 2, 1)``.
    """
    boxes = boxes.to(torch.float64)
    start, length = boxes[:, [1, 0]], boxes[:, [3, 2]]
    pixel = torch.tensor([2 / width, 2 / height], dtype=torch.float64)
    step = length / size
    first = start + step / 2
    places = [first * pixel - 1, step * pixel, (start + 0.5) * pixel - 1, (start + length - 0.5) * pixel - 1]
    return torch.stack(places).unsqueeze(3)


def crop_along(images: Tensor, lines: Tensor, size: int) -> Tensor:
    """Crop a box of each image and enlarge it to ``(S, S)``, bilinearly.

    Pixels outside the box have no influence, as if the box had been cut out first. There is no antialiasing: a side of
    the box should not exceed ``S``; for larger boxes crop to a larger size and use `resize`.

    Args:
        images: Images, ``(N, C, H, W)``.
        lines: The boxes as `crop_lines` has them, ``(4, N, 2, 1)``, on the images' device.
        size: Side ``S``.

    Returns:
        ``(N, C, S, S)``.
    """
    first, step, least, greatest = lines
    places = torch.addcmul(first, step, torch.arange(size, device=lines.device, dtype=lines.dtype))
    x, y = places.clamp_(least, greatest).unbind(1)
    grid = torch.stack([x.unsqueeze(1).expand(-1, size, -1), y.unsqueeze(2).expand(-1, -1, size)], dim=-1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to ``(N, C, S, S)``, bilinear and antialiased."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def greyscale(images: Tensor) -> Tensor:
    """Luma of the images, ``(N, 1, H, W)``; images of one channel are returned as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def blend(images: Tensor, share: Tensor, luma: Tensor, mean: Tensor) -> Tensor:
    """Blend each image with its luma and its mean luma, with shares ``(N,)`` on the images' device."""
    share, luma, mean = (values.view(-1, 1, 1, 1) for values in (share, luma, mean))
    grey = greyscale(images)
    others = torch.addcmul(grey.mean((2, 3), keepdim=True) * mean, grey, luma)
    return torch.addcmul(others, images, share).clamp_(0, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor ``(N,)``."""
    return (images * _each(factor, images)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its mean luma; the factor ``(N,)`` is the share of the image."""
    return _blend(images, greyscale(images).mean((1, 2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its greyscale version; the factor ``(N,)`` is the share of the image."""
    return _blend(images, greyscale(images), factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of each image by ``(N,)`` turns, -0.5..0.5, in HSV space.

    With value V, chroma D = V - min and hue h in sixths of a turn, the channel n of R, G, B (n = 5, 3, 1) of the turned
    colour is V - D clamp(min(k, 4 - k), 0, 1) with k = (n + h + 6 shift) mod 6, which is the usual way from HSV to RGB
    without its six cases.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    # The largest of the three becomes exactly 1, so that floor() marks it: where() takes ten times longer.
    red, green, blue = ((c - low).div_(chroma.clamp(min=1e-12)) for c in (red, green, blue))
    is_red, is_green = red.floor(), green.floor()
    is_green *= 1 - is_red
    angle = (green - blue).mul_(is_red)
    angle += (blue - red).add_(2).mul_(is_green)
    angle += (red - green).add_(4).mul_(1 - is_red - is_green)
    angle += 6 * _each(shift, angle)
    turned = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        k = angle + offset
        k -= (k / 6).floor_().mul_(6)
        torch.sub(value, torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma), out=turned[:, channel])
    return turned


def jitter(images: Tensor, chosen: Tensor, order: Tensor, factors: Tensor) -> None:
    """Change brightness, contrast, saturation and hue of some images in place, in a separate order for each.

    Args:
        images: Images, ``(N, C, H, W)``.
        chosen: Which images change, bool, ``(N,)``.
        order: The four changes 0..3 in the order in which an image undergoes them, ``(N, 4)``.
        factors: Factors of brightness, contrast and saturation, and shift of the hue, ``(N, 4)``.
    """
    changes = (brightness, contrast, saturation, hue)[: 2 if images.shape[1] == 1 else 4]
    for step in range(4):
        for number, change in enumerate(changes):

            def changed(some: Tensor, index: Tensor, number: int = number, change: _Change = change) -> Tensor:
                return change(some, factors[index, number])

            on_some(images, where(chosen & (order[:, step] == number)), changed)


def blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur, one product with a banded matrix per axis; pixels beyond the border are reflected.

    Args:
        images: Images, ``(N, C, H, W)``.
        sigma: Standard deviation of each image's kernel, in pixels, ``(N,)``.
        kernel_size: Width of the kernel in pixels, odd; at most twice the image's side less one.
    """
    reach = kernel_size // 2
    padded = F.pad(images, [reach] * 4, mode="reflect")
    sigma = sigma.to(images.device, images.dtype, non_blocking=True).view(-1, 1, 1, 1)
    rows, columns = (_blur_weights(sigma, side, reach) for side in images.shape[2:])
    return (rows @ padded) @ columns.transpose(2, 3)


def _blur_weights(sigma: Tensor, side: int, reach: int) -> Tensor:
    position = torch.arange(side, device=sigma.device).view(-1, 1) + reach
    distance = torch.arange(side + 2 * reach, device=sigma.device) - position
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= reach)
    return weights / weights.sum(3, keepdim=True)


def solarise(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the pixels that are not below each image's threshold ``(N,)``."""
    return torch.where(images >= _each(threshold, images), 1 - images, images)


_Change = Callable[[Tensor, Tensor], Tensor]


def _blend(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    share = _each(share, images)
    return (images * share).add_((1 - share) * others).clamp_(0, 1)


def _each(values: Tensor, images: Tensor) -> Tensor:
    """Values ``(N,)`` as ``(N, 1, ...)`` on the images' device."""
    return values.to(images.device, images.dtype, non_blocking=True).view(-1, *[1] * (images.ndim - 1))
