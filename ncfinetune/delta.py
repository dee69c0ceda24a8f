"""Deltas: the tensors that fine-tuning changed, in a file that names the base they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ncfinetune.atomic import replacing
from ncfinetune.weights import save as save_weights

_FORMAT = "ncfinetune delta 2"
# What a delta has to say of itself.
_FACTS = ("base", "base_fingerprint", "fingerprint", "knobs", "class_names", "preprocessing")
# What timm calls the ways of making images ready for a network, in its ``pretrained_cfg``.
_TIMMS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


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


def save(path: str | Path, tensors: Mapping[str, Tensor], base_fingerprint: str, facts: Mapping[str, Any]) -> None:
    """Write the tensors to a safetensors file, whose metadata hold the facts, and the fingerprints of base and tensors.

    Raises:
        ValueError: The file's name does not end in ``.safetensors``.
    """
    _check_suffix(path)
    metadata = {"format": _FORMAT, "base_fingerprint": base_fingerprint, "fingerprint": fingerprint(tensors)}
    metadata |= {name: json.dumps(fact, default=repr) for name, fact in facts.items()}
    with replacing(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)


def facts(path: str | Path) -> dict[str, Any]:
    """What a delta says of itself: ``base``, ``knobs``, ``class_names``, ``preprocessing`` and two fingerprints.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no delta, or a damaged one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no delta {str(path)!r}; fit leaves delta.safetensors beside the checkpoints")
    metadata: dict[str, str] = {}
    if Path(path).suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"delta {str(path)!r} is damaged or cut off: {error}") from error
    if metadata.pop("format", None) != _FORMAT:
        raise ValueError(f"{str(path)!r} is no delta; expected the delta.safetensors that fit leaves")
    if missing := [name for name in _FACTS if name not in metadata]:
        raise ValueError(f"delta {str(path)!r} does not say its {', '.join(missing)}; expected a file as fit leaves it")
    return {name: fact if "fingerprint" in name else json.loads(fact) for name, fact in metadata.items()}


def load(
    path: str | Path, tuned: Mapping[str, Tensor], frozen: Mapping[str, Tensor], here: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a delta for a model with these tuned and frozen tensors and, ``here``, this base and these knobs.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no delta, one of other knobs or another base, or its tensors are not those of the tuned
            layers as they were saved.
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
    tensors = load_file(path)
    if wrong := _wrong(tensors, tuned):
        raise ValueError(f"delta {str(path)!r} {wrong}; expected the tensors of the tuned layers and no others")
    if there["fingerprint"] != fingerprint(tensors):
        raise ValueError(f"delta {str(path)!r} is damaged: its tensors are not those that were saved")
    return tensors


def _wrong(tensors: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> str | None:
    """What keeps the tensors from being values of the tuned ones."""
    if missing := [name for name in tuned if name not in tensors]:
        return f"lacks {', '.join(missing[:3])}"
    if further := [name for name in tensors if name not in tuned]:
        return f"holds {', '.join(further[:3])}, which was not tuned"
    if other := [name for name in tuned if tensors[name].shape != tuned[name].shape]:
        return f"has {other[0]} as {tuple(tensors[other[0]].shape)} for {tuple(tuned[other[0]].shape)}"
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return f"has values in {broken[0]} that are not finite" if broken else None


def save_for_timm(
    path: str | Path, net: Any, base: dict[str, Any], classifier: torch.nn.Linear | None, data: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Write a timm network and its classifier under timm's names; returns what `timm.create_model` takes to load them.

    What the ``data`` say of images and classes is in those arguments and in the file's metadata.

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
    if net.pretrained_cfg.get("fixed_input_size") and hasattr(net, "patch_embed"):
        # timm would make the network for the size of the images, and ours may be one that takes any.
        arguments.setdefault("img_size", net.patch_embed.img_size)
    if overlay := _in_timms_words(data):
        arguments["pretrained_cfg_overlay"] = overlay
    timm.create_model(base["name"], **arguments).load_state_dict(weights)
    save_weights(weights, path, data)
    return base["name"], {**arguments, "checkpoint_path": str(path)}


def _in_timms_words(data: Mapping[str, Any]) -> dict[str, Any]:
    images, names = data.get("preprocessing") or {}, data.get("class_names")
    seen = {name: images[name] for name in _TIMMS if name in images}
    overlay = {name: tuple(value) if isinstance(value, list) else value for name, value in seen.items()}
    return {**overlay, **({"label_names": tuple(names)} if names else {})}


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"expected a file name that ends in .safetensors, got {str(path)!r}")
