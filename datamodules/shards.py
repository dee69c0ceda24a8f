"""Images in tar shards, local or remote, read as streams: for data sets that do not fit on one machine.

Legend: ``N`` samples of a batch, ``V`` views, ``C`` channels, ``S`` side of a decoded image, ``K`` classes.
"""

from __future__ import annotations

import glob
import io
import json
import os
import random
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .base import ImageDataModule, free_cores
from .decoding import CENTRE, COLOUR, LOOKED_AT, Decoding, UnknownRangeError, UnreadableError, centre_seen, read_image
from .files import IMAGENET_MEAN, IMAGENET_STD
from .images import UNREADABLE, Batch, blank, crops, mixed_seed
from .listing import IMAGE_SUFFIXES
from .recipes import Recipe

_IMAGE_KEYS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_LABEL_KEY = "cls"


class WebDataset(ImageDataModule):
    """Your own images in tar shards, the layout of the library webdataset: ``KEY.jpg`` beside ``KEY.cls``.

    The image may be jpg, png, webp or any other format of `ImageFolder`; cls holds its label in digits, from 0 on.
    Images are decoded, cropped and augmented as in `ImageFolder`. The samples of all shards form one sequence, of which
    every worker of every process reads its own contiguous range: the number and the sizes of shards are arbitrary. Each
    sample is evaluated once. In training the shards are shuffled each epoch, and all processes get equally many samples
    and batches: up to world size - 1 samples of the epoch's last shard are dropped, and a last batch of a single sample
    per process. Batches depend on the seed and on the numbers of workers and processes: a resumed run has as many
    workers as the interrupted one, unless ``num_workers`` is given. Predictions are in the order of the shards, so that
    one worker decodes for them.

    Images and labels are not known before they are read: for few labels, other class proportions or a validation split
    taken from the training images, write shards of the images that you want, or use `ImageFolder`.

    A truncated shard is refused, even if it ends between two samples: if its samples are counted, by its missing end of
    archive, and if ``sizes`` are given, by their number when its end is read.

    Args:
        num_classes: Number of classes ``K``.
        train: The shards: paths or URLs that webdataset opens (``https://``, ``hf://``, ``pipe:``). ``{000..146}``
            expands to a range, and ``*`` in paths to the matching files.
        val: Shards for validation; None is no validation.
        test: Shards for testing; None is no test.
        sizes: Number of samples in each shard: a JSON file ``{"000.tar": 1000}``, an index of webdataset's widsindex or
            an _info.json of timm's data sets; or for each split the numbers in the order of its shards. None counts the
            samples at the start, in every process; only local files can be counted.
        image_size: Side ``S`` of the images in batches.
        shuffle: Size of each worker's shuffle buffer in training, in samples, which are held undecoded.
        value_range: The values of black and white in grey images of more than 8 bits per pixel; see `ImageFolder`.

    Raises:
        ImportError: webdataset is not installed.
        FileNotFoundError: A file of shards does not exist.
        ValueError: A shard is named twice, cannot be read or has another size; a sample lacks image or label, its image
            cannot be decoded, or its label is not in 0..K-1.
    """

    knows_statistics = False

    def __init__(
        self,
        num_classes: int,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        sizes: str | dict[str, list[int]] | None = None,
        image_size: int = 224,
        shuffle: int = 1000,
        value_range: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, (3, image_size, image_size), IMAGENET_MEAN, IMAGENET_STD, **kwargs)
        self.class_names = []  # shards only number them
        self.decoding = Decoding(value_range=value_range, centre=CENTRE)
        if shuffle < 1:
            raise ValueError(f"expected shuffle of at least 1, got {shuffle}")
        patterns = {"train": train, "val": val, "test": test}
        self.urls = {part: expand(given) for part, given in patterns.items() if given is not None}
        counts = Counter(url for urls in self.urls.values() for url in urls)
        if twice := [url for url, count in counts.items() if count > 1]:
            raise ValueError(f"expected each shard once and in one split, got {twice[0]} more often")
        self.sizes = sizes
        self.shuffle = shuffle

    def parts(self) -> dict[str, Shards]:
        """The shards of each part, with their sizes."""
        parts = {part: Shards(urls, np.array(sizes_of(part, urls, self.sizes))) for part, urls in self.urls.items()}
        centre = centre_seen(list(_first_images(parts["train"])), self.input_size[1])
        self.decoding = replace(self.decoding, centre=centre)
        return parts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the numbers of an interrupted run, whose number of workers is taken where none is given."""
        super().load_state_dict(state_dict)
        cores = free_cores(self.trainer)
        if self.num_workers is None and (workers := self._workers()) != cores:
            rank_zero_info(f"num_workers is {workers} as in the interrupted run, not {cores}: batches depend on it")

    def _numbers(self) -> dict[str, Any]:
        # Without workers the batches are those of one worker.
        return {**super()._numbers(), "num_workers": max(1, self._workers())}

    def _workers(self) -> int:
        """The number of workers as given, as in the interrupted run, or by the machine's cores."""
        if self.num_workers is not None:
            return self.num_workers
        return self._before.get("num_workers", free_cores(self.trainer))

    def _loader(self, name: str, training: bool = False, as_stored: bool = False) -> DataLoader[Batch]:
        # Batches of several workers would alternate, each from the worker's own range.
        workers = int(self.num_workers != 0) if as_stored else self._workers()
        return self._load(self._dataset(self._part(name), training), training, workers, batch_size=None)

    def _dataset(self, part: Shards, training: bool) -> ShardBatches:
        trainer: Any = self.trainer
        # Lightning warns of iterable data sets with a length; here it is right: each worker has its own samples.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        world_size, rank = self._place()
        batches = ShardBatches(
            part,
            self.batch_size,
            self.num_classes,
            self.input_size[1],
            world_size=world_size,
            rank=rank,
            # overfit_batches needs the same batches each epoch.
            shuffle=self.shuffle if training and not (trainer and trainer.overfit_batches) else 0,
            recipe=self.recipe if training and self.recipe.crops else None,
            views=self.views,
            seed=self._run_seed,
            decoding=self.decoding,
        )
        if training and trainer:
            taken = self._taken()
            batches.progress = lambda: (trainer.current_epoch, taken(batches))
        return batches


@dataclass(frozen=True)
class Shards:
    """Tar shards of one split.

    Args:
        urls: Paths or URLs.
        sizes: Samples in each.
    """

    urls: list[str]
    sizes: np.ndarray

    in_memory = False

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def describe(self, num_classes: int) -> str:
        """Numbers of samples and shards, for the log."""
        return f"{len(self)} in {len(self.urls)} shards"

    def sections(self, order: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Samples ``start`` to ``stop`` of shards in ``order``, as shards with first and last (excluded) sample."""
        ends = np.cumsum(self.sizes[order])
        for shard, end, size in zip(order.tolist(), ends.tolist(), self.sizes[order].tolist(), strict=True):
            first, last = max(0, start - end + size), min(size, stop - end + size)
            if first < last:
                yield shard, first, last

    def read(self, shard: int, first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Samples ``first`` to ``last`` (excluded) of a shard with their positions; earlier samples are discarded.

        Raises:
            ValueError: The shard cannot be read, or has another size than expected.
        """
        from webdataset.gopen import gopen, set_options
        from webdataset.tariterators import group_by_keys, tar_file_expander

        url, size, found = self.urls[shard], int(self.sizes[shard]), 0
        stream = gopen(url)
        try:
            samples = group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
            # If the range reaches the shard's last sample, the shard must end there.
            for found, sample in enumerate(islice(samples, last + (last == size)), 1):
                if first < found <= last:
                    yield found - 1, sample
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"cannot read shard {url}: {_reason(error)}") from error
        finally:
            set_options(stream, ignore_errors=True)  # a command fails if its output is closed early
            stream.close()
        if found != last:
            got = str(found) if found < last else "more"
            raise ValueError(f"expected {size} samples in {url}, got {got}; the shard is truncated, or sizes are wrong")


@dataclass(eq=False)
class ShardBatches(IterableDataset[Batch]):
    """Batches of decoded images ``(N, C, S, S)``, or ``(N, V, C, S, S)``, and labels; each pass is an epoch.

    Args:
        shards: The shards.
        batch_size: Images per batch. Each worker makes whole batches, and only the last one may be smaller.
        num_classes: Number of classes ``K``.
        size: Side ``S``.
        world_size: Number of processes.
        rank: Which of the processes this is.
        shuffle: Size of the shuffle buffer, for training; 0 is evaluation, in the order of the shards.
        recipe: The recipe of the random crops; None is the centre crop.
        views: Crops per image.
        seed: Seed of the order and of the crops; crops depend on the seed, the epoch and the sample alone.
        epoch: The epoch of the first pass.
        taken: Number of batches that the first pass starts after.
        decoding: Options for decoding the images.
        mark_broken: Whether an image that cannot be read gives zeros labelled `UNREADABLE` instead of an error.
        progress: Returns ``epoch`` and ``taken`` when a pass begins, in the loader's process.
    """

    shards: Shards
    batch_size: int
    num_classes: int
    size: int
    world_size: int = 1
    rank: int = 0
    shuffle: int = 0
    recipe: Recipe | None = None
    views: int = 1
    seed: int = 0
    epoch: int = 0
    taken: int = 0
    decoding: Decoding = COLOUR
    mark_broken: bool = False
    progress: Callable[[], tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        total, places = len(self.shards), (self.rank, self.rank + 1)
        if self.shuffle:
            total -= total % self.world_size
        self.start, self.stop = (total * place // self.world_size for place in places)
        # Batch normalisation cannot train on a single image, so that a last batch of one image is dropped.
        samples = self.stop - self.start
        if self.shuffle and 1 < self.batch_size < samples and samples % self.batch_size == 1:
            self.stop -= 1

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch_size)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a worker, which cannot call ``progress``."""
        return {**vars(self), "progress": None}

    def begin(self) -> None:
        """Read the progress before the data set is copied to the workers."""
        if self.progress:
            self.epoch, self.taken = self.progress()

    def __iter__(self) -> Iterator[Batch]:
        # Counted here, since the trainer, which knows the epoch, cannot reach a worker's copy.
        epoch, taken, self.epoch, self.taken = self.epoch, self.taken, self.epoch + 1, 0
        return self._batches(epoch, taken)

    def _batches(self, epoch: int, taken: int) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader always starts with worker 0, which here takes the role of the worker whose turn it would have been.
        number = (number + taken) % workers
        samples = self._samples(epoch, *self._own(number, workers))
        if self.shuffle:
            from webdataset.filters import shuffle

            rng = random.Random(mixed_seed(self.seed, epoch, self.rank, number))
            samples = shuffle(self.shuffle, rng=rng)(samples)
        samples = islice(samples, self.batch_size * len(range(number, taken, workers)), None)
        while batch := list(islice(samples, self.batch_size)):
            images, labels = zip(*(self._decode(epoch, *sample) for sample in batch), strict=True)
            yield torch.stack(images), torch.tensor(labels)

    def _own(self, number: int, workers: int) -> tuple[int, int]:
        """Start and stop of a worker's range: batches are taken in turn, and a smaller last batch must be the last."""
        lengths = [self.batch_size * len(range(other, len(self), workers)) for other in range(workers)]
        lengths[(len(self) - 1) % workers] -= len(self) * self.batch_size - (self.stop - self.start)
        start = self.start + sum(lengths[:number])
        return start, start + lengths[number]

    def _samples(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        order = np.arange(len(self.shards.urls))
        if self.shuffle:
            np.random.default_rng(mixed_seed(self.seed, epoch)).shuffle(order)
        for shard, first, last in self.shards.sections(order, start, stop):
            for position, sample in self.shards.read(shard, first, last):
                yield shard, position, sample

    def _decode(self, epoch: int, shard: int, position: int, sample: dict[str, Any]) -> tuple[Tensor, int]:
        name = f"{sample['__key__']} in {self.shards.urls[shard]}"
        key = next((key for key in _IMAGE_KEYS if key in sample), None)
        if key is None or _LABEL_KEY not in sample:
            there = ", ".join(key for key in sample if not key.startswith("__"))
            raise ValueError(f"expected {_LABEL_KEY} and one of {', '.join(_IMAGE_KEYS)} for {name}, got {there}")
        label = _label(sample[_LABEL_KEY], self.num_classes, name)
        seed = mixed_seed(self.seed, epoch, shard, position)
        boxes = crops(self.recipe, self.views, seed) if self.recipe else None
        try:
            images = read_image(f"{name} ({key})", self.size, boxes, sample[key], self.decoding)
        except (UnreadableError, UnknownRangeError):
            if not self.mark_broken:
                raise
            return blank(self.decoding.channels, self.size), UNREADABLE
        return images if boxes and self.views > 1 else images[0], label


def _first_images(part: Shards) -> Iterator[io.BytesIO]:
    """The first image files of a part; none of a shard that cannot be read, which is reported when it is used."""
    with suppress(ValueError):
        for shard, first, last in part.sections(np.arange(len(part.urls)), 0, min(LOOKED_AT, len(part))):
            for _, sample in part.read(shard, first, last):
                yield from (io.BytesIO(sample[key]) for key in _IMAGE_KEYS if key in sample)


def _label(text: bytes, num_classes: int, name: str) -> int:
    if re.fullmatch(rb"\s*\d+\s*", text) and int(text) < num_classes:
        return int(text)
    raise ValueError(
        f"expected a label in 0..{num_classes - 1} for {name}, got {text[:20]!r}; correct num_classes or the label"
    )


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths and URLs that patterns expand to, braces first, then ``*`` in paths.

    Raises:
        ImportError: webdataset is not installed.
        FileNotFoundError: A file does not exist, or a pattern matches none.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError("shards need the library webdataset: pip install 'ncfinetune[shards]'") from error
    given = [patterns] if isinstance(patterns, str) else patterns
    urls = [url for pattern in given for url in expand_urls(pattern)]
    found = {url: [url] if _is_remote(url) or os.path.exists(url) else sorted(glob.glob(url)) for url in urls}
    if missing := [url for url in urls if not found[url]] or ([] if urls else ["(none given)"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"no shard {missing[0]}{more}; expected paths or URLs such as train-{{000..146}}.tar")
    return [path for url in urls for path in found[url]]


def sizes_of(part: str, urls: list[str], sizes: str | dict[str, list[int]] | None) -> list[int]:
    """Samples in each shard of a split: as given, from an index file, or counted.

    Raises:
        ValueError: A size is missing, or shards cannot be counted.
    """
    if isinstance(sizes, str):
        known = read_index(sizes)
        if lacking := [url for url in urls if os.path.basename(url) not in known]:
            raise ValueError(f"{sizes} lacks the size of {lacking[0]}; name each shard there as its file is named")
        return [known[os.path.basename(url)] for url in urls]
    if sizes is not None:
        if len(sizes.get(part, [])) != len(urls):
            raise ValueError(f"expected sizes of the {len(urls)} {part} shards, got {len(sizes.get(part, []))}")
        return sizes[part]
    if remote := [url for url in urls if _is_remote(url)]:
        raise ValueError(f"cannot count the samples of {remote[0]}, which is not a local file; give sizes")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(count_samples, urls))


def read_index(url: str) -> dict[str, int]:
    """Sizes by the names of the shards' files, from any of the three kinds of index.

    Raises:
        ValueError: The file is no index, or two shards of one name have different sizes.
    """
    from webdataset.gopen import gopen

    with gopen(url) as stream:
        content = stream.read()
    try:
        pairs = [(os.path.basename(name), int(size)) for name, size in _pairs(json.loads(content))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'cannot read {url} as sizes of shards ({error!r}); expected JSON as {{"000.tar": 1000}}, an index of '
            "widsindex or an _info.json"
        ) from error
    sizes: dict[str, int] = {}
    for name, size in pairs:
        if sizes.setdefault(name, size) != size:
            raise ValueError(f"{url} has two sizes of shards named {name}; give sizes as numbers")
    return sizes


def _pairs(index: Any) -> list[tuple[str, Any]]:
    if "shardlist" in index:
        return [(shard["url"], shard["nsamples"]) for shard in index["shardlist"]]
    if "splits" in index:
        splits = index["splits"].values()
        return [pair for split in splits for pair in zip(split["filenames"], split["shard_lengths"], strict=True)]
    return list(index.items())


def count_samples(path: str) -> int:
    """Samples in a tar file, by its file names and webdataset's rule: adjacent files with the same key are a sample.

    Raises:
        ValueError: The file cannot be read.
    """
    from webdataset.tariterators import group_by_keys

    try:
        with tarfile.open(path) as tar:
            names = (file.name for file in tar if file.isreg() and not re.match(r"__[^/]*__($|/)", file.name))
            count = sum(1 for _ in group_by_keys({"fname": name, "data": b"", "__url__": path} for name in names))
            _check_end(tar)
            return count
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"cannot read shard {path}: {_reason(error)}") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse an archive without an end-of-archive marker at the position where tarfile stopped reading.

    tarfile takes anything that is not a header for the end: a file truncated between two members or within a header, or
    a damaged one.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    # The marker is blocks of zeros up to a multiple of 20 blocks; anything after it would be a second archive.
    end = tar.fileobj.read(2 * tarfile.RECORDSIZE)
    if end[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"it has no end of archive after {len(tar.getmembers())} files; it is truncated or damaged"
        )
    if any(end):
        raise tarfile.ReadError(
            f"it continues after its end of archive at byte {tar.offset}; extract and pack it again"
        )


def _reason(error: Exception) -> Any:
    """The message of an error, without the objects that webdataset adds to it."""
    return next((said for said in error.args if isinstance(said, str)), repr(error))


def _is_remote(url: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) is not None
