"""Image files of a folder, as a data module's evaluation would see them.

Legend: ``C`` channels, ``S`` side of an image in a batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Of the shorter side this share is seen, about the centre, as in the usual 224 of 256 pixels.
_CENTRE = 0.875


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """The images below a folder by path, each ``(C, S, S)`` of uint8, with the label 0.

    The middle 7/8 of the shorter side are seen, or all of an image that has the size already.

    Args:
        folder: Where they lie, however deep.
        channels: 1 for grey images, 3 for colour.
        size: Side ``S``.

    Raises:
        FileNotFoundError: No such folder, or no images in it.
    """

    def __init__(self, folder: str | Path, channels: int, size: int) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}; expected one with images")
        self.paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not self.paths:
            raise FileNotFoundError(f"no images in {str(folder)!r}; expected files {', '.join(_SUFFIXES)}")
        self.mode = "L" if channels == 1 else "RGB"
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image.

        Raises:
            ValueError: It cannot be read.
        """
        try:
            with Image.open(self.paths[index]) as image:
                box = _centre(image.width, image.height, self.size)
                small = image.convert(self.mode).resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        except OSError as error:
            raise ValueError(f"cannot read {self.paths[index]} as an image: {error}; mend or remove it") from error
        pixels = np.array(small)
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()), 0


def _centre(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of what is seen."""
    if (width, height) == (size, size):
        return 0, 0, width, height
    half = _CENTRE * min(width, height) / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half
