"""Batch transforms against torchvision's for one image, and what is drawn against what torchvision draws."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from launches import Launches
from scipy.stats import chisquare, ks_2samp
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as tv

from ncfinetune.datamodules import recipes
from ncfinetune.datamodules import transforms as ours
from ncfinetune.datamodules.recipes import (
    RECIPES,
    Changes,
    Recipe,
    change_all,
    change_some,
    draw_boxes,
    draw_changes,
    recipe_for,
    render,
)
from ncfinetune.datamodules.trivial import CHANGES, apply_trivial, draw_trivial

COUNT = 4000


def _each(images: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    return torch.stack([function(image, i) for i, image in enumerate(images)])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [30, 64])
def test_crops_are_torchvisions(size: int) -> None:
    images = torch.rand(5, 3, 28, 30)
    boxes = [[0, 0, 28, 30], [3, 7, 11, 23], [10, 0, 18, 18], [27, 29, 1, 1], [0, 29, 28, 1]]
    expected = _each(images, lambda x, i: tv.resized_crop(x, *boxes[i], [size, size], antialias=True))
    lines = ours.crop_lines(torch.tensor(boxes), 28, 30, size).float()
    torch.testing.assert_close(ours.crop_along(images, lines, size), expected, atol=1e-5, rtol=0)


def test_crops_that_shrink_are_antialiased() -> None:
    images = torch.randint(0, 256, (300, 3, 40, 40), dtype=torch.uint8)
    boxes = torch.tensor([2, 4, 30, 36]).expand(300, 4)
    whole = _each(images / 255, lambda x, _: tv.resized_crop(x, 2, 4, 30, 36, [40, 40], antialias=True))
    expected = tv.resize(whole, [16, 16], antialias=True)
    found = render(images, 16, torch.zeros(3), torch.ones(3), boxes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("function", "reference", "low", "high", "within"),
    [
        (ours.brightness, tv.adjust_brightness, 0.0, 2.0, 1e-6),
        (ours.contrast, tv.adjust_contrast, 0.0, 2.0, 1e-6),
        (ours.saturation, tv.adjust_saturation, 0.0, 2.0, 1e-6),
        (ours.hue, tv.adjust_hue, -0.5, 0.5, 1e-5),
        (ours.solarise, tv.solarize, 0.0, 1.0, 0.0),
    ],
)
def test_colours_are_torchvisions(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    low: float,
    high: float,
    within: float,
    channels: int,
) -> None:
    images = torch.rand(9, channels, 16, 12)
    images[1] = images[1].round()  # black, white and pure colours
    images[2] = images[2, :1]  # grey
    values = torch.linspace(low, high, 9)
    expected = _each(images, lambda x, i: reference(x, values[i].item()))
    torch.testing.assert_close(function(images, values), expected, atol=within, rtol=0)


@pytest.mark.parametrize("kernel_size", [3, 9])
def test_blur_is_torchvisions(kernel_size: int) -> None:
    images, sigma = torch.rand(4, 3, 20, 31), torch.tensor([0.1, 0.5, 1.3, 2.0])
    expected = _each(images, lambda x, i: tv.gaussian_blur(x, [kernel_size] * 2, [sigma[i].item()] * 2))
    torch.testing.assert_close(ours.blur(images, sigma, kernel_size), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [change_some, change_all])
def test_all_changes_together_are_torchvisions_one_after_the_other(change: Callable[[Tensor, Changes], Tensor]) -> None:
    images = torch.rand(64, 3, 32, 32)
    recipe = Recipe(**{**RECIPES["simclr"].__dict__, "solarise": 0.5})
    changes = draw_changes(recipe, len(images), _generator())
    jitters = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)

    def reference(image: Tensor, i: int) -> Tensor:
        image = tv.horizontal_flip(image) if changes.flip[i] else image
        for number in changes.order[i].tolist() if changes.jitter[i] else []:
            image = jitters[number](image, changes.factors[i, number].item())
        image = tv.rgb_to_grayscale(image, 3) if changes.grey[i] else image
        image = tv.gaussian_blur(image, [3, 3], [changes.sigma[i].item()] * 2) if changes.blur[i] else image
        return tv.solarize(image, 0.5) if changes.solarise[i] else image

    expected = _each(images, reference)
    near = (change(images, changes) - expected).abs() < 2e-5
    assert near.float().mean() > 0.9999  # solarising may take a rounding error across its threshold


def _posterise(image: Tensor, m: float) -> Tensor:
    return tv.posterize(image, round(m))


# torchvision's meaning of each of TrivialAugment's changes.
TRIVIAL = {
    "identity": lambda x, m: x,
    "shear_x": lambda x, m: tv.affine(
        x, angle=0, translate=[0, 0], scale=1, shear=[math.degrees(math.atan(m)), 0], center=[0, 0]
    ),
    "shear_y": lambda x, m: tv.affine(
        x, angle=0, translate=[0, 0], scale=1, shear=[0, math.degrees(math.atan(m))], center=[0, 0]
    ),
    "translate_x": lambda x, m: tv.affine(x, angle=0, translate=[int(m), 0], scale=1, shear=[0, 0]),
    "translate_y": lambda x, m: tv.affine(x, angle=0, translate=[0, int(m)], scale=1, shear=[0, 0]),
    "rotate": lambda x, m: tv.rotate(x, m),
    "brightness": lambda x, m: tv.adjust_brightness(x, 1 + m),
    "colour": lambda x, m: tv.adjust_saturation(x, 1 + m),
    "contrast": lambda x, m: tv.adjust_contrast(x, 1 + m),
    "sharpness": lambda x, m: tv.adjust_sharpness(x, 1 + m),
    "posterise": _posterise,
    "solarise": lambda x, m: tv.solarize(x, 255 * m),
    "autocontrast": lambda x, m: tv.autocontrast(x),
    "equalise": lambda x, m: tv.equalize(x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_trivialaugment_are_torchvisions(name: str) -> None:
    images = torch.randint(20, 230, (12, 3, 36, 41), dtype=torch.uint8)
    images[0] = 7  # of a single value
    change, strength = draw_trivial(COUNT, 1.0, _generator())
    number = list(CHANGES).index(name)
    strengths = strength[change == number][:12]
    expected = _each(images, lambda x, i: TRIVIAL[name](x, strengths[i].item()))
    floats = images / 255
    apply_trivial(floats, torch.full((12,), number), strengths)
    # torchvision rounds down once or twice, and the nearest of two equally near pixels is a matter of rounding too.
    apart = (floats * 255 - expected).abs() > 2.01
    assert apart.float().mean() < 0.003


def test_trivialaugment_draws_torchvisions_space() -> None:
    change, strength = draw_trivial(20 * COUNT, 1.0, _generator())
    assert chisquare(torch.bincount(change, minlength=14)).pvalue > 1e-3
    rotation = strength[change == list(CHANGES).index("rotate")]
    assert len(rotation.unique()) == 61
    assert (rotation.min().item(), rotation.max().item()) == (-135, 135)
    bits = strength[change == list(CHANGES).index("posterise")].round()
    expected = (8 - torch.arange(31) / (30 / 6)).round().int().bincount(minlength=9).double()
    assert chisquare(bits.int().bincount(minlength=9)[2:], expected[2:] * (len(bits) / 31)).pvalue > 1e-3


# Least and largest strength of each change of torchvision's wide space.
RANGES = {
    **dict.fromkeys(("shear_x", "shear_y", "brightness", "colour", "contrast", "sharpness"), (-0.99, 0.99)),
    **{"translate_x": (-32, 32), "translate_y": (-32, 32), "rotate": (-135, 135)},
    **{"posterise": (2, 8), "solarise": (0, 1)},
    **dict.fromkeys(("identity", "autocontrast", "equalise"), (0, 0)),
}


def test_strengths_of_trivialaugment_have_torchvisions_ranges() -> None:
    change, strength = draw_trivial(10 * COUNT, 1.0, _generator())
    found = {name: strength[change == number].aminmax() for number, name in enumerate(CHANGES)}
    assert {name: (low.item(), high.item()) for name, (low, high) in found.items()} == {
        name: pytest.approx(ends) for name, ends in RANGES.items()
    }


def test_trivialaugment_changes_images_with_its_probability() -> None:
    changed = draw_trivial(COUNT, 0.25, _generator())[0] >= 0
    assert abs(changed.double().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / COUNT)


def test_trivialaugment_spares_images_with_its_probability() -> None:
    images = torch.rand(COUNT, 1, 8, 8)
    before = images.clone()
    apply_trivial(images, *draw_trivial(COUNT, 0.0, _generator()))
    assert torch.equal(images, before)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 450), (40, 400)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    recipe = RECIPES["standard"]
    boxes = draw_boxes(recipe, COUNT, height, width, _generator())
    image = torch.empty(3, height, width)
    get = v1.RandomResizedCrop.get_params
    theirs = torch.tensor([get(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(COUNT)])
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    for measure in (_area, _aspect, lambda b: b[:, 0] / height, lambda b: b[:, 1] / width):
        assert ks_2samp(measure(boxes.double()), measure(theirs.double())).pvalue > 1e-3


def _area(boxes: Tensor) -> Tensor:
    return boxes[:, 2] * boxes[:, 3]


def _aspect(boxes: Tensor) -> Tensor:
    return boxes[:, 3] / boxes[:, 2]


@pytest.mark.parametrize("amount", [0.3, 1.5])
def test_factors_are_distributed_as_torchvisions(amount: float) -> None:
    low = max(0.0, 1 - amount)
    recipe = Recipe(jitter=0.8, brightness=amount, contrast=amount, saturation=amount, hue=0.2)
    changes = draw_changes(recipe, COUNT, _generator())
    ranges = [(low, 1 + amount)] * 3 + [(-0.2, 0.2)]
    theirs = [v1.ColorJitter.get_params(*ranges) for _ in range(COUNT)]
    for number in range(4):
        drawn = torch.tensor([params[number + 1] for params in theirs])
        assert ks_2samp(changes.factors[:, number], drawn).pvalue > 1e-3
    orders = Counter(map(tuple, changes.order.tolist()))
    assert len(orders) == 24
    assert chisquare(list(orders.values())).pvalue > 1e-3
    assert abs(changes.jitter.float().mean().item() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / COUNT)
    sigmas = torch.tensor([v1.GaussianBlur.get_params(0.1, 2.0) for _ in range(COUNT)])
    assert ks_2samp(changes.sigma, sigmas).pvalue > 1e-3


@pytest.mark.parametrize("name", ["flip", "grey", "blur", "solarise", "jitter"])
def test_probabilities_are_kept_and_independent(name: str) -> None:
    changes = draw_changes(Recipe(flip=0.5, grey=0.3, blur=0.3, solarise=0.3, jitter=0.3), COUNT, _generator())
    expected = 0.5 if name == "flip" else 0.3
    happened = getattr(changes, name).double()
    assert abs(happened.mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / COUNT)
    for other in {"flip", "grey", "blur", "solarise", "jitter"} - {name}:
        together = torch.corrcoef(torch.stack([happened, getattr(changes, other).double()]))[0, 1]
        assert abs(together.item()) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("name", RECIPES)
def test_strength_reaches_from_nothing_to_the_recipe(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.scaled(0) == Recipe()
    assert recipe.scaled(1) == recipe
    half = recipe.scaled(0.5)
    assert half.jitter == recipe.jitter / 2
    assert half.hue == recipe.hue / 2
    assert half.min_area == pytest.approx((1 + recipe.min_area) / 2)
    assert half.max_aspect == pytest.approx(math.sqrt(recipe.max_aspect))
    double = recipe.scaled(2)
    assert double.brightness == 2 * recipe.brightness
    assert double.jitter == recipe.jitter
    assert double.min_area == pytest.approx(recipe.min_area)


def test_small_images_are_not_blurred_by_a_named_recipe() -> None:
    assert recipe_for("simclr", 1.0, 32).blur == 0
    assert recipe_for("simclr", 1.0, 64).blur == 0.5
    assert recipe_for(Recipe(blur=0.5), 1.0, 32).blur == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(flip=1.2), "expected flip in 0..1, got 1.2"),
        (lambda: Recipe(hue=0.6), "expected hue in 0..0.5, got 0.6"),
        (
            lambda: Recipe(flip=0.5, brightness=0.4, hue=0.1),
            "expected jitter, the probability of colour changes, above 0 with brightness 0.4, hue 0.1",
        ),
        (lambda: Recipe(max_aspect=0.75), "expected max_aspect in 1..inf, got 0.75"),
        (lambda: Recipe().scaled(-1), "expected strength of at least 0, got -1"),
        (lambda: recipe_for({"flip": 2.0}, 1.0, 32), "expected flip in 0..1, got 2.0"),
        (lambda: recipe_for("strong", 1.0, 32), "expected augmentation to be one of plain, standard, trivial, simclr"),
    ],
)
def test_recipes_that_cannot_be(make: Callable[[], Recipe], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_no_box_that_fits_gives_the_central_one() -> None:
    boxes = draw_boxes(Recipe(min_area=0.99, max_aspect=4 / 3), 3, 30, 90, _generator())
    assert boxes.tolist() == [[0, 25, 30, 40]] * 3


@pytest.mark.parametrize(("name", "size", "most"), [("simclr", 32, 90), ("simclr", 64, 125), ("trivial", 32, 105)])
def test_a_batch_on_an_accelerator_is_a_bounded_number_of_launches(name: str, size: int, most: int) -> None:
    images = torch.zeros(256, 3, size, size, dtype=torch.uint8, device="meta")
    recipe = recipe_for(name, 1.0, size)
    boxes, changes = draw_boxes(recipe, 256, size, size, _generator()), draw_changes(recipe, 256, _generator())
    with Launches("meta") as counted:  # which has no values to wait for
        found = render(images, size, torch.zeros(3), torch.ones(3), boxes, changes)
    assert found.shape == images.shape
    assert counted.total <= most
    with Launches("meta") as again:
        render(images, size, torch.zeros(3), torch.ones(3))
    assert again.total <= 5  # what normalises is on the device by then


@pytest.mark.parametrize("channels", [1, 3])
def test_accelerators_and_cpus_make_the_same_images(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (200, channels, 24, 28), dtype=torch.uint8)
    images[0] = 255
    recipe = Recipe(**{**RECIPES["simclr"].__dict__, "trivial": 0.7, "solarise": 0.3})
    boxes, changes = draw_boxes(recipe, 200, 24, 28, _generator()), draw_changes(recipe, 200, _generator())
    arguments = (images, 32, torch.zeros(channels), torch.ones(channels), boxes, changes)
    expected = render(*arguments)
    monkeypatch.setattr(recipes, "change_some", change_all)
    apart = (render(*arguments) - expected).abs() > 2e-5
    assert apart.float().mean() < 1e-4  # solarising may take a rounding error across its threshold


def test_images_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (23, 3, 16, 16), dtype=torch.uint8)
    recipe = Recipe(**{**RECIPES["simclr"].__dict__, "trivial": 0.5})
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    boxes, changes = draw_boxes(recipe, 23, 16, 16, _generator()), draw_changes(recipe, 23, _generator())
    before = images.clone()
    whole = render(images, 16, mean, std, boxes, changes)
    monkeypatch.setattr(recipes, "_CPU_PIXELS", 5 * 3 * 16 * 16)
    torch.testing.assert_close(render(images, 16, mean, std, boxes, changes), whole)
    assert torch.equal(images, before)
    plain = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(render(images, 16, mean, std), plain)
