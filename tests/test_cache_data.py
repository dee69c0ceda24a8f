"""The cache on data sets of others: it knows them by their labels and images, however they are batched."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write_image
from lightning.pytorch import LightningDataModule
from tiny import SMALL, plain_sgd, trainer_in
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Grayscale, ToTensor

from ncfinetune import FineTuner
from ncfinetune.cache import data_key
from ncfinetune.predicting import PredictionRows
from ncfinetune.samples import known_labels

_PIXELS = Compose([Grayscale(), ToTensor()])
_CLASSES, _EACH = 12, 2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images of each of twelve classes, of which a look at eight images leaves out four at least."""
    for label in range(_CLASSES):
        for number in range(_EACH):
            write_image(tmp_path / "images" / f"{label:02d}" / f"{number}.png", label * _EACH + number, (8, 8))
    return tmp_path / "images"


class Data(LightningDataModule):
    """Training images of ``make``; ``options`` are those of the loader without augmentation, and of validation."""

    def __init__(self, make: Callable[[], Any], **options: Any) -> None:
        super().__init__()
        self.make, self.options = make, options or {"batch_size": 8}

    def train_dataloader(self) -> Any:
        return DataLoader(self.make(), batch_size=8, shuffle=True)

    def train_plain_dataloader(self) -> Any:
        return DataLoader(self.make(), **self.options)

    def val_dataloader(self) -> Any:
        return DataLoader(self.make(), **self.options)


class Watched(FineTuner):
    """Keeps the labels that it is trained on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), *batch[1].tolist()]
        return super().training_step(batch, batch_idx)


def _fit(
    folder: Path, make: Callable[[], Any], options: dict[str, Any] | None = None, cache: Any = "disk", **knobs: Any
) -> Watched:
    torch.manual_seed(0)
    where: dict[str, Any] = {"cache_dir": str(folder / "cache")} if cache == "disk" else {}
    model = Watched(_CLASSES, SMALL, optimizer=plain_sgd, allow_random=True, cache=cache, **where, **knobs)
    trainer_in(folder).fit(model, Data(make, **options or {}))
    return model


class _Merging(ImageFolder):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image, merged(label)


class _MergingSubset(Subset):
    def __getitems__(self, indices: list[int]) -> Any:
        return [(image, merged(label)) for image, label in super().__getitems__(indices)]


def merged(label: int) -> int:
    """Class 5, which is in none of the eight images that are looked at, becomes class 4."""
    return 4 if label == 5 else label


def _merged_batch(samples: list[Any]) -> Any:
    images, labels = default_collate(samples)
    return images, torch.where(labels == 5, 4, labels)


def test_files_whose_names_are_no_utf_8_are_stored(root: Path, tmp_path: Path) -> None:
    (root / "00" / "0.png").rename(root / "00" / os.fsdecode(b"caf\xe9.png"))
    assert len(_fit(tmp_path, lambda: ImageFolder(root, _PIXELS)).seen) == _CLASSES * _EACH


@pytest.mark.parametrize("kind", ["target_transform", "class", "subset", "subset of transformed"])
def test_labels_that_were_changed_since_are_those_of_the_run(kind: str, root: Path, tmp_path: Path) -> None:
    every = range(_CLASSES * _EACH)
    changed: dict[str, Callable[[], Any]] = {
        "target_transform": lambda: ImageFolder(root, _PIXELS, target_transform=merged),
        "class": lambda: _Merging(root, _PIXELS),
        "subset": lambda: _MergingSubset(ImageFolder(root, _PIXELS), every),
        "subset of transformed": lambda: Subset(ImageFolder(root, _PIXELS, target_transform=merged), every),
    }
    as_they_are = {"subset": lambda: Subset(ImageFolder(root, _PIXELS), every)}
    as_they_are |= {"subset of transformed": as_they_are["subset"]}
    first = _fit(tmp_path, as_they_are.get(kind, lambda: ImageFolder(root, _PIXELS)))
    assert sorted(first.seen) == sorted([*range(_CLASSES)] * _EACH)
    assert sorted(_fit(tmp_path, changed[kind]).seen) == sorted(map(merged, [*range(_CLASSES)] * _EACH))


def test_labels_are_unknown_where_another_class_changes_them(root: Path) -> None:
    folder, every = ImageFolder(root, _PIXELS), range(_CLASSES * _EACH)
    assert known_labels(Subset(folder, every)).tolist() == sorted([*range(_CLASSES)] * _EACH)
    assert known_labels(_Merging(root, _PIXELS)) is None
    assert known_labels(_MergingSubset(folder, every)) is None


def test_balanced_weights_count_the_labels_of_the_run(root: Path, tmp_path: Path) -> None:
    model = _fit(
        tmp_path, lambda: ImageFolder(root, _PIXELS, target_transform=merged), cache="none", class_weight="balanced"
    )
    assert model.class_weights is not None
    shares = torch.tensor([*map(merged, [*range(_CLASSES)] * _EACH)]).bincount(minlength=_CLASSES)
    expected = torch.where(shares > 0, shares.sum() / ((shares > 0).sum() * shares), 0.0)
    torch.testing.assert_close(model.class_weights, expected)


def test_labels_that_a_collation_changes_are_read(root: Path, tmp_path: Path) -> None:
    trainer, images = trainer_in(tmp_path), ImageFolder(root, _PIXELS)
    trainer.strategy.connect(FineTuner(_CLASSES, SMALL))
    loaders = [DataLoader(images, 8, collate_fn=collate) for collate in (default_collate, _merged_batch)]
    assert len({data_key(trainer, loader) for loader in loaders}) == 2


class _Relative(Dataset):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.samples: Any = [(f"{label:02d}/{n}.png", label) for label in range(_CLASSES) for n in range(_EACH)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return torch.full((1, 8, 8), int(path[:2]) / _CLASSES), label


class _Pixels(_Relative):
    def __init__(self, root: Path) -> None:
        self.samples = torch.rand(_CLASSES * _EACH, 1, 8, 8)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index], index % _CLASSES


class _Records(_Relative):
    def __init__(self, root: Path) -> None:
        self.samples = [{"image": torch.rand(1, 8, 8), "label": i % _CLASSES} for i in range(_CLASSES * _EACH)]

    def __getitem__(self, index: int) -> Any:
        return tuple(self.samples[index].values())


@pytest.mark.parametrize("kind", [_Relative, _Pixels, _Records])
def test_samples_may_be_anything(kind: type[_Relative], root: Path, tmp_path: Path) -> None:
    data = kind(root)
    stored, plain = (_fit(tmp_path, lambda: data, cache=place) for place in ("disk", "none"))
    assert sorted(stored.seen) == sorted(plain.seen) == sorted([*range(_CLASSES)] * _EACH)


@pytest.mark.parametrize(("kind", "key"), [(_Relative, "file"), (_Pixels, "index"), (_Records, "index")])
def test_predictions_of_samples_have_the_name_of_a_file_or_the_number(
    kind: type[_Relative], key: str, root: Path, tmp_path: Path
) -> None:
    rows = PredictionRows(tmp_path / "rows.csv", None, None, None, evaluates=False)
    loader = DataLoader(kind(root), 8)
    trainer_in(tmp_path, callbacks=[rows]).predict(FineTuner(_CLASSES, SMALL), loader, return_predictions=False)
    assert rows.table is not None
    rows.table.finish()
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0].startswith(f"{key},")
    assert lines[1].startswith({"file": "00/0.png,", "index": "0,"}[key])


@pytest.mark.parametrize("knobs", [{"cache": "memory"}, {"cache": "disk"}, {"cache": "none", "head_init": "ridge"}])
def test_batches_of_a_batch_sampler_are_the_same_images(knobs: dict[str, Any], root: Path, tmp_path: Path) -> None:
    def make() -> ImageFolder:
        return ImageFolder(root, _PIXELS)

    sampled = {"batch_sampler": BatchSampler(SequentialSampler(make()), 8, False)}
    theirs, ours = (_fit(tmp_path / str(n), make, options, **knobs) for n, options in enumerate([sampled, None]))
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
