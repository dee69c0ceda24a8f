"""The order of training images, and loaders that resume within an epoch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from .images import Batch, mixed_seed
from .splits import draw_balanced


class Taken:
    """The part of its epoch that a resumed run has already trained on; later passes are over whole epochs.

    Args:
        count: The amount for a sampler or stream.
        fetched: The number of batches that the run has fetched.
    """

    def __init__(self, count: Callable[[Any], int], fetched: Callable[[], int]) -> None:
        self._count, self._fetched = count, fetched
        self._start: int | None = None

    def __call__(self, source: Any) -> int:
        """The amount until the run has fetched a batch, whoever looks at one before it does; then 0."""
        fetched = self._fetched()
        if self._start is None:
            self._start = fetched
        return self._count(source) if fetched == self._start else 0


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by seed and epoch alone, with each sample once per epoch or balanced classes.

    Each pass is an epoch, the one after the last; once ``set_epoch`` has said which, as a Trainer does, that alone
    changes it.

    If each sample is drawn once per epoch, sample i of N has the key e N + i in epoch e. If sample i is the t-th draw
    of the epoch with replacement, over all processes, its key is (e N + t) N + i. From the key a data set in any
    process knows the sample and a number that is unique to the draw. All processes get equally many samples, which
    contrastive losses need; an epoch drops up to world size - 1 of the N samples, different ones each time.

    Args:
        dataset: The data set.
        world_size: Number of processes.
        rank: Which of the processes this is.
        seed: Seed of the order.
        taken: Returns, when a pass begins, the number of this process's samples that it starts after.
        labels: Labels ``(N,)`` for balancing the classes by drawing with replacement; None draws each sample once.
    """

    def __init__(
        self,
        dataset: Any,
        world_size: int,
        rank: int,
        seed: int,
        taken: Callable[[Any], int],
        labels: np.ndarray | None = None,
    ) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.taken = taken
        self.labels = labels
        self._counts = True

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the passes from now on."""
        super().set_epoch(epoch)
        self._counts = False

    def __iter__(self) -> Iterator[int]:
        # A generator function, so that the epoch is read only when the first key is requested.
        keys = self._each_once() if self.labels is None else self._balanced(self.labels)
        self.epoch += self._counts
        yield from islice(keys, self.taken(self), None)

    def _each_once(self) -> list[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]  # a Dataset of ours has a length
        return [start + index for index in super().__iter__()]

    def _balanced(self, labels: np.ndarray) -> list[int]:
        # N draws for all processes together, so that the order does not depend on their number.
        drawn = draw_balanced(labels, len(labels), mixed_seed(self.seed, self.epoch))
        places = range(self.rank, self.total_size, self.num_replicas)
        return [(self.epoch * len(labels) + place) * len(labels) + int(drawn[place]) for place in places]


class SameSampler(DistributedSampler[Any], SequentialSampler):
    """The same samples in every epoch, in the data set's order, for ``overfit_batches``.

    Lightning replaces any sampler that is not sequential under ``overfit_batches``, and over several processes any that
    is not distributed, by one of its own, which could not start after what a resumed run has already trained on.

    Args:
        dataset: The data set.
        world_size: Number of processes.
        rank: Which of the processes this is.
        taken: As in `EpochSampler`.
    """

    def __init__(self, dataset: Any, world_size: int, rank: int, taken: Callable[[Any], int]) -> None:
        super().__init__(dataset, world_size, rank, shuffle=False, drop_last=True)
        self.data_source = dataset
        self.taken = taken

    def __iter__(self) -> Iterator[int]:
        yield from islice(super().__iter__(), self.taken(self), None)


def end_by_parent(worker: int) -> None:
    """Have a worker process end by a SIGTERM of its parent, as torch's do, and by no other's.

    Schedulers and ``timeout`` send it to all processes of a job at once, of which the main one then finishes its batch
    and saves a checkpoint: it needs its workers until it ends them itself. Where the sender is not known (macOS,
    Windows) a worker is left as it is.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Loader(DataLoader[Batch]):
    """A loader of which several passes can be under way at once.

    The workers that torch keeps from pass to pass serve a single one, which would begin again where a second one does,
    such as a callback's look at a batch. A pass that begins while another is under way has workers of its own.
    """

    _under_way = False

    def __iter__(self) -> Any:
        if self._under_way:
            yield from self._get_iterator()
            return
        self._under_way = True
        try:
            yield from super().__iter__()
        finally:
            self._under_way = False


class EpochLoader(Loader):
    """Training batches, fetched only once the first batch of an epoch is requested.

    Lightning creates the iterator of a resumed run before it sets the epoch; workers that started to fetch then would
    fetch another epoch's samples. The ``begin`` of iterable data sets is called before they are copied to the workers.

    It has the methods by which Lightning recognises a loader that can resume within an epoch. Their state is empty,
    since the trainer keeps the epoch and its number of batches, which sampler and stream read from there.
    """

    def __iter__(self) -> Any:
        if hasattr(self.dataset, "begin"):
            self.dataset.begin()
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """An empty state: the trainer keeps the progress."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
