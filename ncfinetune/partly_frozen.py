"""A classifier whose backbone is trained in part: frozen tensors do not change, tuned tensors are saved as a delta."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ncfinetune import delta
from ncfinetune.built_in import foreign
from ncfinetune.chosen import choose, parameter_table
from ncfinetune.classifier import Classifier
from ncfinetune.frozen import Frozen, refuse_random, refuse_tuners
from ncfinetune.knobs import check_adapters, check_dropout, kept_by_deltas
from ncfinetune.mode_caches import drop_caches
from ncfinetune.passes import eval_mode
from ncfinetune.timm_network import save_for_timm

if TYPE_CHECKING:
    from typing_extensions import Self

# Entry of checkpoints: what tells the tuned layers that the first fit started from.
_START = "tuned_from"


class PartlyFrozen(Classifier):
    """A classifier of which the head and chosen layers of the backbone are trained, the rest frozen. Abstract.

    Frozen layers get no gradients and do not update their running statistics: they stay in eval mode, and callbacks
    that average weights leave them unchanged. At the start of a run a table of trained and frozen parameters is logged.

    Args:
        checkpoint: File with the pre-trained weights of the backbone; see `Backbone.load`.
        train: ``none``, ``all``, or names and patterns; see `choose`.
        allow_random: Allow a backbone that is not pre-trained, and frozen parameters that no file provided.
        **options: Arguments of `Classifier`.

    Attributes:
        chosen: Layers and parameters of the backbone that are trained.
        head: Maps the backbone's features to logits.

    Raises:
        ValueError: As `choose`; in ``fit``: a random backbone, callbacks that change which layers are trained, or
            frozen tensors that were changed.
    """

    head: nn.Module

    def __init__(
        self, checkpoint: str | dict[str, Any] | None, train: str | list[str], allow_random: bool, **options: Any
    ) -> None:
        super().__init__(**options)
        if checkpoint is not None:
            self.backbone.load(checkpoint)
        self.allow_random = allow_random
        self._frozen = Frozen()
        # What tells the tuned layers that the first fit started from; empty where a checkpoint does not say.
        self._start: dict[str, Any] | None = None
        self._tune(train)
        check_adapters(train, self.backbone.adapters, self.backbone.net)
        check_dropout(train, self.backbone.spec.get("drop_rate"), self.chosen.layers.values())

    def setup(self, stage: str) -> None:
        """Refuse callbacks that change which layers are trained.

        Lightning's warning about modules in eval mode is silenced, since frozen layers belong there.
        """
        super().setup(stage)
        if stage == "fit":
            refuse_tuners(self, self.trainer)
            if strange := self._not_for_deltas():
                rank_zero_warn(f"no delta will be written beside the checkpoints: {_not_in_delta(strange)}")
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def on_fit_start(self) -> None:
        """Record the frozen tensors, and log how many parameters are trained."""
        super().on_fit_start()
        self.chosen.check(self.backbone.net)
        if not self.allow_random:
            refuse_random(self.backbone.net, self.backbone.random)
        tuned, frozen = self._tuned_and_frozen(self.trainer.strategy.lightning_module_state_dict())
        if self._start is None:
            self._start = delta.start_of(_of_backbone(tuned))
        self._frozen.remember(frozen, self, self.trainer)
        rank_zero_info(self.parameter_table())

    def teardown(self, stage: str) -> None:
        """Forget the frozen tensors."""
        super().teardown(stage)
        self._frozen = Frozen()

    def on_train_epoch_start(self) -> None:
        """Restore the frozen tensors: a callback may have averaged them or reset their statistics."""
        super().on_train_epoch_start()
        self._frozen.restore(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Have layers in eval mode of which single parameters train use these as they are now."""
        super().on_train_batch_start(batch, batch_idx)
        if self.chosen.parameters:
            drop_caches(self.backbone.net)

    def on_validation_epoch_start(self) -> None:
        """Restore the frozen tensors: a callback may have replaced them by an average."""
        super().on_validation_epoch_start()
        self._frozen.restore(self)

    def on_train_end(self) -> None:
        """Restore the frozen tensors in the weights that a callback sets at the end of training."""
        super().on_train_end()
        self._frozen.restore(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the frozen tensors as they were loaded, even if a callback changed them."""
        super().on_save_checkpoint(checkpoint)
        self._frozen.restore_in(checkpoint["state_dict"])
        checkpoint[_START] = self._start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what tells the layers that the first fit started from."""
        super().on_load_checkpoint(checkpoint)
        self._start = checkpoint.get(_START, {})

    def on_fit_end(self) -> None:
        """Write ``delta.safetensors`` beside the checkpoints; after a run without a step ``last.ckpt`` too.

        Raises:
            ValueError: Frozen tensors have changed.
        """
        super().on_fit_end()
        trainer: Any = self.trainer
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        state = trainer.strategy.lightning_module_state_dict()
        self._frozen.check(self._tuned_and_frozen(state)[1])
        if folder and trainer.global_step == 0:  # Lightning saves no checkpoint of such a run
            trainer.save_checkpoint(Path(folder) / "last.ckpt")
        if folder and trainer.is_global_zero and not trainer.fast_dev_run and not self._not_for_deltas():
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.save_delta(Path(folder) / "delta.safetensors", state=state)

    def train(self, mode: bool = True) -> Self:
        """Switch the head and the tuned layers to training mode; frozen layers stay in eval mode."""
        super().train(mode)
        self.backbone.eval()
        for layer in self.chosen.layers.values():
            layer.train(mode)
        return self

    def parameter_table(self) -> str:
        """A table of trained and of all parameters: head, each tuned layer, rest of the backbone, total."""
        head, rest = list(self.head.parameters()), list(self.backbone.parameters())
        return parameter_table({"head": head, **self.chosen.rows(self.backbone.net), "rest of the backbone": rest})

    def save_delta(
        self, path: str | Path, class_names: list[str] | None = None, state: dict[str, Tensor] | None = None
    ) -> None:
        """Save the tuned tensors, the classifier included, with the base's name and fingerprint.

        The fingerprint is computed from the frozen tensors, since the delta replaces all others. Adapters are always in
        the delta, trained or frozen, since no file of the base has them.

        Args:
            path: File to write, ``.safetensors``.
            class_names: Names of the classes, in the order of their labels; None takes the datamodule's names.
            state: The state of this module, where its own is sharded over processes.

        Raises:
            ValueError: The file's name has another suffix, or an option of a subclass is of no built-in type.
        """
        if strange := self._not_for_deltas():
            raise ValueError(_not_in_delta(strange))
        tensors, frozen = self._of_delta(state)
        names = self.class_names if class_names is None else [str(name) for name in class_names]
        delta.save(path, tensors, frozen, {**self._facts(), "class_names": names})

    def load_delta(self, path: str | Path) -> None:
        """Load tuned layers and classifier from a delta.

        Frozen tensors stay as they are, but for a delta of a run with a precision such as ``bf16-true``: they become
        the rounded ones on which it was tuned.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is no delta, a damaged one, or a delta of other options or of another base.
        """
        facts = delta.facts(path)
        tuned, base = self._of_delta()
        self.load_state_dict(
            delta.load(path, tuned, base, self._facts()) | delta.as_tuned_on(base, facts), strict=False
        )
        self._trained_on(facts["class_names"], facts["preprocessing"])
        self._start = facts.get("start") or {}

    @classmethod
    def from_delta(
        cls,
        path: str | Path,
        checkpoint: str | dict[str, Any] | None = None,
        pretrained: bool = False,
        strength: float = 1.0,
    ) -> Self:
        """The fine-tuned model made of a delta and of its base weights, from ``checkpoint`` or timm.

        Args:
            path: The delta.
            checkpoint: File of the base; see `Backbone`.
            pretrained: Take the base weights from timm.
            strength: Interpolates the tuned layers between base and delta: ``base + strength * (delta - base)``. Values
                between 0 and 1 are often more robust to distribution shift (Wortsman et al. 2022, arXiv 2109.01903,
                section 3). The head is always the delta's.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is no delta, a damaged one, or a delta of another base; ``strength`` is outside 0..1,
                or below 1 for adapters, or for a base with other tuned layers than the fit started from.
        """
        facts = delta.facts(path)
        delta.check_strength(strength, facts)
        if strange := facts["knobs"].keys() - kept_by_deltas(cls):
            raise ValueError(f"delta {str(path)!r} is of another version: a FineTuner has no {', '.join(strange)}")
        model = cls(backbone={**facts["base"], "pretrained": pretrained}, checkpoint=checkpoint, **facts["knobs"])
        base = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()} if strength != 1 else {}
        if base:
            delta.check_start(path, facts, _of_backbone(model._of_delta()[0]))
        model.load_delta(path)
        delta.average(base, model.backbone.state_dict(), strength)
        return model.eval()

    def save_for_timm(self, path: str | Path) -> tuple[str, dict[str, Any]]:
        """Merge base and tuned layers into one file, and return the arguments of `timm.create_model` that load it.

        After training, or from a delta, these arguments include the class names and the image preprocessing, so that
        `timm.data.resolve_model_data_config` of the network returns the datamodule's preprocessing: of images of its
        ``stored_size``, if that is another side than the network's. With ``skip_from`` the classifier is left out,
        since timm's networks have no skip connection to it.

        Raises:
            ValueError: timm has no such network, as with a stem for small images; its head cannot hold the classifier;
                or the file's name does not end in ``.safetensors``.
        """
        classifier = self.head if isinstance(self.head, nn.Linear) else None
        data = {"class_names": self.class_names, "preprocessing": self.preprocessing}
        with eval_mode(self):
            return save_for_timm(path, self.backbone, classifier, data)

    def _tune(self, train: str | list[str]) -> None:
        """Freeze the backbone but for what ``train`` names; ``auto`` names nothing yet."""
        self.chosen = choose(self.backbone, self.backbone.net, "none" if train == "auto" else train)
        self.backbone.requires_grad_(False)
        for tensors in self.chosen.tensors(self.backbone.net).values():
            for tensor in tensors:
                tensor.requires_grad_(True)

    def tunes_the_same(self, train: str | list[str]) -> bool:
        """Whether ``train`` names the layers and parameters that this model tunes."""
        net = self.backbone.net
        return train != "auto" and choose(self.backbone, net, train).paths(self, net) == self.chosen.paths(self, net)

    def _tuned_and_frozen(self, state: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tuned and the frozen tensors of the state."""
        tuned = {"head", *self.chosen.paths(self, self.backbone.net)}
        return delta.split(self.state_dict() if state is None else state, tuned)

    def _of_delta(self, state: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state's tensors that a delta keeps, frozen adapters included, and the tensors of its base."""
        tuned, frozen = self._tuned_and_frozen(state)
        adapters, base = delta.split(frozen, (f"backbone.net.{path}" for path in self.backbone.adapters))
        return tuned | adapters, base

    def _not_for_deltas(self) -> str | None:
        """The first option, or entry of the preprocessing, that no delta can hold; None if there is none."""
        facts = self._facts()
        return foreign({**facts["knobs"], **(facts["preprocessing"] or {})})

    def _facts(self) -> dict[str, Any]:
        # Under the command line Lightning keeps further entries in the hyper-parameters.
        kept = {name: self.hparams[name] for name in sorted(kept_by_deltas(type(self))) if name in self.hparams}
        data = {"class_names": self.class_names, "preprocessing": self.preprocessing, "start": self._start or None}
        return {"base": self.backbone.spec, "knobs": kept, **data}


def _of_backbone(tuned: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tuned.items() if name.startswith("backbone.")}


def _not_in_delta(option: str) -> str:
    return f"expected options that are numbers, words, lists and dictionaries, which a delta can hold, got {option}"
