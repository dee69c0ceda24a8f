"""A pass takes neither batches nor random numbers from the training, whatever loader that has."""

import contextlib
import copy
import itertools
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from timm.data.loader import MultiEpochsDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, SubsetRandomSampler, TensorDataset, get_worker_info

from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe
from ncfinetune.copies import CopyError, copy_of
from ncfinetune.loaders import drawn_by, evenly, in_order

K, N, BATCH = 3, 24, 4
LABELS = torch.arange(N) % K
IMAGES = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + LABELS.view(-1, 1, 1, 1)
IMAGE_SET = TensorDataset(IMAGES, LABELS)
WORKERS: dict[str, Any] = {"num_workers": 1, "persistent_workers": True}


class Module(LightningModule):
    """Somebody else's module, whose dropout shows whether random numbers were taken."""

    def __init__(self) -> None:
        super().__init__()
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3))
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *pooled, nn.Linear(4, K))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Own:
    """Shuffles its order in place, by a generator of its own; gives batches or, without images, their rows."""

    def __init__(self, images: bool = True) -> None:
        self.images, self.order, self.generator = images, np.arange(N), np.random.default_rng(0)

    def __iter__(self) -> Iterator[Any]:
        self.generator.shuffle(self.order)
        for rows in self.order.reshape(-1, BATCH):
            yield (IMAGES[rows], LABELS[rows]) if self.images else rows.tolist()

    def __len__(self) -> int:
        return N // BATCH


class Counting(IterableDataset):
    """A stream in an order by its own count of epochs."""

    epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        return ((IMAGES[row], LABELS[row]) for row in order)


class Data(LightningDataModule):
    """Has these loaders, and the same again whenever it is asked."""

    def __init__(self, train: Any, plain: Any = None, val: Any = None) -> None:
        super().__init__()
        self.train, self.plain, self.val = train, plain, val

    def train_dataloader(self) -> Any:
        return self.train

    def train_plain_dataloader(self) -> Any:
        return self.train if self.plain is None else self.plain

    def val_dataloader(self) -> Any:
        return DataLoader(IMAGE_SET, BATCH) if self.val is None else self.val


def _web(**options: Any) -> Any:
    shuffled = webdataset.shuffle(10, rng=random.Random(0))
    return webdataset.WebLoader(webdataset.DataPipeline(Counting(), shuffled), batch_size=BATCH, **options)


def _shuffled(**options: Any) -> Any:
    return DataLoader(IMAGE_SET, BATCH, shuffle=True, **options)


class Shifting(DataLoader):
    """Changes its batches in its own way of iterating, with noise from a generator of its own."""

    def __init__(self, *args: Any, noise: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.noise, self.own = noise, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Any]:
        for images, labels in super().__iter__():
            yield images.square() + self.noise * torch.rand(images.shape, generator=self.own), labels


class Repeating(DataLoader):
    """Keeps its workers by an iterator that never ends."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        object.__setattr__(self, "batch_sampler", Again(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.batches)

    def __iter__(self) -> Iterator[Any]:
        return (next(self.iterator) for _ in range(len(self)))


class Again:
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.batches


def _val_is_plain() -> Data:
    plain = DataLoader(IMAGE_SET, BATCH, **WORKERS)
    return Data(_shuffled(), plain, plain)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": _shuffled,
    "workers": lambda: _shuffled(**WORKERS),
    "web": _web,
    "web with workers": lambda: _web(**WORKERS),
    "web of fewer batches": lambda: _web(**WORKERS).with_epoch(4),
    "own loader": Own,
    "own sampler": lambda: DataLoader(IMAGE_SET, BATCH, sampler=SubsetRandomSampler(range(N), torch.Generator())),
    "own batch sampler": lambda: DataLoader(IMAGE_SET, batch_sampler=Own(images=False)),
    "own iteration": lambda: Shifting(IMAGE_SET, BATCH, shuffle=True, noise=0.5),
    "repeated": lambda: Repeating(IMAGE_SET, BATCH, shuffle=True),
    "timm": lambda: MultiEpochsDataLoader(IMAGE_SET, batch_size=BATCH, shuffle=True, **WORKERS),
    "stream": lambda: DataLoader(Counting(), BATCH),
    "stream with workers": lambda: DataLoader(Counting(), BATCH, **WORKERS),
    "plain": lambda: Data(_shuffled(), DataLoader(IMAGE_SET, BATCH)),
    "plain is training": lambda: Data(_shuffled(**WORKERS)),
    "plain is web training": lambda: Data(_web(**WORKERS)),
    "plain is own training": lambda: Data(Own()),
    "plain is validation": _val_is_plain,
}


def _fit(folder: Path, data: Any, *callbacks: Any) -> tuple[int, list[Tensor]]:
    """Steps and weights of a run, and nothing else that a run leaves."""
    seed_everything(0, verbose=False)
    module, quiet = Module(), {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    given = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False, **quiet}
    trainer = Trainer(default_root_dir=folder, callbacks=list(callbacks), **given)
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data, DataLoader(IMAGE_SET, BATCH))
    return trainer.global_step, list(module.state_dict().values())


# Loaders that another one here is a case of.
LIKE_ANOTHER = {
    "workers",
    "web",
    "web of fewer batches",
    "own batch sampler",
    "stream",
    "stream with workers",
    "plain is web training",
    "plain is own training",
    "timm",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in LIKE_ANOTHER else kind for kind in LOADERS]
)
@pytest.mark.filterwarnings("ignore:.*IterableDataset.*has.*__len__")
def test_weights_are_those_without_the_tracker(kind: str, tmp_path: Path) -> None:
    make, tracker = LOADERS[kind], NeuralCollapseTracker(K)
    steps, expected = _fit(tmp_path, make())
    tracked, weights = _fit(tmp_path, make(), tracker)
    assert tracked == steps
    assert all(torch.equal(a, b) for a, b in zip(expected, weights, strict=True))
    assert np.isfinite(tracker.values["nc1/train/penultimate"])
    assert list(tracker.history["train"]) == [0, 1, 2]


@pytest.mark.parametrize("plain", [True, False])
def test_images_are_those_of_the_loaders_own_iteration(plain: bool, tmp_path: Path) -> None:
    seen: set[bytes] = set()
    loader = Shifting(IMAGE_SET, BATCH, shuffle=not plain)
    tracker = NeuralCollapseTracker(K, batch_to_labels=lambda batch: seen.update(map(_key, batch[0])) or batch[1])
    _fit(tmp_path, Data(_shuffled(), loader) if plain else loader, tracker)
    assert all(_key(image) in seen for image in IMAGES.square())


def test_loaders_with_what_cannot_be_copied_keep_their_own_iteration() -> None:
    loader = Shifting(IMAGE_SET, BATCH)
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        for part in (threading.Lock(), threading.RLock(), database):
            loader.part = {"within": [part]}
            for made in (evenly(loader, N), in_order(loader)):
                assert torch.equal(torch.cat([images for images, _ in made]), IMAGES.square())
                assert type(made.part["within"][0]) is type(part)
                assert made.own is not loader.own
    loader.part = iter([0 for _ in range(3)]), (index for index in range(3))
    with pytest.raises(CopyError, match="a dict cannot be copied \\(cannot pickle 'generator' object\\)"):
        in_order(loader)


def test_a_copy_has_locks_of_its_own() -> None:
    lock, within = threading.Lock(), threading.Condition(threading.Lock())
    with lock, within:
        for copied in copy_of([lock, within]):
            assert copied.acquire(blocking=False)
    assert lock.acquire(blocking=False)


@pytest.mark.parametrize("numbers", [random.Random(0), np.random.default_rng(0)], ids=["random", "numpy"])
def test_a_copy_draws_by_methods_of_its_own_generator(numbers: Any) -> None:
    expected = [numbers.random() for numbers in [copy.deepcopy(numbers)] for _ in range(4)]
    copied = copy_of({"draw": numbers.random})["draw"]
    assert [copied() for _ in range(4)] == expected
    assert [numbers.random() for _ in range(4)] == expected


class Rows(IterableDataset):
    """The numbers of the samples, of which `share` leaves a worker its part."""

    start, step = 0, 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, N, self.step))


def share(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.start, info.dataset.step = worker, info.num_workers


def test_a_stream_that_workers_are_told_to_divide_gives_each_sample_once() -> None:
    made = in_order(DataLoader(Rows(), BATCH, num_workers=2, worker_init_fn=share))
    assert sorted(torch.cat(list(made)).tolist()) == list(range(N))


class Endless(Sampler):
    """Draws an order from the global generator as soon as it is asked for an iterator, and repeats it."""

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(torch.randperm(N).tolist())


class Counted(Endless):
    def __len__(self) -> int:
        return N


@pytest.mark.parametrize("sampler", [Endless(), Counted()], ids=["endless", "counted"])
def test_asking_what_a_sampler_draws_takes_no_random_numbers(sampler: Sampler) -> None:
    before = torch.get_rng_state()
    assert drawn_by(DataLoader(IMAGE_SET, BATCH, sampler=sampler)) == list(range(N))
    assert torch.equal(torch.get_rng_state(), before)


def _key(image: Tensor) -> bytes:
    return image.numpy().tobytes()


@pytest.mark.slow
def test_weights_are_those_without_the_probe(tmp_path: Path) -> None:
    _, expected = _fit(tmp_path, _web(**WORKERS))
    _, weights = _fit(tmp_path, _web(**WORKERS), OnlineProbe(num_classes=K, layer="model.4", knn=5))
    assert all(torch.equal(a, b) for a, b in zip(expected, weights, strict=True))


def test_a_loader_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    batches = ((IMAGES[rows], LABELS[rows]) for rows in np.arange(N).reshape(-1, BATCH))
    message = (
        r"NeuralCollapseTracker needs its own training loader, .* a generator cannot be copied \(cannot pickle "
        r"'generator' object\); give the datamodule a train_plain_dataloader\(\) that returns a new loader, or "
        r"NeuralCollapseTracker\(train_every_n_epochs=0\)"
    )
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path, batches, NeuralCollapseTracker(K))


def test_a_copy_shares_images_and_code_and_nothing_that_changes() -> None:
    class Loader:
        def __init__(self) -> None:
            self.order, self.images, self.count, self.see = torch.arange(3), torch.zeros(3, 2), [0], lambda: self
            self.network, self.set = nn.Linear(1, 1), {"a": 1}

    loader = Loader()
    copied = copy_of(loader, loader.set)
    assert copied.images is loader.images
    assert copied.network is loader.network
    assert copied.see is loader.see
    assert copied.set is loader.set
    copied.order += 1
    copied.count.append(1)
    assert loader.order.tolist() == [0, 1, 2]
    assert loader.count == [0]
    loader.set = (row for row in range(3))
    with pytest.raises(CopyError, match="a Loader cannot be copied"):
        copy_of(loader)
