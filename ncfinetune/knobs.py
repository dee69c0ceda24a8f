"""The allowed values of a `FineTuner`'s options, and which options exclude each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from ncfinetune.backbone import Backbone
from ncfinetune.cache import Place
from ncfinetune.heads import ClosedForm, SkipJoin
from ncfinetune.split import SkipGradient

HeadInit = Literal["default", "zero", ClosedForm]
Refit = Literal["none", ClosedForm]
CACHE_DIR = "runs/cache"
_REMEDY = "to start from its weights, give the file as the FineTuner's checkpoint instead"
# Arguments that a delta stores elsewhere, or that describe the run and not the model.
_NOT_THE_MODEL = (
    "backbone",
    "checkpoint",
    "cache",
    "cache_dir",
    "allow_random",
    "layer_decay",
    "label_smoothing",
    "class_weight",
    "optimizer",
    "lr_scheduler",
    "lr_interval",
)
# Kinds of parameters that stand for several arguments.
_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# What a fit in which ``auto`` chose no layer to train saves: with the others its checkpoint would be refused.
NO_LAYER = {"train": "none", "skip_gradient": "both", "layer_decay": None}


def check_choices(skip_join: str, skip_gradient: str, head_init: str, refit: str, cache: str) -> None:
    """Refuse values that are not among the choices.

    Raises:
        ValueError: A value is not among them.
    """
    choices = {
        "skip_join": (skip_join, SkipJoin),
        "skip_gradient": (skip_gradient, SkipGradient),
        "head_init": (head_init, HeadInit),
        "refit": (refit, Refit),
        "cache": (cache, Place),
    }
    for name, (value, words) in choices.items():
        if value not in get_args(words):
            raise ValueError(f"expected {name} to be one of {', '.join(get_args(words))}, got {value!r}")


def check_cache(train: Any, cache: str, cache_dir: str) -> None:
    """Refuse a cache without frozen layers, and a folder that is not used.

    Raises:
        ValueError: There are no frozen layers, or the folder is not used.
    """
    if cache != "none" and train == "all":
        raise ValueError(f'cache={cache!r} stores the outputs of frozen layers, and with train="all" there are none')
    if cache != "disk" and cache_dir != CACHE_DIR:
        raise ValueError(f'cache_dir={cache_dir!r} is for cache="disk", and cache={cache!r} writes no files')


def check_skips(train: Any, skip_from: Any, skip_join: str, skip_gradient: str, max_skips: int) -> None:
    """Refuse options of skip connections that would have no effect; log that a skip connection tunes no layer.

    Raises:
        ValueError: An option would have no effect, or is out of its range.
    """
    if skip_from is None and (skip_join != "pad" or skip_gradient != "both"):
        raise ValueError(f"skip_join={skip_join!r} and skip_gradient={skip_gradient!r} need a layer in skip_from")
    if train == "none" and skip_gradient != "both":
        raise ValueError('skip_gradient="skip" needs a layer in train: without one the backbone gets no gradient')
    if skip_from == "auto" and skip_join not in ("concat", "only"):
        raise ValueError(
            f'skip_from="auto" chooses layers by concatenated features, and skip_join={skip_join!r} adds them; give '
            'skip_join="concat" or "only"'
        )
    if max_skips < 1:
        raise ValueError(f"expected max_skips of at least 1, got {max_skips}")
    if skip_from != "auto" and max_skips != 1:
        raise ValueError(f'max_skips={max_skips} is for skip_from="auto"; leave it out, or name that many layers')
    if train == "none" and skip_from:
        features = "features" if skip_join == "only" else "penultimate features joined with the features"
        rank_zero_info(f'train="none": a linear probe on the {features} of {_listed(skip_from)}')


def listed_skips(skip_from: Any) -> list[str]:
    """The layers that ``skip_from`` names; none while ``auto`` has not chosen them."""
    if skip_from is None or skip_from == "auto":
        return []
    return list(skip_from) if isinstance(skip_from, list | tuple) else [skip_from]


def by_name(backbone: Backbone, layers: Any) -> Any:
    """Layers by name, where negative numbers count the blocks of a backbone from its end.

    Raises:
        ValueError: The backbone has no such block, or a number is not negative.
    """
    if isinstance(layers, list | tuple):
        return [by_name(backbone, layer) for layer in layers]
    if not isinstance(layers, int):
        return layers
    names = list(backbone.layers)
    if not -len(names) <= layers < 0:
        raise ValueError(
            f"expected the name of a layer, or a number from -1, the last block, to -{len(names)}, the first one of "
            f"{backbone.spec['name']}, got {layers}"
        )
    return names[layers]


def _listed(skip_from: Any) -> str:
    return "layers to be chosen" if skip_from == "auto" else ", ".join(map(str, listed_skips(skip_from)))


def check_chooses(option: str, stage: str) -> None:
    """Refuse to choose layers of ``auto`` in anything but a fit.

    Raises:
        ValueError: It is no fit.
    """
    if stage != "fit":
        raise ValueError(
            f'{option}="auto" chooses layers when a fit starts; load what a fit has saved by '
            "FineTuner.load_from_checkpoint"
        )


def check_decay(train: Any, layer_decay: float | None) -> None:
    """Refuse layer-wise learning rates without trained layers.

    Raises:
        ValueError: No layer of the backbone is trained.
    """
    if train == "none" and layer_decay is not None:
        raise ValueError(
            f'layer_decay={layer_decay} is for trained layers of the backbone, and with train="none" there are none'
        )


def check_adapters(train: Any, adapters: Iterable[str], network: nn.Module) -> None:
    """Warn if the network has adapters and none of them is trained."""
    parameters = [parameter for path in adapters for parameter in network.get_submodule(path).parameters()]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        rank_zero_warn(
            f'the adapters of lora are frozen, since train={train!r} names none of them; train="*lora_*" trains them'
        )


def check_dropout(train: Any, rate: float | None, layers: Iterable[nn.Module]) -> None:
    """Warn of a dropout rate of the network that is applied in frozen layers alone, which are in eval mode."""
    parts = (part for layer in layers for part in layer.modules())
    if rate and train not in ("all", "auto") and not any(isinstance(part, nn.Dropout) and part.p for part in parts):
        rank_zero_warn(
            f"drop_rate={rate} of the backbone drops nothing with train={train!r}, since the layers that drop are "
            'frozen and in eval mode; leave it out, or train="all"'
        )


def check_head(train: Any, head_init: str, refit: str, head_lr_factor: float, skip_join: str) -> None:
    """Refuse options of the head that would have no effect, or with which nothing would be trained.

    Raises:
        ValueError: An option would have no effect, or nothing would be trained.
    """
    if not 0 <= head_lr_factor < float("inf"):
        raise ValueError(f"expected head_lr_factor of at least 0, got {head_lr_factor}")
    if head_lr_factor == 0 and train == "none":
        raise ValueError(
            'with train="none" and head_lr_factor=0 nothing would be trained; for a classifier in closed form alone '
            "leave head_lr_factor out and fit with max_epochs=0"
        )
    if head_lr_factor == 0 and head_init == "zero":
        raise ValueError('head_init="zero" with head_lr_factor=0 gives no gradient; take another head_init')
    if head_lr_factor == 0 and skip_join == "linear":
        raise ValueError(
            'skip_join="linear" learns maps, and head_lr_factor=0 keeps their random values; take another skip_join'
        )
    if refit != "none" and train == "none" and skip_join != "linear":
        raise ValueError(
            f'refit="{refit}" has no effect with train="none", since the features do not change; fit with '
            f'head_init="{refit}" and max_epochs=0 instead'
        )


def kept_by_deltas(kind: type) -> set[str]:
    """The arguments of a `FineTuner`, or of a class that hands ``**kwargs`` on to it, that a delta stores."""
    found: set[str] = set()
    for base in kind.__mro__:
        if own := vars(base).get("__init__"):
            _, *parameters = inspect.signature(own).parameters.values()
            found |= {parameter.name for parameter in parameters if parameter.kind not in _SEVERAL}
            if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return found - set(_NOT_THE_MODEL)


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], tunes_the_same: Callable[[Any], bool]) -> None:
    """Refuse to resume the run of another learner or of other layers, which the saved optimiser state belongs to.

    Args:
        saved: Hyper-parameters of the checkpoint.
        now: Hyper-parameters of the model.
        tunes_the_same: Whether a value of ``train`` names the layers that the model tunes.

    Raises:
        ValueError: The run is of another learner or of other layers.
    """
    if "train" not in saved:
        raise ValueError(f"a FineTuner cannot resume the run of another learner; {_REMEDY}")
    if not tunes_the_same(saved["train"]) or listed_skips(saved["skip_from"]) != listed_skips(now["skip_from"]):
        before, after = (
            ", ".join(f"{name}={knobs[name]!r}" for name in ("train", "skip_from")) for knobs in (saved, now)
        )
        raise ValueError(f"cannot resume a run of {before} with {after}; {_REMEDY}")
