"""What a run of fine-tuning must not change: noted at its start, put back where callbacks average, compared after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, callbacks
from torch import Tensor, nn

from ncfinetune.checksums import fingerprint

# Share of random values from which on a network is not pre-trained.
_RANDOM = 0.5
# They average or replace weights, frozen ones too. Older versions of Lightning have only the first.
_AVERAGING = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")
    if hasattr(callbacks, name)
)


class Frozen:
    """The frozen tensors of a run, by name.

    Callbacks that average weights do not know that some are frozen: they are off by the rounding error of a mean of
    equal numbers, or their statistics of normalisation are reset. Under such a callback a copy is kept on the CPU and
    put back. Whatever else changes them is found out when the run ends.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._kept: dict[str, Tensor] = {}
        self._trained: dict[str, bool] = {}

    def remember(self, frozen: Mapping[str, Tensor], module: nn.Module, trainer: Any) -> None:
        """Record the frozen tensors, which parameters train, and whether a callback of the trainer averages weights."""
        self._digests = _digests(frozen)
        self._trained = _trained(module)
        if any(isinstance(callback, _AVERAGING) for callback in trainer.callbacks):
            self._kept = {name: tensor.detach().cpu().clone() for name, tensor in frozen.items()}

    def restore(self, module: nn.Module) -> None:
        """Put the frozen tensors back, if some callback may have changed them.

        Raises:
            ValueError: Other parameters require a gradient than at the start of the run.
        """
        now = _trained(module)
        # A pruned parameter gets another name.
        if other := [name for name, trains in self._trained.items() if now.get(name, trains) != trains]:
            raise ValueError(
                f"something changed in the run whether {_some(other)} train, which a FineTuner's optimiser and "
                "delta know nothing of; say it by train=..., in a run of its own"
            )
        if self._kept:
            state = module.state_dict()
            for name, tensor in self._kept.items():
                state[name].copy_(tensor)

    def restore_in(self, state: dict[str, Tensor]) -> None:
        """Put the frozen tensors into a state that is about to be saved."""
        state |= {name: tensor.to(state[name].device) for name, tensor in self._kept.items()}

    def check(self, frozen: Mapping[str, Tensor]) -> None:
        """See that the tensors are those of the start.

        Raises:
            ValueError: Some have changed.
        """
        now = _digests(frozen)
        if changed := [name for name, digest in self._digests.items() if now.get(name) != digest]:
            raise ValueError(
                f"something changed frozen tensors in the run: {_some(changed)}; a delta would not give this model "
                "again, so none is written. Leave out the callback that changes them, or train those layers"
            )


def refuse_tuners(module: nn.Module, trainer: Any) -> None:
    """Refuse callbacks that decide by themselves which layers train, or that change what is frozen.

    Raises:
        ValueError: There is one.
    """
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if isinstance(callback, callbacks.BaseFinetuning):
            raise ValueError(
                f"{name} unfreezes layers in the run, and a FineTuner's train says which layers train from start to "
                "end; leave it out, or start a second run with other layers from the first one's checkpoint"
            )
        pruned = getattr(callback, "_parameters_to_prune", None) if isinstance(callback, callbacks.ModelPruning) else ()
        if any(id(getattr(layer, weight)) in frozen for layer, weight in pruned or ()):
            raise ValueError(f"{name} would prune frozen layers; give it parameters_to_prune that train")


def refuse_averages(trainer: Any) -> None:
    """Refuse callbacks that average weights, where the classifier is a closed form of the features.

    Raises:
        ValueError: There is one.
    """
    if averaging := [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, _AVERAGING)]:
        raise ValueError(
            f"{averaging[0]} averages weights, and an average of refitted classifiers is not the closed form on "
            'averaged features; leave it out, or say refit="none"'
        )


def average_anew(trainer: Any, module: LightningModule) -> None:
    """Have callbacks that average weights copy the module again, which they do before it is set up."""
    for callback in trainer.callbacks:
        if isinstance(callback, _AVERAGING):
            callback.setup(trainer, module, "fit")


def refuse_random(network: nn.Module, random: Mapping[str, nn.Parameter]) -> None:
    """Refuse a network that nothing pre-trained, or with frozen parameters that are still ``random``.

    Raises:
        ValueError: It is one.
    """
    if sum(p.numel() for p in random.values()) > _RANDOM * sum(p.numel() for p in network.parameters()):
        raise ValueError(
            "the backbone is at its random start, with nothing to fine-tune; give a checkpoint, or pretrained=true "
            "among the backbone's arguments (allow_random=true runs all the same)"
        )
    if frozen := [name for name, p in random.items() if not p.requires_grad]:
        raise ValueError(
            f"frozen layers are at their random start, since no file gave {_some(frozen)}; name them in train, or give "
            "weights that have them (allow_random=true runs all the same)"
        )


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}


def _trained(module: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in module.named_parameters()}


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
