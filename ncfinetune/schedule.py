"""The learning rate over epochs and layers: a schedule made of torch's schedulers, and factors of any schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau, SequentialLR


class WarmupCosine(SequentialLR):
    """Linear warm-up, then cosine decay to zero, where it stays.

    It is a class because a YAML file cannot give one optimiser to several schedulers.

    Args:
        optimizer: The optimiser.
        epochs: Number of all epochs, the ``max_epochs`` of the Trainer; the rate is zero from then on. Of steps, if the
            learner has ``lr_interval="step"``. A run that is longer is refused, unless its weights are averaged from
            then on.
        warmup: Number of epochs of the warm-up; its first epoch has ``1 / (warmup + 1)`` of the learning rate.

    Raises:
        ValueError: ``warmup`` is negative or leaves no epoch for the decay.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warmup: int = 0) -> None:
        if not 0 <= warmup < epochs:
            raise ValueError(f"expected a warmup of 0 to {epochs - 1} epochs, since epochs={epochs}, got {warmup}")
        self.epochs, decay = epochs, epochs - warmup
        ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        cosine = LambdaLR(optimizer, lambda epoch: (1 + math.cos(math.pi * min(epoch / decay, 1))) / 2)
        super().__init__(optimizer, [ramp, cosine], milestones=[warmup])

    def state_dict(self) -> dict[str, Any]:
        """The state without ``epochs``, so that a run that is resumed may be longer."""
        return {name: value for name, value in super().state_dict().items() if name != "epochs"}


def check_lengths(trainer: Any) -> None:
    """Refuse a `WarmupCosine` that ends before the run, whose learning rate would be zero for the rest of it.

    Raises:
        ValueError: The run is longer.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, WarmupCosine):
            epochs, steps = config.scheduler.epochs, config.interval == "step"
            length = _steps_of(trainer) if steps else _epochs_of(trainer)
            if epochs < length < math.inf:
                raise ValueError(
                    f"WarmupCosine has epochs={epochs}, after which the learning rate is 0, but the run has {length} "
                    f"{'steps, by which lr_interval=step counts' if steps else 'epochs'}; give epochs={length}"
                )


def check_monitors(trainer: Any) -> None:
    """Refuse a scheduler or callback that monitors a number of the validation in a run that has none.

    Raises:
        ValueError: There is one.
    """
    # The loaders are known before training starts, if the first epoch is validated.
    known = trainer.val_dataloaders is not None
    if trainer.enable_validation and not (known and not sum(trainer.num_val_batches)):
        return
    plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    monitors = [("the scheduler", config.monitor) for config in plateaus]
    # A callback that is not strict does without.
    strict = [callback for callback in trainer.callbacks if getattr(callback, "strict", True)]
    monitors += [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in strict]
    for who, monitor in monitors:
        if "val" in str(monitor).split("/"):
            other = "lightning.pytorch.cli.ReduceLROnPlateau with the" if who == "the scheduler" else "another"
            raise ValueError(
                f"{who} monitors {monitor}, but the run has no validation{_images_of(trainer)}; give validation images "
                "(a folder val, or a val_fraction above 0 of two images or more of a class), or take "
                f"{other} monitor, as train/loss"
            )


def _images_of(trainer: Any) -> str:
    """How many training images each class has, where the datamodule tells it."""
    counts = getattr(getattr(trainer, "datamodule", None), "class_counts", None)
    if counts is None or not len(counts):
        return ""
    low, high = min(counts), max(counts)
    return f" (training images per class: {low if low == high else f'{low} to {high}'})"


def _epochs_of(trainer: Any) -> float:
    """Number of epochs of a run, which may be infinite."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    if trainer.max_steps < 0:
        return epochs
    if trainer.num_training_batches == math.inf:
        return 0  # not known: a single one may have all steps
    begun, steps = 0, 0
    while begun < epochs and steps < trainer.max_steps:
        steps += _steps_in(trainer, begun)
        begun += 1
    return begun


def _steps_in(trainer: Any, epoch: int) -> int:
    """Steps of the optimiser in an epoch, whose last batch is followed by one in any case."""
    schedule = _accumulation(trainer)
    accumulated = schedule.get_accumulate_grad_batches(epoch) if schedule else trainer.accumulate_grad_batches
    return math.ceil(max(1, trainer.num_training_batches) / accumulated)


def _steps_of(trainer: Any) -> float:
    """Steps of the optimiser in a run; Lightning counts those of a `GradientAccumulationScheduler` without it."""
    steps: float = trainer.estimated_stepping_batches
    if _accumulation(trainer) is None or trainer.max_epochs == -1 or trainer.num_training_batches == math.inf:
        return steps
    counted = sum(_steps_in(trainer, epoch) for epoch in range(trainer.max_epochs))
    return counted if trainer.max_steps == -1 else min(counted, trainer.max_steps)


def _accumulation(trainer: Any) -> GradientAccumulationScheduler | None:
    return next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)


def images_a_step(trainer: Any) -> int:
    """Training images of a step of the optimiser, over all processes and accumulated batches; at most an epoch's.

    Raises:
        ValueError: The loader has no batch size, or a `GradientAccumulationScheduler` changes the number.
    """
    _ = trainer.estimated_stepping_batches  # creates the loader, which does not exist before the first epoch
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "dataset", None), "batch_size", None)
    if size is None:
        raise ValueError("lr_batch needs a training DataLoader with a batch_size; leave lr_batch out and give the rate")
    schedule, numbers = _accumulation(trainer), {trainer.accumulate_grad_batches}
    if schedule is not None:
        epochs = schedule.scheduling if trainer.max_epochs == -1 else range(max(1, trainer.max_epochs))
        numbers = set(map(schedule.get_accumulate_grad_batches, epochs))
    if len(numbers) > 1:
        raise ValueError(
            f"lr_batch scales the learning rate once, but GradientAccumulationScheduler accumulates {sorted(numbers)} "
            "batches in turn; leave lr_batch out and give the rate"
        )
    batches = min(numbers.pop(), trainer.num_training_batches)  # the optimiser steps at the end of an epoch too
    own = sized_len(getattr(loader, "sampler", None))
    return trainer.world_size * int(size * batches if own is None else min(size * batches, own))


def configured(optimizer: Optimizer) -> dict[str, list[float]]:
    """The learning rate and the weight decay of each group of parameters of an optimiser that has just been made."""
    groups = optimizer.param_groups
    found = {"lr": [group.get("initial_lr", group["lr"]) for group in groups]}
    found["weight_decay"] = [group.get("weight_decay") for group in groups]
    return {name: [float(value) for value in values] for name, values in found.items() if None not in values}


def depths(net: Any) -> dict[str, int]:
    """Distance in layers of each parameter of a timm network from the classifier.

    Layers are those of timm's `param_groups_layer_decay`, defined by the network's ``group_matcher``: the stem, the
    blocks, and the classifier, which includes modules before it that belong to no block and has distance 0.

    Raises:
        ValueError: The network has no ``group_matcher``, or one that puts all parameters into one layer, as if the
            parameters were renamed.
    """
    layers: dict[str, int] = {}
    if hasattr(net, "group_matcher"):
        known = net.pretrained_cfg.get("classifier") or "head"
        # Includes the names of the classifier, so that timm counts its layer even if it has no other parameters.
        classifiers = [(f"{name}.weight", None) for name in ([known] if isinstance(known, str) else known)]
        named = [*net.named_parameters(), *classifiers]
        layers = group_with_matcher(iter(named), net.group_matcher(coarse=False), reverse=True)
    if len(set(layers.values())) < 2:
        raise ValueError(
            f"layer_decay needs a network that timm divides into layers, but {type(net).__name__} has no group_matcher "
            "for that; leave layer_decay out"
        )
    last = max(layers.values())
    return {name: last - layers[name] for name, _ in net.named_parameters()}


def layer_groups(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Groups of a timm network's trained parameters, one for each layer, from the first layer on.

    The learning rate of a layer is to be multiplied by the ``lr_factor`` of its group: ``decay`` to the power of its
    distance from the classifier (layer-wise learning-rate decay: Clark et al. 2020, arXiv 2003.10555, appendix B; Bao
    et al. 2021, arXiv 2106.08254).
    """
    distances, layers = depths(net), dict[int, list[nn.Parameter]]()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(distances[name], []).append(parameter)
    return [
        {"params": layers[distance], "name": f"backbone-{distance}", "lr_factor": decay**distance}
        for distance in sorted(layers, reverse=True)
    ]


# Attributes in which torch keeps learning rates: in the optimiser's groups (three of OneCycleLR) and in schedulers.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "_last_lr")


def scale_rates(optimizer: Optimizer, scheduler: Any, factors: Sequence[float]) -> None:
    """Multiply the learning rates of an optimiser that has made no step, and those of its scheduler.

    Torch's schedulers are linear in these rates, whether they follow the optimiser's rates or, as `OneCycleLR` and
    `CyclicLR`, set rates of their own. Floors such as ``eta_min`` are not changed.

    Args:
        optimizer: The optimiser.
        scheduler: Its scheduler; None is none.
        factors: A factor for each of its groups of parameters.
    """
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group.update({name: group[name] * factor for name in _GROUP_RATES if name in group})
    for part in _parts(scheduler):
        for name in _SCHEDULER_RATES:
            rates = getattr(part, name, None)
            if isinstance(rates, list):
                setattr(part, name, [rate * factor for rate, factor in zip(rates, factors, strict=True)])


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and the schedulers that it contains."""
    if scheduler is not None:
        yield scheduler
        for part in getattr(scheduler, "_schedulers", []):
            yield from _parts(part)


def follows_rates(
    make: Callable[[Optimizer], Any], optimizer: Optimizer, factors: Sequence[float] | None = None
) -> bool:
    """Whether a scheduler's rates follow the optimiser's; tested on optimisers of a dummy parameter.

    Args:
        make: Makes the scheduler.
        optimizer: An optimiser without a scheduler, whose groups of parameters the trial has too.
        factors: Factors of `scale_rates` to try; None tries an optimiser of twice the rates.
    """
    before = _second_rates(make, optimizer, [1.0] * len(optimizer.param_groups))
    if factors is not None:
        after = _second_rates(make, optimizer, factors)
        pairs = [pair for *pair, factor in zip(before, after, factors, strict=True) if factor != 1]
    else:
        doubled = SGD([{**group, "lr": 2 * group["lr"]} for group in _groups(optimizer)])
        after = _second_rates(make, doubled, [1.0] * len(before))
        pairs = [list(pair) for pair in zip(before, after, strict=True)]
    told = [pair for pair in pairs if any(pair)]  # a warm-up may start with epochs at rate 0
    return not told or any(first != second for first, second in told)


def _second_rates(make: Callable[[Optimizer], Any], optimizer: Optimizer, factors: Sequence[float]) -> list[float]:
    """Rates of an optimiser of a dummy parameter after one step of its scheduler."""
    trial = SGD(_groups(optimizer))
    scheduler = make(trial)
    scale_rates(trial, scheduler, factors)
    trial.step()
    scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return [float(group["lr"]) for group in trial.param_groups]


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{**group, "params": [torch.zeros(1)]} for group in optimizer.param_groups]


def monitored(scheduler: Any, interval: str, loss: str) -> str | None:
    """The log name that a ReduceLROnPlateau monitors; None for other schedulers.

    Args:
        scheduler: The scheduler.
        interval: When it is stepped, each ``epoch`` or each ``step``.
        loss: The log name that it monitors unless it names another.

    Raises:
        ValueError: It maximises without naming what it monitors, which cannot be a loss, or is stepped each step.
    """
    name = getattr(scheduler, "monitor", None)
    if not isinstance(scheduler, ReduceLROnPlateau):
        return name
    if interval == "step":
        raise ValueError(
            'ReduceLROnPlateau needs lr_interval="epoch", got "step": what it monitors is the mean of an epoch'
        )
    if name is None and scheduler.mode == "max":
        raise ValueError(
            f"torch's ReduceLROnPlateau with mode='max' has no monitor, and the default {loss} is not maximised; "
            "take lightning.pytorch.cli.ReduceLROnPlateau and give its monitor, such as val/acc"
        )
    return loss if name is None else name


def two_groups(parameters: Iterable[nn.Parameter], backbone: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups, ``backbone``, if any of its parameters is trained, and ``head``."""
    inside = set(map(id, backbone.parameters()))
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": []}
    for parameter in parameters:
        groups["backbone" if id(parameter) in inside else "head"].append(parameter)
    return [{"params": params, "name": name} for name, params in groups.items() if params]
