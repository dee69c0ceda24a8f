"""Fine-tuning: which layers train, and which features reach the classifier.

Legend: ``N`` samples, ``K`` classes, ``d`` width of the penultimate features, ``d_l`` of the skipped layer's.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ncfinetune import delta
from ncfinetune.backbone import Backbone
from ncfinetune.cache import Place, PrefixCache
from ncfinetune.checksums import fingerprint
from ncfinetune.classifier import Classifier
from ncfinetune.frozen import Frozen, chosen_layers, refuse_random, refuse_tuners
from ncfinetune.heads import SkipHead, SkipJoin, nearest_mean_classifier, streamed_moments
from ncfinetune.layers import enclosing_block
from ncfinetune.learner import Interval
from ncfinetune.passes import eval_mode, evaluation, plain_loader, ready_batches
from ncfinetune.pooling import detached
from ncfinetune.store import Stored

SkipGradient = Literal["both", "skip"]
HeadInit = Literal["default", "zero", "mean"]
_CACHE_DIR = "runs/cache"
# Arguments that a delta keeps apart, or that say how a run went about it.
_NOT_THE_MODEL = (
    "backbone",
    "checkpoint",
    "cache",
    "cache_dir",
    "allow_random",
    "optimizer",
    "lr_scheduler",
    "lr_interval",
)


class FineTuner(Classifier):
    """Trains a new classifier and chosen layers of a pre-trained backbone; the rest is frozen.

    The methods of Li et al. (arXiv 2212.12206) are points of two knobs:

    ================  =========  =============
    method            ``train``  ``skip_from``
    ================  =========  =============
    linear probe      none       (null)
    layer FT          a layer    (null)
    SCL FT            a layer    the same
    full FT           all        (null)
    ================  =========  =============

    What is frozen neither gets gradients nor updates its running statistics: it stays in eval mode, and no callback
    that averages weights changes it. At the start of a run a table says how many parameters train. A run on a backbone
    that nothing pre-trained, or of which frozen parameters are still random, is refused.

        >>> from ncfinetune import Backbone
        >>> base = Backbone("resnet18", stem="cifar")  # with pretrained=True or a checkpoint in earnest
        >>> model = FineTuner(10, base, train="layer4.0", skip_from="layer4.0")  # SCL FT
        >>> {name[:12] for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
        {'net.layer4.0'}

    Args:
        num_classes: Number of classes; on the command line it comes from the data.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        checkpoint: File with the pre-trained weights of the backbone, or ``{path: FILE, key: KEY, prefix: PREFIX}`` for
            one of several networks in it; see `Backbone`.
        train: ``none``, ``all``, or the layers to train: a name or pattern such as ``layer3.1`` or ``blocks.1?``, or
            several.
        skip_from: Layer whose pooled output joins the features that reach the classifier.
        skip_join: How it joins them: ``pad`` adds the two, the narrower padded with zeros; ``linear`` adds them after a
            learned linear map to the width of the features; ``concat`` puts them side by side.
        skip_gradient: ``both`` lets the gradient reach the tuned layer through the skip connection and through the
            network behind it; ``skip`` through the skip connection alone, which spares the backward pass of the
            network behind and its memory.
        head_init: How the classifier starts: ``default`` at random as `torch.nn.Linear` does, ``zero``, or ``mean``: as
            the nearest-class-mean classifier of the training images without augmentation, by one pass over
            them or over what the cache has of them.
        head_lr_factor: Learning rate of the head, as a multiple of the optimiser's, which the backbone's layers have.
        cache: ``memory`` or ``disk`` run the frozen layers once over the training and validation images and train on
            what the first tuned layer gets of each (without tuned layers: on the features), which spares their forward
            pass from then on. For training without random augmentation.
        cache_dir: Folder of the files of ``disk``. Each is named after a fingerprint of weights, images and transform,
            so that another run finds it; any may be deleted while no run uses it.
        allow_random: Run on a backbone that is not pre-trained, or frozen parameters that no file gave.
        optimizer: Makes an optimiser of the parameters that train; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_interval: Whether the scheduler is stepped once an ``epoch`` or after each ``step``.

    Raises:
        ValueError: No layer of that name, one without parameters to train, or all of them by name; a layer to skip from
            that does not run; an option that the others leave without effect; a checkpoint that fits nothing.
        FileNotFoundError: No such checkpoint.
    """

    head: nn.Linear | SkipHead

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        checkpoint: str | dict[str, Any] | None = None,
        train: str | list[str] = "none",
        skip_from: str | None = None,
        skip_join: SkipJoin = "pad",
        skip_gradient: SkipGradient = "both",
        head_init: HeadInit = "default",
        head_lr_factor: float = 1.0,
        cache: Place = "none",
        cache_dir: str = _CACHE_DIR,
        allow_random: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__(num_classes, backbone, optimizer, lr_scheduler, lr_interval=lr_interval)
        _check_choice("skip_join", skip_join, SkipJoin)
        _check_choice("skip_gradient", skip_gradient, SkipGradient)
        _check_choice("head_init", head_init, HeadInit)
        _check_choice("cache", cache, Place)
        if cache != "none" and train == "all":
            raise ValueError(f'cache={cache!r} keeps the outputs of frozen layers, and with train="all" there are none')
        if cache != "disk" and cache_dir != _CACHE_DIR:
            raise ValueError(f'cache_dir={cache_dir!r} is for cache="disk", and cache={cache!r} writes no files')
        _check_effects(train, skip_from, skip_join, skip_gradient, head_lr_factor)
        if checkpoint is not None:
            self.backbone.load(checkpoint)
        self.allow_random = allow_random
        self._frozen = Frozen()
        self.skip_from = skip_from
        self.skip_gradient = skip_gradient
        self.head_init = head_init
        self._head_ready = head_init != "mean"
        self._trained = chosen_layers(self.backbone, train)
        self.head = self._new_head(skip_join)
        self._cache = (
            None if cache == "none" else PrefixCache(cache, cache_dir, *self._parts(), self.features, skip_from)
        )
        if head_init == "zero":
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)
        self.head_lr_factor = head_lr_factor
        if head_lr_factor != 1:
            self._optimizer = partial(_in_two_groups, self._optimizer, list(self.head.parameters()))
        self.backbone.requires_grad_(False)
        for layer in self._trained.values():
            layer.requires_grad_(True)
        self.train()

    def _new_head(self, skip_join: SkipJoin) -> nn.Linear | SkipHead:
        self._skipped: Tensor | None = None
        if self.skip_from is None:
            return nn.Linear(self.backbone.dim, self.num_classes)
        hooks = [hook for part in self.backbone.modules() for hook in part._forward_hooks.values()]
        if any(getattr(hook, "__func__", None) is FineTuner._catch for hook in hooks):
            raise ValueError("this Backbone serves another FineTuner, with a skip connection of its own; build another")
        pool = self.backbone.pool(self.skip_from)
        # For good, since a compiled network does not see hooks that come after its first call.
        self.backbone.layer(self.skip_from).register_forward_hook(self._catch)
        return SkipHead(self.backbone.dim, pool.dim, self.num_classes, skip_join)

    def _catch(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Keep the pooled output of the skipped layer; with ``skip_gradient="skip"`` the rest gets it detached."""
        assert self.skip_from is not None
        self._skipped = self.backbone.pool(self.skip_from)(output)
        return output if self.skip_gradient == "both" else detached(output)

    def _parts(self) -> tuple[Backbone, list[nn.Module]]:
        """The backbone, and the blocks before which it is frozen and gives the head nothing."""
        skipped = [self.skip_from] if self.skip_from and self._trained else []
        names = [enclosing_block(self.backbone.net, name) for name in (*self._trained, *skipped)]
        return self.backbone, [self.backbone.layer(name) for name in names]

    @property
    def classifier(self) -> nn.Linear:
        """The linear layer whose outputs are the logits."""
        return self.head.fc if isinstance(self.head, SkipHead) else self.head

    def features(self, x: Tensor | Stored) -> tuple[Tensor, ...]:
        """What the head gets of images: penultimate features ``(N, d)`` and, with a skip, those of its layer."""
        if isinstance(x, Stored):
            assert self._cache is not None
            penultimate, stored = self._cache.penultimate(x.value), self._cache.skipped(x.value)
        else:
            penultimate, stored = self.backbone(x), None
        if self.skip_from is None:
            return (penultimate,)
        caught, self._skipped = self._skipped, None
        if stored is not None:
            return penultimate, stored
        assert caught is not None
        return penultimate, caught

    def forward(self, x: Tensor | Stored) -> Tensor:
        """Class logits ``(N, K)`` of images."""
        return self.head(*self.features(x))

    def setup(self, stage: str) -> None:
        """Refuse callbacks that would decide what trains, and compare the data with what was learnt of them.

        Lightning's warning of modules in eval mode is silenced, since they are to be.
        """
        super().setup(stage)
        if stage == "fit":
            refuse_tuners(self, self.trainer.callbacks)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def on_fit_start(self) -> None:
        """Show and log what trains and start the classifier from class means, if asked to."""
        super().on_fit_start()
        if not self.allow_random:
            refuse_random(self.backbone.net, self.backbone.random)
        frozen = self._split(self.trainer.strategy.lightning_module_state_dict())[1]
        self._frozen.remember(frozen, self, self.trainer.callbacks)  # type: ignore[attr-defined]
        rank_zero_info(self.parameter_table())
        if self._cache is not None:
            self._cache.fill(self.trainer, self, self._split()[1])
        if not self._head_ready:
            self._start_from_means()

    def lr_factor(self, group: dict[str, Any]) -> float:
        """What the learning rate of one of the optimiser's groups of parameters is multiplied by."""
        return super().lr_factor(group) * (self.head_lr_factor if group.get("name") == "head" else 1)

    def configure_callbacks(self) -> list[Callback]:
        """The cache, which has to know when a run breaks off, unless the trainer has it from an earlier run."""
        known = [] if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]
        return [] if self._cache is None or self._cache in known else [self._cache]

    def teardown(self, stage: str) -> None:
        """Give the datamodule its images back."""
        self._frozen = Frozen()
        if self._cache is not None:
            self._cache.drop()

    def on_train_epoch_start(self) -> None:
        """See that what is frozen still is; a callback may have averaged it or reset its statistics."""
        self._frozen.restore(self)

    def on_validation_epoch_start(self) -> None:
        """See that what is frozen still is; a callback may have put an average in its place."""
        self._frozen.restore(self)

    def on_train_end(self) -> None:
        """See that what is frozen still is, in the weights that a callback leaves at the end too."""
        self._frozen.restore(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is frozen as it was loaded, whatever a callback made of it, and whether the classifier has started.

        Tuners save and restore it before it has.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint["head_ready"] = self._head_ready
        self._frozen.restore_in(checkpoint["state_dict"])

    def on_fit_end(self) -> None:
        """Leave ``delta.safetensors`` beside the checkpoints.

        Raises:
            ValueError: Something changed what is frozen.
        """
        super().on_fit_end()
        folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
        state = self.trainer.strategy.lightning_module_state_dict()
        self._frozen.check(self._split(state)[1])
        if folder and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.save_delta(Path(folder) / "delta.safetensors", state=state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the classifier that is loaded, and go on with no run but one of the same layers.

        Raises:
            ValueError: A run that tuned or skipped from other layers would go on, whose optimiser does not know these.
        """
        super().on_load_checkpoint(checkpoint)
        self._head_ready = checkpoint.get("head_ready", True)
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        saved = checkpoint.get("hyper_parameters", {})
        remedy = "to start from its weights, give the file as the FineTuner's checkpoint instead"
        if "train" not in saved:
            raise ValueError(f"a FineTuner cannot go on with the run of another learner; {remedy}")
        same = [*chosen_layers(self.backbone, saved["train"]).values()] == [*self._trained.values()]
        if not same or saved["skip_from"] != self.skip_from:
            before = f"train={saved['train']!r}, skip_from={saved['skip_from']!r}"
            now = f"train={self.hparams['train']!r}, skip_from={self.skip_from!r}"
            raise ValueError(f"cannot go on with a run of {before} as one of {now}; {remedy}")

    def train(self, mode: bool = True) -> FineTuner:
        """Switch what trains to training mode; what is frozen stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        for layer in self._trained.values():
            layer.train(mode)
        return self

    def parameter_table(self) -> str:
        """Counts of trained and of all parameters: of the head, of each tuned layer, of the rest, and together."""
        seen: set[int] = set()

        def row(name: str, parameters: Iterable[nn.Parameter]) -> tuple[str, int, int]:
            new = [p for p in parameters if id(p) not in seen]
            seen.update(map(id, new))
            return name, sum(p.numel() for p in new if p.requires_grad), sum(p.numel() for p in new)

        rows = [row("head", self.head.parameters())]
        rows += [row(name, layer.parameters()) for name, layer in self._trained.items()]
        rows.append(row("rest of the backbone", self.backbone.parameters()))
        rows = [r for r in rows if r[2]]
        rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
        lines = [f"{name:<24}{own:>16,}{of:>16,}{100 * own / of:>10.3g}" for name, own, of in rows]
        return "\n".join([f"{'parameters':<24}{'trained':>16}{'total':>16}{'%':>10}", *lines])

    def save_delta(
        self, path: str | Path, class_names: list[str] | None = None, state: dict[str, Tensor] | None = None
    ) -> None:
        """Save what was tuned, the classifier included, with the base's name and fingerprint.

        The fingerprint is that of the frozen tensors, since the delta replaces the others.

        Args:
            path: File to write, ``.safetensors``.
            class_names: Names of the classes, in the order of their labels; None is as it is known of the data.
            state: The state of this module, where its own is spread over processes.

        Raises:
            ValueError: The file's name ends in something else.
        """
        tensors, frozen = self._split(state)
        names = self.class_names if class_names is None else class_names
        delta.save(path, tensors, fingerprint(frozen), {**self._facts(), "class_names": names})

    def load_delta(self, path: str | Path) -> None:
        """Put tuned layers and classifier in place.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is no delta, a damaged one, or one of other knobs or another base.
        """
        facts = delta.facts(path)
        self.load_state_dict(delta.load(path, *self._split(), self._facts()), strict=False)
        self.class_names, self.preprocessing = facts["class_names"], facts["preprocessing"]
        self._head_ready = True

    @classmethod
    def from_delta(
        cls, path: str | Path, checkpoint: str | dict[str, Any] | None = None, pretrained: bool = False
    ) -> FineTuner:
        """The fine-tuned model of a delta and of the weights it was tuned on, in ``checkpoint`` or timm's own.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is no delta, a damaged one, or the base is another one.
        """
        facts = delta.facts(path)
        if strange := facts["knobs"].keys() - _knobs():
            raise ValueError(f"delta {str(path)!r} is of another version: a FineTuner has no {', '.join(strange)}")
        model = cls(backbone={**facts["base"], "pretrained": pretrained}, checkpoint=checkpoint, **facts["knobs"])
        model.load_delta(path)
        return model.eval()

    def save_for_timm(self, path: str | Path) -> tuple[str, dict[str, Any]]:
        """Merge base and tuned layers into one file, and return what `timm.create_model` takes to load it.

        After training, or of a delta, those arguments say how images are made ready, so that
        `timm.data.resolve_model_data_config` of the network does as the datamodule did, and what the classes are. With
        ``skip_from`` the classifier is left out, since timm's networks have no skip connection to it.

        Raises:
            ValueError: timm has no such network, as with a stem for small images; its head cannot hold the classifier;
                or the file's name does not end in ``.safetensors``.
        """
        classifier = self.head if isinstance(self.head, nn.Linear) else None
        data = {"class_names": self.class_names, "preprocessing": self.preprocessing}
        with eval_mode(self):
            return delta.save_for_timm(path, self.backbone, classifier, data)

    def _tuned_paths(self) -> list[str]:
        tuned = [self.head, *self._trained.values()]
        return [path for path, module in self.named_modules() if any(module is one for one in tuned)]

    def _split(self, state: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state's tensors that are tuned, and those that are frozen."""
        return delta.split(self.state_dict() if state is None else state, self._tuned_paths())

    def _facts(self) -> dict[str, Any]:
        # The command line has Lightning keep more than these in the hyper-parameters.
        knobs = {name: self.hparams[name] for name in sorted(_knobs()) if name in self.hparams}
        data = {"class_names": self.class_names, "preprocessing": self.preprocessing}
        return {"base": self.backbone.spec, "knobs": knobs, **data}

    def _start_from_means(self) -> None:
        stored = None if self._cache is None else self._cache.train_rows
        rows = plain_loader(self.trainer, 'head_init="mean"') if stored is None else stored
        with evaluation(self.trainer, self):
            moments = streamed_moments(
                ((self._joined(images), labels) for images, labels in ready_batches(self.trainer, rows)),
                self.num_classes,
            )
        # From the CPU, since a tensor that is sent as an object would come to lie on its sender's device.
        weight, bias = (self.trainer.strategy.broadcast(v.cpu()) for v in nearest_mean_classifier(moments))
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.copy_(bias)
        self._head_ready = True

    def _joined(self, x: Tensor | Stored) -> Tensor:
        """Input of the linear classifier ``(N, classifier.in_features)``."""
        features = self.features(x)
        return self.head.joined(*features) if isinstance(self.head, SkipHead) else features[0]


def _in_two_groups(optimizer: OptimizerCallable, head: list[nn.Parameter], parameters: Iterable[nn.Parameter]) -> Any:
    """An optimiser of two groups, ``backbone`` and ``head``."""
    in_head = set(map(id, head))
    body = [p for p in parameters if id(p) not in in_head]
    groups = [{"params": body, "name": "backbone"}] if body else []
    return optimizer([*groups, {"params": head, "name": "head"}])


def _knobs() -> set[str]:
    """The arguments that a delta keeps."""
    return set(inspect.signature(FineTuner).parameters) - set(_NOT_THE_MODEL)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"expected {name} to be one of {', '.join(get_args(choices))}, got {value!r}")


def _check_effects(train: Any, skip_from: Any, skip_join: str, skip_gradient: str, head_lr_factor: float) -> None:
    """Refuse options that would do nothing, and say so where a skip connection has nothing to tune."""
    if head_lr_factor <= 0:
        raise ValueError(f"expected head_lr_factor above 0, got {head_lr_factor}")
    if skip_from is None and (skip_join != "pad" or skip_gradient != "both"):
        raise ValueError(f"skip_join={skip_join!r} and skip_gradient={skip_gradient!r} need a layer in skip_from")
    if train == "none" and skip_gradient != "both":
        raise ValueError('skip_gradient="skip" needs a layer in train: without one the backbone gets no gradient')
    if train == "none" and skip_from is not None:
        rank_zero_info(f'train="none": a linear probe on the penultimate features joined with those of {skip_from}')
