"""Images to predict with a trained model's preprocessing, without its data set.

Legend: ``C`` channels, ``S`` side of an image in a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from .base import ImageDataModule
from .images import Batch, Part


class Unlabelled(ImageDataModule):
    """Images without labels, with the preprocessing of a trained model; see `predict_files`.

    ``ncfinetune predict --ckpt_path CHECKPOINT --images FOLDER`` uses it automatically.

    Args:
        class_names: Names of the model's classes, in the order of its outputs.
        preprocessing: The ``preprocessing`` of the model's datamodule, which checkpoints keep.

    Raises:
        ValueError: ``preprocessing`` lacks an entry; or other images than those of `predict_files` are requested.
    """

    def __init__(self, class_names: list[str], preprocessing: dict[str, Any], **kwargs: Any) -> None:
        if missing := {"input_size", "stored_size", "mean", "std"} - preprocessing.keys():
            raise ValueError(f"expected the preprocessing of a datamodule; it lacks {', '.join(sorted(missing))}")
        channels, size = preprocessing["input_size"][:2]
        stored = preprocessing["stored_size"]
        kwargs = {**kwargs, "image_size": size, "augmentation": "plain"}
        super().__init__(
            len(class_names), (channels, stored, stored), preprocessing["mean"], preprocessing["std"], **kwargs
        )
        self.class_names = class_names
        self.decoding = replace(self.decoding, centre=preprocessing.get("crop_pct", 1.0))
        if value_range := preprocessing.get("value_range"):
            self.decoding = replace(self.decoding, value_range=tuple(value_range))

    def parts(self) -> dict[str, Part]:
        """Empty: there are no labelled images."""
        return {}

    def _loader(self, name: str, training: bool = False, as_stored: bool = False) -> DataLoader[Batch]:
        raise ValueError(f"Unlabelled has no {name} images, only those of predict_files")
