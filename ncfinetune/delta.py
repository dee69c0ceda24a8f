"""Deltas: the tensors that fine-tuning changed, in a file that names the base they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_FORMAT = "ncfinetune delta 1"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()[:16]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def split(state: Mapping[str, Tensor], tuned: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a state that lie in the ``tuned`` modules, and the others."""
    prefixes = tuple(f"{path}." for path in tuned)
    inside = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
    return inside, {name: tensor for name, tensor in state.items() if name not in inside}


def save(
    path: str | Path, tensors: Mapping[str, Tensor], frozen: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write the tensors to a safetensors file, whose metadata hold the facts and the fingerprint of the frozen ones.

    Raises:
        ValueError: The file's name does not end in ``.safetensors``.
    """
    _check_suffix(path)
    metadata = {"format": _FORMAT, "base_fingerprint": fingerprint(frozen)}
    metadata |= {name: json.dumps(fact, default=repr) for name, fact in facts.items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def facts(path: str | Path) -> dict[str, Any]:
    """What a delta says of itself: ``base``, ``base_fingerprint``, ``knobs``, ``class_names``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no delta.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no delta {str(path)!r}; fit leaves delta.safetensors beside the checkpoints")
    metadata: dict[str, str] = {}
    if Path(path).suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    if metadata.pop("format", None) != _FORMAT:
        raise ValueError(f"{str(path)!r} is no delta; expected the delta.safetensors that fit leaves")
    own = metadata.pop("base_fingerprint")
    return {"base_fingerprint": own, **{name: json.loads(fact) for name, fact in metadata.items()}}


def load(path: str | Path, frozen: Mapping[str, Tensor], here: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a delta for a model with these frozen tensors and, ``here``, this base and these knobs.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no delta, or one of other knobs or another base.
    """
    there, here = facts(path), json.loads(json.dumps(here, default=repr))
    for name in ("num_classes", "train", "skip_from", "skip_join"):
        ours, theirs = here["knobs"].get(name), there["knobs"].get(name)
        if ours != theirs:
            raise ValueError(f"delta {str(path)!r} was tuned with {name}={theirs!r}, and the model has {ours!r}")
    own = fingerprint(frozen)
    if there["base"] != here["base"] or there["base_fingerprint"] != own:
        raise ValueError(
            f"delta {str(path)!r} belongs to another base: it was tuned on {there['base']} whose frozen weights have "
            f"the fingerprint {there['base_fingerprint']}, and this is {here['base']} with {own}; "
            "start from the checkpoint that it was tuned on"
        )
    return load_file(path)


def save_for_timm(
    path: str | Path, net: Any, base: dict[str, Any], classifier: torch.nn.Linear | None
) -> tuple[str, dict[str, Any]]:
    """Write a timm network and its classifier under timm's names; returns what `timm.create_model` takes to load them.

    Raises:
        ValueError: timm has no such network; or the file's name does not end in ``.safetensors``.
    """
    _check_suffix(path)
    arguments = {key: value for key, value in base.items() if key not in ("name", "stem")}
    if base["stem"] != "imagenet":
        raise ValueError(f"timm has no {base['name']} with stem={base['stem']!r}; keep the delta, which has")
    weights = dict(net.state_dict())
    if classifier is not None:
        names = net.pretrained_cfg["classifier"]
        for name in [names] if isinstance(names, str) else names:  # DeiT has two and takes the mean of their logits
            weights |= {f"{name}.{key}": tensor.clone() for key, tensor in classifier.state_dict().items()}
    arguments["num_classes"] = 0 if classifier is None else classifier.out_features
    timm.create_model(base["name"], **arguments).load_state_dict(weights)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
    return base["name"], {**arguments, "checkpoint_path": str(path)}


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"expected a file name that ends in .safetensors, got {str(path)!r}")
