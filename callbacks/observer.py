"""LayerObserver: captures pooled features of named layers, and their labels, while any module runs.

Legend: ``N`` samples of a batch, ``V`` views of a sample, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ncfinetune.inputs import whole
from ncfinetune.layers import PENULTIMATE, find_layers
from ncfinetune.loaders import new_samples
from ncfinetune.pooling import Pool, PoolError, no_tensor, tensors

from . import adapters
from .adapters import BatchReader
from .hook import Hook
from .pool_finder import PoolFinder

Pooling = Callable[[Tensor], Tensor]


class LayerObserver:
    """Hooks on named layers of a module that keep each layer's last output, pooled to ``(N, d)``, while observing.

    The name ``penultimate`` stands for the output of the module's submodule of that name or, if there is none, for the
    input of the classifier: the linear layer with ``K`` outputs. If several layers have ``K`` outputs, the classifier
    is the one whose output the module returns, which is found as they run.

    Args:
        module: The module to observe.
        layers: Names or patterns of its layers, as `find_layers` reads them, and ``penultimate``.
        reader: Reads the labels of batches.
        classifier: The classifier's name, or ``auto``.
        needs_classifier: Find the classifier even if the module has a submodule ``penultimate``.
        pool: Maps a layer's output to ``(N, d)``; None pools in the way the network pools its last features, found by a
            second run on the first two samples of the first batch.

    Attributes:
        names: The layers' names in depth order, ``penultimate`` last.
        classifier: The classifier, once it is known.

    Raises:
        ValueError: No such layer, or no classifier where one is needed.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        reader: BatchReader,
        classifier: str = "auto",
        needs_classifier: bool = False,
        pool: Pooling | None = None,
    ) -> None:
        self.classifier: nn.Module | None = None
        self._module: Any = module
        self._reader = reader
        self._pool = pool
        self._open = False
        self._step: str | None = None
        self._seen: Counter[int] = Counter()
        self._batch: Any = None
        self._caught: dict[str, Tensor] = {}
        self._how: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        self._declared = adapters.penultimate_of(module) if PENULTIMATE in layers else None
        found = find_layers(module, [name for name in layers if name != PENULTIMATE])
        self._rivals = self._classifiers(classifier, needs_classifier) if PENULTIMATE in layers else {}
        self.names = list(found)
        if self._declared is not None:
            found[PENULTIMATE] = self._declared
        self._pools = PoolFinder(module, {} if pool else found, self._listening, self._ends)
        self._handles += self._pools.handles
        for name, layer in found.items():
            self._hook_output(name, layer)
        self._hooked = {*found.values(), *self._rivals.values()}
        self._given: dict[str, Tensor] = {}
        self._compares = reader.run is None
        self._network = adapters.network_of(module)
        if self._compares and self._network is not None:
            self._hook_input(self._network)
        self._inputs: dict[str, Tensor] = {}
        # Inputs of layers that may be the classifier which cannot be its features.
        self._misfits: dict[str, PoolError] = {}
        self._outputs: dict[str, list[Any]] = {}
        self._sharded = False
        self._whole: Any = None
        if PENULTIMATE in layers:
            self.names.append(PENULTIMATE)
            self._hook_penultimate()

    def listen(self, batch: Any, step: str | None = None) -> None:
        """Keep the layers' outputs from now on.

        Args:
            batch: The batch that the module will run on. Its labels are those that it has now: a step may take them out
                of it, or change them.
            step: Name of the module's step whose outputs are kept: other callbacks may run the module on other images
                before or after it. None keeps the outputs of any run.
        """
        self._open, self._step = True, step
        self._forget()
        self._batch = adapters.kept(batch)

    @property
    def caught(self) -> bool:
        """Whether a layer ran since `listen`."""
        return bool(self._caught or self._inputs)

    def restart(self) -> None:
        """Begin a pass: count the samples of each loader from 0."""
        self._seen.clear()
        self._whole = None
        self._sharded = self.classifier is not None and adapters.is_sharded(self.classifier)

    def run(self, batch: Any) -> None:
        """Run the module on a batch, and keep the layers' outputs."""
        self.listen(batch)
        output = self._reader.forward(self._module, batch)
        if self.classifier is None and self._rivals:
            self._outputs.setdefault("", []).append(output)

    def close(self) -> None:
        """Stop observing, and free the outputs."""
        self._open = False
        self._forget()

    def take(
        self, loader: Any = None, index: int = 0, shares: bool = False, reader: BatchReader | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features ``{name: (M, d)}`` of the last batch and their labels ``(M,)``, one row per sample and view.

        Samples that the sampler of ``loader`` repeats on another process are left out.

        Args:
            loader: The loader of the batch.
            index: Its ``dataloader_idx``.
            shares: Keep labels that are class probabilities ``(M, K)``.
            reader: Reads the labels in place of the observer's reader.

        Raises:
            ValueError: The features do not have rows for all samples of the batch.
        """
        self._open = False
        features, batch = self._features(), self._batch
        self._compare_input(batch)
        self._forget()
        reader = reader or self._reader
        labels = whole(reader.labels(batch))
        labels = _as_shares(labels) if shares else reader.classes(labels)
        samples = len(labels)
        new = new_samples(loader, self._seen[index], samples)
        self._seen[index] += samples
        if samples == 0 or not features:
            return features, labels
        views, listed = self._views(features, samples, batch)
        if views > 1:
            labels = labels.repeat(views, *[1] * (labels.ndim - 1)) if listed else labels.repeat_interleave(views, 0)
        if new < samples:
            features = {name: _first(rows, new, views, listed) for name, rows in features.items()}
            labels = _first(labels, new, views, listed)
        device = next(iter(features.values())).device
        return features, labels.to(device, non_blocking=True)

    def weight(self) -> tuple[Tensor, Tensor | None] | None:
        """Copies of the classifier's weight ``(K, d)`` and bias ``(K,)``; None without one, or if it can't be read."""
        if self.classifier is None:
            return None
        return self._whole if self._sharded else adapters.weight_of(self.classifier)

    def describe(self) -> str:
        """Output and pooling of each layer that ran, in words."""
        return "; ".join(f"{name}: {how}" for name, how in self._how.items())

    def is_within(self, module: nn.Module) -> bool:
        """Whether a module has all hooked layers, which it may have replaced by others."""
        return self._hooked <= set(module.modules())

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _forget(self) -> None:
        self._caught, self._inputs, self._outputs, self._batch = {}, {}, {}, None
        self._misfits = {}

    def _listening(self) -> bool:
        return (
            self._open
            and not PoolFinder.looking
            and (self._step is None or self._module._current_fx_name == self._step)
        )

    def _hook_output(self, name: str, layer: nn.Module) -> None:
        def catch(m: nn.Module, args: Any, output: Any) -> None:
            if self._listening():
                pooling = self._pool or self._pools.of(name, output)
                self._caught[name] = self._pooled(name, output, pooling)

        self._handles.append(layer.register_forward_hook(Hook(catch)))

    def _classifiers(self, classifier: str, needed: bool) -> dict[str, nn.Module]:
        """The layers that may be the classifier, by path; none where the features are declared and none is found."""
        if self._declared is not None and not needed:
            return {}
        try:
            return adapters.classifiers(self._module, self._reader.num_classes, classifier)
        except ValueError:
            if self._declared is None or classifier != "auto":
                raise
            return {}

    def _hook_penultimate(self) -> None:
        if len(self._rivals) == 1:
            (self.classifier,) = self._rivals.values()
        elif self._rivals:
            self._hook_networks()
        for path, layer in self._rivals.items():
            self._hook_classifier(path, layer, self._declared is None)

    def _hook_classifier(self, path: str, layer: nn.Module, is_penultimate: bool) -> None:
        def catch(m: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._listening() or self.classifier not in (None, m):
                return
            if is_penultimate:
                self._keep_input(path, m, args[0] if args else kwargs["input"])
            if self._sharded and self._whole is None and self.classifier is m:
                self._whole = adapters.weight_of(m)

        def catch_output(m: nn.Module, args: Any, output: Any) -> None:
            if self.classifier is None and self._listening():
                self._outputs.setdefault(path, []).append(output)

        self._handles.append(layer.register_forward_pre_hook(Hook(catch), with_kwargs=True))
        if len(self._rivals) > 1:
            self._handles.append(layer.register_forward_hook(Hook(catch_output)))

    def _keep_input(self, path: str, layer: nn.Module, rows: Tensor) -> None:
        """Keep the input of a layer that is, or may be, the classifier."""
        try:
            self._inputs[path] = self._pooled(PENULTIMATE, rows, self._pool or _as_it_is(path, rows))
        except PoolError as error:
            if self.classifier is layer:
                raise
            self._misfits[path] = error

    def _hook_networks(self) -> None:
        """Keep the module's output, to find the classifier that made it."""
        network = adapters.network_of(self._module)

        def catch(m: nn.Module, args: Any, output: Any) -> None:
            if self._listening() and self.classifier is None:
                self._outputs.setdefault("", []).append(output)

        if network is not None:
            self._handles.append(network.register_forward_hook(Hook(catch)))

    def _hook_input(self, network: nn.Module) -> None:
        """Keep what an evaluation step gives the network, until it was compared once.

        A training step may augment the inputs, which passes do not.
        """

        def catch(m: nn.Module, args: Any, kwargs: Any) -> None:
            if self._compares and self._step not in (None, "training_step") and self._listening():
                self._given = adapters.inputs_by_name(m, args, kwargs)

        self._handles.append(network.register_forward_pre_hook(Hook(catch), with_kwargs=True))

    def _compare_input(self, batch: Any) -> None:
        """Warn once if a step gives the network something other than the inputs of the batch, as passes do."""
        given, self._given = self._given, {}
        inputs = adapters.inputs_of_pass(self._network, batch) if given and self._network is not None else {}
        if not inputs:
            return
        self._compares = False
        if any(adapters.is_other(name, value, inputs) for name, value in given.items()):
            asker = self._reader.asker
            rank_zero_warn(
                f"{type(self._module).__name__}'s {self._step} gives the network something other than the inputs of "
                f"the batch; {asker} gives it these inputs when it reads training images. Give it "
                f"{asker}(forward=lambda module, batch: ...) that runs the network as the step does"
            )

    def _features(self) -> dict[str, Tensor]:
        """The captured features, with the input of the classifier, which is searched for if it is not known yet."""
        if self.classifier is None and set(self._outputs) - {""}:
            path = self._find_classifier()
            if path in self._misfits:
                raise self._misfits[path]
            self.classifier = self._rivals[path]
            rank_zero_info(f"{self._reader.asker} takes {path!r} as the classifier, among {', '.join(self._rivals)}")
        features = {name: self._caught[name] for name in self.names if name in self._caught}
        for path, rows in self._inputs.items():
            if self._rivals[path] is self.classifier:
                features[PENULTIMATE] = rows
        return features

    def _find_classifier(self) -> str:
        """The candidate whose output the network returns, or the only candidate that ran."""
        returned = {id(tensor) for tensor in tensors(self._outputs.pop("", []))}
        fitting = [path for path, outputs in self._outputs.items() if any(id(output) in returned for output in outputs)]
        ran = list(self._outputs)
        if len(fitting or ran) == 1:
            return (fitting or ran)[0]
        asker = self._reader.asker
        raise ValueError(
            f"{asker} cannot tell which of {' and '.join(map(repr, fitting or ran))} is the classifier: "
            f"{'the module returns the outputs of all of them' if fitting else 'the module returns the output of none'}"
            f"; give it {asker}(classifier={(fitting or ran)[-1]!r})"
        )

    def _ends(self) -> tuple[nn.Module | None, nn.Module | None]:
        return self._declared, self.classifier

    def _pooled(self, name: str, output: Any, pooling: Pooling | Pool) -> Tensor:
        """A pooled copy ``(N, d)`` of an output in float32 or wider: later layers may overwrite the output in place."""
        if isinstance(pooling, Pool):
            chosen = list(tensors(output))[pooling.index].detach()
            how = "" if pooling.ndim == 2 else f" ({pooling.describe()} of outputs {tuple(chosen.shape)})"
            self._how[name] = f"{pooling.dim} features{how}"
            return pooling(output, torch.promote_types(chosen.dtype, torch.float32)).detach()
        first = next(tensors(output), None)
        if first is None:
            raise no_tensor(name, output)
        tensor = first.detach()
        self._how[name] = f"the given function of outputs {tuple(tensor.shape)}"
        return pooling(tensor).to(torch.promote_types(tensor.dtype, torch.float32), copy=True)

    def _views(self, features: dict[str, Tensor], samples: int, batch: Any) -> tuple[int, bool]:
        """Rows per sample, the same for every layer, and whether they are ordered by view."""
        sizes = {len(value): name for name, value in features.items()}
        try:
            if len(sizes) > 1:
                raise ValueError(f"{' and '.join(map(str, sizes))} rows of features")
            return self._reader.views(batch, samples, next(iter(sizes)))
        except ValueError as error:
            asker = self._reader.asker
            raise ValueError(
                f"{asker} found {error} in layer {' and '.join(map(repr, sizes.values()))}; it measures the "
                "last forward pass of a step, which must run all samples of the batch: name other layers, or "
                f"give it {asker}(batch_to_labels=...) with a label for each row"
            ) from error


def _as_shares(labels: Tensor) -> Tensor:
    """Labels ``(M,)`` as they are, and one-hot ones ``(M, K)`` of integers as probabilities."""
    return labels if labels.ndim == 1 or labels.is_floating_point() else labels.float()


def _first(rows: Tensor, samples: int, views: int, listed: bool) -> Tensor:
    """The rows of the first samples."""
    if not listed or views == 1:
        return rows[: samples * views]
    return rows.reshape(views, -1, *rows.shape[1:])[:, :samples].flatten(0, 1)


def _as_it_is(path: str, rows: Tensor) -> Pool:
    """The pooling of a classifier's input, which must have one vector per sample."""
    if rows.ndim != 2:
        raise PoolError(
            f"expected features (N, d) as the input of the classifier {path!r}, got {tuple(rows.shape)}; name the "
            "layers to measure, or give the callback its own pool="
        )
    return Pool(2, rows.shape[1])
