"""The order of training images, and loaders of them that go on where a resumed run had stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from .images import Batch


class Taken:
    """How much of its epoch a run has had already, told once: passes after the first one are of whole epochs."""

    def __init__(self, count: Callable[[Any], int]) -> None:
        self._count: Callable[[Any], int] | None = count

    def __call__(self, source: Any) -> int:
        """How much of this sampler's or stream's it was, and from now on 0."""
        count, self._count = self._count, None
        return count(source) if count else 0


class EpochSampler(DistributedSampler[Any]):
    """Shuffled anew each epoch by seed and epoch alone; index i of N in epoch e is the key e N + i.

    So a data set knows the epoch in whatever process it runs. The shards of several processes are equally long, which
    contrastive losses need; of N images an epoch leaves out up to one less than there are processes, others each time.

    Args:
        dataset: The data set.
        world_size: Number of processes.
        rank: Which of the processes this is.
        seed: Seed of the order.
        taken: Tells, when a pass begins, how many samples of this process it leaves out at its beginning.
    """

    def __init__(self, dataset: Any, world_size: int, rank: int, seed: int, taken: Callable[[Any], int]) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.taken = taken

    def __iter__(self) -> Iterator[int]:
        # A generator, so that it looks at the epoch only when the first key is asked for.
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]  # a Dataset of ours has a length
        for index in islice(super().__iter__(), self.taken(self), None):
            yield start + index


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
