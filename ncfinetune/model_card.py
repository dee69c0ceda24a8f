"""The model card of an exported network: what it is, what it was made from and how good it is, as far as is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ncfinetune import __version__
from ncfinetune.classifier import Classifier
from ncfinetune.contrastive import Contrastive
from ncfinetune.learner import Learner
from ncfinetune.restoring import PRETRAINED, Restored
from ncfinetune.runs import Run
from ncfinetune.sample_statistics import wilson
from ncfinetune.settings import method_name, task_name
from ncfinetune.texts import some

# More classes than this are not listed; config.json has all.
_LISTED = 20
# Arguments of datamodules that are paths of the machine that trained.
_PATHS = ("root", "folders", "labels", "file", "train", "val", "test", "sizes", "cache_dir")
_USE = """```python
import numpy as np
import timm
import torch
from PIL import Image, ImageOps
{imports}
model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # from timm 1.0.16 on; on the hub "hf-hub:..."
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("image.jpg")
image.draft("RGB", ({side}, {side}))  # as in training: much larger JPEGs are decoded at a part of their size
image = ImageOps.exif_transpose(image)
if image.mode.startswith(("I", "F")):  # grey of more than 8 bits: {black} is black, {white} white
    grey = (np.asarray(image, np.float32) - {black}) * (255 / ({white} - {black}))
    image = Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8))
image = image.convert("{mode}")
{resized}with torch.no_grad():
    {outputs} = model(transform(image)[None])[0]
{last}```"""
# Where images are decoded to another side than the network's, which timm's configuration has no word for.
_IMPORTS = "from torchvision import transforms\n"
_RESIZED = """# The images of the training were stored at {stored}x{stored}, and resized from there.
steps = [transforms.Resize({shorter}), transforms.CenterCrop({stored}), transforms.ToTensor()]
image = transforms.Compose(steps)(image)
"""
_SOFTMAX = "probabilities = logits.softmax(0)\n"
_OF_SQUARES = """positive = logits.clamp(min=0)
largest = torch.nn.functional.one_hot(logits.argmax(), len(logits)).to(logits)
probabilities = positive / positive.sum() if positive.any() else largest
"""
_NAMED = """print(model.pretrained_cfg["label_names"][int(probabilities.argmax())], float(probabilities.max()))
"""


def model_card(name: str, restored: Restored) -> str:
    """The text of a README.md with the front matter of Hugging Face's hub.

    The run's folder, two above a checkpoint, tells base, data and numbers, if it is there. Its numbers are those that
    were logged at the checkpoint's step; what is not known is left out.
    """
    learner, run = restored.learner, _run_of(restored.source)
    base, hub, licence = _base(restored, run)
    numbers = _numbers(run, restored) if run else {}
    task = task_name(run.part("data"), _PATHS) if run else None
    front = {
        **({"license": licence} if licence else {}),
        "library_name": "timm",
        "pipeline_tag": "image-classification" if isinstance(learner, Classifier) else "image-feature-extraction",
        "tags": ["timm", "ncfinetune"],
        **({"base_model": hub} if hub else {}),
        **_index(name, task, numbers),
    }
    rows = {
        "architecture": _architecture(learner),
        "base": base,
        "licence of the base": licence,
        "data": _data(run, task),
        "classes": _classes(learner),
        "images": _images(learner),
        "method": method_name(_model_part(learner, run)),
        "trained": _trained(learner),
        **_measured(numbers),
    }
    table = [f"| {key} | {_cell(text)} |" for key, text in rows.items() if text]
    kind = "classifies images" if isinstance(learner, Classifier) else "maps images to features"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"A network that {kind}, exported by ncfinetune {__version__}.",
        "\n".join(["| | |", "|---|---|", *table]),
        _use(name, learner),
    ]
    return "\n\n".join(parts) + "\n"


def _run_of(source: Path) -> Run | None:
    """The run that a checkpoint lies in; None if there is no folder of one."""
    run = Run(source.resolve().parent.parent)
    with suppress(ValueError, OSError):
        return run if run.config else None
    return None


def _model_part(learner: Learner, run: Run | None) -> Mapping[str, Any]:
    """The configuration of the model: the run's, with the layers that the checkpoint has, or what the latter says."""
    named = run.part("model").get("class_path") if run else None
    return {"class_path": named or type(learner).__name__, "init_args": dict(learner.hparams)}


def _base(restored: Restored, run: Run | None) -> tuple[str | None, str | None, str | None]:
    """The weights that training started from: in words, on the hub, and their licence; None where it is unknown."""
    arguments = run.part("model").get("init_args") if run else None
    arguments = arguments if isinstance(arguments, Mapping) else {}
    backbone = arguments.get("backbone")
    options = backbone if isinstance(backbone, Mapping) else {}
    source = arguments.get("checkpoint") or options.get("checkpoint")
    pretrained = bool(options.get("pretrained"))
    if restored.base is not None:
        source, pretrained = (None, True) if restored.base == PRETRAINED else (restored.base, False)
    if source:
        path = source.get("path") if isinstance(source, Mapping) else source
        return f"weights of the file {Path(str(path)).name}", None, None
    if pretrained:
        known = restored.learner.backbone.net.pretrained_cfg
        hub = known.get("hf_hub_id")
        return f"timm's weights, {hub or known.get('tag')}", hub, known.get("license")
    return ("none: trained from random weights" if run else None), None, None


def _architecture(learner: Learner) -> str:
    spec = {key: value for key, value in learner.backbone.spec.items() if key not in ("name", "lora")}
    spec = {key: value for key, value in spec.items() if (key, value) != ("stem", "imagenet")}
    options = ", ".join(f"{key}={value}" for key, value in spec.items())
    return learner.backbone.spec["name"] + (f" ({options})" if options else "")


def _data(run: Run | None, task: str | None) -> str | None:
    arguments = run.part("data").get("init_args") if run else None
    root = arguments.get("root") if isinstance(arguments, Mapping) else None
    return f"{task}, folder {Path(str(root)).name}" if root else task


def _classes(learner: Learner) -> str | None:
    names = learner.class_names
    if not isinstance(learner, Classifier) or not names:
        return None
    return f"{len(names)}: {some(names, _LISTED)}"


def _images(learner: Learner) -> str:
    seen = learner.preprocessing or {}
    channels, height, width = seen["input_size"]
    words = [f"{height}x{width}, {'grey' if channels == 1 else 'colour' if channels == 3 else f'{channels} channels'}"]
    stored = seen.get("stored_size", height)
    words += [f"resized from {stored}x{stored}"] if stored != height else []
    words += [f"{key} {seen[key]}" for key in ("interpolation", "crop_pct", "mean", "std") if key in seen]
    words += (
        [f"black and white are {seen['value_range']} in files of more than 8 bits"] if seen.get("value_range") else []
    )
    return ", ".join(words)


def _trained(learner: Learner) -> str:
    """Trained layers, and numbers of parameters; a projection that is not exported does not count."""
    part: nn.Module = learner.backbone if isinstance(learner, Contrastive) else learner
    sizes = [(p.numel(), p.requires_grad) for p in part.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    layers = learner.hparams.get("train", "all")
    listed = ", ".join(layers) if isinstance(layers, list) else str(layers)
    words = {"none": "the classifier alone", "all": "all layers"}.get(listed, f"{listed} and the classifier")
    return f"{words}: {trained:,} of {total:,} parameters ({100 * trained / total:.3g} %)"


def _numbers(run: Run, network: Restored) -> dict[str, float]:
    """What the run logged of a network, by tag: of tests at its step, and of an epoch at the step before."""
    if network.step is None:
        return {}
    places = dict.fromkeys(("test/acc", "test/images"), network.step)
    if network.measured:
        places |= {tag: max(network.step - 1, 0) for tag in ("val/acc", "nc1/train/penultimate")}
    found = {tag: [value for at, value in run.points.get(tag, ()) if at == place] for tag, place in places.items()}
    return {tag: values[-1] for tag, values in found.items() if values and math.isfinite(values[-1])}


def _measured(numbers: Mapping[str, float]) -> dict[str, str]:
    # Not that of other images: it grows with their number, so that it would be read wrongly beside this one.
    nc1 = numbers.get("nc1/train/penultimate")
    rows = {"NC1 of the features": "" if nc1 is None else f"{nc1:.3g} on the training images"}
    rows["validation accuracy"] = f"{100 * numbers['val/acc']:.1f} %" if "val/acc" in numbers else ""
    images = int(numbers.get("test/images", 0))
    if "test/acc" in numbers and images > 0:
        low, high = (100 * end for end in wilson(numbers["test/acc"], images))
        interval = f"95 % interval {low:.1f} to {high:.1f} (Wilson)"
        rows["test accuracy"] = f"{100 * numbers['test/acc']:.1f} %, {interval}, {images:,} test images"
    return rows


def _index(name: str, task: str | None, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The entry from which the hub takes the accuracy."""
    if "test/acc" not in numbers or task is None:
        return {}
    metric = {"type": "accuracy", "name": "test accuracy", "value": round(numbers["test/acc"], 4)}
    data = {"name": task, "type": task.partition(",")[0].lower()}
    result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": [metric]}
    return {"model-index": [{"name": name, "results": [result]}]}


def _use(name: str, learner: Learner) -> str:
    seen = learner.preprocessing or {}
    channels, side, _ = seen["input_size"]
    stored = seen.get("stored_size", side)
    shorter = math.floor(stored / seen.get("crop_pct", 0.875))
    black, white = seen.get("value_range") or (0, 65535)
    shares = _OF_SQUARES if getattr(learner, "loss_name", "ce") == "mse" else _SOFTMAX
    classifies = isinstance(learner, Classifier)
    return _USE.format(
        name=name,
        imports=_IMPORTS if stored != side else "",
        side=2 * shorter,
        black=black,
        white=white,
        mode="L" if channels == 1 else "RGB",
        resized=_RESIZED.format(stored=stored, shorter=shorter) if stored != side else "",
        outputs="logits" if classifies else "features",
        last=shares + _NAMED if classifies else "",
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
