"""Datamodules: labelled images in splits that can be trusted."""

from .base import ImageDataModule as ImageDataModule
from .digits import Digits as Digits

__all__ = ["Digits", "ImageDataModule"]
