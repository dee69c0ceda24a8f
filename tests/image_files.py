"""Small image files for tests, each with a colour that tells which image it is."""

from pathlib import Path

import numpy as np
from PIL import Image


def colour(number: int) -> tuple[int, int, int]:
    """A colour for each number below 216, 45 levels from the next."""
    return (20 + number % 6 * 45, 20 + number // 6 % 6 * 45, 20 + number // 36 * 45)


def write_image(path: Path, number: int, size: tuple[int, int] = (20, 16), banner: int = 0) -> None:
    """An image ``(width, height)`` of one colour, and below it a white banner of some rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (size[0], size[1] + banner), "white")
    image.paste(colour(number), (0, 0, *size))
    image.save(path, quality=95)


def number_of(image: np.ndarray) -> int:
    """Which number an image ``(3, H, W)`` of one colour was written with."""
    red, green, blue = np.round((image.mean((1, 2)) - 20) / 45).astype(int).tolist()
    return red + 6 * green + 36 * blue
