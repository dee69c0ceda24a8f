"""NeuralCollapseTracker in projects that have never heard of it, and in every regime that Lightning has."""

import copy
import itertools
import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import timm
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import reference
from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe
from ncfinetune.callbacks.adapters import BatchReader
from ncfinetune.probes import decided_rightly, ridge

K, N = 3, 50
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def _images(size: int = 16, channels: int = 3, number: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % K
    return torch.randn(number, channels, size, size, generator=generator) + labels.view(-1, 1, 1, 1), labels


def _loader(batch_size: int = 16, shuffle: bool = False, **arguments: Any) -> DataLoader:
    return DataLoader(TensorDataset(*_images()), batch_size=batch_size, shuffle=shuffle, **arguments)


def _trainer(folder: Path, *callbacks: Any, library: Any = pl, **arguments: Any) -> Any:
    given = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **QUIET, **arguments}
    return library.Trainer(default_root_dir=folder, callbacks=list(callbacks), **given)


def _training(library: Any, network: nn.Module) -> Any:
    """A module as somebody else writes it: a network, a step, an optimiser, and no forward."""

    class Stock(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            return nn.functional.cross_entropy(self.model(images), labels)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.training_step(batch, batch_idx), prog_bar=False)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.001)

    return Stock()


class HuggingFace(pl.LightningModule):
    """Batches are mappings, and outputs of layers and network are no plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        self.net = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=K))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.001)


class Mappings(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        images, labels = _images()
        return {"pixel_values": images[index], "labels": labels[index]}


def _nc1(run: Callable[[Tensor], Any], layer: nn.Module, pool: Callable[[Any], Tensor], take: str = "output") -> float:
    """NC1 of a layer over the images in one forward pass, by the reference."""
    caught: list[Tensor] = []
    images, labels = _images()
    handle = layer.register_forward_hook(lambda m, i, o: caught.append(pool(o if take == "output" else i[0])))
    with torch.no_grad():
        run(images)
    handle.remove()
    return reference.nc1(caught[0].numpy(), labels.numpy())


LIBRARIES = pytest.mark.parametrize("library", [pl, pytorch_lightning], ids=["lightning", "pytorch_lightning"])


@LIBRARIES
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchvision_resnet(library: Any, tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=K)
    tracker = NeuralCollapseTracker(K, layers=["layer2.*", "auto"])
    trainer = _trainer(tmp_path, tracker, library=library)
    trainer.fit(_training(library, network), _loader(25, shuffle=True), _loader(25))
    network.eval()
    for split in ("train", "val"):
        for name, layer, take in (("layer2.1", network.layer2[1], "output"), ("penultimate", network.fc, "input")):
            pool = (lambda o: o.mean((2, 3))) if take == "output" else (lambda o: o)
            value = tracker.values[f"nc1/{split}/{name}"]
            assert value == pytest.approx(_nc1(network, layer, pool, take), rel=1e-5)
            assert trainer.callback_metrics[f"nc1/{split}/{name}"].item() == pytest.approx(value, rel=1e-6)
    logged = {name.split("/")[0] for name in tracker.values if name.endswith("val/penultimate")}
    family = {"nc1", "nc1_ratio", "cdnv", "nc2_equinorm", "nc2_equiangularity", "nc2_etf"}
    assert logged == family | {"nc3", "nc4"}
    assert {name.split("/")[0] for name in tracker.values if name.endswith("layer2.0")} == family


def test_hugging_face_transformer(tmp_path: Path) -> None:
    module = HuggingFace()
    loader = DataLoader(Mappings(), batch_size=16)
    names = [name for name, _ in module.named_modules() if name.split(".")[-1].isdigit()]
    tracker = NeuralCollapseTracker(K, layers=[names[1], "penultimate"])
    _trainer(tmp_path, tracker).fit(module, loader, loader)
    module.eval()

    def run(images: Tensor) -> Any:
        return module.net(pixel_values=images)

    layer = module.get_submodule(names[1])
    expected = _nc1(run, layer, lambda o: (o if isinstance(o, Tensor) else o[0])[:, 0])
    assert tracker.values[f"nc1/val/{names[1]}"] == pytest.approx(expected, rel=1e-4)
    expected = _nc1(run, module.net.classifier, lambda o: o, "input")
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "layer"), [("test_vit.r160_in1k", "blocks.2"), ("test_convnext.r160_in1k", "stages.1")]
)
def test_timm_networks(name: str, layer: str, tmp_path: Path) -> None:
    size = {"img_size": 32} if "vit" in name else {}
    network = timm.create_model(name, num_classes=K, **size)
    data = DataLoader(TensorDataset(*_images(32)), batch_size=16)
    tracker = NeuralCollapseTracker(K, layers=[layer, "auto"])
    _trainer(tmp_path, tracker).fit(_training(pl, network), data, data)
    assert tracker.values[f"nc1/val/{layer}"] > 0
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(tracker.values["nc1/train/penultimate"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["module", "network"])
def test_compiled(whole: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    network = torchvision.models.resnet18(num_classes=K)
    module: Any = _training(pl, network)
    if whole:
        module = torch.compile(module, backend="eager")
    else:
        module.model = torch.compile(network, backend="eager")
    tracker = NeuralCollapseTracker(K, layers=["layer3.1", "auto"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo's own
        _trainer(tmp_path, tracker, max_epochs=2).fit(module, _loader(25), _loader(25))
    network.eval()
    expected = _nc1(network, network.layer3[1], lambda o: o.mean((2, 3)))
    assert tracker.values["nc1/val/layer3.1"] == pytest.approx(expected, rel=1e-5)
    assert tracker.values["nc1/train/layer3.1"] == pytest.approx(expected, rel=1e-5)


def _small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K))


def test_layers_made_in_configure_model(tmp_path: Path) -> None:
    class Late(pl.LightningModule):
        def configure_model(self) -> None:
            self.model = getattr(self, "model", None) or _small()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.001)

    for run in ("fit", "validate"):
        tracker = NeuralCollapseTracker(K)
        trainer = _trainer(tmp_path, tracker)
        trainer.fit(Late(), _loader(), _loader()) if run == "fit" else trainer.validate(
            Late(), _loader(), verbose=False
        )
        assert tracker.values["nc1/val/penultimate"] > 0


def test_nc4_compares_validation_with_the_means_of_the_training_set(tmp_path: Path) -> None:
    network = _small()
    tracker = NeuralCollapseTracker(K)
    images, labels = _images(number=40)
    other = DataLoader(TensorDataset(images + 0.8 * torch.randn_like(images), labels), batch_size=16)
    _trainer(tmp_path, tracker).fit(_training(pl, network), _loader(), other)
    with torch.no_grad():
        train, val = network[:4](_images()[0]), network[:4](other.dataset.tensors[0])
        means = reference.class_means(train.numpy(), _images()[1].numpy())
        nearest = np.linalg.norm(val.numpy()[:, None] - means, axis=2).argmin(1)
        differ = (nearest != network[4](val).argmax(1).numpy()).mean()
    assert 0 < differ < 1
    assert tracker.values["nc4/val/penultimate"] == pytest.approx(differ)
    assert "nc4/train/penultimate" not in tracker.values
    weight = network[4].weight.detach().numpy()
    expected = reference.self_duality(val.numpy(), labels.numpy(), weight)
    assert tracker.values["nc3/val/penultimate"] == pytest.approx(expected, rel=1e-5)


def test_validation_in_the_middle_of_an_epoch_has_no_nc4(tmp_path: Path) -> None:
    class Remembering(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.first = getattr(self, "first", set(tracker.values))

    tracker, remembering = NeuralCollapseTracker(K, train_every_n_epochs=2), Remembering()
    trainer = _trainer(tmp_path, tracker, remembering, max_epochs=2, val_check_interval=0.5)
    trainer.fit(_training(pl, _small()), _loader(), _loader())
    assert "nc1/val/penultimate" in remembering.first
    assert "nc4/val/penultimate" not in remembering.first
    assert "nc4/val/penultimate" in tracker.values  # that of the second epoch's end


def test_several_validation_sets(tmp_path: Path) -> None:
    images, labels = _images()
    narrow = DataLoader(TensorDataset(images[:20] / 2, labels[:20]), batch_size=16)
    tracker = NeuralCollapseTracker(K)
    module: Any = _training(pl, _small())
    module.validation_step = lambda batch, batch_idx, dataloader_idx=0: module.model(batch[0])
    _trainer(tmp_path, tracker).fit(module, _loader(), [_loader(), narrow])
    values = [tracker.values[f"nc1/val/penultimate/dataloader_idx_{i}"] for i in (0, 1)]
    with torch.no_grad():
        for value, loader in zip(values, (_loader(), narrow), strict=True):
            features, kinds = module.model[:4](loader.dataset.tensors[0]), loader.dataset.tensors[1]
            assert value == pytest.approx(reference.nc1(features.numpy(), kinds.numpy()), rel=1e-5)


@pytest.mark.parametrize("stacked", [True, False], ids=["(N, V, ...)", "list of views"])
def test_several_views(stacked: bool, tmp_path: Path) -> None:
    images, labels = _images()
    views = [images, images + 0.1]
    module: Any = _training(pl, _small())

    def flat(batch: Any) -> Tensor:
        return batch[0].flatten(0, 1) if stacked else torch.cat(batch[0])

    module.training_step = lambda batch, batch_idx: module.model(flat(batch)).square().mean()
    module.validation_step = lambda batch, batch_idx: module.model(flat(batch))
    parts = torch.arange(N).split(16)
    inputs = [torch.stack(views, 1)[rows] if stacked else [view[rows] for view in views] for rows in parts]
    batches = [(part, labels[rows]) for part, rows in zip(inputs, parts, strict=True)]
    data = DataLoader(batches, batch_size=None)
    tracker = NeuralCollapseTracker(K, forward=lambda module, batch: module.model(flat(batch)))
    _trainer(tmp_path, tracker).fit(module, data, data)
    with torch.no_grad():
        features = torch.cat([module.model[:4](view) for view in views])
    expected = pytest.approx(reference.nc1(features.numpy(), labels.repeat(2).numpy()), rel=1e-5)
    assert tracker.values["nc1/val/penultimate"] == expected
    assert tracker.values["nc1/train/penultimate"] == expected


def test_labels_and_pooling_of_ones_own(tmp_path: Path) -> None:
    images, labels = _images()
    onehot = nn.functional.one_hot(labels, K).float()
    data = DataLoader(TensorDataset(images, onehot), batch_size=16)
    module = _training(pl, _small())
    tracker = NeuralCollapseTracker(
        K, layers="1", batch_to_labels=lambda batch: batch[1].argmax(1), pool=lambda o: o.amax((2, 3))
    )
    _trainer(tmp_path, tracker).fit(module, data, data)
    expected = _nc1(module.model, module.model[1], lambda o: o.amax((2, 3)))
    assert tracker.values["nc1/val/1"] == pytest.approx(expected, rel=1e-5)


def test_number_of_classes_from_the_classifier_that_is_named(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(classifier="model.4")
    _trainer(tmp_path, tracker).fit(_training(pl, _small()), _loader(), _loader())
    assert tracker.values["nc1/val/penultimate"] > 0


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(*_images(), strict=True))


REGIMES: dict[str, tuple[dict[str, Any], int]] = {
    "fast_dev_run": ({"fast_dev_run": True}, 16),
    "limit_train_batches": ({"limit_train_batches": 2}, 32),
    "overfit_batches": ({"overfit_batches": 1}, 16),
    "gradient accumulation": ({"accumulate_grad_batches": 3}, N),
    "16-mixed": ({"precision": "16-mixed"}, N),
    "bf16-mixed": ({"precision": "bf16-mixed"}, N),
    "bf16-true": ({"precision": "bf16-true"}, N),
    "sanity check": ({"num_sanity_val_steps": 2}, N),
}


def _counting_labels(seen: list[int]) -> Callable[[Any], Tensor]:
    """Takes the labels from a batch, and notes how many they are: the sizes of the batches that are measured."""
    return lambda batch: (seen.append(len(batch[1])), batch[1])[1]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_regimes(regime: str, tmp_path: Path) -> None:
    arguments, samples = REGIMES[regime]
    seen: list[int] = []
    tracker = NeuralCollapseTracker(K, layers=["0", "auto"], batch_to_labels=_counting_labels(seen))
    module = _training(pl, _small())
    trainer = _trainer(tmp_path, tracker, limit_val_batches=0, **arguments)
    trainer.fit(module, _loader(), _loader())
    # These overrule limit_val_batches; the second lets a sanity check run, too.
    validated = {"fast_dev_run": 16, "overfit_batches": 32}.get(regime, 0)
    assert sum(seen) == 2 * samples + validated  # before the first step and after the epoch
    assert np.isfinite(tracker.values["nc1/train/penultimate"])
    if "16" in regime:
        exact = _nc1(module.float().eval().model, module.model[4], lambda o: o, "input")
        assert tracker.values["nc1/train/penultimate"] == pytest.approx(exact, rel=0.1)


def test_sanity_check_is_not_measured(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K, train_every_n_epochs=0)
    trainer = _trainer(tmp_path, tracker, num_sanity_val_steps=2, max_epochs=0)
    trainer.fit(_training(pl, _small()), _loader(), _loader())
    assert tracker.values == {}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*IterableDataset.* has .__len__. defined")
def test_iterable_data(workers: int, tmp_path: Path) -> None:
    loader = DataLoader(Stream(), batch_size=16, num_workers=workers)
    tracker = NeuralCollapseTracker(K)
    module = _training(pl, _small())
    _trainer(tmp_path, tracker).fit(module, loader, _loader())
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(tracker.values["nc1/val/penultimate"], rel=1e-9)


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(zip(*_images(), strict=True))


def test_endless_data(tmp_path: Path) -> None:
    endless = {"max_epochs": -1, "max_steps": 5, "limit_val_batches": 0}
    loader = DataLoader(Endless(), batch_size=16)
    with pytest.raises(ValueError, match=r"whether the training data are infinite.*max_train_batches=...\)"):
        _trainer(tmp_path, NeuralCollapseTracker(K), **endless).fit(_training(pl, _small()), loader, _loader())
    tracker = NeuralCollapseTracker(K, max_train_batches=2)
    _trainer(tmp_path, tracker, **endless).fit(_training(pl, _small()), loader, _loader())
    assert tracker.values["nc1/train/penultimate"] > 0


@pytest.mark.parametrize("run", ["validate", "test"])
def test_evaluation_alone(run: str, tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K)
    module: Any = _training(pl, _small())
    module.test_step = module.validation_step
    getattr(_trainer(tmp_path, tracker), run)(module, _loader(), verbose=False)
    split = "val" if run == "validate" else "test"
    expected = _nc1(module.eval().model, module.model[4], lambda o: o, "input")
    assert tracker.values[f"nc1/{split}/penultimate"] == pytest.approx(expected, rel=1e-5)


def test_gradients_that_accumulate_are_left_alone(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [NeuralCollapseTracker(K)]):
        torch.manual_seed(0)
        module = _training(pl, _small())
        trainer = _trainer(tmp_path, *callbacks, max_epochs=3, accumulate_grad_batches=3, val_check_interval=1)
        trainer.fit(module, _loader(), _loader())
        ends.append(module.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_resumed_runs_continue_their_curves(tmp_path: Path) -> None:
    whole = NeuralCollapseTracker(K, layers=["0", "auto"])
    torch.manual_seed(0)
    _trainer(tmp_path, whole, max_epochs=4).fit(_training(pl, _small()), _loader(), _loader())
    torch.manual_seed(0)
    half, again = (NeuralCollapseTracker(K, layers=["0", "auto"]) for _ in range(2))
    trainer = _trainer(tmp_path, half, max_epochs=2)
    trainer.fit(_training(pl, _small()), _loader(), _loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = _trainer(tmp_path, again, max_epochs=4)
    resumed.fit(_training(pl, _small()), _loader(), _loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert list(again.history["train"]) == [0, 1, 2, 3, 4]
    for split, epochs in whole.history.items():
        for epoch, layers in epochs.items():
            assert again.history[split][epoch] == {k: pytest.approx(v, rel=1e-6) for k, v in layers.items()}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("only", [False, True], ids=["whole", "weights only"])
def test_a_test_of_a_checkpoint_is_recorded_at_its_epoch(only: bool, fresh: bool, tmp_path: Path) -> None:
    """Lightning tells callbacks nothing of a checkpoint of weights only."""

    def made() -> Any:
        module = _training(pl, _small())
        type(module).test_step = type(module).validation_step
        return module

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt", weights_only=only)

    tracker, module = NeuralCollapseTracker(K), made()
    trainer = _trainer(tmp_path, Save(), tracker, max_epochs=3)
    trainer.fit(module, _loader(), _loader())
    if fresh:
        tracker = NeuralCollapseTracker(K)
        trainer, module = _trainer(tmp_path, tracker), made()
    for epoch in (1, 0):
        trainer.test(module, _loader(), ckpt_path=str(tmp_path / f"{epoch}.ckpt"), verbose=False)
    assert list(tracker.records["test"]) == [2, 1]


def test_two_trackers_in_one_run_keep_their_own_state() -> None:
    keys = {NeuralCollapseTracker(K, layers=layers).state_key for layers in ("auto", ["0", "auto"])}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["nc1", "nc9"]}, "expected metrics among nc1, .*, or 'all', got nc9"),
        ({"metrics": []}, "expected metrics among .*, got none"),
    ],
)
def test_wrong_metrics(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralCollapseTracker(K, **arguments)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare, self.sizes = _small(), nn.Linear(6, 2), Sizes()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes(x)
        return self.net(x)


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> str:
        return f"{len(x)}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "spare"}, ValueError, "layer 'spare' never ran in a pass over the train set; name layers that"),
        (
            {"layers": "sizes"},
            TypeError,
            "expected the output of layer 'sizes' to be a tensor, .* got str; name another layer",
        ),
        ({"layers": "siezs"}, ValueError, "no layer fits 'siezs'; .*nearest: sizes"),
        ({"classifier": "net.0"}, TypeError, "expected the classifier 'net.0' to be a torch.nn.Linear, got Conv2d"),
        ({"num_classes": 2, "layers": "net.0"}, ValueError, r"expected labels in 0..1 \(num_classes=2\), got \[2\]"),
    ],
)
def test_what_cannot_be_tracked(arguments: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(**{"num_classes": K, **arguments})
    module = _training(pl, Unused())
    trainer = _trainer(tmp_path, tracker, num_sanity_val_steps=0)
    with pytest.raises(error, match=message):
        trainer.fit(module, _loader(), _loader())
    assert trainer.global_step == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_module_that_the_tracker_cannot_run(tmp_path: Path) -> None:
    module: Any = _training(pl, _small())
    module.other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"since it has no forward and 2 children .*; give it .*forward=lambda"):
        _trainer(tmp_path, NeuralCollapseTracker(K)).fit(module, _loader(), _loader())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_one_warning_and_nan(value: float, tmp_path: Path) -> None:
    images, labels = _images()
    images[3] = value
    broken = DataLoader(TensorDataset(images, labels), batch_size=16)
    tracker = NeuralCollapseTracker(K, train_every_n_epochs=0)
    trainer = _trainer(tmp_path, tracker, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="collapse of layer 'penultimate' on the val set is logged as nan") as caught:
        trainer.fit(_training(pl, _small()), _loader(), broken)
    assert len([w for w in caught if "collapse of layer" in str(w.message)]) == 1
    assert np.isnan(tracker.values["nc1/val/penultimate"])
    assert np.isnan(tracker.values["nc3/val/penultimate"])
    assert np.isnan(trainer.callback_metrics["nc1/val/penultimate"].item())
    assert trainer.global_step == 4


def test_one_class_alone_is_nan(tmp_path: Path) -> None:
    images, _ = _images()
    alone = DataLoader(TensorDataset(images, torch.zeros(N).long()), batch_size=16)
    tracker = NeuralCollapseTracker(K, train_every_n_epochs=0)
    with pytest.warns(UserWarning, match="logged as nan: expected samples of at least two classes, got 1"):
        _trainer(tmp_path, tracker, num_sanity_val_steps=0).fit(_training(pl, _small()), _loader(), alone)
    assert np.isnan(tracker.values["cdnv/val/penultimate"])


def _nearly_flat(small: float) -> DataLoader:
    """Two features, of which the second varies less by the factor ``small``, within classes and between."""
    features = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(N) % K
    means = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, -1.0]])
    return DataLoader(TensorDataset((features + means[labels]) * torch.tensor([1.0, small]), labels), batch_size=16)


def test_rounding_of_nc1_is_said_once_and_the_number_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader, tracker = _nearly_flat(1e-6), NeuralCollapseTracker(K)
    trainer = _trainer(tmp_path, tracker)
    for _ in range(2):
        trainer.validate(_training(pl, nn.Sequential(nn.Linear(2, K))), loader, verbose=False)
    features, labels = (tensor.numpy() for tensor in loader.dataset.tensors)
    expected = reference.nc1(features * np.array([1, 1e6]), labels)
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(expected, rel=1e-3)
    (said,) = [record.message for record in caplog.records if "rounding" in record.message]
    assert re.fullmatch(
        r"NeuralCollapseTracker: rounding may have moved nc1 by up to \de-0\d of it: the features vary too unevenly "
        r"within classes, or the class means too little in some directions \(layer 'penultimate', val set; reported "
        r"once\)",
        said,
    )


def test_nc1_alone_is_nan_where_rounding_hides_it(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K)
    with pytest.warns(UserWarning, match="nc1 of layer 'penultimate' on the val set is logged as nan: expected round"):
        _trainer(tmp_path, tracker).validate(
            _training(pl, nn.Sequential(nn.Linear(2, K))), _nearly_flat(1e-7), verbose=False
        )
    assert np.isnan(tracker.values["nc1/val/penultimate"])
    assert all(np.isfinite(tracker.values[f"{name}/val/penultimate"]) for name in ("nc1_ratio", "cdnv", "nc3"))


def test_monitoring_stops_on_collapse(tmp_path: Path) -> None:
    stop = pl.callbacks.EarlyStopping("nc1/train/penultimate", stopping_threshold=1e9, patience=99)
    trainer = _trainer(tmp_path, NeuralCollapseTracker(K), stop, max_epochs=5)
    trainer.fit(_training(pl, _small()), _loader(), _loader())
    assert trainer.current_epoch == 1


def test_pictures_scalars_and_hyper_parameters_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    module = _training(pl, _small())
    module.save_hyperparameters({"lr": 0.01})
    tracker = NeuralCollapseTracker(K, layers=["0", "auto"])
    _trainer(tmp_path, tracker, logger=[logger, CSVLogger(tmp_path)], max_epochs=6).fit(module, _loader(), _loader())
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    drawn = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    names = ("depth", "cosines_penultimate", "spread_penultimate", "projection_penultimate")
    assert drawn == {f"neural_collapse/{name}": [0, 4, 8, 16, 24] for name in names}
    assert len(events.Scalars("nc1/train/penultimate")) == 1 + 6
    metadata = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    for name in (b"nc1/train/penultimate", b"val/loss"):
        assert name in metadata
    assert b"nc1/train/0" not in metadata
    assert [folder for folder in (tmp_path / "run").iterdir() if folder.is_dir()] == []


def test_no_pictures_on_request(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    _trainer(tmp_path, NeuralCollapseTracker(K, figures=False), logger=logger).fit(
        _training(pl, _small()), _loader(), _loader()
    )
    assert EventAccumulator(str(tmp_path / "run")).Reload().Tags()["images"] == []


def test_progress_bar_on_request(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, NeuralCollapseTracker(K, prog_bar=True))
    trainer.fit(_training(pl, _small()), _loader(), _loader())
    shown = {name for name in trainer.progress_bar_metrics if "/" in name}
    assert shown == {"nc1/train/penultimate", "nc1/val/penultimate"}


class EvenOnly(RandomSampler):
    """Draws the samples with even numbers."""

    def __iter__(self) -> Iterator[int]:
        return (index for index in super().__iter__() if index % 2 == 0)

    def __len__(self) -> int:
        return N // 2


class EndlessSampler(Sampler):
    """Draws the first samples again and again, in random order."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        for _ in range(100):
            yield from torch.randperm(self.number).tolist()
        raise AssertionError("an endless sampler was asked for all that it draws")


class EndlessWithLength(EndlessSampler):
    def __len__(self) -> int:
        return self.number


class ThriceEach(Sampler):
    """Draws each sample three times, and does not say how many that are."""

    def __iter__(self) -> Iterator[int]:
        return (index // 3 for index in range(3 * N))


class Tensors(Sampler):
    """Draws some samples twice, as tensors."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(30) % 20)


class OfSampler(Dataset):
    """What another sampler draws, as a data set."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.drawn = sampler, list(sampler)

    def __getitem__(self, index: int) -> int:
        return self.drawn[index]

    def __len__(self) -> int:
        return len(self.drawn)


class Distributing(DistributedSampler):
    """Divides what another sampler draws among processes, as catalyst's, which many projects have copied."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(OfSampler(sampler), num_replicas=1, rank=0)
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        drawn = OfSampler(self.sampler)
        return (drawn[index] for index in super().__iter__())


class DistributedEven(DistributedSampler):
    """Draws the samples with even numbers."""

    def __iter__(self) -> Iterator[int]:
        return (index for index in super().__iter__() if index % 2 == 0)

    def __len__(self) -> int:
        return N // 2


# Samplers and the samples that they draw.
SAMPLERS: dict[str, tuple[Any, list[int]]] = {
    "subset": (SubsetRandomSampler(range(0, N, 2)), list(range(0, N, 2))),
    "weights, some 0": (WeightedRandomSampler([i % 3 for i in range(N)], N), [i for i in range(N) if i % 3]),
    "weights of the first": (WeightedRandomSampler([1.0] * 20, N), list(range(20))),
    "derived": (EvenOnly(range(N)), list(range(0, N, 2))),
    "distributed, of another": (Distributing(SubsetRandomSampler(range(20))), list(range(20))),
    "distributed, derived": (DistributedEven(range(N), num_replicas=1, rank=0), list(range(0, N, 2))),
    "each three times": (ThriceEach(), list(range(N))),
    "tensors": (Tensors(), list(range(20))),
    "endless": (EndlessSampler(N), list(range(N))),
    "endless, of some": (EndlessSampler(20), list(range(20))),
    "endless, of a length": (EndlessWithLength(20), list(range(20))),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_what_the_training_sampler_draws_is_measured(sampler: str, tmp_path: Path) -> None:
    images, labels = _images()
    draws, chosen = SAMPLERS[sampler]
    if sampler == "weights, some 0":
        labels = torch.arange(N) // 2 % K  # so that every class is drawn
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, sampler=draws)
    module, tracker = _training(pl, _small()), NeuralCollapseTracker(K)
    _trainer(tmp_path, tracker, **({"limit_train_batches": 7} if "endless" in sampler else {})).fit(
        module, loader, _loader()
    )
    with torch.no_grad():
        features = module.model[:4](images[chosen])
    expected = reference.nc1(features.numpy(), labels[chosen].numpy())
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sampled", [16, 8])
def test_batch_samplers_are_measured_once(sampled: int, tmp_path: Path) -> None:
    batches = [list(rows) for rows in torch.arange(N).split(sampled)]
    loader = DataLoader(TensorDataset(*_images()), batch_sampler=batches)
    tracker = NeuralCollapseTracker(K)
    _trainer(tmp_path, tracker).fit(_training(pl, _small()), loader, _loader())
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(tracker.values["nc1/val/penultimate"], rel=1e-6)


def test_limits_are_of_samples_where_the_plain_batches_have_another_size(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return _loader(8)

        def train_plain_dataloader(self) -> DataLoader:
            return _loader(16)

        def val_dataloader(self) -> DataLoader:
            return _loader()

    seen: list[int] = []
    tracker = NeuralCollapseTracker(K, batch_to_labels=_counting_labels(seen))
    _trainer(tmp_path, tracker, limit_train_batches=4, limit_val_batches=0).fit(
        _training(pl, _small()), datamodule=Data()
    )
    assert seen == [16, 16, 16, 16]  # four batches of eight, before the first step and after the epoch


def test_a_forward_pass_of_a_part_of_the_batch_is_refused_in_the_sanity_check(tmp_path: Path) -> None:
    module: Any = _training(pl, _small())
    module.validation_step = lambda batch, batch_idx: [module.model(part) for part in batch[0].split(6)]
    trainer = _trainer(tmp_path, NeuralCollapseTracker(K))
    with pytest.raises(
        ValueError, match=r"found 4 rows of features for 16 labels in layer 'penultimate'; it measures the"
    ):
        trainer.fit(module, _loader(), _loader())
    assert trainer.global_step == 0


def test_views_in_a_mapping(tmp_path: Path) -> None:
    images, labels = _images()
    views = [images, images + 0.1]
    parts = torch.arange(N).split(16)
    data = DataLoader([{"views": [v[r] for v in views], "labels": labels[r]} for r in parts], batch_size=None)
    module: Any = _training(pl, _small())
    module.training_step = lambda batch, batch_idx: module.model(torch.cat(batch["views"])).square().mean()
    module.validation_step = lambda batch, batch_idx: module.model(torch.cat(batch["views"]))
    tracker = NeuralCollapseTracker(K, train_every_n_epochs=0)
    _trainer(tmp_path, tracker).fit(module, data, data)
    with torch.no_grad():
        features = torch.cat([module.model[:4](view) for view in views])
    expected = reference.nc1(features.numpy(), labels.repeat(2).numpy())
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(expected, rel=1e-5)


def test_validation_loaders_by_name(tmp_path: Path) -> None:
    module: Any = _training(pl, _small())
    module.validation_step = lambda batch, batch_idx, dataloader_idx=0: module.model(batch[0])
    tracker = NeuralCollapseTracker(K)
    _trainer(tmp_path, tracker).fit(module, _loader(), {"a": _loader(), "b": _loader()})
    assert "nc1/val/penultimate/dataloader_idx_1" in tracker.values


@pytest.mark.parametrize("mode", ["sequential", "max_size"])
def test_batches_with_a_part_of_each_validation_loader_are_one_set(mode: str, tmp_path: Path) -> None:
    images, labels = _images()
    second = DataLoader(TensorDataset(images[:20] + 1, labels[:20]), batch_size=16)
    module: Any = _training(pl, _small())
    # The last forward pass of the step is measured: of combined batches that of the first part.
    module.validation_step = lambda batch, batch_idx, dataloader_idx=0: [
        module.model(images) for images, _ in reversed([batch] if mode == "sequential" else [b for b in batch if b])
    ]
    parts = None if mode == "sequential" else lambda batch: (batch[0] if isinstance(batch[0], list) else batch)[1]
    tracker = NeuralCollapseTracker(K, train_every_n_epochs=0, batch_to_labels=parts)
    both = CombinedLoader([_loader(), second], mode)
    trainer = _trainer(tmp_path, tracker, OnlineProbe(K, kind="ridge", batch_to_labels=parts))
    trainer.fit(module, _loader(), both)
    name = "nc1/val/penultimate" + ("/dataloader_idx_0" if mode == "sequential" else "")
    expected = _nc1(module.model, module.model[4], lambda o: o, "input")
    assert tracker.values[name] == pytest.approx(expected, rel=1e-5)
    assert ("probe/acc" in trainer.callback_metrics) == (mode != "sequential")
    assert sum(logged.startswith("nc1/val/") for logged in tracker.values) == (2 if mode == "sequential" else 1)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_a_validation_set_without_samples_is_nan(tmp_path: Path) -> None:
    images, labels = _images()
    empty = DataLoader(TensorDataset(images[:0], labels[:0]), batch_size=16)
    module: Any = _training(pl, _small())
    module.validation_step = lambda batch, batch_idx, dataloader_idx=0: module.model(batch[0])
    tracker = NeuralCollapseTracker(K, layers=["0", "auto"], metrics="all")
    with pytest.warns(UserWarning, match="'0', 'penultimate' on the val set is logged as nan: no samples in the val"):
        _trainer(tmp_path, tracker).fit(module, _loader(), [_loader(), empty])
    for metric in ("nc1", "nc3", "nc4", "numerical_rank"):
        assert np.isfinite(tracker.values[f"{metric}/val/penultimate/dataloader_idx_0"])
        assert np.isnan(tracker.values[f"{metric}/val/penultimate/dataloader_idx_1"])


def test_several_training_loaders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot choose among 2 training loaders; give the datamodule"):
        _trainer(tmp_path, NeuralCollapseTracker(K)).fit(
            _training(pl, _small()), {"a": _loader(), "b": _loader()}, _loader()
        )


class Keywords(HuggingFace):
    """Takes whatever a batch has, as many projects with Hugging Face's networks do."""

    def forward(self, **inputs: Any) -> Any:
        return self.net(**inputs)


def test_forward_of_any_keywords(tmp_path: Path) -> None:
    loader = DataLoader(Mappings(), batch_size=16)
    tracker = NeuralCollapseTracker(K)
    _trainer(tmp_path, tracker).fit(Keywords(), loader, loader)
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(tracker.values["nc1/val/penultimate"], rel=1e-9)


def test_forward_of_the_whole_batch_is_explained(tmp_path: Path) -> None:
    class Whole(type(_training(pl, _small()))):
        def forward(self, batch: Any) -> Tensor:
            images, _ = batch
            return self.model(images)

    module = Whole()
    with pytest.raises(ValueError, match=r"cannot run Whole on the inputs of list\(.*; give .*forward=lambda"):
        _trainer(tmp_path, NeuralCollapseTracker(K)).fit(module, _loader(), _loader())


def test_forward_of_another_network_is_explained(tmp_path: Path) -> None:
    class Generating(type(_training(pl, _small()))):
        def forward(self, noise: Tensor) -> Tensor:
            return noise @ torch.zeros(7, 3)

    with pytest.raises(ValueError, match=r"cannot run Generating on .* \(RuntimeError: .*forward=lambda"):
        _trainer(tmp_path, NeuralCollapseTracker(K)).fit(Generating(), _loader(), _loader())


@pytest.mark.slow
def test_trial_runs_with_a_logger(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    _trainer(tmp_path, NeuralCollapseTracker(K), logger=logger, fast_dev_run=True).fit(
        _training(pl, _small()), _loader(), _loader()
    )


def test_dead_features_are_nan_and_training_goes_on(tmp_path: Path) -> None:
    module: Any = _training(pl, _small())
    nn.init.zeros_(module.model[0].weight)
    nn.init.zeros_(module.model[0].bias)
    tracker = NeuralCollapseTracker(K, metrics="all")
    trainer = _trainer(tmp_path, tracker)
    trainer.fit(module, _loader(), _loader())
    assert trainer.global_step == 4
    assert np.isnan(tracker.values["nc3/val/penultimate"])


def test_a_second_fit_starts_its_history_anew_and_validation_adds_to_the_last(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K)
    for _ in range(2):
        module = _training(pl, _small())
        trainer = _trainer(tmp_path, tracker, max_epochs=2)
        trainer.fit(module, _loader(), _loader())
        assert {split: list(epochs) for split, epochs in tracker.history.items()} == {"train": [0, 1, 2], "val": [1, 2]}
    trainer.validate(module, _loader(), verbose=False)
    assert list(tracker.history["val"]) == [1, 2]


@pytest.mark.slow
def test_a_pass_without_numbers_leaves_no_record(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K, metrics="nc4")  # which the training set does not have
    _trainer(tmp_path, tracker, limit_val_batches=0).fit(_training(pl, _small()), _loader(), _loader())
    assert tracker.records == {}
    assert repr(tracker) == "NeuralCollapseTracker(layers=['penultimate'], metrics=['nc4'])"
    _trainer(tmp_path, tracker).fit(_training(pl, _small()), _loader(), _loader())
    assert list(tracker.records) == ["val"]
    assert tracker.plot().axes[0].get_title() == "nc4"


class InSetup(pl.LightningModule):
    """Makes its network in its own ``setup``, ``anew`` for each run."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.anew = anew
        if anew:
            self.model = _small()

    def setup(self, stage: str) -> None:
        if self.anew or not hasattr(self, "model"):
            self.model, self.num_classes = _small(), K

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("anew", [True, False])
def test_layers_made_in_the_modules_own_setup(anew: bool, tmp_path: Path) -> None:
    module = InSetup(anew)
    replaced = list(module.modules())
    tracker, probe = NeuralCollapseTracker(K if anew else None, layers=["0", "auto"]), OnlineProbe(K if anew else None)
    trainer = _trainer(tmp_path, tracker, probe)
    trainer.fit(module, _loader(), _loader())
    expected = _nc1(module.model, module.model[4], lambda o: o, "input")
    for split in ("train", "val"):
        assert tracker.values[f"nc1/{split}/penultimate"] == pytest.approx(expected, rel=1e-5)
    assert "probe/acc" in trainer.callback_metrics
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in [*replaced, *module.modules()])
    trainer.validate(module, _loader(), verbose=False)
    expected = _nc1(module.model, module.model[4], lambda o: o, "input")
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(expected, rel=1e-5)


def test_predictions_of_a_module_without_such_layers(tmp_path: Path) -> None:
    class Predicting(pl.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch[0].mean((1, 2, 3))

    trainer = _trainer(tmp_path, NeuralCollapseTracker(K, layers="0"))
    assert sum(map(len, trainer.predict(Predicting(), _loader()))) == N


@pytest.mark.parametrize("number", [N, 51])  # of 51 the last batch has as many images as an image has channels
@pytest.mark.parametrize("growth", [0, 4], ids=["one size", "two sizes"])
def test_inputs_with_a_tensor_for_each_sample(growth: int, number: int, tmp_path: Path) -> None:
    labels = torch.arange(number) % K
    images = [torch.randn(3, 16 + growth * (i % 2), 16) + label for i, label in enumerate(labels.tolist())]
    network = _small()

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = network[:4], network[4]

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.head(torch.cat([self.one(image[None]) for image in images]))

    batches = DataLoader([([images[i] for i in r], labels[r]) for r in torch.arange(number).split(16)], batch_size=None)
    module: Any = _training(pl, Listed())
    module.validation_step = lambda batch, batch_idx: module.model(batch[0])
    _trainer(tmp_path, tracker := NeuralCollapseTracker(K)).fit(module, batches, batches)
    with torch.no_grad():
        features = torch.cat([module.model.one(image[None]) for image in images])
    expected = reference.nc1(features.numpy(), labels.numpy())
    for split in ("train", "val"):
        assert tracker.values[f"nc1/{split}/penultimate"] == pytest.approx(expected, rel=1e-5)


class Received(nn.Module):
    """Keeps what it was run on."""

    def forward(self, inputs: Any) -> Any:
        self.inputs = inputs
        return inputs


def _received(reader: BatchReader, inputs: list[Tensor], labels: int) -> Any:
    reader.forward(network := Received(), (inputs, torch.arange(labels)))
    return network.inputs


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (2, 5), (1, 4, 8, 8)], ids=str)
def test_lists_of_samples_are_not_taken_for_views(shape: tuple[int, ...]) -> None:
    reader = BatchReader("NeuralCollapseTracker", K)
    for number in (16, 2, 3):  # (2, 5) is of 2 samples only where the first batch tells
        samples = list(torch.randn(number, *shape))
        assert _received(reader, samples, number) is samples


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 5), (7,)], ids=str)
@pytest.mark.parametrize("a_label_each", [False, True], ids=["a label for each sample", "a label for each view"])
def test_lists_of_views_are_concatenated_in_batches_of_any_size(shape: tuple[int, ...], a_label_each: bool) -> None:
    reader = BatchReader("NeuralCollapseTracker", K)
    for number in (16, 3, 2, 1):
        views = list(torch.randn(3, number, *shape))
        received = _received(reader, views, number * (3 if a_label_each else 1))
        assert torch.equal(received, torch.cat(views)), number


@pytest.mark.parametrize("shape", [(3, 8, 8), (7,)], ids=str)
def test_as_many_views_as_samples_from_the_first_batch(shape: tuple[int, ...]) -> None:
    views = list(torch.randn(2, 2, *shape))
    assert torch.equal(_received(BatchReader("NeuralCollapseTracker", K), views, 2), torch.cat(views))


def test_a_layer_that_setup_does_not_make_either_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer fits 'layer9'"):
        _trainer(tmp_path, NeuralCollapseTracker(K, layers="layer9")).fit(InSetup(False), _loader(), _loader())


def test_metrics_of_the_classifier_need_its_layer() -> None:
    with pytest.raises(ValueError, match="metrics nc3, nc4 need the layer 'penultimate', which is not among layers"):
        NeuralCollapseTracker(K, layers=["0"], metrics=["nc3", "nc4"])


@pytest.mark.slow
def test_two_processes_find_what_one_does() -> None:
    """Of 51 samples the sampler repeats one; of 33 one process has a batch of one more; 18 are a batch and a bit."""
    script = Path(__file__).with_name("tracked_in_two_processes.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=150, cwd=script.parent.parent
    )
    assert done.returncode == 0, done.stderr
    for number, (one, two) in json.loads(done.stdout.splitlines()[-1]).items():
        assert set(two) == set(one), number
        assert {"nc1/train/0", "nc3/val/penultimate", "nc4/val/penultimate", "numerical_rank/val/0"} <= set(one)
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-10, abs=1e-14), (number, name)


@pytest.mark.parametrize("validated", [True, False], ids=["before validation", "at the end"])
def test_two_processes_measure_the_training_set_in_one_network(validated: bool, tmp_path: Path) -> None:
    """That of rank 0, as checkpoints have it; batch norm's statistics differ until the next step."""
    module, tracker, probe = Scaled(_net()), NeuralCollapseTracker(K), OnlineProbe(K, kind="ridge")
    spread = {"strategy": "ddp_fork", "devices": 2, "limit_val_batches": 1.0 if validated else 0}
    trainer = _trainer(tmp_path, Apart(validated), tracker, probe, max_epochs=2, **spread)
    trainer.fit(module, _loader(batch_size=5), _loader())
    found = trainer.callback_metrics
    assert float(found["nc1/train/penultimate"]) == pytest.approx(_of_the_end(module.net, _images()[0]), rel=1e-4)
    with torch.no_grad():
        head = ridge(module.net[:-1].eval()(_images()[0]), _images()[1], K)
    right = decided_rightly(head.held_out(), _images()[1]).double().mean()
    assert float(found["probe/held_out_acc"]) == pytest.approx(float(right), abs=1e-6)


class Apart(pl.Callback):
    """Checks that two processes come to a pass, and leave it, with batch norm's statistics of their own."""

    def __init__(self, validated: bool) -> None:
        self.validated = validated

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self.validated and not trainer.sanity_checking:
            self.check(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.validated:
            self.check(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.validated:
            self.check(pl_module)

    def check(self, module: Any) -> None:
        means: list[Any] = [None, None]
        torch.distributed.all_gather_object(means, module.net[1].running_mean)
        assert not torch.equal(*means)


# ---- what modules of others do to their batches, their copies and their logs


class Scaled(pl.LightningModule):
    """A network in the module's hyper-parameters, as a widely copied template has it, and hooks on its batches."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attribute 'net' is an instance of `nn.Module`")
            self.save_hyperparameters(logger=False)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Before(Scaled):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [10 * batch[0] + 3, batch[1]]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6, K))


def _of_the_end(net: nn.Module, images: Tensor) -> float:
    """NC1 of the classifier's input, by the reference."""
    with torch.no_grad():
        features = net[:-1].eval()(images)
    return reference.nc1(features.double().numpy(), _images()[1].numpy())


def test_a_pass_gives_a_network_what_its_step_would(tmp_path: Path) -> None:
    """Whichever hook makes it of the batches, and the probe's bank too."""
    tracker, probe = NeuralCollapseTracker(K), OnlineProbe(K, kind="ridge", knn=5)
    module = Before(_net())
    trainer = _trainer(tmp_path, tracker, probe)
    trainer.fit(module, _loader(), _loader())
    expected = _of_the_end(module.net, 10 * _images()[0] + 3)
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(expected, rel=1e-4)
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(expected, rel=1e-4)


class Popping(HuggingFace):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(self.net(**batch).logits, labels)


@pytest.mark.parametrize("options", [{}, {"batch_to_labels": lambda batch: batch["labels"]}])
def test_a_step_may_take_the_labels_out_of_its_batch(options: Any, tmp_path: Path) -> None:
    tracker, probe = NeuralCollapseTracker(K, **options), OnlineProbe(K, **options)
    _trainer(tmp_path, tracker, probe).fit(Popping(), DataLoader(Mappings(), 10), DataLoader(Mappings(), 10))
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(tracker.values["nc1/train/penultimate"], rel=1e-4)


class Clamping(Scaled):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        batch[1].clamp_(max=1)


def test_labels_are_those_that_the_step_was_given(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K)
    _trainer(tmp_path, tracker).fit(module := Clamping(_net()), _loader(), _loader())
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(_of_the_end(module.net, _images()[0]), rel=1e-4)


class Averaging(Scaled):
    """A copy of the network that another hand averages, which each step runs too."""

    def on_train_start(self) -> None:
        self.ema = copy.deepcopy(self.net)
        for parameter in self.ema.parameters():
            parameter.data.mul_(1.5)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        if hasattr(self, "ema"):
            self.ema.eval()(batch[0])


@pytest.mark.parametrize("layer", ["penultimate", "net.4"])
def test_a_copy_of_the_network_is_not_observed(layer: str, tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K, layers=[layer], classifier="net.5" if layer == "penultimate" else "auto")
    _trainer(tmp_path, tracker, num_sanity_val_steps=0).fit(module := Averaging(_net()), _loader(), _loader())
    assert tracker.values[f"nc1/val/{layer}"] == pytest.approx(_of_the_end(module.net, _images()[0]), rel=1e-4)


def test_a_network_in_the_hyper_parameters_is_saved_with_the_run(tmp_path: Path) -> None:
    """And read where nobody has ncfinetune, with what its hooks became."""
    tracker, probe = NeuralCollapseTracker(K), OnlineProbe(K)
    trainer = _trainer(tmp_path, tracker, probe, enable_checkpointing=True)
    trainer.fit(module := Scaled(_net()), _loader(), _loader())
    (file,) = tmp_path.rglob("*.ckpt")
    content = torch.load(file, weights_only=False)
    assert not [callback for callback in content["callbacks"] if "hook" in callback.lower()]
    pickled = pickle.dumps(content["hyper_parameters"])
    assert b"ncfinetune" not in pickled
    loaded = Scaled.load_from_checkpoint(file, weights_only=False)
    assert torch.equal(loaded(_images()[0]), module.train()(_images()[0]))


class Random(pl.LightningDataModule):
    """Splits at random, without a generator of its own."""

    num_classes = K

    def setup(self, stage: str) -> None:
        self.train, self.val = torch.utils.data.random_split(TensorDataset(*_images()), [30, 20])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 10)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 10)


def test_a_second_data_set_takes_no_random_numbers_of_the_run(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [OnlineProbe(K, downstream=Random())]):
        module = Scaled(_net())
        torch.manual_seed(1)
        _trainer(tmp_path, *callbacks).fit(module, _loader(shuffle=True), _loader())
        ends.append([*module.parameters(), torch.rand(1)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


class After(Scaled):
    """Normalises on the device, and sees what it is given."""

    seen: list[float]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [10 * batch[0], batch[1]]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(x.std()))
        return super().forward(x)


def test_a_second_data_set_is_prepared_by_the_modules_hooks_where_it_has_none(tmp_path: Path) -> None:
    module = After(_net())
    module.seen = []
    _trainer(tmp_path, OnlineProbe(K, downstream=Random())).fit(module, _loader(), _loader())
    assert min(module.seen) > 5


class Logging(Scaled):
    """Logs in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.log("norm", x.norm(), on_step=True, on_epoch=True)
        return super().forward(x)


def test_what_a_pass_runs_is_not_logged(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [NeuralCollapseTracker(K), OnlineProbe(K, kind="ridge")]):
        trainer = _trainer(tmp_path, *callbacks)
        trainer.fit(Logging(_net()), _loader(), _loader())
        found.append(
            {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("norm")}
        )
    assert found[0] == found[1] != {}


class Normalising(pl.LightningModule):
    """No forward, a network, and preprocessing without parameters that the steps put before it."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.net, self.scale = nn.Identity(), net, scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.norm(self.scale * batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NormalisingBefore(Scaled):
    """A forward, and preprocessing that the steps put before it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(10 * batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(10 * batch[0])


class NormalisingMappings(Normalising):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(input=10 * batch["image"]), batch["labels"])


class Conditioned(Scaled):
    """A forward with more inputs than passes give it."""

    def forward(self, x: Tensor, shift: Any = 0.0) -> Tensor:
        return self.net(x + shift)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], batch[1]), batch[2])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0], batch[1])


class AsGiven(Conditioned):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[2])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(x=batch[0])


class Wrapped(Normalising):
    """A forward whose parameters have no names, which the steps call by position."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.net(*args, *kwargs.values())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(self.scale * batch["image"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(self.scale * batch["image"])


class Rows(Dataset):
    """The images with something beside them, or as mappings."""

    def __init__(self, mapping: bool) -> None:
        self.mapping = mapping

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        image, label = (part[index] for part in _images())
        return {"image": image, "labels": label} if self.mapping else (image, image.flip(-1), label)


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (lambda: Wrapped(_net(), 10), Rows(mapping=True)),
        (lambda: NormalisingBefore(_net()), TensorDataset(*_images())),
        (lambda: NormalisingMappings(_net(), 1), Rows(mapping=True)),
        (lambda: Conditioned(_net()), Rows(mapping=False)),
    ],
    ids=["wrapper", "forward", "mapping", "more inputs"],
)
def test_other_inputs_are_noticed_whatever_the_module_is(
    module: Callable[[], Any], data: Dataset, tmp_path: Path
) -> None:
    loader = DataLoader(data, batch_size=16)
    with pytest.warns(UserWarning, match="validation_step gives the network something other than the inputs of"):
        _trainer(tmp_path, NeuralCollapseTracker(K)).fit(module(), loader, loader)


def test_inputs_that_are_those_of_the_batch_are_not_warned_of(tmp_path: Path) -> None:
    for module, mapping in ((AsGiven(_net()), False), (Mapped(_net()), True), (Wrapped(_net(), 1), True)):
        loader = DataLoader(Rows(mapping), batch_size=16)
        tracker = NeuralCollapseTracker(K)
        _trainer(tmp_path, tracker).fit(module, loader, loader)
        expected = tracker.values["nc1/val/penultimate"]
        assert tracker.values["nc1/train/penultimate"] == pytest.approx(expected, rel=1e-4)


class Mapped(Scaled):
    """A forward that takes all of a mapping, and its labels."""

    def forward(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.net(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(**batch), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(**batch)


def test_other_inputs_than_those_of_the_batch_are_said_once(tmp_path: Path) -> None:
    message = (
        r"Normalising's validation_step gives the network something other than the inputs of the "
        r"batch; NeuralCollapseTracker gives it these inputs when it reads .* NeuralCollapseTracker\(forward=lambda"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        _trainer(tmp_path, NeuralCollapseTracker(K)).fit(Normalising(_net(), 10), _loader(), _loader())
    assert sum("something other than the inputs" in str(warning.message) for warning in caught) == 1
    _trainer(tmp_path, NeuralCollapseTracker(K)).fit(Normalising(_net(), 1), _loader(), _loader())
    as_the_step = NeuralCollapseTracker(K, forward=lambda module, batch: module.net(10 * batch[0]))
    _trainer(tmp_path, as_the_step).fit(Normalising(_net(), 10), _loader(), _loader())
    assert as_the_step.values["nc1/train/penultimate"] == pytest.approx(as_the_step.values["nc1/val/penultimate"])
