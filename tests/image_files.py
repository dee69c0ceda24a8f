"""Small image files for tests, each with a colour that tells which image it is."""

from pathlib import Path

import numpy as np
from PIL import Image


def colour(number: int) -> tuple[int, int, int]:
    """A colour for each number below 216, 45 levels from the next."""
    return (20 + number % 6 * 45, 20 + number // 6 % 6 * 45, 20 + number // 36 * 45)


def write_image(path: Path, number: int, size: tuple[int, int] = (20, 16)) -> None:
    """An image ``(width, height)`` of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(number)).save(path, quality=95)


def number_of(image: np.ndarray) -> int:
    """Which number an image ``(3, H, W)`` of one colour was written with."""
    red, green, blue = np.round((image.mean((1, 2)) - 20) / 45).astype(int).tolist()
    return red + 6 * green + 36 * blue
