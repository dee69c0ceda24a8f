"""Deltas: the tensors that fine-tuning changed, in a file that identifies their base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ncfinetune.atomic import replacing
from ncfinetune.checksums import fingerprint
from ncfinetune.weight_files import with_own_memory

_FORMAT = "ncfinetune delta 3"
# Required metadata of a delta.
_FACTS = ("base", "base_fingerprint", "fingerprint", "knobs", "class_names", "preprocessing")


def split(state: Mapping[str, Tensor], tuned: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a state whose paths are ``tuned`` or lie in tuned modules, and all other tensors."""
    paths = set(tuned)
    prefixes = tuple(f"{path}." for path in paths)
    inside = {name: tensor for name, tensor in state.items() if name in paths or name.startswith(prefixes)}
    return inside, {name: tensor for name, tensor in state.items() if name not in inside}


def save(
    path: str | Path, tensors: Mapping[str, Tensor], frozen: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write the tensors to a safetensors file, whose metadata hold the facts, and fingerprints of base and file.

    Raises:
        ValueError: The file's name does not end in ``.safetensors``.
    """
    check_suffix(path)
    facts = {**facts, "base_dtype": _dtype(frozen)}
    metadata = {"format": _FORMAT, "base_fingerprint": fingerprint(as_tuned_on(frozen, facts))}
    metadata |= {name: json.dumps(fact) for name, fact in facts.items()}
    metadata["fingerprint"] = fingerprint(tensors, metadata)
    with replacing(path) as part:
        save_file(with_own_memory(tensors), part, metadata)


def _dtype(tensors: Mapping[str, Tensor]) -> str | None:
    """The narrowest floating-point type that holds the tensors' values exactly; None if there is none.

    It is that of a run that has rounded them, also where they have been cast back.
    """
    numbers = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        if all(tensor.to(dtype).to(tensor.dtype).equal(tensor) for tensor in numbers):
            return str(dtype).removeprefix("torch.")
    return None


def as_tuned_on(frozen: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The frozen tensors in the floating-point type in which the delta of these facts was tuned on them.

    A run with a precision such as ``bf16-true`` casts its weights, the frozen ones too.
    """
    dtype = getattr(torch, str(facts.get("base_dtype")), None)
    if not isinstance(dtype, torch.dtype):
        return dict(frozen)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in frozen.items()}


def start_of(tuned: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells the values that tuned tensors have when a fit starts, in plain types: see `check_start`."""
    dtype = _dtype(tuned)
    return {"base_dtype": dtype, "fingerprint": fingerprint(as_tuned_on(tuned, {"base_dtype": dtype}))}


def check_start(path: str | Path, facts: Mapping[str, Any], base: Mapping[str, Tensor]) -> None:
    """Refuse to average a delta with other values of the tuned tensors than those that its fit started from.

    The fingerprint of the base does not cover these, since the delta replaces them.

    Raises:
        ValueError: They are others.
    """
    start = facts.get("start")
    if start is None:
        rank_zero_warn(
            f"delta {str(path)!r} does not say which values of the tuned layers its fit started from, so that it is "
            "averaged with those of this base unchecked"
        )
    elif start["fingerprint"] != (own := fingerprint(as_tuned_on(base, start))):
        raise ValueError(
            f"delta {str(path)!r} was tuned from layers with the fingerprint {start['fingerprint']}, but those of this "
            f"base have {own}, and an average with other weights is of no use; give the checkpoint that the fit "
            "started from, or strength=1"
        )


def is_delta(path: str | Path) -> bool:
    """Whether an intact safetensors file is a delta."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format") == _FORMAT


def facts(path: str | Path) -> dict[str, Any]:
    """The metadata of a delta: ``base``, ``knobs``, ``class_names``, ``preprocessing`` and two fingerprints.

    Of a delta that records them also ``base_dtype``, the type to which its run has rounded the frozen tensors, and
    ``start``, which tells the tuned tensors that its fit started from.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no delta, or a damaged one.
    """
    return _parsed(path, _metadata(path))


def _parsed(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        return {k: v if "fingerprint" in k else json.loads(v) for k, v in metadata.items() if k != "format"}
    except ValueError as error:
        raise ValueError(f"delta {str(path)!r} is damaged: {error}; copy it anew, or fit again") from error


def _metadata(path: str | Path) -> dict[str, str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no delta {str(path)!r}; fit writes delta.safetensors beside the checkpoints")
    metadata: dict[str, str] = {}
    if Path(path).suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"delta {str(path)!r} is damaged or cut off: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is no delta; expected the delta.safetensors that fit writes")
    if missing := [name for name in _FACTS if name not in metadata]:
        raise ValueError(
            f"delta {str(path)!r} lacks {', '.join(missing)} in its metadata; expected a file that fit wrote"
        )
    return metadata


def load(
    path: str | Path, tuned: Mapping[str, Tensor], frozen: Mapping[str, Tensor], here: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a delta for a model with these tuned and frozen tensors; ``here`` has its base and options.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no delta, a delta of other options or another base, or its tensors are not the tuned
            ones or not as they were saved.
    """
    metadata, here = _metadata(path), json.loads(json.dumps(here))
    there = _parsed(path, metadata)
    for name in ("num_classes", "train", "skip_from", "skip_join"):
        ours, theirs = here["knobs"].get(name), there["knobs"].get(name)
        if ours != theirs:
            raise ValueError(f"delta {str(path)!r} was tuned with {name}={theirs!r}, but the model has {ours!r}")
    own = fingerprint(as_tuned_on(frozen, there))
    if there["base"] != here["base"] or there["base_fingerprint"] != own:
        raise ValueError(
            f"delta {str(path)!r} belongs to another base: it was tuned on {there['base']} whose frozen weights have "
            f"the fingerprint {there['base_fingerprint']}, but this base is {here['base']} with {own}; "
            "start from the checkpoint that it was tuned on"
        )
    tensors = load_file(path)
    if wrong := _wrong(tensors, tuned):
        raise ValueError(f"delta {str(path)!r} {wrong}; expected the tensors of the tuned layers and no others")
    if metadata.pop("fingerprint") != fingerprint(tensors, metadata):
        raise ValueError(f"delta {str(path)!r} is damaged: its checksum is wrong; copy it anew, or fit again")
    return tensors


def _wrong(tensors: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> str | None:
    """Why the tensors cannot be values of the tuned tensors; None if they can."""
    if missing := [name for name in tuned if name not in tensors]:
        return f"lacks {', '.join(missing[:3])}"
    if further := [name for name in tensors if name not in tuned]:
        return f"holds {', '.join(further[:3])}, which was not tuned"
    if other := [name for name in tuned if tensors[name].shape != tuned[name].shape]:
        return f"has {other[0]} as {tuple(tensors[other[0]].shape)} for {tuple(tuned[other[0]].shape)}"
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return f"has values in {broken[0]} that are not finite" if broken else None


def check_strength(strength: float, facts: Mapping[str, Any]) -> None:
    """Refuse a strength that is not allowed for a delta with these facts.

    Raises:
        ValueError: The strength is outside 0..1, or below 1 for adapters.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"expected a strength from 0, the base, to 1, the delta, got {strength}")
    if strength != 1 and "lora" in facts["base"]:
        raise ValueError(
            f"strength={strength} averages weights, but the factors of adapters cannot be averaged; take 1"
        )


def average(base: Mapping[str, Tensor], state: Mapping[str, Tensor], strength: float) -> None:
    """Set the floating-point tensors of a state to ``base + strength * (state - base)``."""
    # All before any is set, since a tensor that is used in several places has several names.
    between = {
        name: torch.lerp(before, state[name], strength) for name, before in base.items() if before.is_floating_point()
    }
    for name, tensor in between.items():
        state[name].copy_(tensor)


def check_suffix(path: str | Path) -> None:
    """Refuse a file of another suffix.

    Raises:
        ValueError: The file's name does not end in ``.safetensors``.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"expected a file name that ends in .safetensors, got {str(path)!r}")
