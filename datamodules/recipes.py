"""Random augmentation of training images: recipes, their strength, and the drawing of parameters.

Legend: ``N`` images, ``H W`` height and width, ``S`` side of the images after a crop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .launches import blends, constant, flip_all, grey_all, jitter_all, send
from .transforms import blur, crop_along, crop_lines, greyscale, jitter, on_some, resize, solarise, where
from .trivial import apply_trivial, draw_trivial, make_trivial, plan_trivial

# Attempts at a crop that fits into the image, as in torchvision.
_CROP_TRIES = 10
# Float pixels processed at a time on a CPU, so that they stay in its cache: 4 MB.
_CPU_PIXELS = 2**20
# The possible orders of four colour changes.
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
# Below this side SimCLR uses no blur (appendix B.9).
_BLUR_SIDE = 64


@dataclass(frozen=True)
class Recipe:
    """Random changes of a training image, in the order of the arguments; without arguments there are none.

    Args:
        min_area: Least share of the image's area that a random crop keeps; 1 is no crop.
        max_aspect: Largest ratio of a random crop's longer side to its shorter side.
        flip: Probability of a horizontal flip.
        trivial: Probability of one change drawn by TrivialAugment (Mueller and Hutter 2021, wide space).
        jitter: Probability of the following four colour changes, in random order.
        brightness: The factor is drawn from 1 - brightness to 1 + brightness, but not below 0.
        contrast: The same for the contrast.
        saturation: The same for the saturation.
        hue: Largest shift of the hue, in turns, 0..0.5.
        grey: Probability of conversion to greyscale.
        blur: Probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels.
        solarise: Probability of inverting the brighter half of the pixel values.

    Raises:
        ValueError: A number is out of its range, or there are colour changes that are never made.
    """

    min_area: float = 1.0
    max_aspect: float = 1.0
    flip: float = 0.0
    trivial: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"expected {name} in {low}..{high:g}, got {getattr(self, name)}")
        if not self.jitter and (
            unused := [f"{name} {getattr(self, name)}" for name in _COLOURS if getattr(self, name)]
        ):
            raise ValueError(f"expected jitter, the probability of colour changes, above 0 with {', '.join(unused)}")

    @property
    def crops(self) -> bool:
        """Whether there is a random crop."""
        return self.min_area < 1 or self.max_aspect > 1

    @property
    def changes(self) -> bool:
        """Whether anything is random."""
        return self.crops or any(getattr(self, name) > 0 for name in _PROBABILITIES)

    def scaled(self, strength: float) -> Recipe:
        """The recipe at a strength: no augmentation at 0, the recipe itself at 1, and in proportion between.

        Above 1 the colour changes grow further, as in Chen et al. (2020, SimCLR, appendix A), while crops and
        probabilities stay those of strength 1.

        Raises:
            ValueError: ``strength`` is negative.
        """
        if strength < 0:
            raise ValueError(f"expected strength of at least 0, got {strength}")
        share = min(strength, 1.0)
        changed: dict[str, float] = {name: share * getattr(self, name) for name in _PROBABILITIES}
        changed |= {name: strength * getattr(self, name) for name in ("brightness", "contrast", "saturation")}
        changed["hue"] = min(strength * self.hue, 0.5)
        changed["min_area"] = share * self.min_area + (1 - share)
        changed["max_aspect"] = self.max_aspect**share
        return replace(self, **changed)


_PROBABILITIES = ("flip", "trivial", "jitter", "grey", "blur", "solarise")
_COLOURS = ("brightness", "contrast", "saturation", "hue")
_RANGES = {
    **dict.fromkeys(_PROBABILITIES, (0, 1)),
    **dict.fromkeys(("brightness", "contrast", "saturation"), (0, math.inf)),
    "hue": (0, 0.5),
    "min_area": (0, 1),
    "max_aspect": (1, math.inf),
}
_CROP = {"min_area": 0.08, "max_aspect": 4 / 3, "flip": 0.5}
RECIPES = {
    "plain": Recipe(),
    "standard": Recipe(**_CROP),
    "trivial": Recipe(**_CROP, trivial=1),
    # Chen et al. 2020 (SimCLR), appendix A, at strength 1.
    "simclr": Recipe(**_CROP, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5),
}
Augmentation = Literal["plain", "standard", "trivial", "simclr"] | Recipe


def recipe_for(recipe: Augmentation | Mapping[str, Any], strength: float, size: int) -> Recipe:
    """A recipe, given by name, as a `Recipe` or as its arguments, at a strength, for images of side ``size``.

    Raises:
        ValueError: There is no recipe of that name; ``strength`` is negative.
    """
    if isinstance(recipe, Mapping):  # as a YAML file has it
        recipe = Recipe(**recipe)
    if isinstance(recipe, Recipe):
        return recipe.scaled(strength)
    if recipe not in RECIPES:
        raise ValueError(f"expected augmentation to be one of {', '.join(RECIPES)} or a Recipe, got {recipe!r}")
    named = RECIPES[recipe].scaled(strength)
    return named if size >= _BLUR_SIDE else replace(named, blur=0.0)


class Changes(NamedTuple):
    """The changes of each of ``N`` images: bools and floats ``(N,)``, ``order`` and ``factors`` ``(N, 4)``."""

    flip: Tensor
    trivial: Tensor
    trivial_strength: Tensor
    jitter: Tensor
    order: Tensor
    factors: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarise: Tensor


def draw_boxes(recipe: Recipe, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes of random crops of an image ``(H, W)``: top, left, height and width, ``(count, 4)``.

    Area and the logarithm of the aspect are uniform; the first of ten attempts that fits is taken, and if none fits,
    the largest central box with an allowed aspect. This is the rule of torchvision's ``RandomResizedCrop``.
    """
    drawn = torch.rand(count, 2 * _CROP_TRIES + 2, generator=generator)
    area = (recipe.min_area + (1 - recipe.min_area) * drawn[:, :_CROP_TRIES]) * (height * width)
    aspect = ((2 * drawn[:, _CROP_TRIES:-2] - 1) * math.log(recipe.max_aspect)).exp_()
    widths, heights = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    sides = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1)
    corners = ((torch.tensor([height, width]) - sides + 1) * drawn[:, -2:]).floor_()
    boxes = torch.cat([corners, sides], dim=1)
    if not (some := fits.any(1)).all():
        boxes[~some] = torch.tensor(_central_box(recipe, height, width))
    return boxes


def _central_box(recipe: Recipe, height: int, width: int) -> list[float]:
    box_width = min(width, round(height * recipe.max_aspect))
    box_height = min(height, round(width * recipe.max_aspect))
    return [float((height - box_height) // 2), float((width - box_width) // 2), float(box_height), float(box_width)]


def draw_changes(recipe: Recipe, count: int, generator: torch.Generator) -> Changes:
    """Draw the changes of ``count`` images, on the CPU, so that every device makes the same ones."""
    shares = torch.tensor([recipe.flip, recipe.jitter, recipe.grey, recipe.blur, recipe.solarise])
    flip, jitter, grey, blur, solarise = (torch.rand(5, count, generator=generator) < shares.unsqueeze(1)).unbind()
    amounts = torch.tensor([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    low = torch.cat([(1 - amounts[:3]).clamp(min=0), -amounts[3:]])
    high = torch.cat([1 + amounts[:3], amounts[3:]])
    trivial, trivial_strength = draw_trivial(count, recipe.trivial, generator)
    return Changes(
        flip=flip,
        trivial=trivial,
        trivial_strength=trivial_strength,
        jitter=jitter,
        order=_ORDERS[torch.randint(len(_ORDERS), (count,), generator=generator)],
        factors=torch.rand(count, 4, generator=generator).mul_(high - low).add_(low),
        grey=grey,
        blur=blur,
        sigma=torch.rand(count, generator=generator) * 1.9 + 0.1,
        solarise=solarise,
    )


def render(
    images: Tensor, size: int, mean: Tensor, std: Tensor, boxes: Tensor | None = None, changes: Changes | None = None
) -> Tensor:
    """uint8 images cropped or resized, changed and normalised for a model; on a CPU a few at a time.

    Args:
        images: Images, ``(N, C, H, W)``.
        size: Side ``S``.
        mean: Mean of each channel, for pixels in 0..1, on the CPU, ``(C,)``.
        std: Standard deviation of each channel, for pixels in 0..1, on the CPU, ``(C,)``.
        boxes: Crop boxes, on the CPU, ``(N, 4)``; None is the whole image.
        changes: Changes, on the CPU; None is none.

    Returns:
        Floats, ``(N, C, S, S)``.
    """
    count, channels = images.shape[:2]
    mean, std = (constant(tuple(values.tolist()), images.device) for values in (mean, std))
    rendered = torch.empty(count, channels, size, size, device=images.device)
    on_cpu = images.device.type == "cpu"
    change = change_some if on_cpu else change_all
    step = max(1, _CPU_PIXELS // (channels * size**2)) if on_cpu else max(1, count)
    for start in range(0, count, step):
        part = slice(start, start + step)
        some = None if changes is None else Changes(*(values[part] for values in changes))
        floats = _changed(images[part], size, None if boxes is None else boxes[part], some, change)
        torch.div(floats.sub_(mean), std, out=rendered[part])
    return rendered


def _changed(
    images: Tensor,
    size: int,
    boxes: Tensor | None,
    changes: Changes | None,
    change: Callable[[Tensor, Changes], Tensor],
) -> Tensor:
    """uint8 images as floats in 0..1, cropped or resized, and changed by ``change``."""
    floats = images.to(torch.float32).div_(255)
    if boxes is not None:
        height, width = images.shape[2:]
        side = max(size, height, width)
        (lines,) = send([crop_lines(boxes, height, width, side)], images.device)
        floats = crop_along(floats, lines, side)
    # A crop of larger images is made at their size and then downsampled with antialiasing.
    floats = resize(floats, size)
    return floats if changes is None else change(floats, changes)


def change_some(images: Tensor, changes: Changes) -> Tensor:
    """Make the changes, in the order of `Recipe`, on float images ``(N, C, S, S)`` in 0..1 on the CPU.

    Only the images that a change was drawn for are changed, in place.
    """
    kernel_size = _kernel_size(images)
    on_some(images, where(changes.flip), lambda some, _: some.flip(3))
    apply_trivial(images, changes.trivial, changes.trivial_strength)
    jitter(images, changes.jitter, changes.order, changes.factors)
    on_some(images, where(changes.grey), lambda some, _: greyscale(some).expand_as(some))
    on_some(images, where(changes.blur), lambda some, index: blur(some, changes.sigma[index], kernel_size))
    on_some(images, where(changes.solarise), lambda some, _: solarise(some, torch.full((len(some),), 0.5)))
    return images


def change_all(images: Tensor, changes: Changes) -> Tensor:
    """`change_some` in few kernel launches and without synchronisation, on any device.

    Cheap changes are made on all images at once; blur and TrivialAugment, which cost more, on the drawn images only.
    """
    index, numbers, counts = plan_trivial(changes.trivial, changes.trivial_strength, *images.shape[2:])
    blurred = where(changes.blur)
    shift = torch.where(changes.jitter, changes.factors[:, 3], 0.0)
    floats = [changes.flip, numbers, blends(changes.jitter, changes.order, changes.factors), shift, changes.grey]
    flip, numbers, shares, shift, grey, sigma, threshold = send(
        # A threshold of 2 changes no image: pixels are at most 1.
        [*floats, changes.sigma[blurred], torch.where(changes.solarise, 0.5, 2.0)],
        images.device,
    )
    index, there = send([index, blurred], images.device, torch.int64)
    if changes.flip.any():
        images = flip_all(images, flip)
    if len(index):
        make_trivial(images, index, numbers, counts)
    if changes.jitter.any():
        images = jitter_all(images, shares, shift)
    if changes.grey.any():
        images = grey_all(images, grey)
    kernel_size = _kernel_size(images)
    on_some(images, there, lambda some, _: blur(some, sigma, kernel_size))
    return solarise(images, threshold) if changes.solarise.any() else images


def _kernel_size(images: Tensor) -> int:
    """A tenth of the side, odd, as in appendix A of SimCLR."""
    return max(3, images.shape[2] // 10 | 1)
