"""Learners restored from what a run has saved: a checkpoint, or a delta and its base."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncfinetune import delta
from ncfinetune.contrastive import SimCLR, SupCon
from ncfinetune.finetune import FineTuner
from ncfinetune.learner import OF_THE_RUN, Learner
from ncfinetune.resume import NUMBERS
from ncfinetune.supervised import Supervised
from ncfinetune.weight_files import read

# The learners by an argument that tells them apart: checkpoints name the class only if the command line made them.
# SupCon and SimCLR have the same arguments, and the same network.
_KINDS: dict[type[Learner], str] = {
    FineTuner: "train",
    Supervised: "mse_weight",
    SupCon: "temperature",
    SimCLR: "temperature",
}
# The word for timm's weights in place of a file of the base.
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Restored:
    """A learner in eval mode, on the CPU.

    Attributes:
        learner: The learner.
        source: The file that it was restored from.
        base: The base that was given for a delta.
        step: Steps of the optimiser that it was trained for; None if the file does not say.
        measured: Whether the run's numbers of that step are of these weights, and not of those that they replaced.
    """

    learner: Learner
    source: Path
    base: str | None = None
    step: int | None = None
    measured: bool = True


def restore(path: str | Path, base: str | None = None) -> Restored:
    """The learner of a checkpoint or a delta; no code of the file is run.

    Args:
        path: A checkpoint that a Trainer saved of one of our learners, or a delta (``.safetensors``).
        base: For a delta: the file with the weights of its base, or ``pretrained`` for timm's.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is neither, is damaged, or is of another class than our learners; a delta whose base is
            another; a base for a checkpoint, which needs none.
    """
    if Path(path).suffix == ".safetensors":
        started = {"pretrained": True} if base == PRETRAINED else {"checkpoint": base}
        return Restored(FineTuner.from_delta(path, **started), Path(path), base)
    if base is not None:
        raise ValueError(f"base={base!r} is for a delta, while a checkpoint such as {str(path)!r} has all weights")
    content, _ = read(path)
    hparams, state = content.get("hyper_parameters"), content.get("state_dict")
    if not isinstance(hparams, Mapping) or not isinstance(state, Mapping):
        raise ValueError(
            f"{str(path)!r} holds weights but not which network they are of; expected a checkpoint that a Trainer "
            "saved, such as RUN/checkpoints/NAME.ckpt"
        )
    kind = _kind(path, hparams)
    taken = set(inspect.signature(kind).parameters) - set(OF_THE_RUN)
    try:
        learner = kind(**{name: value for name, value in hparams.items() if name in taken})
        learner.load_state_dict(dict(state))
    except (RuntimeError, TypeError) as error:
        found = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is no checkpoint of a {kind.__name__} of this version: {found}") from error
    learner.on_load_checkpoint(content)
    return Restored(learner.eval(), Path(path), None, content.get("global_step"), content.get(NUMBERS) != {})


def has_all_weights(path: str | Path) -> bool:
    """Whether a file of weights can be used as it is: it is no delta, and has no adapters."""
    content, _ = read(path)
    if Path(path).suffix == ".safetensors" and delta.is_delta(path):
        return False
    hparams = content.get("hyper_parameters")
    spec = hparams.get("backbone") if isinstance(hparams, Mapping) else None
    return not (isinstance(spec, Mapping) and spec.get("lora"))


def _kind(path: str | Path, hparams: Mapping[str, Any]) -> type[Learner]:
    """The class of a checkpoint: the one that it names, or else the one whose arguments it has."""
    named = str(hparams.get("_class_path", "")).rpartition(".")[2]
    for kind, argument in _KINDS.items():
        if named == kind.__name__ or (not named and argument in hparams):
            return kind
    raise ValueError(
        f"{str(path)!r} is a checkpoint of {named or 'another class'}; expected one of "
        f"{', '.join(kind.__name__ for kind in _KINDS)}"
    )
