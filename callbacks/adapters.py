"""Reading any project's batch and module: labels and inputs of a batch, number of classes, classifier.

Legend: ``N`` samples of a batch, ``V`` views of a sample, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ncfinetune.inputs import may_look
from ncfinetune.layers import PENULTIMATE, find_layers
from ncfinetune.pooling import NoTensorError, PoolError

_LABEL_KEYS = ("labels", "label", "targets", "target", "y")
_FORMS = f"(inputs, labels), or a mapping with one of the keys {', '.join(_LABEL_KEYS)}"
# Parts of a module's path inside adapters (peft's names); layers there do not output the logits.
_INSIDE_ADAPTERS = {"base_layer", "lora_A", "lora_B", "original_module"}
# Replaces labels that are no single class, so that they count as out of range.
NO_CLASS = -(2**31)


@dataclass(frozen=True)
class BatchReader:
    """Reads labels and inputs of any project's batches, and runs its module on them.

    Args:
        asker: Name of the callback, for messages.
        num_classes: Number of classes ``K`` if known; needed to distinguish one-hot labels from inputs.
        labels_of: The user's function that takes labels from a batch.
        run: The user's function that runs a module on a batch.
    """

    asker: str
    num_classes: int | None = None
    labels_of: Callable[[Any], Tensor] | None = None
    run: Callable[[Any, Any], Any] | None = None
    # Whether lists of tensors are those of views, of which one batch may tell nothing; empty until one did.
    _lists: set[bool] = field(default_factory=set, init=False, repr=False, compare=False)

    def labels(self, batch: Any) -> Tensor:
        """Integer labels ``(N,)``, or class probabilities ``(N, K)``, of a batch.

        Recognised are ``(inputs, labels, ...)`` and mappings with a usual key. In a sequence the labels are the only
        vector of integers besides the inputs.

        Raises:
            ValueError: There are no labels, or several tensors that may be these; the message describes the batch.
        """
        found = self._candidates(batch) if self.labels_of is None else [self.labels_of(batch)]
        if len(found) == 1 and self._are_labels(found[0]):
            labels = found[0]
            whole = not labels.is_floating_point()
            return labels.long().reshape(-1) if whole and labels.numel() == len(labels) else labels
        if len(found) > 1:
            raise ValueError(
                f"{self.asker} found {len(found)} tensors in a batch, each of which could be the labels: "
                f"{sketch(batch)}; give it {self.asker}(batch_to_labels=lambda batch: batch[...])"
            )
        raise ValueError(
            f"{self.asker} found no integer labels (N,) in a batch: expected {_FORMS}, got {sketch(batch)}; "
            f"give it {self.asker}(batch_to_labels=lambda batch: ...)"
        )

    def _candidates(self, batch: Any) -> list[Any]:
        if isinstance(batch, Mapping):
            return [batch[key] for key in _LABEL_KEYS if key in batch][:1]
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) < 2:
            return []
        vectors = [part for part in batch if _is_vector(part)]
        if vectors and any(self._are_labels(part) and not _is_vector(part) for part in batch[1:2]):
            return [batch[1], *vectors]  # probabilities in the place of labels, and a vector behind them
        return vectors or [part for part in batch[1:] if self._are_labels(part)]

    def _are_labels(self, part: Any) -> bool:
        """Whether these are integers, or class probabilities."""
        if _is_vector(part):
            return True
        shares = isinstance(part, Tensor) and part.ndim == 2 and part.dtype != torch.bool
        return shares and part.shape[1] > 1 and part.shape[1] == (self.num_classes or part.shape[1])

    def views(self, batch: Any, samples: int, rows: int) -> tuple[int, bool]:
        """The number of rows of features per sample, and whether they are ordered by view instead of by sample.

        With inputs ``(N, V, ...)`` the views of a sample are adjacent; with a list of views whole views follow another.

        Raises:
            ValueError: The inputs do not explain the number of rows.
        """
        if samples == 0 or rows % samples or rows < samples:
            raise ValueError(f"{rows} rows of features for {samples} labels")
        views = rows // samples
        parts = batch.values() if isinstance(batch, Mapping) else [inputs_of(batch)]
        listed = any(_are_views(part) for part in parts)
        stacked = any(isinstance(p, Tensor) and p.ndim > 2 and tuple(p.shape[:2]) == (samples, views) for p in parts)
        if views > 1 and not listed and not stacked:
            raise ValueError(f"{rows} rows of features for {samples} labels, and no {views} views of a sample")
        return views, listed

    def forward(self, module: nn.Module, batch: Any) -> Any:
        """Run a module, or its only child if it has no ``forward``, on the inputs of a batch.

        Inputs are the first item of a sequence that is not a vector of integers, where a list of views is concatenated
        and a list with a tensor for each sample is not; the items of a mapping that ``forward`` accepts, without
        labels; or a tensor. A list that may be either, as of 3 images of 3 channels, is what lists of earlier batches
        were, or else of views if each tensor has as many rows as there are samples and is no single image.

        Raises:
            ValueError: The module has no ``forward`` and not exactly one child, it does not accept the inputs, or a
                list of tensors has no labels.
        """
        if self.run is not None:
            return self.run(module, batch)
        network = network_of(module)
        if network is None:
            raise ValueError(
                f"{self.asker} cannot run {type(module).__name__} on its own batches, since it has no forward and "
                f"{len(_with_parameters(module))} children with parameters; give it "
                f"{self.asker}(forward=lambda module, batch: ...)"
            )
        inputs: Any = None if isinstance(batch, Mapping) else inputs_of(batch)
        views = _are_views(inputs) and self._lists_views(inputs, len(self.labels(batch)))
        try:
            if isinstance(batch, Mapping):
                return network(**_named_inputs(network, batch))
            return network(_joined(inputs) if views else inputs)
        except (NoTensorError, PoolError):
            raise
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(r"\b(shapes?|sizes?)\b", str(error)):
                raise  # out of memory, a process that ended, and the like
            raise ValueError(
                f"cannot run {type(network).__name__} on the inputs of {sketch(batch)} ({type(error).__name__}: "
                f"{error}); give {self.asker}(forward=lambda module, batch: ...)"
            ) from error

    def _lists_views(self, inputs: Sequence[Tensor], number: int) -> bool:
        """Whether a list with this number of labels is of views, not of samples."""
        whole = all(len(part) == number for part in inputs)
        views = whole or sum(map(len, inputs)) == number
        if not views or len(inputs) != number:
            self._lists.add(views)
            return views
        if len(self._lists) == 1:
            return True in self._lists
        return whole and inputs[0].ndim != 3

    def classes(self, labels: Tensor) -> Tensor:
        """Integer labels ``(N,)``, from integer or from one-hot labels.

        Probabilities of several classes are refused; on an accelerator, where a check would synchronise, they become a
        label out of range instead.

        Raises:
            ValueError: The labels are probabilities of several classes, and on the CPU.
        """
        if labels.ndim == 1:
            return labels
        largest, index = labels.max(1)
        hard = (largest == 1) & (labels.sum(1) == 1)
        if may_look(labels) and not bool(hard.all()):
            raise ValueError(
                f"{self.asker} needs one class per sample, got labels {sketch(labels)} with several classes per sample "
                f"(mixup, soft labels); give it {self.asker}(batch_to_labels=lambda batch: ...)"
            )
        return torch.where(hard, index, NO_CLASS)


def _is_vector(part: Any) -> bool:
    """Whether it is one integer per sample."""
    if not isinstance(part, Tensor) or part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
        return False
    return part.ndim == 1 or (part.ndim == 2 and part.shape[1] == 1)


def _are_views(inputs: Any) -> bool:
    listed = isinstance(inputs, Sequence) and not isinstance(inputs, str) and len(inputs) > 1
    return listed and all(isinstance(view, Tensor) and view.ndim > 1 for view in inputs)


def _joined(views: Sequence[Tensor]) -> Tensor:
    if len({view.shape[1:] for view in views}) > 1:
        raise ValueError(f"views of several shapes, {', '.join(str(tuple(view.shape)) for view in views)}")
    return torch.cat(list(views))


def kept(batch: Any) -> Any:
    """A batch as it is now, whatever a step makes of it: of mappings and sequences a copy of their kind.

    Their tensors of up to two dimensions, labels among them, are copied too; images, which are large, are not.
    """
    same: Any
    if isinstance(batch, MutableMapping):
        same = copy.copy(batch)
        same.update({key: _kept(part) for key, part in batch.items()})
        return same
    if isinstance(batch, list):
        same = copy.copy(batch)
        same[:] = map(_kept, batch)
        return same
    if isinstance(batch, tuple):
        parts = map(_kept, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch


def _kept(part: Any) -> Any:
    return part.clone() if isinstance(part, Tensor) and part.ndim <= 2 else part


def inputs_of(batch: Any) -> Any:
    """The first item of a sequence that is not a vector of integers; the batch itself if it is no sequence."""
    if not isinstance(batch, Sequence) or isinstance(batch, str):
        return batch
    return next((part for part in batch if not _is_vector(part)), batch[0])


def sketch(value: Any) -> str:
    """A description of a batch: types, shapes and keys."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {sketch(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__}({', '.join(sketch(item) for item in value[:6])})"
    return type(value).__name__


def _named_inputs(network: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(network.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    inputs = {k: v for k, v in batch.items() if k not in _LABEL_KEYS}
    taken = {k: v for k, v in inputs.items() if takes_all or k in known}
    if not taken and len(inputs) == 1 and known:  # a single input and a single parameter: their names need not agree
        return dict(zip(known, inputs.values(), strict=False))
    return taken


def inputs_by_name(network: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a network is called with, without labels, by the names of its parameters."""
    signature = inspect.signature(network.forward)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # which the call itself is about to raise
        return {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            given |= {f"{name}[{index}]": value for index, value in enumerate(given.pop(name, ()))}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if name not in _LABEL_KEYS and not _is_vector(value)}


def inputs_of_pass(network: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The tensors that `BatchReader.forward` calls a network with, by the names of its parameters; none of lists."""
    if isinstance(batch, Mapping):
        return inputs_by_name(network, (), _named_inputs(network, batch))
    return inputs_by_name(network, (inputs_of(batch),), {})


def is_other(name: str, given: Tensor, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a network was given something other than its inputs in a pass, and one of ``*args`` than all of these."""
    if name not in inputs and not name.endswith("]"):
        return True
    fitting = [inputs[name]] if name in inputs else inputs.values()
    alike = [value for value in fitting if value.shape == given.shape]
    return bool(alike) and not any(((given == value.to(given)) | given.isnan()).all() for value in alike)


def defines(module: nn.Module, method: str) -> bool:
    """Whether a module overrides a method of torch and Lightning (either of its two packages)."""
    home = getattr(type(module), method).__module__.split(".")[0]
    return home not in ("torch", "lightning", "pytorch_lightning")


def hooks_early(module: nn.Module, attach: Callable[[], None]) -> None:
    """Call ``attach`` in a callback's ``setup``, unless the module makes its layers later.

    That is in ``configure_model``, or in its own ``setup``, which Lightning calls after those of the callbacks.

    Raises:
        ValueError: What ``attach`` raises, if the module has neither method.
        TypeError: As above.
    """
    if defines(module, "configure_model"):
        return
    try:
        attach()
    except (ValueError, TypeError):
        if not defines(module, "setup"):
            raise


def network_of(module: nn.Module) -> nn.Module | None:
    """The module if it has its own forward, else its only child with parameters; None if there is neither."""
    if defines(module, "forward"):
        return module
    children = _with_parameters(module)
    return children[0] if len(children) == 1 else None


def _with_parameters(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if any(True for _ in child.parameters())]


def known_num_classes(trainer: Any, module: nn.Module, asker: str, classifier: str = "auto") -> int:
    """The ``num_classes`` of the datamodule, the module or its hyper-parameters; ``asker`` is named in messages.

    If a classifier is named, it is the number of its outputs.

    Raises:
        ValueError: None of them has it.
        TypeError: The layer named as the classifier is not linear.
    """
    if classifier != "auto":
        (named,) = classifiers(module, None, classifier).values()
        return width(named) or 0
    for owner in (getattr(trainer, "datamodule", None), module, getattr(module, "hparams", None)):
        if isinstance(known := getattr(owner, "num_classes", None), int):
            return known
    raise ValueError(
        f"{asker} needs the number of classes, and neither datamodule nor module has num_classes; "
        f"give it {asker}(num_classes=...)"
    )


def class_names(trainer: Any, module: nn.Module, num_classes: int) -> list[str] | None:
    """The ``class_names`` of the datamodule or of the module; None if neither has as many as there are classes."""
    for owner in (getattr(trainer, "datamodule", None), module):
        names = getattr(owner, "class_names", None)
        if isinstance(names, list | tuple) and len(names) == num_classes:
            return [str(name) for name in names]
    return None


def classifiers(module: nn.Module, num_classes: int | None, name: str = "auto") -> dict[str, nn.Module]:
    """The layer of that name, or, for ``auto``, all linear layers with ``num_classes`` outputs, by path.

    A layer with adapters counts as one layer: its inner layers and peft's copies of it are left out.

    Raises:
        ValueError: There is no such layer; the message names the linear layers.
        TypeError: The layer of that name is not linear.
    """
    if name != "auto":
        found = find_layers(module, [name])
        (layer,) = found.values()
        if width(layer) is None:
            raise TypeError(f"expected the classifier {name!r} to be a torch.nn.Linear, got {type(layer).__name__}")
        return found
    outside = {path: m for path, m in module.named_modules() if not _INSIDE_ADAPTERS & set(path.split("."))}
    linear = {path: layer for path, layer in outside.items() if width(layer) is not None}
    fitting = {path: layer for path, layer in linear.items() if width(layer) == num_classes}
    if not fitting:
        some = ", ".join(f"{path} ({width(layer)})" for path, layer in list(linear.items())[-5:])
        raise ValueError(
            f"no linear layer with num_classes={num_classes} outputs, whose input is the layer 'penultimate'; "
            f"name the layers to measure, or the classifier, or correct num_classes. "
            f"Linear layers (outputs): {some or 'none'}"
        )
    return fitting


def width(layer: nn.Module) -> int | None:
    """Number of outputs of a linear layer, with or without adapters; None for other modules."""
    linear = getattr(layer, "base_layer", layer)
    return linear.out_features if isinstance(linear, nn.Linear) else None


def penultimate_of(module: nn.Module) -> nn.Module | None:
    """The module's submodule named ``penultimate``, whose output is then measured; None if it has none."""
    owner = getattr(module, PENULTIMATE, None)
    return owner if isinstance(owner, nn.Module) else None


def weight_of(classifier: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Effective weight ``(K, d)`` and bias ``(K,)`` of a classifier as dense copies; None if they can't be read.

    Quantised and adapted weights are computed from the classifier's outputs for unit vectors. Weights that are sharded
    over processes are whole only while the classifier runs.
    """
    if is_sharded(classifier):
        return None
    weight: Any = getattr(classifier, "weight", None)
    bias: Any = getattr(classifier, "bias", None)
    if type(weight) in (Tensor, nn.Parameter) and type(classifier).forward is nn.Linear.forward:
        return weight.detach().clone(), None if bias is None else bias.detach().clone()
    try:
        return _by_unit_vectors(classifier)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
        return None


def is_sharded(classifier: nn.Module) -> bool:
    """Whether a process holds only a part of the weight: a DTensor, or a piece of FSDP's flat parameter."""
    linear: Any = getattr(classifier, "base_layer", classifier)
    if is_parametrized(linear, "weight"):  # to compute the weight may change a state, as `spectral_norm` does
        weight = next(linear.parametrizations["weight"].parameters(), None)
    else:
        weight = getattr(linear, "weight", None)
    return isinstance(weight, Tensor) and (hasattr(weight, "placements") or weight.ndim != 2)


def _by_unit_vectors(classifier: nn.Module) -> tuple[Tensor, Tensor]:
    own = next(classifier.parameters())
    linear: Any = getattr(classifier, "base_layer", classifier)
    with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
        unit = torch.eye(linear.in_features, device=own.device, dtype=own.dtype)
        bias = classifier(torch.zeros_like(unit[:1]))[0]
        return (classifier(unit) - bias).T, bias
