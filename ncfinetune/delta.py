"""Deltas: the tensors that fine-tuning changed, in a file that identifies their base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ncfinetune.atomic import replacing
from ncfinetune.backbone import Backbone
from ncfinetune.checksums import fingerprint
from ncfinetune.weight_files import save as save_weights
from ncfinetune.weight_files import with_own_memory

_FORMAT = "ncfinetune delta 3"
# Required metadata of a delta.
_FACTS = ("base", "base_fingerprint", "fingerprint", "knobs", "class_names", "preprocessing")
# Names of the preprocessing in timm's ``pretrained_cfg``.
_TIMMS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# Relative to the largest logit: the difference that float32 rounding may cause between the two networks.
_ROUNDING = 1e-3
# The remedy where timm's network cannot hold ours.
_INSTEAD = "keep the delta, or write the network without its classifier: model.backbone.save(path)"


def split(state: Mapping[str, Tensor], tuned: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a state whose paths are ``tuned`` or lie in tuned modules, and all other tensors."""
    paths = set(tuned)
    prefixes = tuple(f"{path}." for path in paths)
    inside = {name: tensor for name, tensor in state.items() if name in paths or name.startswith(prefixes)}
    return inside, {name: tensor for name, tensor in state.items() if name not in inside}


def save(path: str | Path, tensors: Mapping[str, Tensor], base_fingerprint: str, facts: Mapping[str, Any]) -> None:
    """Write the tensors to a safetensors file, whose metadata hold the facts, and fingerprints of base and file.

    Raises:
        ValueError: The file's name does not end in ``.safetensors``.
    """
    _check_suffix(path)
    metadata = {"format": _FORMAT, "base_fingerprint": base_fingerprint}
    metadata |= {name: json.dumps(fact, default=repr) for name, fact in facts.items()}
    metadata["fingerprint"] = fingerprint(tensors, metadata)
    with replacing(path) as part:
        save_file(with_own_memory(tensors), part, metadata)


def facts(path: str | Path) -> dict[str, Any]:
    """The metadata of a delta: ``base``, ``knobs``, ``class_names``, ``preprocessing`` and two fingerprints.

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
    metadata, here = _metadata(path), json.loads(json.dumps(here, default=repr))
    there = _parsed(path, metadata)
    for name in ("num_classes", "train", "skip_from", "skip_join"):
        ours, theirs = here["knobs"].get(name), there["knobs"].get(name)
        if ours != theirs:
            raise ValueError(f"delta {str(path)!r} was tuned with {name}={theirs!r}, but the model has {ours!r}")
    own = fingerprint(frozen)
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
    for name, before in base.items():
        if before.is_floating_point():
            state[name].copy_(torch.lerp(before, state[name], strength))


def save_for_timm(
    path: str | Path, backbone: Backbone, classifier: nn.Linear | None, data: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Write a backbone and its classifier for timm; returns the arguments of `timm.create_model` that load them.

    Modules in timm's head other than the classifier are set to the identity or to 0. Before the file is written, the
    logits (without a classifier the features) of timm's network for a few images are compared with ours. The
    preprocessing and the class names in ``data`` are part of those arguments and of the file's metadata.

    Raises:
        ValueError: timm has no such network; its head cannot hold the classifier; or the file's name does not end in
            ``.safetensors``.
    """
    _check_suffix(path)
    backbone = backbone.merged()
    base = backbone.spec
    arguments = {key: value for key, value in base.items() if key not in ("name", "stem")}
    if base["stem"] != "imagenet":
        raise ValueError(f"timm has no {base['name']} with stem={base['stem']!r}; keep the delta, which supports it")
    arguments["num_classes"] = 0 if classifier is None else classifier.out_features
    made_for = getattr(getattr(backbone.net, "patch_embed", None), "img_size", None)
    if made_for and backbone.net.pretrained_cfg.get("fixed_input_size"):
        # timm would build the network for the image size, while ours may accept any size.
        arguments.setdefault("img_size", made_for)
    if overlay := _in_timms_words(data):
        arguments["pretrained_cfg_overlay"] = overlay
    images = backbone.noise(2)
    other: Any = timm.create_model(base["name"], **arguments).to(images).eval()
    with torch.no_grad():
        other.load_state_dict(backbone.net.state_dict(), strict=False)
        expected = backbone(images)
        if classifier is None:
            error = _apart(other(images), expected)
        else:
            expected = classifier(expected)
            error = _put_into(other, set(backbone.net.state_dict()), classifier, images, expected, base["name"])
    if not error < _ROUNDING:
        raise ValueError(
            f"timm's {base['name']} gives other logits with the same weights (by {error:.2g} of the largest logit), "
            f"since its head has more than the classifier; {_INSTEAD}"
        )
    save_weights(other.state_dict(), path, data)
    return base["name"], {**arguments, "checkpoint_path": str(path)}


def _in_timms_words(data: Mapping[str, Any]) -> dict[str, Any]:
    images, names = data.get("preprocessing") or {}, data.get("class_names")
    seen = {name: images[name] for name in _TIMMS if name in images}
    overlay = {name: tuple(value) if isinstance(value, list) else value for name, value in seen.items()}
    return {**overlay, **({"label_names": tuple(names)} if names else {})}


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _put_into(net: Any, known: set[str], classifier: nn.Linear, images: Tensor, expected: Tensor, name: str) -> float:
    """Copy a linear classifier into timm's own, and return by how much the logits differ then.

    If timm's network has several classifiers, either their logits are averaged (DeiT, and CrossViT, where each
    classifier takes a part of the features), or the others add to the first classifier's logits and are set to 0
    (VOLO).
    """
    names = net.pretrained_cfg["classifier"]
    heads = [net.get_submodule(head) for head in ([names] if isinstance(names, str) else names)]
    error = float("inf")
    for used in dict.fromkeys([tuple(heads), tuple(heads[:1])]):
        parts = _parts([_inputs(head) for head in used], classifier.in_features)
        if parts is None:
            continue
        _make_neutral(net, known)
        shares = len(used) * classifier.in_features / sum(map(_inputs, used))
        for head, part in zip(used, parts, strict=True):
            head.weight.copy_((classifier.weight[:, part] * shares).view(head.weight.shape))
            head.bias.copy_(classifier.bias)
        error = _apart(net(images), expected)
        if error < _ROUNDING:
            return error
    if error == float("inf"):
        kinds = ", ".join(type(head).__name__ for head in heads)
        raise ValueError(
            f"the head of timm's {name} ({kinds} of {', '.join(str(_inputs(head)) for head in heads)} features) cannot "
            f"hold a linear classifier of {classifier.in_features} features; {_INSTEAD}"
        )
    return error


def _inputs(head: nn.Module) -> int:
    """Input width of a linear layer or a 1x1 convolution; 0 for other modules."""
    if not isinstance(head, nn.Linear | nn.Conv2d) or head.bias is None:
        return 0
    return head.weight.shape[1] if head.weight[0, 0].numel() == 1 else 0


def _make_neutral(net: nn.Module, known: set[str]) -> None:
    """Neutralise layers that the backbone does not have: normalisations to the identity, extra classifiers to 0."""
    for name, module in net.named_modules():
        if any(f"{name}.{key}" in known for key, _ in module.named_parameters(recurse=False)):
            continue
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is not None:
            module.reset_running_stats()
            nn.init.zeros_(module.bias)
            nn.init.constant_(module.weight, (1 + module.eps) ** 0.5)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def _parts(widths: list[int], width: int) -> list[slice] | None:
    """The features that each classifier takes: all, or consecutive parts; None if the widths do not add up."""
    parts, start = [], 0
    for own in widths:
        parts.append(slice(start, start + own))
        start = (start + own) % width
        if own < 1 or parts[-1].stop > width:
            return None
    return parts if start == 0 else None


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"expected a file name that ends in .safetensors, got {str(path)!r}")
