"""Decoding: crops of an image file as upright uint8 squares, whatever the format of the file.

Legend: ``V`` views, ``C`` channels, ``S`` side of a decoded image.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

# Share of an image's shorter side that evaluation uses, around the centre: 224 of 256 pixels.
CENTRE = 0.875
# Number of training files that are examined to see whether all have the requested size already.
LOOKED_AT = 8
# An image whose longer side would be more than so many squares is not resized as a whole.
_LONGEST = 50
# A JPEG may be decoded at a half, a quarter or an eighth of its size, if this many times the pixels needed are left.
_DECODED_SIDE = 2
# Operations that make stored pixels upright, by EXIF orientation: swap the axes, then turn upside down, then mirror.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_UPRIGHT = (False, False, False)
# If no 16-bit pixel reaches this value, they come from a camera or scanner of 10, 12 or 14 bits, and would be dark.
_DARK = 2**14
_ALL = 65535.0
_PHOTOMETRIC, _BITS_PER_SAMPLE, _S_MIN, _S_MAX = 262, 258, 340, 341
# Pillow's readers raise all of these on damaged files, and the last on intact ones of very many pixels too.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

# Makes crop boxes (top, left, height, width) for an upright image of a height and a width.
Boxes = Callable[[int, int], list[list[float]]]
Box = list[float]


class UnreadableError(ValueError):
    """A file cannot be read as an image."""


class UnknownRangeError(ValueError):
    """An image is intact, but its values of black and white are unknown."""


@dataclass(frozen=True)
class Decoding:
    """Options for decoding image files.

    Args:
        channels: 3 for colour, 1 for grey.
        value_range: The values of black and white in grey files of more than 8 bits per pixel. None is the range that
            the file states: SMinSampleValue and SMaxSampleValue or fewer than 16 bits in a TIFF, and all 16 bits
            otherwise.
        banner: Rows of pixels at the bottom of each file that are not part of the picture.
        centre: Share of the shorter side that evaluation uses, timm's ``crop_pct``. None is 7/8, but 1 for each image
            that has the size already.

    Raises:
        ValueError: ``value_range`` is empty.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    banner: int = 0
    centre: float | None = None

    def __post_init__(self) -> None:
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"expected value_range to be black and white, black below white, got {self.value_range}")


COLOUR = Decoding()


def read_image(
    path: str, size: int, boxes: Boxes | None = None, content: bytes | None = None, decoding: Decoding = COLOUR
) -> Tensor:
    """Decode a file and cut crops out of it, each resized to ``(S, S)``, bilinear and antialiased.

    Evaluation resizes the whole image and then cuts out its centre, as torchvision's `Resize` and `CenterCrop` do, and
    timm, to the same pixels. A JPEG of which half the size would still be twice that size is first decoded at half its
    size, or at a quarter or an eighth, by Pillow's ``draft``.

    Args:
        path: The file. Grey, palette, CMYK and 16-bit images become RGB; transparency is ignored; the orientation
            that EXIF states is applied.
        size: Side ``S``.
        boxes: Makes boxes (top, left, height, width) for an upright image of a height and width. None is the centre,
            for evaluation; see `Decoding`.
        content: The file's bytes if they have been read already; the path is then used in messages only.
        decoding: Channels, range and banner.

    Returns:
        uint8, ``(V, C, S, S)``.

    Raises:
        UnreadableError: The file cannot be read as an image.
        UnknownRangeError: The values of black and white are unknown.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            deep = image.format in ("PNG", "TIFF", "SGI") and ";16" in repr(image.tile[:1])
            decoding = replace(decoding, value_range=_as_loaded(image, decoding.value_range))
            swap, *flips = _orientation(image)
            width, height = image.width, image.height - decoding.banner
            if height < 1:
                raise ValueError(f"it has {image.height} rows, {decoding.banner} of which are a banner")
            upright = (width, height) if swap else (height, width)
            shorter = math.floor(size / _share(decoding.centre, upright, size))
            wanted = [_stored(box, upright, swap, *flips) for box in (boxes(*upright) if boxes else [])]
            image.draft(None, _needed(image, wanted, size) if boxes else (_DECODED_SIDE * shorter,) * 2)
            pixels = _eight_bits(image, decoding, deep)
    except UnknownRangeError as error:
        raise UnknownRangeError(f"cannot use {path}: {error}") from error
    except _DAMAGE as error:
        raise UnreadableError(f"cannot read {path} as an image: {_reason(error)}") from error
    if decoding.banner:
        rows = pixels.height * height // (height + decoding.banner)
        pixels = pixels.crop((0, 0, pixels.width, rows))
    if boxes is None:
        if swap:  # before resizing, which rounds to 8 bits between the columns and the rows
            pixels, swap = pixels.transpose(Image.Transpose.TRANSPOSE), False
        squares = [_middle(pixels, shorter, size, *flips)]
    else:
        x, y = pixels.width / width, pixels.height / height
        corners = [(left * x, top * y, (left + w) * x, (top + h) * y) for top, left, h, w in wanted]
        squares = [pixels.resize((size, size), Image.Resampling.BILINEAR, box=corner) for corner in corners]
    views = np.empty((len(squares), decoding.channels, size, size), np.uint8)
    for view, square in zip(views, squares, strict=True):
        view[:] = _turned(np.atleast_3d(np.asarray(square)), swap, *flips).transpose(2, 0, 1)
    return torch.from_numpy(views)


def _reason(error: Exception) -> str:
    """Why Pillow cannot read an image, and what to do."""
    if not isinstance(error, Image.DecompressionBombError):
        return f"{error}; repair or remove the file; skip_broken=true of ImageFolder leaves out all such files"
    most = Image.MAX_IMAGE_PIXELS or 0  # Pillow warns above it, and refuses above twice as many
    return (
        f"it states more pixels than Pillow's limit of {2 * most:,} allows; if the file is intact, make it smaller, or "
        f"raise PIL.Image.MAX_IMAGE_PIXELS, which is half of the limit ({most:,})"
    )


def _share(centre: float | None, upright: tuple[int, int], size: int) -> float:
    """The share of the shorter side that evaluation uses."""
    if centre is not None:
        return centre
    return 1.0 if upright == (size, size) else CENTRE


def _needed(image: Image.Image, boxes: Sequence[Box], size: int) -> tuple[int, int]:
    """Width and height of a decoded image whose boxes all have the sides that are needed."""
    across, down = (_DECODED_SIDE * size / min(box[side] for box in boxes) for side in (3, 2))
    return round(image.width * across), round(image.height * down)


def _middle(pixels: Image.Image, shorter: int, size: int, upside_down: bool, mirror: bool) -> Image.Image:
    """The middle square of an image whose shorter side is resized first; rounded as torchvision and timm do.

    Where the image is to be flipped, the middle is that of the flipped image.
    """
    short = min(pixels.size)
    width, height = (int(shorter * side / short) for side in pixels.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    left, top = width - size - left if mirror else left, height - size - top if upside_down else top
    if max(width, height) > _LONGEST * size:  # of which all but the middle would take gigabytes
        x, y = pixels.width / width, pixels.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return pixels.resize((size, size), Image.Resampling.BILINEAR, box=box)
    whole = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return whole.crop((left, top, left + size, top + size))


def centre_seen(files: Sequence[str | BinaryIO], size: int) -> float:
    """Share of these files' shorter side that evaluation uses: 1 if they have the size already."""
    try:
        sizes = set(map(_size, files))
    except _DAMAGE:  # reported when the file is decoded
        return CENTRE
    return 1.0 if sizes == {(size, size)} else CENTRE


def _size(file: str | BinaryIO) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def _orientation(image: Image.Image) -> tuple[bool, bool, bool]:
    """The operations that make stored pixels upright; loads the image, except a JPEG, which may be decoded smaller."""
    if image.format not in ("JPEG", "MPO"):
        image.load()  # some formats have their EXIF at the end, and Pillow turns TIFF files itself
    try:
        return _ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1), _UPRIGHT)
    except _DAMAGE:  # only the EXIF data are damaged; the picture may be intact
        return _UPRIGHT


def _stored(box: Box, upright: tuple[int, int], swap: bool, upside_down: bool, mirror: bool) -> Box:
    """A box of the upright image as a box of the stored one."""
    top, left, height, width = box
    if upside_down:
        top = upright[0] - top - height
    if mirror:
        left = upright[1] - left - width
    return [left, top, width, height] if swap else [top, left, height, width]


def _turned(square: np.ndarray, swap: bool, upside_down: bool, mirror: bool) -> np.ndarray:
    """Stored pixels ``(S, S, C)`` upright."""
    if swap:
        square = square.swapaxes(0, 1)
    return square[:: -1 if upside_down else 1, :: -1 if mirror else 1]


def _eight_bits(image: Image.Image, decoding: Decoding, deep: bool) -> Image.Image:
    """RGB or grey of eight bits per channel; ``deep`` files have 16 bits per channel."""
    if image.mode == "RGB" and not deep:  # convert() would copy it
        image.load()
        pixels = image
    elif image.mode.startswith(("I", "F")):
        pixels = _scaled(image, decoding.value_range).convert("RGB")
    else:
        pixels = (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
        if deep:
            _check_upper_bits(pixels, decoding.value_range)
    return pixels if decoding.channels == 3 else pixels.convert("L")


def _scaled(image: Image.Image, value_range: tuple[float, float] | None) -> Image.Image:
    low, high = value_range or _stated_range(image)
    values = np.asarray(image, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are not finite numbers")
    if _white_is_zero(image):
        low, high = high, low
    return Image.fromarray(np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255).astype(np.uint8))


def _as_loaded(image: Image.Image, value_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """The values of black and white in what Pillow will load of a file that is open, or None if they are not known.

    It stretches those of a PGM to 16 bits by the largest that the file states, unless that is 65535.
    """
    tiles: Any = getattr(image, "tile", [])
    codec, _, _, arguments = tiles[0] if tiles else ("", None, None, None)
    largest = arguments[1] if isinstance(arguments, tuple) and codec in ("ppm", "ppm_plain") else _ALL
    if largest == _ALL:
        return value_range
    low, high = value_range or (0, largest)
    return low * _ALL / largest, high * _ALL / largest


def _stated_range(image: Image.Image) -> tuple[float, float]:
    """The values of black and white that the file states.

    PNG's sBIT chunk is ignored: it holds the bits of the camera, while by the specification (11.3.2.7) samples are
    always scaled to all bits of the file.
    """
    tags = getattr(image, "tag_v2", {})
    if _S_MIN in tags and _S_MAX in tags:
        low, high = float(np.min(tags[_S_MIN])), float(np.max(tags[_S_MAX]))
        if low < high:
            return low, high
    bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 16)))
    if image.mode.startswith("I;16") and bits < 16:
        return 0.0, 2.0**bits - 1
    known = image.mode.startswith("I;16") or image.format in ("PNG", "PPM", "JPEG2000")  # mode I in some versions
    if not known:
        kind = "floating-point numbers" if image.mode == "F" else "integers"
        raise UnknownRangeError(
            f"its pixels are {kind} without a known range; give the values that are black and white as value_range"
        )
    brightest = int(np.asarray(image).max())
    if 0 < brightest < _DARK:
        raise UnknownRangeError(
            f"its 16-bit pixels end at {brightest}, which would be nearly black; give the values that are black and "
            "white as value_range: [0, 4095] where 12 bits are used, [0, 65535] where the picture is as dark as that"
        )
    return 0.0, _ALL


def _white_is_zero(image: Image.Image) -> bool:
    """Whether 0 is white in a TIFF, which Pillow handles for eight bits only."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def _check_upper_bits(pixels: Image.Image, value_range: tuple[float, float] | None) -> None:
    """Refuse colours whose upper eight bits, which Pillow keeps of 16 per channel, do not cover their range."""
    brightest = int(np.asarray(pixels).max())
    if value_range is None and (brightest == 0 or brightest >= _DARK // 256):
        return
    if value_range is None or tuple(value_range) != (0, 65535):
        raise UnknownRangeError(
            f"its colours have 16 bits a channel, of which only the upper 8 are read and end at {brightest}; "
            "value_range can be [0, 65535] for them; store other ranges as 8 bits a channel"
        )
