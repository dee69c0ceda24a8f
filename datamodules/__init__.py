"""Datamodules: labelled images in fixed, disjoint splits."""

if __name__ != "ncfinetune.datamodules":
    raise ImportError(
        "import this folder as ncfinetune.datamodules; another name would make a second copy of its classes"
    )

from .base import ImageDataModule as ImageDataModule
from .digits import Digits as Digits
from .files import ImageFolder as ImageFolder
from .indexed import IndexedImages as IndexedImages
from .recipes import Recipe as Recipe
from .shards import WebDataset as WebDataset
from .unlabelled import Unlabelled as Unlabelled
from .vision import CIFAR10 as CIFAR10
from .vision import CIFAR100 as CIFAR100
from .vision import DTD as DTD
from .vision import Aircraft as Aircraft
from .vision import Flowers102 as Flowers102
from .vision import Food101 as Food101
from .vision import Pets as Pets
from .vision import StanfordCars as StanfordCars

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DTD",
    "Aircraft",
    "Digits",
    "Flowers102",
    "Food101",
    "ImageDataModule",
    "ImageFolder",
    "IndexedImages",
    "Pets",
    "Recipe",
    "StanfordCars",
    "Unlabelled",
    "WebDataset",
]
