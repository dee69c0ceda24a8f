"""Fine-tuning: which layers are trained, and which features reach the classifier.

Legend: ``N`` samples, ``K`` classes, ``d`` width of the penultimate features, ``d_l`` of a skipped layer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ncfinetune import knobs
from ncfinetune.averages import average_anew, average_from_here, refuse_averages
from ncfinetune.backbone import Backbone
from ncfinetune.cache import Place, PrefixCache
from ncfinetune.classifier import ClassWeight
from ncfinetune.gathering import rows_of_parts
from ncfinetune.heads import ClosedForm, SkipHead, SkipJoin, classifier_of, new_head
from ncfinetune.knobs import CACHE_DIR, NO_LAYER, HeadInit, Refit
from ncfinetune.launches import warn_of_what_stays
from ncfinetune.learner import Batch, Interval
from ncfinetune.linearised import choose_block, require_gradients
from ncfinetune.loaders import is_stream
from ncfinetune.partly_frozen import PartlyFrozen
from ncfinetune.passes import eval_mode, evaluation, ready_batches
from ncfinetune.probes import simplex_etf
from ncfinetune.schedule import two_groups
from ncfinetune.skips import choose_skips, layer_features
from ncfinetune.split import SkipGradient, Split
from ncfinetune.store import Stored

# Key in a checkpoint.
_SET_ASIDE = "classifier_set_aside"


class FineTuner(PartlyFrozen):
    """Trains a new classifier and chosen layers of a pre-trained backbone; the rest is frozen.

    The methods of Li et al. (arXiv 2212.12206) are settings of two options:

    | method       | ``train`` | ``skip_from`` |
    |--------------|-----------|---------------|
    | linear probe | none      | (null)        |
    | layer FT     | a layer   | (null)        |
    | SCL FT       | a layer   | the same      |
    | full FT      | all       | (null)        |

    Bias tuning, norm tuning and other selections of parameters are patterns in ``train``, such as ``*.bias``. The
    classifier can be initialised in closed form from the frozen features; with ``max_epochs: 0`` that is all that is
    trained.

    Frozen layers get no gradients and do not update their running statistics: they stay in eval mode, and callbacks
    that average weights leave them unchanged. At the start of a run a table of trained and frozen parameters is logged.
    A run is refused if the backbone is not pre-trained or frozen parameters still have random values.

        >>> from ncfinetune import Backbone
        >>> base = Backbone("resnet18", stem="cifar")  # in practice with pretrained=True or a checkpoint
        >>> model = FineTuner(10, base, train="layer4.0", skip_from="layer4.0")  # SCL FT
        >>> {name[:12] for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
        {'net.layer4.0'}

    Args:
        num_classes: Number of classes; on the command line it comes from the data.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        checkpoint: File with the pre-trained weights of the backbone, or ``{path: FILE, key: KEY, prefix: PREFIX}`` for
            one of several networks in it; see `Backbone`.
        train: ``none``, ``all``, or one or several names or patterns: layers such as ``layer3.1``, ``blocks.1?`` or
            ``*norm*``; a pattern that fits no layer selects parameters, such as ``*.bias`` or ``*.bn*.weight``. If only
            parameters of a layer are trained, the layer stays in eval mode and keeps its batch-norm statistics. A
            negative number counts the network's blocks from its end, for any network: -1 is the last block. ``auto``
            chooses at the start of a fit the block whose tuning lowers the squared error of images left out most, by
            the network's first-order expansion, or none; see `linearised.choose_block`.
        skip_from: Layer, or layers, by name or number, whose pooled outputs join the features that reach the
            classifier. ``auto`` chooses at the start of a fit the layers that clearly lower the leave-one-out error of
            ridge regression; see `skips.choose_skips`. It needs ``skip_join`` ``concat`` or ``only``.
        skip_join: How the pooled outputs join the penultimate features: ``pad`` adds them, narrower ones padded with
            zeros; ``linear`` adds them after learned linear maps to the width of the features; ``concat`` concatenates
            them; ``only`` concatenates the pooled outputs and leaves the penultimate features out, so that layers
            behind the skipped ones cannot be tuned.
        skip_gradient: ``both`` lets the gradient reach the tuned layer through the skip connection and through the
            following layers; ``skip`` through the skip connection alone, which saves the time and the memory of the
            backward pass through the following layers.
        max_skips: Largest number of layers that ``auto`` chooses.
        head_init: Initialisation of the classifier: ``default`` is random as in `torch.nn.Linear`, ``zero`` is zero,
            and the others are closed forms, fitted in one pass over the training images without augmentation (over
            their cached values if there is a cache): ``mean`` is the nearest class mean, ``ridge`` ridge regression and
            ``lda`` linear discriminant analysis, both with a regularisation chosen by leave-one-out error, ``etf`` the
            simplex nearest to the class means. See `heads.classifier_of`, also for the scale of the logits. They read
            all training images, whatever ``limit_train_batches`` of the Trainer is.
        refit: A closed form on the tuned features, which takes the classifier's place when the model is validated and
            at the end of each epoch, so that it is validated, saved and tested; checkpoints of every few steps have the
            trained classifier. Training goes on with the classifier as it was, since one that is replaced after each
            epoch costs accuracy at few images per class.
        head_lr_factor: Learning rate of the head as a multiple of the optimiser's, which the backbone's layers have.
            With 0 the head keeps its initial values, such as a fixed simplex.
        layer_decay: Factor of the learning rate from each layer of the backbone to the layer before it, in (0, 1]; the
            head has the optimiser's learning rate. See `Classifier`.
        label_smoothing: Share of the target that cross-entropy spreads over all classes in training; see `Classifier`.
        class_weight: Weights of the classes in the training loss and in ``ridge`` and ``lda``, or ``balanced``; see
            `Classifier`.
        cache: ``memory`` or ``disk`` run the frozen layers once over the training and validation images and then train
            on the stored inputs of the first tuned layer (without tuned layers: on the stored features), which saves
            the forward pass of the frozen layers. For training without random augmentation.
        cache_dir: Folder for the files of ``disk``. Each is named after a fingerprint of weights, images, labels and
            transform, so that another run finds it; any may be deleted while no run uses it.
        allow_random: Allow a backbone that is not pre-trained, and frozen parameters that no file provided.
        optimizer: Makes an optimiser of the trained parameters; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_interval: Whether the scheduler is stepped once an ``epoch`` or after each ``step``.

    Raises:
        ValueError: No layer or parameter of that name, a layer without parameters to train, or every layer by name; a
            layer in ``skip_from`` that does not run; an option that has no effect with the other options; a checkpoint
            that fits nothing. When the run starts: a closed form that the training images do not allow, and tuned
            layers that the classifier gets nothing of.
        FileNotFoundError: No such checkpoint.
    """

    head: nn.Linear | SkipHead
    rate_factors: ClassVar[tuple[str, ...]] = (*PartlyFrozen.rate_factors, "head_lr_factor")

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        checkpoint: str | dict[str, Any] | None = None,
        train: int | str | list[int | str] = "none",
        skip_from: int | str | list[int | str] | None = None,
        skip_join: SkipJoin = "pad",
        skip_gradient: SkipGradient = "both",
        max_skips: int = 1,
        head_init: HeadInit = "default",
        refit: Refit = "none",
        head_lr_factor: float = 1.0,
        layer_decay: float | None = None,
        label_smoothing: float = 0.0,
        class_weight: ClassWeight | None = None,
        cache: Place = "none",
        cache_dir: str = CACHE_DIR,
        allow_random: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        knobs.check_choices(skip_join, skip_gradient, head_init, refit, cache)
        knobs.check_cache(train, cache, cache_dir)
        knobs.check_skips(train, skip_from, skip_join, skip_gradient, max_skips)
        knobs.check_head(train, head_init, refit, head_lr_factor, skip_join)
        knobs.check_decay(train, layer_decay)
        base = Backbone.build(backbone)
        tuned, skips = (knobs.by_name(base, layers) for layers in (train, skip_from))
        super().__init__(
            checkpoint,
            tuned,
            allow_random,
            num_classes=num_classes,
            backbone=base,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            layer_decay=layer_decay,
        )
        self.hparams.update({"train": tuned, "skip_from": skips})
        self.head_init = head_init
        self.refit = refit
        # Whether the head has been initialised, and the number of the batch after which it was refitted last.
        self._head_ready = head_init not in get_args(ClosedForm)
        self._refitted: int | None = None
        # Weight and bias of the classifier that training goes on with, and of the refitted one that took its place.
        self._set_aside: tuple[list[Tensor], list[Tensor]] | None = None
        self._split = Split(self.backbone, self.chosen.places(), knobs.listed_skips(skips), skip_gradient)
        # With skip_from="auto" no layers are chosen yet; `setup` chooses them and builds the head anew.
        join = "concat" if skip_from == "auto" else skip_join
        self.head = new_head(self._split.widths, num_classes, None if skip_from is None else join)
        self._cache = PrefixCache(cache, cache_dir, self._split)
        self.head_lr_factor = float(head_lr_factor)
        if "etf" in (head_init, refit) and skip_from != "auto":
            simplex_etf(num_classes, self.classifier.in_features)  # raises where the width is too small for a simplex
        self._start_head()
        self.train()

    @property
    def classifier(self) -> nn.Linear:
        """The linear layer whose outputs are the logits."""
        return self.head.fc if isinstance(self.head, SkipHead) else self.head

    def features(self, x: Tensor | Stored) -> tuple[Tensor, ...]:
        """The head's inputs: penultimate features ``(N, d)`` and, for each skipped layer, ``(N, d_l)``."""
        return self._split(x)

    def forward(self, x: Tensor | Stored) -> Tensor:
        """Class logits ``(N, K)`` of images."""
        return self.head(*self.features(x))

    def setup(self, stage: str) -> None:
        """Choose the layers of ``auto``, and refuse callbacks that average a refitted classifier."""
        super().setup(stage)
        if self.hparams["train"] == "auto":
            self._choose_block(stage)
        if self.hparams["skip_from"] == "auto":
            self._choose_skips(stage)
        if stage == "fit":
            self._check_reached()
        if stage == "fit" and self.refit != "none":
            refuse_averages(self.trainer)

    def on_fit_start(self) -> None:
        """Fill the cache, and initialise the classifier in closed form if ``head_init`` names one."""
        super().on_fit_start()
        self._cache.fill(self.trainer, self, self._tuned_and_frozen()[1])
        if not self._head_ready:
            rank_zero_info(f"classifier: initialised as {self.head_init} of the training images without augmentation")
            warn_of_what_stays(self.trainer, f"another fit of this model starts from head_init={self.head_init!r} anew")
            self._fit_head("head_init", self.head_init)
            self._head_ready = True
            average_from_here(self.trainer, self)

    def parameter_groups(self) -> list[Any]:
        """The optimiser's parameters; where the head has its own learning rate, groups of backbone and head."""
        groups = super().parameter_groups()
        if self.layer_decay is not None or self.head_lr_factor in (0, 1):
            return groups
        return two_groups(groups, self.backbone)

    def lr_factor(self, group: dict[str, Any]) -> float:
        """What the learning rate of one of the optimiser's groups of parameters is multiplied by."""
        return super().lr_factor(group) * (self.head_lr_factor if group.get("name") == "head" else 1)

    def configure_callbacks(self) -> list[Callback]:
        """The cache, whose `on_exception` must run, unless the trainer has it from an earlier run."""
        trainer: Any = self._trainer
        return [] if trainer is not None and self._cache in trainer.callbacks else [self._cache]

    def teardown(self, stage: str) -> None:
        """Give the datamodule its images back."""
        super().teardown(stage)
        self._cache.drop()

    def on_train_start(self) -> None:
        """Forget the batch of the last refit, which may belong to another run."""
        super().on_train_start()
        self._refitted = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the classifier as it was before it was refitted."""
        super().on_train_batch_start(batch, batch_idx)
        if self._set_aside is not None:
            self._set_classifier(*self._trained_classifier())
            self._set_aside = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refit the classifier after an epoch's last batch, before callbacks measure the epoch."""
        if self.trainer.is_last_batch:
            self._refit()

    def on_train_epoch_end(self) -> None:
        """Refit the classifier of an epoch that ends before its last batch."""
        super().on_train_epoch_end()
        self._refit()

    def on_validation_start(self) -> None:
        """Refit the classifier during a fit, so that the validated model is the saved one."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._refit()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record whether the classifier has been initialised, which tuners save and restore before it has; and the
        classifier that training goes on with, if it is a refitted one that is saved.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint["head_ready"] = self._head_ready
        if self._set_aside is not None:
            checkpoint[_SET_ASIDE] = self._trained_classifier(), self._classifier_now()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the loaded classifier, and refuse to resume a run with other layers.

        Raises:
            ValueError: The run tuned, or skipped from, other layers, which its optimiser's state belongs to.
        """
        super().on_load_checkpoint(checkpoint)
        self._head_ready = checkpoint.get("head_ready", True)
        self._set_aside = checkpoint.get(_SET_ASIDE)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            knobs.check_same_run(checkpoint.get("hyper_parameters", {}), self.hparams, self.tunes_the_same)

    def load_delta(self, path: str | Path) -> None:
        """Load tuned layers and classifier; see `PartlyFrozen.load_delta`."""
        super().load_delta(path)
        self._head_ready = True

    def _start_head(self) -> None:
        if self.head_init == "zero":
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)
        self.head.requires_grad_(self.head_lr_factor > 0)

    def _choose_block(self, stage: str) -> None:
        """Choose the block to tune by the network's expansion on the training images."""
        knobs.check_chooses("train", stage)
        with self._split.expanded():
            found = choose_block(self.trainer, self, self.backbone, self.num_classes, [*self._left_out().values()])
        block = self.trainer.strategy.broadcast(found)
        rank_zero_info(f"train: {block or 'no block, since none is expected to lower the error'}")
        knobs.check_head(block or "none", self.head_init, self.refit, self.head_lr_factor, self.hparams["skip_join"])
        self._tune(block or "none")
        self._split.tune(self.chosen.places())
        self.train()
        self.hparams.update({"train": block} if block else NO_LAYER)
        self.layer_decay = self.hparams["layer_decay"]
        average_anew(self.trainer, self)

    def _choose_skips(self, stage: str) -> None:
        """Choose the layers that lower the closed form's error on the training images, and build the head for them."""
        knobs.check_chooses("skip_from", stage)
        join = self.hparams["skip_join"]
        features, layers, labels = layer_features(self.trainer, self, self.backbone)
        start = features if join == "concat" else None
        skips = choose_skips(start, layers, labels, self.hparams["max_skips"])
        skips = self.trainer.strategy.broadcast(skips)
        rank_zero_info(f"skip connections: from {', '.join(skips) or 'no layer, since none lowers the error clearly'}")
        self._split.skip_from(skips)
        width, *skipped = self._split.widths
        assert isinstance(self.head, SkipHead)
        self.head.rebuild(width, skipped, join)
        self._start_head()
        self.hparams.update({"skip_from": skips, "max_skips": 1})
        average_anew(self.trainer, self)

    def _left_out(self) -> dict[str, nn.Parameter]:
        """Parameters of the network that the classifier gets nothing of, by name: with ``only`` those behind skips."""
        if self.hparams["skip_join"] != "only" or not self._split.skips:
            return {}
        named: dict[str, nn.Parameter] = dict(self.backbone.net.named_parameters())
        with eval_mode(self), torch.enable_grad(), require_gradients(self.backbone):
            last, *skipped = self.features(self.backbone.noise(2))
            runs, reaches = (
                torch.autograd.grad(torch.cat(parts, 1).sum(), [*named.values()], retain_graph=True, allow_unused=True)
                for parts in ((last, *skipped), skipped)
            )
        pairs = zip(named.items(), runs, reaches, strict=True)
        return dict(item for item, run, reach in pairs if run is not None and reach is None)

    def _check_reached(self) -> None:
        """Refuse tuned layers that the classifier gets nothing of."""
        if behind := [name for name, parameter in self._left_out().items() if parameter.requires_grad]:
            raise ValueError(
                f'with skip_join="only" the classifier gets the output of {", ".join(self._split.skips)} alone, which '
                f"does not depend on {behind[0]!r}, so that it would not be trained; name layers up to the skipped "
                "one in train, or take another skip_join"
            )

    def _warn_of_limits(self, rows: Any) -> None:
        """Warn that a closed form reads all training images of a run that trains on fewer."""
        trainer: Any = self.trainer
        limit = trainer.limit_train_batches
        batches = math.inf if sized_len(rows) is None else len(rows)
        some = limit < 1 if isinstance(limit, float) else limit * trainer.world_size < batches
        if limit and some and not trainer.fast_dev_run and not trainer.global_step:
            rank_zero_warn(
                "the classifier in closed form reads all training images, although the run is limited to "
                f"limit_train_batches={limit}; for fewer labels give the datamodule shots or a fraction"
            )

    def _refit(self) -> None:
        """Fit the classifier in closed form, unless that was done after this batch."""
        batches = self.trainer.fit_loop.total_batch_idx  # not steps: statistics change between steps
        if self.refit != "none" and self._refitted != batches:
            trained = self._trained_classifier()
            self._fit_head("refit", self.refit)
            self._set_aside = trained, self._classifier_now()
            self._refitted = batches

    def _trained_classifier(self) -> list[Tensor]:
        """The classifier that was set aside, unless another one than the refitted has been loaded since."""
        now = self._classifier_now()
        if self._set_aside is None:
            return now
        trained, refitted = self._set_aside
        return trained if all(torch.equal(a, b.to(a)) for a, b in zip(now, refitted, strict=True)) else now

    def _classifier_now(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in (self.classifier.weight, self.classifier.bias)]

    def _fit_head(self, option: str, kind: Any) -> None:
        """Fit the classifier in closed form to the training images without augmentation."""
        rows = self._cache.train_rows(self.trainer, f'{option}="{kind}"')
        self._warn_of_limits(rows)
        with evaluation(self.trainer, self):
            batches = ready_batches(self.trainer, rows)
            chunks: Iterable[Batch] = ((self._joined(images), labels) for images, labels in batches)
            if self.trainer.world_size > 1 and is_stream(rows):  # of which each process reads its own part
                none = torch.empty(0, dtype=torch.int64, device=self.device)
                parts = [(none.new_empty(0, self.classifier.in_features), none), *chunks]
                features, labels = zip(*parts, strict=True)
                chunks = [rows_of_parts(torch.cat(features).float(), torch.cat(labels))]
            fitted = classifier_of(kind, chunks, self.num_classes, self.hparams["class_weight"])
        # From the CPU, since a broadcast object's tensors are loaded onto the sender's device.
        self._set_classifier(*(self.trainer.strategy.broadcast(tensor.cpu()) for tensor in fitted))

    @torch.no_grad()
    def _set_classifier(self, weight: Tensor, bias: Tensor) -> None:
        self.classifier.weight.copy_(weight)
        self.classifier.bias.copy_(bias)

    def _joined(self, x: Tensor | Stored) -> Tensor:
        """Input of the linear classifier ``(N, classifier.in_features)``."""
        features = self.features(x)
        return self.head.joined(*features) if isinstance(self.head, SkipHead) else features[0]
