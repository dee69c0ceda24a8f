"""A folder that timm loads, ``timm.create_model("local-dir:FOLDER", pretrained=True)``, and so does Hugging Face's hub.

It holds the weights, ``config.json`` with architecture, preprocessing and class names, and a model card.

Legend: ``K`` classes, ``d`` width of the features, ``p`` width of a projection.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ncfinetune.atomic import sync, unwritten
from ncfinetune.contrastive import Contrastive
from ncfinetune.finetune import FineTuner
from ncfinetune.learner import Learner
from ncfinetune.supervised import Supervised
from ncfinetune.texts import some
from ncfinetune.timm_network import ROUNDING, NotTimmsError, apart, timm_network
from ncfinetune.weight_files import save

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# Entries of timm's configuration that belong to the architecture. The others, such as licence and origin, belong to
# timm's own weights, which ours need not come from.
_KEPT = ("fixed_input_size", "first_conv", "classifier", "pool_size")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything other than an earlier export.

    Raises:
        ValueError: It is a file, or holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; name a folder that is new, empty or an earlier export")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in there if name not in (WEIGHTS, CONFIG, CARD)]:
        raise ValueError(
            f"the folder {str(folder)!r} holds {some(others, 3)}; name one that is new, empty or an earlier export"
        )


def write_folder(folder: Path, learner: Learner, card: str) -> float:
    """Write weights, configuration and card; the files are put into the folder once timm has loaded them and agrees.

    Returns:
        The largest difference of the logits (without a classifier the features) of timm's network, relative to the
        largest.

    Raises:
        NotTimmsError: timm has no network that computes what the learner's does.
        ValueError: The folder holds other files.
    """
    check_folder(folder)
    folder = folder.absolute()  # which has a name, unlike "."
    classifier = linear_classifier(learner)
    data = {"class_names": learner.class_names if classifier else None, "preprocessing": learner.preprocessing}
    net, name, arguments = timm_network(learner.backbone, classifier, data)
    config = _config(net, name, arguments)
    part = folder.with_name(f".{folder.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        save(net.state_dict(), part / WEIGHTS, data)
        (part / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (part / CARD).write_text(card, encoding="utf-8")
        difference = _difference(part, config, learner, classifier)
        folder.mkdir(exist_ok=True)
        for file in (WEIGHTS, CONFIG, CARD):
            sync(part / file)
            (part / file).replace(folder / file)
        sync(folder)
    except OSError as error:
        raise unwritten(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return difference


def linear_classifier(learner: Learner) -> nn.Linear | None:
    """The one linear layer ``(K, d)`` from the backbone's features to the logits; None of a learner without classifier.

    A linear projection ``P (p, d)`` with bias ``b`` before a classifier ``W (K, p)`` with bias ``c`` is the classifier
    ``W P`` with the bias ``W b + c``.

    Raises:
        NotTimmsError: There is more than a linear layer between features and logits.
    """
    if isinstance(learner, Contrastive):
        return None
    name = learner.backbone.spec["name"]
    head: Any = learner.head
    if isinstance(learner, FineTuner) and not isinstance(head, nn.Linear):
        raise NotTimmsError(f"timm's {name} has no skip connections to its classifier, and this network has some")
    projection = learner.projection if isinstance(learner, Supervised) else nn.Identity()
    if isinstance(projection, nn.Identity):
        return head
    if not isinstance(projection, nn.Linear):
        raise NotTimmsError(f"timm's {name} has no MLP projection before its classifier, and this network has one")
    joined = nn.Linear(projection.in_features, head.out_features)
    with torch.no_grad():
        joined.weight.copy_(head.weight @ projection.weight)
        joined.bias.copy_(head.weight @ projection.bias + head.bias)
    return joined


def _config(net: Any, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says, as timm's `save_config_for_hf` writes it."""
    overlay = dict(arguments.get("pretrained_cfg_overlay", {}))
    names = overlay.pop("label_names", None)
    kept = {key: net.pretrained_cfg[key] for key in _KEPT if net.pretrained_cfg.get(key) is not None}
    made = {key: value for key, value in arguments.items() if key not in ("num_classes", "pretrained_cfg_overlay")}
    if overlay.get("input_size", (3,))[0] not in (1, 3):
        # Before 1.0.31, timm discards the first convolution of other numbers of channels and draws a random one.
        kept["first_conv"] = None
    return {
        "architecture": name.partition(".")[0],
        "num_classes": arguments["num_classes"],
        "num_features": net.num_features,
        **({"label_names": names} if names else {}),
        **({"model_args": made} if made else {}),
        "pretrained_cfg": {**kept, **overlay, "num_classes": arguments["num_classes"]},
    }


def _difference(folder: Path, config: Mapping[str, Any], learner: Learner, classifier: nn.Linear | None) -> float:
    """By how much the network that timm loads differs; without ``local-dir:``, which timm knows since 1.0.16."""
    settings = {**config["pretrained_cfg"], "file": str(folder / WEIGHTS), "label_names": config.get("label_names")}
    loaded: Any = timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg=settings, **config.get("model_args", {})
    )
    images = learner.backbone.noise(2)
    with torch.no_grad():
        features: Tensor = learner.backbone(images)
        error = apart(loaded.to(images).eval()(images), features if classifier is None else classifier(features))
    if not error < ROUNDING:
        raise NotTimmsError(
            f"timm's {config['architecture']} loads other weights than were written, which changes the outputs by "
            f"{error:.2g} of the largest"
        )
    return error
