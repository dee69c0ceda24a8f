"""Evaluation passes over images: the only module that switches to eval mode and back.

A pass has no augmentation, no gradients and fixed weights. It restores everything that it changes, bit for bit:
weights, modes, the trainer's stage and the random state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, DistributedSampler

from ncfinetune.copies import CopyError, copy_of
from ncfinetune.launches import returns_weights_only
from ncfinetune.loaders import batch_size_of, drawn_by_all, evenly, flat, in_order, is_stream, like
from ncfinetune.mode_caches import has_own_train, own_tensors
from ncfinetune.progress import watched
from ncfinetune.samples import spread

# Attributes of every torch module; all others are defined by its class.
_OF_TORCH = frozenset(vars(nn.Module()))
# Marks the end of a loader's iterator, since a batch may be any object.
_END = object()
# Images that suffice to tell layers apart; the cost of a choice grows with their third power.
_CHOOSING = 2000


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """A context in eval mode; on exit mode, tensors and attributes of every submodule are restored.

    A submodule that overrides ``train()`` (LoRA that merges its weights, an attention that caches its biases) changes
    more than a flag. It is restored by its own method and then, since merging and unmerging rounds, from a copy of its
    tensors and attributes.
    """
    modes = {part: part.training for part in module.modules()}
    kept = [(part, _state(part)) for part in modes if has_own_train(part) and _has_values(part)]
    try:
        module.eval()
        yield
    finally:
        for part in modes:  # parents come first: their train() may reach their children
            if part.training != modes[part] and has_own_train(part):
                part.train(modes[part])
        for part, mode in modes.items():
            part.training = mode
        for part, (attributes, tensors) in kept:
            vars(part).update(attributes)
            for tensor, value in zip(own_tensors(part), tensors, strict=True):
                tensor.data.copy_(value)


def _has_values(part: nn.Module) -> bool:
    """Whether it has tensors, all of which have a shape: a lazy layer's get theirs in its first pass."""
    tensors = own_tensors(part)
    return bool(tensors) and not any(map(is_lazy, tensors))


def _state(part: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
    attributes = {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value
        for name, value in vars(part).items()
        if name not in _OF_TORCH
    }
    return attributes, [tensor.detach().clone() for tensor in own_tensors(part)]


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """A context that restores all buffers: some networks count their passes, or keep means, in eval mode too.

    Buffers of lazy layers that have no shape yet get one in the pass, and keep it.
    """
    kept = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in kept:
            part._buffers[name] = buffer
            buffer.data.copy_(value)


@contextmanager
def evaluation(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """`eval_mode` without gradients or logged numbers, of one network on all processes; all of them must enter it.

    On exit all buffers, the trainer's stage and the random state are restored too.
    """
    stage = trainer.state.stage
    precision = trainer.precision_plugin.forward_context()
    with isolate_rng(), torch.no_grad(), precision, eval_mode(module), buffers_kept(module), unlogged(module):
        try:
            trainer.validating = True
            _take_buffers_of_rank_zero(trainer, module)
            yield
        finally:
            trainer.state.stage = stage


def _take_buffers_of_rank_zero(trainer: Trainer, module: nn.Module) -> None:
    """Give all processes the buffers that validation and checkpoints have.

    DDP copies rank 0's at the next pass through its wrapper only, so that after a training step each process has batch
    norm's statistics of its own batch, and a pass that is divided among the processes would be one of several networks.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return
    found = [buffer for buffer in module.buffers() if not is_lazy(buffer) and not hasattr(buffer, "to_local")]
    for dtype in dict.fromkeys(buffer.dtype for buffer in found):
        some = [buffer for buffer in found if buffer.dtype == dtype]
        values = torch.cat([buffer.flatten().to(trainer.strategy.root_device) for buffer in some])
        dist.broadcast(values, src=0)
        for buffer, value in zip(some, torch.split(values, [buffer.numel() for buffer in some]), strict=True):
            buffer.copy_(value.view_as(buffer))


@contextmanager
def unlogged(module: nn.Module) -> Iterator[None]:
    """A context in which what a module's ``forward`` logs is dropped: it is not of a step of the run."""
    loggers = [part for part in module.modules() if hasattr(part, "log_dict") and "log" not in vars(part)]
    for part in loggers:
        vars(part)["log"] = vars(part)["log_dict"] = _drop
    try:
        yield
    finally:
        for part in loggers:
            del vars(part)["log"], vars(part)["log_dict"]


def _drop(*args: Any, **kwargs: Any) -> None:
    pass


def on_device(trainer: Trainer, batch: Any, data: Any = None) -> Any:
    """The batch after the transfer to the device and the hooks of datamodule and module, as a step gets it.

    Args:
        trainer: The trainer.
        batch: The batch, as a loader gives it.
        data: The datamodule whose hooks are called, or the module's where it has none; None is that of the run.
    """
    module: Any = trainer.lightning_module
    with data_precision():
        batch = trainer.precision_plugin.convert_input(batch)
        if data is None:
            return trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch))
        batch = _with_hook("on_before_batch_transfer", data, module)(batch, 0)
        batch = _with_hook("transfer_batch_to_device", data, module)(batch, trainer.strategy.root_device, 0)
        return _with_hook("on_after_batch_transfer", data, module)(batch, 0)


def _with_hook(name: str, data: Any, module: Any) -> Any:
    """A hook of the datamodule, or of the module if the former does not define it, as Lightning has it."""
    home = str(getattr(type(data), name).__module__).split(".")[0]
    return getattr(module if home in ("lightning", "pytorch_lightning") else data, name)


def ready_batches(trainer: Trainer, loader: Iterable[Any], data: Any = None) -> Iterator[Any]:
    """The batches of a loader after the transfer to the device, as a step gets them; with a bar if that takes long.

    Arguments as in `on_device`.
    """
    batches = watched(trainer, loader, "pass over images")
    while True:
        with data_precision():
            batch = next(batches, _END)
        if batch is _END:
            return
        yield on_device(trainer, batch, data)


@contextmanager
def data_precision() -> Iterator[None]:
    """Create data in float32, as outside a pass: inside, precision bf16-true makes bfloat16 the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def plain_loader(trainer: Trainer, purpose: str) -> Any:
    """All training images without augmentation in a fixed order, the same on every process, but for a divided stream.

    Raises:
        ValueError: The trainer has no datamodule with a ``train_plain_dataloader``.
    """
    offered = _offered(trainer)
    if offered is None:
        raise ValueError(
            f"{purpose} needs the training images in a fixed order and without augmentation; "
            "fit with a datamodule that has a train_plain_dataloader()"
        )
    loader = offered()
    return in_order(loader, None if is_stream(loader) else drawn_by_all(loader, trainer.world_size))


def rows_to_choose_by(trainer: Trainer, module: LightningModule, option: str) -> Iterable[Any]:
    """Training images without augmentation, to choose layers by in ``setup``; 2,000 of them, evenly spread, if more.

    The module is moved to the strategy's device, which the strategy does after ``setup`` only.

    Args:
        trainer: The trainer.
        module: What the images go through.
        option: The option that chooses, for the error.

    Raises:
        ValueError: The trainer has no datamodule with a ``train_plain_dataloader``, or a strategy that trains in forked
            or spawned processes, which return weights only.
    """
    if returns_weights_only(trainer):
        raise ValueError(
            f"{option} needs a strategy such as ddp, since strategies that fork or spawn processes return only "
            "weights and not the chosen layers; or name the layers that a fit in one process chooses"
        )
    trainer.precision_plugin.convert_module(module.to(trainer.strategy.root_device))
    return evenly(plain_loader(trainer, option), _CHOOSING)


def _offered(trainer: Trainer) -> Any:
    return getattr(_of(trainer, "datamodule"), "train_plain_dataloader", None)


class TrainingSet:
    """The training set of a run for evaluation passes: in a fixed order, each sample once over all processes.

    Its samples come from the datamodule's ``train_plain_dataloader()``, without augmentation; if there is none, from
    the data set of the training loader (the samples that its sampler draws, in the order of the data set), or from a
    copy of a stream or of another kind of loader. A pass consumes neither batches nor random numbers of the training,
    except numbers that a data set draws from its own generator without workers. The loader is requested again whenever
    the trainer requests its training loader.

    Args:
        asker: Name of the callback, for messages.
        option: The callback's argument that limits a pass, for messages.
        off: The callback's argument that turns these passes off, for messages.

    Attributes:
        limited: Whether the last pass read less than the whole set.
        loader: The loader of the last pass.
    """

    def __init__(self, asker: str, option: str, off: str) -> None:
        self.limited = False
        self.loader: Any = None
        self._asker, self._option, self._off = asker, option, off
        self._asked_for: Any = None
        self._source: Any = None
        self._plain = False
        self._made: tuple[Any, Any] | None = None

    def batches(
        self, trainer: Trainer, max_batches: int | None = None, max_samples: int | None = None, shared: bool = True
    ) -> Iterator[Any]:
        """Batches of a pass, from the loader.

        If these arguments or the trainer's limits on training batches limit the pass, samples are taken evenly over the
        set, and in proportion to its classes if the data set has labels in ``targets`` or ``labels``. Of a stream, and
        under ``overfit_batches``, the first batches are taken.

        Args:
            trainer: The trainer.
            max_batches: Largest number of batches on each process.
            max_samples: Largest number of samples over all processes; of a stream, up to a batch more on each. It does
                not hold for data sets that make their batches, whose sizes are not known here.
            shared: Whether the set is divided among the processes; otherwise each process reads all of it, unless it is
                a stream.

        Raises:
            ValueError: There are several training loaders, the data may be infinite, or the loader cannot be copied.
        """
        with isolate_rng():  # loaders may draw random numbers when they, or their iterators, are created
            loader = self._ask(trainer)
            try:
                if is_stream(loader):
                    return self._stream(trainer, loader, max_batches, max_samples)
                return self._samples(trainer, loader, max_batches, max_samples, shared)
            except CopyError as error:
                raise ValueError(
                    f"{self._asker} needs its own training loader, since a pass over the run's loader would consume "
                    f"batches and random numbers of the training, but {error}; give the datamodule a "
                    f"train_plain_dataloader() that returns a new loader, or {self._asker}({self._off})"
                ) from error

    def _samples(
        self, trainer: Trainer, loader: DataLoader[Any], max_batches: int | None, max_samples: int | None, shared: bool
    ) -> Iterator[Any]:
        drawn = drawn_by_all(loader, trainer.world_size)
        most = self._most_samples(trainer, loader, max_batches, max_samples)
        self.limited = most is not None and most < len(drawn)
        fixed = bool(_of(trainer, "overfit_batches")) and not self._plain
        chosen = (
            drawn if not self.limited else drawn[:most] if fixed else spread(drawn, cast(int, most), loader.dataset)
        )
        own = chosen[trainer.global_rank :: trainer.world_size] if shared else chosen
        as_it_is = trainer.world_size == 1 or (shared and isinstance(loader.sampler, DistributedSampler))
        if not (self._plain and as_it_is) or self.limited or _in_use(trainer, loader):
            if self._made is None or self._made[0] != own:
                self._made = own, like(loader, own)
            loader = self._made[1]
        self.loader = loader
        return iter(loader)

    def _ask(self, trainer: Trainer) -> Any:
        """The training loader that a pass reads or copies, requested again if the trainer has a new loader."""
        own = getattr(
            trainer.fit_loop, "_combined_loader", None
        )  # a new object each time that the trainer requests its loader
        asked_for = (_of(trainer, "datamodule"), trainer.train_dataloader if own is None else own)
        if self._asked_for is None or any(a is not b for a, b in zip(self._asked_for, asked_for, strict=True)):
            offered = _offered(trainer)
            self._source = offered() if offered is not None else trainer.train_dataloader
            if self._asked_for is None and offered is None:
                rank_zero_info(
                    f"{self._asker} measures the training set with the augmentation of its data set; a datamodule's "
                    "train_plain_dataloader() would be used instead"
                )
            self._asked_for, self._made, self._plain = asked_for, None, offered is not None
        if isinstance(self._source, Mapping | Sequence):
            raise ValueError(
                f"{self._asker} cannot choose among {len(self._source)} training loaders; give the datamodule a "
                f"train_plain_dataloader(), or {self._asker}({self._off})"
            )
        return self._source

    def _stream(self, trainer: Trainer, loader: Any, max_batches: int | None, max_samples: int | None) -> Iterator[Any]:
        length = self._most_batches(trainer, loader, max_batches, max_samples)
        self.limited = length is not None
        if not self._plain or _in_use(trainer, loader):
            if self._made is None:
                self._made = None, self._own_stream(loader)
            loader = self._made[1]
        self.loader = loader
        return islice(iter(loader), length)

    def _own_stream(self, loader: Any) -> Any:
        """A loader of the same stream whose passes do not advance the given loader."""
        if not isinstance(loader, DataLoader):
            return copy_of(loader)
        # Workers have copies of the stream.
        return like(loader, None, dataset=loader.dataset if loader.num_workers else copy_of(loader.dataset))

    def _most_samples(
        self, trainer: Trainer, loader: DataLoader[Any], max_batches: int | None, max_samples: int | None
    ) -> int | None:
        """The limit on samples over all processes; on batches, if the data set makes batches itself."""
        size = batch_size_of(loader)
        limits = [] if max_batches is None else [max_batches * (size or 1) * trainer.world_size]
        limits += [] if max_samples is None or size is None else [max_samples]
        if _is_limited(trainer):
            theirs = getattr(trainer.train_dataloader, "batch_size", None) or size or 1
            limits.append(int(trainer.num_training_batches) * (theirs if size else 1) * trainer.world_size)
        return min(limits, default=None)

    def _most_batches(
        self, trainer: Trainer, loader: Any, max_batches: int | None, max_samples: int | None
    ) -> int | None:
        """The limit on batches of a process."""
        size = batch_size_of(loader)
        limits = [] if max_batches is None else [max_batches]
        limits += [] if max_samples is None or not size else [math.ceil(max_samples / size)]
        counted = sized_len(loader) is not None
        if (_is_limited(trainer) or not counted) and trainer.num_training_batches != float("inf"):
            theirs = getattr(trainer.train_dataloader, "batch_size", None)
            limits.append(math.ceil(int(trainer.num_training_batches) * (theirs / size if theirs and size else 1)))
        if not limits and not counted and trainer.max_epochs in (None, -1):
            raise ValueError(
                f"{self._asker} cannot know whether the training data are infinite, since their loader has no length "
                f"and the trainer no max_epochs; give it {self._asker}({self._option}=...)"
            )
        return min(limits, default=None)


def _of(trainer: Any, name: str) -> Any:
    """An attribute that Trainer sets in its constructor but does not declare."""
    return getattr(trainer, name, None)


def leaves_out(limit: int | float) -> bool:
    """Whether a Trainer's limit on batches may leave some out: 1 is a batch, 1.0 is all of them."""
    return isinstance(limit, int) or limit < 1.0


def _is_limited(trainer: Trainer) -> bool:
    limited = leaves_out(trainer.limit_train_batches) or bool(_of(trainer, "overfit_batches"))
    return limited and trainer.num_training_batches != float("inf")


def _in_use(trainer: Any, loader: Any) -> bool:
    """Whether the trainer iterates over this loader, so that a pass would run during the iteration."""
    theirs = (trainer.train_dataloader, trainer.val_dataloaders)
    return any(loader is other for loaders in theirs if loaders is not None for other in flat(loaders))


def evaluated(trainer: Trainer) -> list[Any]:
    """The data sets of the running validation or test in the order of their ``dataloader_idx``, each by its loader.

    A `CombinedLoader` whose batches hold a part of each loader, in every mode but ``sequential``, is one data set.
    """
    loader: Any = trainer._evaluation_loop._combined_loader
    return list(loader.flattened) if loader._mode == "sequential" else [loader]
