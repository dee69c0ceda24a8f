"""Features of all blocks of some backbones over a training set, in one pass, whole or in parts that many jobs make.

A pass cuts the images into batches once and for all; part ``i`` of ``n`` takes every ``n``-th batch. Since a batch is
the same whoever computes it, parts joined in any order are the features of one pass, to the last bit on one kind of
machine.

Legend: ``N`` images, ``K`` classes, ``d_l`` width of layer ``l``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ncfinetune.atomic import replacing
from ncfinetune.backbone import Backbone
from ncfinetune.checksums import fingerprint
from ncfinetune.layers import PENULTIMATE, find_layers
from ncfinetune.loaders import evenly, is_stream
from ncfinetune.samples import known_labels
from ncfinetune.texts import some
from ncfinetune.weight_files import with_own_memory

_FORMAT = "ncfinetune scan part 1"
_LABELS, _BATCHES = "labels", "batches"


@dataclass(frozen=True)
class Bank:
    """Features of layers, by model and layer, on the device where they were computed.

    Args:
        facts: What they are of, as plain data: ``models`` (name, specification, fingerprint of the weights, and
            ``{layer: [width, parameters]}`` in depth order), ``data``, ``classes``, ``preprocessing``, a
            fingerprint of the ``images``, and the ``part``.
        features: ``{"MODEL/LAYER": (N, d_l)}``.
        labels: ``(N,)``.
        batches: Which batch of the pass each image was in, ``(N,)``.
    """

    facts: Mapping[str, Any]
    features: Mapping[str, Tensor]
    labels: Tensor
    batches: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes ``K``."""
        return len(self.facts["classes"])

    def of(self, model: str, layer: str) -> Tensor:
        """The features of a model's layer, ``(N, d_l)``."""
        return self.features[f"{model}/{layer}"]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata hold the facts and a fingerprint of everything.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        tensors = with_own_memory({**self.features, _LABELS: self.labels, _BATCHES: self.batches})
        metadata = {"format": _FORMAT, "facts": json.dumps(self.facts, default=str)}
        metadata["fingerprint"] = fingerprint(tensors, metadata)
        with replacing(path) as part:
            save_file(tensors, part, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Bank:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is none of these, or a damaged one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no part {str(path)!r}; scan --part i/n leaves one")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path) if metadata.get("format") == _FORMAT else {}
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no part of a scan, or damaged: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} is no part of a scan; expected what scan --part i/n leaves")
        if metadata.pop("fingerprint", None) != fingerprint(tensors, metadata):
            raise ValueError(f"part {str(path)!r} is damaged: it is not what was saved; delete it, and scan it again")
        return cls(json.loads(metadata["facts"]), tensors, tensors.pop(_LABELS), tensors.pop(_BATCHES))


def merge(parts: Mapping[str, Bank]) -> Bank:
    """The bank of a whole pass from its parts, by the name of each, in whatever order.

    Raises:
        ValueError: A part is missing, is given twice, or is of another pass.
    """
    first_name, first = next(iter(parts.items()))
    _, number = first.facts["part"]
    seen: dict[int, str] = {}
    for name, bank in parts.items():
        if other := difference(first.facts, bank.facts):
            raise ValueError(f"{name!r} is a part of another scan than {first_name!r}: {other}")
        index = bank.facts["part"][0]
        if index in seen:
            raise ValueError(f"part {index} of {number} is given twice: {seen[index]!r} and {name!r}")
        seen[index] = name
    if missing := [str(index) for index in range(1, number + 1) if index not in seen]:
        raise ValueError(f"of {number} parts {len(missing)} are missing: {some(missing, 10)}")
    banks = list(parts.values())
    order = torch.cat([bank.batches for bank in banks]).argsort(stable=True)
    features = {name: torch.cat([bank.features[name] for bank in banks])[order] for name in first.features}
    labels, batches = (torch.cat([getattr(bank, name) for bank in banks])[order] for name in (_LABELS, _BATCHES))
    return Bank({**first.facts, "part": [1, 1]}, features, labels, batches)


def difference(facts: Mapping[str, Any], others: Mapping[str, Any]) -> str | None:
    """The first fact in which two passes differ, in words; None if they agree."""
    if facts["part"][1] != others["part"][1]:
        return f"one of {others['part'][1]} parts, and not of {facts['part'][1]}"
    ours, theirs = (json.loads(json.dumps(known, default=str)) for known in (facts, others))
    for name in sorted(set(ours) - {"part"}):
        if ours[name] != theirs.get(name):
            return f"its {name} are {_short(theirs.get(name))}, and not {_short(ours[name])}"
    return None


def _short(fact: Any, most: int = 200) -> str:
    text = json.dumps(fact)
    return text if len(text) <= most else text[: most - 4] + " ..."


@dataclass(frozen=True)
class Source:
    """A backbone to take features from, and those of its layers that are wanted, in depth order.

    Args:
        name: What it is called in tables.
        backbone: The network.
        layers: Names of layers; the penultimate features are added to them.
    """

    name: str
    backbone: Backbone
    layers: Sequence[str]

    @classmethod
    def of(cls, name: str, backbone: Backbone, patterns: Iterable[str] = ()) -> Source:
        """A source with the layers that the patterns fit, or with all blocks if there are none.

        Raises:
            ValueError: A pattern fits no layer, or one whose output cannot be pooled.
        """
        wanted = list(patterns)
        named = [pattern for pattern in wanted if pattern != PENULTIMATE]
        layers = list(find_layers(backbone.net, named) if wanted else backbone.layers)
        for layer in layers:
            backbone.pool(layer)
        return cls(name, backbone, [*layers, PENULTIMATE])

    def widths(self) -> dict[str, int]:
        """``{layer: d_l}``."""
        known = self.backbone
        return {name: known.dim if name == PENULTIMATE else known.pool(name).dim for name in self.layers}

    def facts(self) -> dict[str, Any]:
        """What the features are of, as plain data."""
        backbone, widths = self.backbone, self.widths()
        return {
            "name": self.name,
            "spec": backbone.spec,
            "weights": fingerprint(backbone.net.state_dict()),
            "layers": {name: [widths[name], backbone.size(name)] for name in self.layers},
        }


def fill(
    trainer: Trainer,
    sources: Sequence[Source],
    data: LightningDataModule,
    said: Mapping[str, Any],
    most: int,
    part: tuple[int, int] = (1, 1),
) -> Bank:
    """The features of a pass over training images as they are evaluated, or of a part of it.

    Each batch is decoded once and goes through all sources.

    Args:
        trainer: Gives device, precision and progress bar. With a limit of no batches there are the facts alone, for
            which one image is decoded.
        sources: Backbones and layers.
        data: A datamodule with ``train_plain_dataloader()``; its batches are images and labels.
        said: What tells the data from others, as plain data.
        most: Images at most, evenly over each class.
        part: Which part of how many, from 1.

    Raises:
        ValueError: The datamodule has no such loader, does not say its number of classes, or its batches are something
            else; a network refuses images of their size.
    """
    images, reader = _TrainingImages(data, most, part), _Reader(sources, data, part)
    models = [source.facts() for source in sources]  # before a pass in half precision changes the weights' type
    trainer.predict(reader, images, return_predictions=False)
    known = {"models": models, "data": dict(said), "part": list(part), "classes": classes_of(data)}
    return reader.bank({**known, "preprocessing": getattr(data, "preprocessing", None), "images": images.mark})


def read_images(trainer: Trainer, backbone: Backbone, data: LightningDataModule, most: int) -> tuple[Tensor, Tensor]:
    """The images of a pass as a network is evaluated on them, ``(N, C, H, W)``, and labels, ``(N,)``, on the CPU.

    Raises:
        ValueError: As `fill`; also no images.
    """
    parts: Any = trainer.predict(_Images(backbone), _TrainingImages(data, most, (1, 1)))
    if not parts:
        raise ValueError("expected training images, got none")
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


class _Images(LightningModule):
    """Gives back the images and labels of a batch; holds the network that the data's preprocessing may follow."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = _checked(batch)
        return images.cpu(), labels.cpu()


def classes_of(data: Any) -> list[str]:
    """Names of the classes that a datamodule knows, or their numbers.

    Raises:
        ValueError: It knows neither.
    """
    names = getattr(data, "class_names", None) or range(getattr(data, "num_classes", 0))
    if not names:
        raise ValueError(f"expected {type(data).__name__} to say its num_classes or class_names, and it has neither")
    return [str(name) for name in names]


class _TrainingImages(LightningDataModule):
    """Another datamodule's training images, of which a part is predicted."""

    def __init__(self, data: LightningDataModule, most: int, part: tuple[int, int]) -> None:
        super().__init__()
        if not hasattr(data, "train_plain_dataloader"):
            raise ValueError(
                f"scan needs the training images in a fixed order and without augmentation; {type(data).__name__} "
                "has no train_plain_dataloader()"
            )
        self.data, self.most, self.part = data, most, part
        # What tells these images from others of the same options: fingerprint of one of them and of all labels.
        self.mark: str | None = None

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup("fit")
        self.loader = self.data.train_plain_dataloader()
        self.mark = _mark(self.loader)

    def predict_dataloader(self) -> Any:
        return evenly(self.loader, self.most, self.part)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def teardown(self, stage: str) -> None:
        self.data.teardown("fit")


def _mark(loader: Any) -> str | None:
    """Fingerprint of the sample in the middle of a data set and of all labels that it knows; None of a stream."""
    if is_stream(loader):
        return None
    tensors = [part for part in next(iter(evenly(loader, 1)), ()) if isinstance(part, Tensor)]
    labels = known_labels(loader.dataset)
    known = {} if labels is None else {"labels": torch.as_tensor(labels)}
    return fingerprint({**{str(place): tensor for place, tensor in enumerate(tensors)}, **known})


class _Reader(LightningModule):
    """Takes the features of its sources from the batches that it predicts.

    Args:
        sources: Backbones and layers.
        data: The datamodule of the images.
        part: Which part of how many the batches are.
    """

    def __init__(self, sources: Sequence[Source], data: LightningDataModule, part: tuple[int, int]) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(source.backbone for source in sources)
        self.sources, self.data, self.part = sources, data, part
        self.batches: list[tuple[dict[str, Tensor], Tensor, int]] = []

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = _checked(batch)
        features: dict[str, Tensor] = {}
        for source in self.sources:
            own = _for_network(images, source.backbone, self.sources[0].backbone, self.data)
            stages = _stages(source, own)
            features |= {f"{source.name}/{layer}": rows.float() for layer, rows in stages.items()}
        index, number = self.part
        self.batches.append((features, labels, index - 1 + batch_idx * number))
        return labels

    def bank(self, facts: Mapping[str, Any]) -> Bank:
        """What was taken."""
        widths = {f"{s.name}/{layer}": width for s in self.sources for layer, width in s.widths().items()}
        features = {name: [rows[name] for rows, _, _ in self.batches] for name in widths}
        labels = [labels for _, labels, _ in self.batches]
        numbers = [torch.full_like(labels, number) for _, labels, number in self.batches]
        none = torch.zeros(0, dtype=torch.int64)
        return Bank(
            facts,
            {name: torch.cat(rows) if rows else torch.zeros(0, widths[name]) for name, rows in features.items()},
            torch.cat(labels or [none]),
            torch.cat(numbers or [none]),
        )


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch that is these two."""
    images, labels = batch if isinstance(batch, Sequence) and len(batch) == 2 else (None, None)
    if not _are_images(images) or not _are_labels(labels):
        held = batch if isinstance(batch, Sequence) else [batch]
        kinds = (f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in held)
        raise ValueError(
            "scan takes batches of floating-point images (N, C, H, W) and whole-number labels (N,), got "
            f"{', '.join(kinds)}; give a datamodule whose train_plain_dataloader() has them"
        )
    return images, labels.long()


def _are_images(images: Any) -> TypeGuard[Tensor]:
    return isinstance(images, Tensor) and images.is_floating_point()


def _are_labels(labels: Any) -> TypeGuard[Tensor]:
    return isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()


def _stages(source: Source, images: Tensor) -> dict[str, Tensor]:
    try:
        return source.backbone.stages(images, source.layers)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error
    except (AssertionError, RuntimeError) as error:
        size, made_for = tuple(images.shape[1:]), source.backbone.input_size()
        if size == made_for or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ValueError(
            f"{source.name} cannot take images of {_times(size)}, and is made for {_times(made_for)} "
            f"({' '.join(str(error).split())}); give --data.image_size {made_for[1]}, or another network"
        ) from error


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _for_network(images: Tensor, backbone: Backbone, first: Backbone, data: Any) -> Tensor:
    """Images normalised as the network was pre-trained, where the datamodule does so for the first of several."""
    if not getattr(data, "follows_network", False) or backbone is first:
        return images
    mean, std = _pretrained(first, images)
    if not (torch.equal(mean, data.mean.to(images)) and torch.equal(std, data.std.to(images))):  # given by the user
        return images
    own_mean, own_std = _pretrained(backbone, images)
    scale, shift = std / own_std, (mean - own_mean) / own_std
    return images * scale[:, None, None] + shift[:, None, None]


def _pretrained(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels; of one channel, those of three averaged as a datamodule does."""
    config, channels = backbone.net.pretrained_cfg, images.shape[1]
    mean, std = (images.new_tensor(config[name]) for name in ("mean", "std"))
    return (mean, std) if len(mean) == channels else (mean.mean().expand(channels), std.mean().expand(channels))
