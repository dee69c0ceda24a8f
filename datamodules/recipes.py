"""What is done to a training image at random: recipes, their strength, and the drawing of the parameters.

Legend: ``N`` images, ``H W`` height and width, ``S`` side of the images after a crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .transforms import blur, crop_resize, greyscale, jitter, on_some, resize, solarise
from .trivial import apply_trivial, draw_trivial

# Tries at a crop that fits into the image, as in torchvision.
_CROP_TRIES = 10
# Float pixels that are worked on at a time on a CPU: they stay in its cache.
_CPU_PIXELS = 2**20
# Below this side SimCLR leaves the blur out (appendix B.9).
_BLUR_SIDE = 64


@dataclass(frozen=True)
class Recipe:
    """Random changes of a training image, in the order of the arguments; without arguments there are none.

    Args:
        min_area: Least share of the image's area that a random crop keeps; 1 is no crop.
        max_aspect: Greatest ratio of a random crop's longer side to its shorter one.
        flip: Probability of mirroring left and right.
        trivial: Probability of one change drawn by TrivialAugment (Mueller and Hutter 2021, wide space).
        jitter: Probability of the four changes of colour that follow, in random order.
        brightness: A factor is drawn from 1 - brightness to 1 + brightness, but not below 0.
        contrast: The same for the contrast.
        saturation: The same for the saturation.
        hue: Most that the hue turns, in turns, 0..0.5.
        grey: Probability of taking the colour away.
        blur: Probability of a Gaussian blur, of 0.1 to 2 pixels.
        solarise: Probability of inverting the brighter half of the pixel values.

    Raises:
        ValueError: A number is out of its range.
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

    @property
    def crops(self) -> bool:
        """Whether there is a random crop."""
        return self.min_area < 1 or self.max_aspect > 1

    @property
    def changes(self) -> bool:
        """Whether anything is random."""
        return self.crops or any(getattr(self, name) > 0 for name in _PROBABILITIES)

    def scaled(self, strength: float) -> Recipe:
        """The recipe at a strength: nothing is done at 0, what the recipe says at 1, and everything in proportion.

        Beyond 1 the changes of colour grow further, as Chen et al. (2020, SimCLR, appendix A) let them, and crops and
        probabilities stay.

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


def recipe_for(recipe: Augmentation, strength: float, size: int) -> Recipe:
    """A recipe by its name, or a given one, at a strength, for images of side ``size``.

    Raises:
        ValueError: There is no recipe of that name; ``strength`` is negative.
    """
    if isinstance(recipe, Recipe):
        return recipe.scaled(strength)
    if recipe not in RECIPES:
        raise ValueError(f"expected augmentation to be one of {', '.join(RECIPES)} or a Recipe, got {recipe!r}")
    named = RECIPES[recipe].scaled(strength)
    return named if size >= _BLUR_SIDE else replace(named, blur=0.0)


class Changes(NamedTuple):
    """What is done to each of ``N`` images: bools and floats ``(N,)``, ``order`` and ``factors`` ``(N, 4)``."""

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

    Area and the logarithm of the aspect are uniform; of ten tries the first that fits is taken, and if none does, the
    largest box about the centre whose aspect is allowed. This is the rule of torchvision's ``RandomResizedCrop``.
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

    def happens(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    amounts = torch.tensor([recipe.brightness, recipe.contrast, recipe.saturation])
    low = (1 - amounts).clamp(min=0)
    factors = torch.rand(count, 4, generator=generator)
    factors[:, :3] = low + factors[:, :3] * (1 + amounts - low)
    factors[:, 3] = (2 * factors[:, 3] - 1) * recipe.hue
    trivial, trivial_strength = draw_trivial(count, recipe.trivial, generator)
    return Changes(
        flip=happens(recipe.flip),
        trivial=trivial,
        trivial_strength=trivial_strength,
        jitter=happens(recipe.jitter),
        order=torch.rand(count, 4, generator=generator).argsort(1),
        factors=factors,
        grey=happens(recipe.grey),
        blur=happens(recipe.blur),
        sigma=torch.rand(count, generator=generator) * 1.9 + 0.1,
        solarise=happens(recipe.solarise),
    )


def render(
    images: Tensor, size: int, mean: Tensor, std: Tensor, boxes: Tensor | None = None, changes: Changes | None = None
) -> Tensor:
    """uint8 images as a model gets them: cropped or resized, changed, normalised. On a CPU a few are made at a time.

    Args:
        images: Images, ``(N, C, H, W)``.
        size: Side ``S``.
        mean: Mean of each channel, for pixels in 0..1, ``(C,)``.
        std: Standard deviation of each channel, for pixels in 0..1, ``(C,)``.
        boxes: Crops, ``(N, 4)``; None is all of each image.
        changes: Changes; None is none.

    Returns:
        Floats, ``(N, C, S, S)``.
    """
    count, channels = images.shape[:2]
    mean, std = (v.to(images.device, non_blocking=True).view(-1, 1, 1) for v in (mean, std))
    rendered = torch.empty(count, channels, size, size, device=images.device)
    few = max(1, _CPU_PIXELS // (channels * size**2))
    step = few if images.device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        part = slice(start, start + step)
        some = images[part].to(torch.float32).div_(255)
        some = resize(some, size) if boxes is None else _cropped(some, boxes[part], size)
        if changes is not None:
            apply_changes(some, Changes(*(values[part] for values in changes)))
        torch.div(some.sub_(mean), std, out=rendered[part])
    return rendered


def _cropped(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of ``(S, S)``; where the images are larger, made at their size and shrunk with antialiasing."""
    return resize(crop_resize(images, boxes, max(size, *images.shape[2:])), size)


def apply_changes(images: Tensor, changes: Changes) -> None:
    """Make the changes, in the order of `Recipe`, on float images ``(N, C, S, S)`` in 0..1, where they lie."""
    kernel_size = max(3, images.shape[2] // 10 | 1)
    on_some(images, changes.flip, lambda some, _: some.flip(3))
    apply_trivial(images, changes.trivial, changes.trivial_strength)
    jitter(images, changes.jitter, changes.order, changes.factors)
    on_some(images, changes.grey, lambda some, _: greyscale(some).expand_as(some))
    on_some(images, changes.blur, lambda some, index: blur(some, changes.sigma[index], kernel_size))
    on_some(images, changes.solarise, lambda some, _: solarise(some, torch.full((len(some),), 0.5)))
