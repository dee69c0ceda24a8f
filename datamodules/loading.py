"""The order of training images, and loaders of them that go on where a resumed run had stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from .images import Batch, mixed_seed
from .splits import draw_balanced


class Taken:
    """How much of its epoch a run has had already, told once: passes after the first one are of whole epochs."""

    def __init__(self, count: Callable[[Any], int]) -> None:
        self._count: Callable[[Any], int] | None = count

    def __call__(self, source: Any) -> int:
        """How much of this sampler's or stream's it was, and from now on 0."""
        count, self._count = self._count, None
        return count(source) if count else 0


class EpochSampler(DistributedSampler[Any]):
    """Drawn anew each epoch by seed and epoch alone, each sample once or the classes in equal shares.

    Drawn once an epoch, sample i of N has the key e N + i in epoch e. Drawn with replacement as the t-th of the epoch,
    over all processes, it has (e N + t) N + i. So a data set knows in whatever process it runs which sample is meant,
    and a number that no other draw of that sample has. The shards of several processes are equally long, which
    contrastive losses need; of N samples an epoch leaves out up to one less than there are processes, others each time.

    Args:
        dataset: The data set.
        world_size: Number of processes.
        rank: Which of the processes this is.
        seed: Seed of the order.
        taken: Tells, when a pass begins, how many samples of this process it leaves out at its beginning.
        labels: Labels of the samples, ``(N,)``, whose classes are balanced by drawing with replacement; None draws each
            sample once.
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

    def __iter__(self) -> Iterator[int]:
        # A generator, so that it looks at the epoch only when the first key is asked for.
        keys = self._each_once() if self.labels is None else self._balanced(self.labels)
        yield from islice(keys, self.taken(self), None)

    def _each_once(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]  # a Dataset of ours has a length
        for index in super().__iter__():
            yield start + index

    def _balanced(self, labels: np.ndarray) -> Iterator[int]:
        # As many as there are samples, so that the order does not depend on how many processes share it.
        drawn = draw_balanced(labels, len(labels), mixed_seed(self.seed, self.epoch))
        for place in range(self.rank, self.total_size, self.num_replicas):
            yield (self.epoch * len(labels) + place) * len(labels) + int(drawn[place])


class EpochLoader(DataLoader[Batch]):
    """Training batches, fetched from when the first of an epoch is asked for.

    Lightning makes the iterator of a run that is resumed before it says which epoch that is; workers that started to
    fetch then would fetch another. Data sets that are streams are told with ``begin``, while their copies have not gone
    to the workers.

    It has the methods by which Lightning knows that a loader can go on within an epoch. What is in the state is what
    the trainer keeps anyway, the epoch and the number of its batches; sampler and stream ask for it.
    """

    def __iter__(self) -> Any:
        if hasattr(self.dataset, "begin"):
            self.dataset.begin()
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing that the trainer does not keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""
