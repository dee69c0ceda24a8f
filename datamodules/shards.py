"""Images in tar shards, read from end to end by streams: for sets that do not fit one machine, near or far.

Legend: ``N`` samples of a batch, ``V`` views, ``C`` channels, ``S`` side of a decoded image, ``K`` classes.
"""

from __future__ import annotations

import glob
import json
import os
import random
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .base import ImageDataModule
from .decoding import CENTRE, COLOUR, Decoding, UnknownRangeError, UnreadableError, read_image
from .files import IMAGENET_MEAN, IMAGENET_STD
from .images import UNREADABLE, Batch, blank, crops, mixed_seed
from .listing import IMAGE_SUFFIXES
from .recipes import Recipe

_IMAGE_KEYS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_LABEL_KEY = "cls"


class WebDataset(ImageDataModule):
    """Your own images in tar shards, the layout of the library webdataset: ``KEY.jpg`` beside ``KEY.cls``.

    The image may be jpg, png, webp or whatever else `ImageFolder` takes for one; cls holds its label in digits, from 0
    on. Images are decoded, cropped and augmented as `ImageFolder` does. The samples of all shards are one stream, of
    which every process, and every worker in it, reads its own stretch: shards may be of any number and sizes. Each
    sample is evaluated once. In training the shards come in another order each epoch, and all processes get equally
    many samples and batches: of the last shard of the epoch up to one sample less than there are processes is left
    out, and one a process if it would be a batch by itself. Batches depend on the seed and the numbers of workers and
    processes. Predictions come in the order of the shards, so one worker decodes for them.

    Images and labels are not known before they are read: to train on few labels, or in other shares of the classes, and
    for a part that is cut off for validation, write shards of the images that you want, or use `ImageFolder`.

    A shard that is cut is refused, even between two samples: where its samples are counted, by its missing end of
    archive, and where ``sizes`` are given, by their number when its end is read.

    Args:
        num_classes: Number of classes ``K``.
        train: The shards: paths or URLs that webdataset opens (``https://``, ``hf://``, ``pipe:``). ``{000..146}``
            stands for a range, and, in paths, ``*`` for what is there.
        val: Shards for validation; None is no validation.
        test: Shards for testing; None is no test.
        sizes: How many samples each shard has: a JSON file ``{"000.tar": 1000}``, an index of webdataset's widsindex
            or an _info.json as timm's sets have it; or for each part the numbers in the order of its shards. None
            counts them at the start, in every process; only files can be counted.
        image_size: Side ``S`` of the images in batches.
        shuffle: Samples that each worker holds, undecoded, to draw the next one from in training.
        value_range: The numbers that are black and white in grey images of more than 8 bits a pixel, as `ImageFolder`
            has it.

    Raises:
        ImportError: webdataset is not installed.
        FileNotFoundError: A file of shards does not exist.
        ValueError: A shard is named twice, cannot be read or is of another size; a sample lacks image or label, its
            image cannot be decoded, or its label is not in 0..K-1.
    """

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
        self.decoding = Decoding(value_range=value_range)
        if shuffle < 1:
            raise ValueError(f"expected shuffle of at least 1, got {shuffle}")
        patterns = {"train": train, "val": val, "test": test}
        self.urls = {part: expand(given) for part, given in patterns.items() if given is not None}
        counts = Counter(url for urls in self.urls.values() for url in urls)
        if twice := [url for url, count in counts.items() if count > 1]:
            raise ValueError(f"expected each shard once and in one part, got {twice[0]} more often")
        self.sizes = sizes
        self.shuffle = shuffle
        self.centre = CENTRE

    def parts(self) -> dict[str, Shards]:
        """The shards of each part, with their sizes."""
        return {part: Shards(urls, np.array(sizes_of(part, urls, self.sizes))) for part, urls in self.urls.items()}

    def _loader(self, name: str, training: bool = False, as_stored: bool = False) -> DataLoader[Batch]:
        # Batches of several workers would come in turns, each from a stretch of its own.
        workers = int(self.num_workers != 0) if as_stored else None
        return self._load(self._dataset(self._part(name), training), training, workers, batch_size=None)

    def _dataset(self, part: Shards, training: bool) -> ShardBatches:
        trainer: Any = self.trainer
        # Lightning doubts the length of any iterable data set; here each worker has its own samples.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        world_size, rank = self._place()
        batches = ShardBatches(
            part,
            self.batch_size,
            self.num_classes,
            self.input_size[1],
            world_size=world_size,
            rank=rank,
            # Whoever overfits wants the same batches each epoch.
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
    """Tar shards of one part.

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
        """How many samples there are."""
        return f"{len(self)} in {len(self.urls)} shards"

    def stretch(self, order: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Shards, and the first and last (excluded) sample of each, that samples start to stop of all in order are."""
        ends = np.cumsum(self.sizes[order])
        for shard, end, size in zip(order.tolist(), ends.tolist(), self.sizes[order].tolist(), strict=True):
            first, last = max(0, start - end + size), min(size, stop - end + size)
            if first < last:
                yield shard, first, last

    def read(self, shard: int, first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Samples ``first`` to ``last`` (excluded) of a shard with their positions; those before are passed over.

        Raises:
            ValueError: The shard cannot be read, or its size is not what it should be.
        """
        from webdataset.gopen import gopen, set_options
        from webdataset.tariterators import group_by_keys, tar_file_expander

        url, size, found = self.urls[shard], int(self.sizes[shard]), 0
        stream = gopen(url)
        try:
            samples = group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
            # Where the stretch goes to the shard's end, that must be its end.
            for found, sample in enumerate(islice(samples, last + (last == size)), 1):
                if first < found <= last:
                    yield found - 1, sample
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"cannot read shard {url}: {_reason(error)}") from error
        finally:
            set_options(stream, ignore_errors=True)  # a command complains if its output is no longer wanted
            stream.close()
        if found != last:
            got = str(found) if found < last else "more"
            raise ValueError(f"expected {size} samples in {url}, got {got}; the shard is cut, or sizes are wrong")


@dataclass(eq=False)
class ShardBatches(IterableDataset[Batch]):
    """Batches of decoded images ``(N, C, S, S)``, or ``(N, V, C, S, S)``, and labels; each pass is an epoch.

    Args:
        shards: The shards.
        batch_size: Images a batch. Each worker makes whole batches, and only the last one may be smaller.
        num_classes: Number of classes ``K``.
        size: Side ``S``.
        world_size: Number of processes.
        rank: Which of the processes this is.
        shuffle: Samples held to draw from, for training; 0 is evaluation, in the order of the shards.
        recipe: Whose random crops are cut out of the whole image; None is the centre.
        views: Crops an image.
        seed: Seed of the order, and of the crops, which depend on it, the epoch and the sample alone.
        epoch: The epoch of the first pass.
        taken: Batches that the first pass leaves out at its beginning.
        decoding: Range of the images' values.
        mark_broken: Whether an image that cannot be read comes as zeros labelled `UNREADABLE` in place of an error.
        progress: Tells ``epoch`` and ``taken`` when a pass begins, in the process that the loader is in.
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
        # Batch normalisation cannot train on a single image: one that is left over is left out of the epoch.
        if self.shuffle and self.batch_size > 1 and (self.stop - self.start) % self.batch_size == 1:
            self.stop -= 1

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch_size)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs; it cannot ask for the progress."""
        return {**vars(self), "progress": None}

    def begin(self) -> None:
        """Take over the epoch, and what the first pass leaves out, before workers get their copies."""
        if self.progress:
            self.epoch, self.taken = self.progress()

    def __iter__(self) -> Iterator[Batch]:
        # Counted here, since a worker's copy is out of reach for whoever knows the epoch.
        epoch, taken, self.epoch, self.taken = self.epoch, self.taken, self.epoch + 1, 0
        return self._batches(epoch, taken)

    def _batches(self, epoch: int, taken: int) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks worker 0 first, which goes on with the batches of the one whose turn it would have been.
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
        """Start and stop of a worker's stretch: batches go round the workers, so whoever has the last makes it last."""
        lengths = [self.batch_size * len(range(other, len(self), workers)) for other in range(workers)]
        lengths[(len(self) - 1) % workers] -= len(self) * self.batch_size - (self.stop - self.start)
        start = self.start + sum(lengths[:number])
        return start, start + lengths[number]

    def _samples(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        order = np.arange(len(self.shards.urls))
        if self.shuffle:
            np.random.default_rng(mixed_seed(self.seed, epoch)).shuffle(order)
        for shard, first, last in self.shards.stretch(order, start, stop):
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


def _label(text: bytes, num_classes: int, name: str) -> int:
    if re.fullmatch(rb"\s*\d+\s*", text) and int(text) < num_classes:
        return int(text)
    raise ValueError(
        f"expected a label in 0..{num_classes - 1} for {name}, got {text[:20]!r}; correct num_classes or it"
    )


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths and URLs that patterns stand for, braces first, then, in paths, ``*``.

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
    """Samples in each shard of a part: as given, of an index file, or counted.

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
        raise ValueError(f"cannot count the samples of {remote[0]}, which is no file here; give sizes")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(count_samples, urls))


def read_index(url: str) -> dict[str, int]:
    """Sizes by the names of the shards' files, of any of the three kinds of index.

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
    """Samples in a tar file, by the names in it alone and webdataset's rule: neighbours of one key are a sample.

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
    """Refuse an archive that has been read to where tarfile stopped, and does not end there as archives do.

    tarfile takes anything that is no header for the end: a file cut between two members, within a header, or damaged.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    # The end is blocks of zeros up to a multiple of 20 blocks; what follows that would be a second archive.
    end = tar.fileobj.read(2 * tarfile.RECORDSIZE)
    if end[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it has no end of archive after {len(tar.getmembers())} files; it is cut or damaged")
    if any(end):
        raise tarfile.ReadError(f"it goes on after its end of archive at byte {tar.offset}; extract and pack it again")


def _reason(error: Exception) -> Any:
    """What an error says, without the objects that webdataset adds to it."""
    return next((said for said in error.args if isinstance(said, str)), repr(error))


def _is_remote(url: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) is not None
