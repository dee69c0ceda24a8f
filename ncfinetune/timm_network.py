"""timm's own network with a learner's weights: the classifier moved into timm's head, and compared with ours.

Legend: ``N`` images, ``K`` classes, ``d`` width of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ncfinetune.backbone import Backbone
from ncfinetune.delta import check_suffix
from ncfinetune.weight_files import save as save_weights

# Names of the preprocessing in timm's ``pretrained_cfg``.
_TIMMS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# Relative to the largest logit: the difference that float32 rounding may cause between two forms of a network.
ROUNDING = 1e-3
# The remedy where timm's network cannot hold ours.
_INSTEAD = "keep the delta, or write the network without its classifier: model.backbone.save(path)"


class NotTimmsError(ValueError):
    """timm has no network that computes what ours does."""


def timm_network(
    backbone: Backbone, classifier: nn.Linear | None, data: Mapping[str, Any]
) -> tuple[nn.Module, str, dict[str, Any]]:
    """A network of timm with our weights, and the name and arguments with which `timm.create_model` makes it.

    Modules in timm's head other than the classifier are set to the identity or to 0. The logits (without a classifier
    the features) of timm's network for a few images are compared with ours.

    Args:
        backbone: The network, in eval mode; its adapters are merged.
        classifier: Maps its features ``(N, d)`` to logits ``(N, K)``; None exports the features.
        data: The preprocessing and the class names, which become part of the arguments.

    Raises:
        NotTimmsError: timm has no such network, or its head cannot hold the classifier.
    """
    backbone = backbone.merged()
    base = backbone.spec
    arguments = {key: value for key, value in base.items() if key not in ("name", "stem")}
    if base["stem"] != "imagenet":
        raise NotTimmsError(f"timm has no {base['name']} with stem={base['stem']!r}")
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
            error = apart(other(images), expected)
        else:
            expected = classifier(expected)
            error = _put_into(other, set(backbone.net.state_dict()), classifier, images, expected, base["name"])
    if not error < ROUNDING:
        raise NotTimmsError(
            f"timm's {base['name']} gives other logits with the same weights (by {error:.2g} of the largest logit), "
            "since its head has more than the classifier"
        )
    return other, base["name"], arguments


def save_for_timm(
    path: str | Path, backbone: Backbone, classifier: nn.Linear | None, data: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Write a backbone and its classifier for timm; returns the arguments of `timm.create_model` that load them.

    The preprocessing and the class names in ``data`` are part of those arguments and of the file's metadata. Where
    ``stored_size`` is another side than that of ``input_size``, timm's transform is for images that were cropped and
    resized to ``stored_size`` before.

    Raises:
        ValueError: timm has no such network; its head cannot hold the classifier; or the file's name does not end in
            ``.safetensors``.
    """
    check_suffix(path)
    try:
        other, name, arguments = timm_network(backbone, classifier, data)
    except NotTimmsError as error:
        raise ValueError(f"{error}; {_INSTEAD}") from error
    save_weights(other.state_dict(), path, data)
    return name, {**arguments, "checkpoint_path": str(path)}


def _in_timms_words(data: Mapping[str, Any]) -> dict[str, Any]:
    images, names = data.get("preprocessing") or {}, data.get("class_names")
    seen = {name: images[name] for name in _TIMMS if name in images}
    if "stored_size" in images and images["stored_size"] != images["input_size"][1]:
        seen["crop_pct"] = 1.0  # Of an image that was cropped when it was decoded to stored_size, as the card does it.
    overlay = {name: tuple(value) if isinstance(value, list) else value for name, value in seen.items()}
    return {**overlay, **({"label_names": tuple(names)} if names else {})}


def apart(found: Tensor, expected: Tensor) -> float:
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
        error = apart(net(images), expected)
        if error < ROUNDING:
            return error
    if error == float("inf"):
        kinds = ", ".join(type(head).__name__ for head in heads)
        raise NotTimmsError(
            f"the head of timm's {name} ({kinds} of {', '.join(str(_inputs(head)) for head in heads)} features) cannot "
            f"hold a linear classifier of {classifier.in_features} features"
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
