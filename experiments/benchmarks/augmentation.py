"""Speed of the datamodules' augmentation against torchvision's transforms of one PIL image at a time.

torchvision's pipeline is what lightly and solo-learn put around each image. Both sides get the same images and batches,
make the same recipe and normalised float tensors, in turn; the ratio is taken pair by pair. Without workers that is one
process on one thread, and seconds are those that it had the processor; with workers they are the clock's. The images
are patches of the photographs that come with scikit-learn. Memory is what a fresh process grows by when it sets up a
CIFAR-10 of 60,000 images of noise and goes through the training images once.

    python experiments/benchmarks/augmentation.py [--repeats 5] [--out experiments/results/augmentation.md]
"""

import os
import pickle
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torchvision
from common import in_a_new_process, median_and_range, options_of, seconds, written
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as pil

from ncfinetune.datamodules import CIFAR10, ImageDataModule, ImageFolder, IndexedImages
from ncfinetune.datamodules.images import Labelled

SMALL, SMALL_COUNT = 32, 4096
LARGE, LARGE_COUNT = 224, 192
PHOTOGRAPH = (500, 375)  # the usual size of an image of ImageNet
BATCH = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = [
    pil.RandomApply([pil.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    pil.RandomGrayscale(p=0.2),
]  # SimCLR's at strength 0.5, which is its choice for small images


class Case(NamedTuple):
    name: str
    images: int
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    workers: int = 0


def patches(count: int, width: int, height: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        top = rng.integers(photograph.shape[0] - height + 1)
        left = rng.integers(photograph.shape[1] - width + 1)
        yield np.ascontiguousarray(photograph[top : top + height, left : left + width])


class Patches(IndexedImages):
    """Patches of photographs in memory."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, (3, SMALL, SMALL), MEAN, STD, batch_size=BATCH, val_fraction=0, **kwargs)

    def parts(self) -> dict[str, Labelled]:
        images = torch.from_numpy(np.stack(list(patches(SMALL_COUNT, SMALL, SMALL)))).permute(0, 3, 1, 2).contiguous()
        return {"train": Labelled.all(images, np.arange(SMALL_COUNT) % 2)}


class PILViews(Dataset[Any]):
    """What the peers do: an array, a PIL image of each row, a chain of transforms for each view."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], views: int) -> None:
        self.arrays = list(patches(SMALL_COUNT, SMALL, SMALL))
        self.transform = transform
        self.views = views

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Any:
        image = Image.fromarray(self.arrays[index])
        return [self.transform(image) for _ in range(self.views)], index % 2


def pipeline(size: int, *changes: Any) -> Any:
    finish = [pil.ToTensor(), pil.Normalize(MEAN, STD)]
    return pil.Compose([pil.RandomResizedCrop(size), pil.RandomHorizontalFlip(), *changes, *finish])


def training(data: ImageDataModule) -> ImageDataModule:
    """The datamodule in the state that a Trainer brings it to."""
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer.training = True
    data.setup("fit")
    return data


def through(data: ImageDataModule, loader: Any = None) -> None:
    for batch in loader or data.train_dataloader():
        data.on_after_batch_transfer(batch, 0)


def drain(loader: Any) -> None:
    for _ in loader:
        pass


def small_cases() -> Iterator[Case]:
    one = training(Patches(augmentation="simclr", strength=0.5))
    held = list(one.train_dataloader())
    chain = pipeline(SMALL, *COLOUR)
    pictures = [Image.fromarray(array) for array in patches(SMALL_COUNT, SMALL, SMALL)]
    yield Case(
        "SimCLR views of 32x32, from images that are ready",
        SMALL_COUNT,
        lambda: through(one, held),
        lambda: [chain(picture) for picture in pictures],
    )
    two = training(Patches(augmentation="simclr", strength=0.5, views=2))
    loader = DataLoader(PILViews(chain, 2), BATCH, shuffle=True)
    yield Case("two such views, loader to batch", SMALL_COUNT, lambda: through(two), lambda: drain(loader))
    standard = training(Patches(augmentation="standard"))
    cropped = DataLoader(PILViews(pipeline(SMALL), 1), BATCH, shuffle=True)
    yield Case(
        "crop and flip of 32x32, loader to batch", SMALL_COUNT, lambda: through(standard), lambda: drain(cropped)
    )
    trivial = training(Patches(augmentation="trivial"))
    chosen = DataLoader(PILViews(pipeline(SMALL, pil.TrivialAugmentWide()), 1), BATCH, shuffle=True)
    yield Case("the same with TrivialAugment", SMALL_COUNT, lambda: through(trivial), lambda: drain(chosen))


def write_photographs(root: Path, count: int, width: int, height: int) -> None:
    for i, array in enumerate(patches(count, *PHOTOGRAPH)):
        folder = root / "train" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).resize((width, height)).save(folder / f"{i}.jpg", quality=90)


def file_case(root: Path, count: int, kind: str, workers: int) -> Case:
    files = training(ImageFolder(str(root), num_workers=workers, batch_size=32, val_fraction=0))
    mine = files.train_dataloader()
    images = torchvision.datasets.ImageFolder(str(root / "train"), pipeline(LARGE))
    theirs = DataLoader(images, 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    name = f"crop and flip to 224x224 of JPEG files {kind}, {workers} workers"
    return Case(name, count, lambda: through(files, mine), lambda: drain(theirs), workers)


def large_cases(root: Path) -> Iterator[Case]:
    width, height = PHOTOGRAPH
    write_photographs(root / "usual", LARGE_COUNT, width, height)
    for workers in (0, 2):
        yield file_case(root / "usual", LARGE_COUNT, f"{width}x{height}", workers)
    write_photographs(root / "large", 32, 4 * width, 4 * height)
    yield file_case(root / "large", 32, f"{4 * width}x{4 * height}", 0)
    options: dict[str, Any] = {"num_workers": 0, "batch_size": 32, "val_fraction": 0}
    views = training(ImageFolder(str(root / "usual"), augmentation="simclr", strength=0.5, views=2, **options))
    blur = pil.RandomApply([pil.GaussianBlur(23, (0.1, 2.0))], p=0.5)
    chain = pipeline(LARGE, *COLOUR, blur)
    pairs = torchvision.datasets.ImageFolder(str(root / "usual" / "train"), lambda x: [chain(x), chain(x)])
    theirs = DataLoader(pairs, 32, shuffle=True)
    name = "two SimCLR views with blur, 224x224, 0 workers"
    yield Case(name, LARGE_COUNT, lambda: through(views), lambda: drain(theirs))


def measure(case: Case, repeats: int) -> str:
    case.ours(), case.theirs()
    clock = time.process_time if case.workers == 0 else time.perf_counter
    pairs = [(seconds(case.ours, clock), seconds(case.theirs, clock)) for _ in range(repeats)]
    ratios = [theirs / ours for ours, theirs in pairs]
    mine, others = (case.images / statistics.median(times) for times in zip(*pairs, strict=True))
    return f"| {case.name} | {mine:,.0f} | {others:,.0f} | {median_and_range(ratios, 1)} |"


def _write_cifar(root: Path) -> None:
    base = root / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {
            "data": rng.integers(0, 256, (10_000, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(10_000)],
        }
        (base / name).write_bytes(pickle.dumps(entry))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _grown(root: str) -> float:
    torchvision.datasets.cifar.check_integrity = lambda path, md5=None: True  # noise has another checksum
    data = CIFAR10(root, batch_size=BATCH, augmentation="plain")
    before = _resident()
    training(data)
    drain(data.train_dataloader())
    return _resident() - before


def memory() -> str:
    with tempfile.TemporaryDirectory() as root:
        _write_cifar(Path(root))
        grown = in_a_new_process(_grown, root)
    images = 60_000 * 3 * 32 * 32 / 2**20
    return f"CIFAR-10 in memory: {grown:.0f} MiB, of which the uint8 images are {images:.0f}."


def main() -> None:
    options = options_of(__doc__, "augmentation.md").parse_args()
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    with written(options.out) as say, tempfile.TemporaryDirectory() as root:
        say(f"`python experiments/benchmarks/augmentation.py --repeats {options.repeats}`: torch {torch.__version__},")
        say(f"torchvision {torchvision.__version__}, {platform.machine()}. Medians (least to most) of the pairs.\n")
        say("| training images | ours, images/s | torchvision and PIL, images/s | ratio |")
        say("|---|---|---|---|")
        for case in small_cases():
            say(measure(case, options.repeats))
        for case in large_cases(Path(root)):
            say(measure(case, options.repeats))
        say("")
        say(memory())


if __name__ == "__main__":
    main()
