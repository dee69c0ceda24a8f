"""The datamodules' common ground, tried on the digits and on a folder of small images."""

import functools
import pickle
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from image_files import number_of, write_image
from launches import Launches
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from scipy.stats import beta, chisquare
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.datamodules import Digits, ImageDataModule, ImageFolder, IndexedImages, Recipe
from ncfinetune.datamodules.augmenting import BatchAugmentation
from ncfinetune.datamodules.images import Labelled, TensorImages
from ncfinetune.datamodules.loading import EpochSampler, SameSampler
from ncfinetune.loaders import evenly
from ncfinetune.samples import known_labels

SUBTLE = Recipe(min_area=0.5, max_aspect=1.2, jitter=1.0, brightness=0.5)


class Recorder(pl.LightningModule):
    """Keeps the batches that it is given, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.keep(f"train{self.current_epoch}", batch)
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.keep("sanity" if self.trainer.sanity_checking else "val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.keep("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[1]

    def keep(self, name: str, batch: Any) -> None:
        self.seen.setdefault(name, []).append((batch[0].clone(), batch[1].clone()))

    def images(self, name: str) -> Tensor:
        return torch.cat([images for images, _ in self.seen[name]])

    def labels(self, name: str) -> Tensor:
        return torch.cat([labels for _, labels in self.seen[name]])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(**arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **arguments,
        }
    )


def _fit(data: ImageDataModule, **arguments: Any) -> Recorder:
    model = Recorder()
    _trainer(**arguments).fit(model, data)
    return model


@functools.cache
def _digits() -> dict[bytes, int]:
    images, digits = load_digits(return_X_y=True)
    rounded = np.round(images * 255 / 16).astype(np.uint8)
    return {image.tobytes(): digit for image, digit in zip(rounded, digits, strict=True)}


def _stored(data: ImageDataModule, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a part as they are stored, in their order."""
    data.setup("fit")
    loader = {"train": data.train_plain_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8 training images and 5 for validation, of several sizes."""
    root = tmp_path_factory.mktemp("folder")
    numbers = iter(range(216))
    for part, count in (("train", 8), ("val", 5)):
        for name in ("ant", "bee", "cow"):
            for i in range(count):
                write_image(root / part / name / f"{i}.png", next(numbers), (20 + i, 24 - i))
    return root


def _folder(root: Path, **arguments: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"image_size": 8, "num_workers": 0, "batch_size": 5, **arguments})


def _looking(hook: str, loader: str) -> pl.Callback:
    """A callback that looks at a batch of one of the trainer's loaders, as one that logs a picture of it does."""

    class Looking(pl.Callback):
        pass

    def look(self: pl.Callback, trainer: pl.Trainer, *_: Any) -> None:
        next(iter(getattr(trainer, loader)))

    setattr(Looking, hook, look)
    return Looking()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("hook", "loader"), [("on_train_batch_end", "train_dataloader"), ("on_validation_batch_end", "val_dataloaders")]
)
def test_a_look_at_a_batch_changes_no_pass(hook: str, loader: str, workers: int, folder: Path) -> None:
    seen = []
    for callbacks in ([], [_looking(hook, loader)]):
        pl.seed_everything(0, verbose=False)
        seen.append(_fit(_folder(folder, num_workers=workers), callbacks=callbacks, max_epochs=2).seen)
    plain, looked = seen
    assert [len(plain[name]) for name in ("train0", "train1", "val")] == [5, 5, 6]
    for name, batches in plain.items():
        for ours, theirs in zip(looked[name], batches, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_passes_one_after_another_share_their_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _folder(folder, num_workers=1)
    data.setup("fit")
    loader, begun = data.val_dataloader(), []
    monkeypatch.setattr(loader, "_get_iterator", lambda: begun.append(DataLoader._get_iterator(loader)) or begun[-1])
    first, again = next(iter(loader)), next(iter(loader))  # the rest of a pass is not asked for
    assert all(map(torch.equal, first, again))
    assert len(list(loader)) == 3
    assert len(begun) == 1


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is not known here")
def test_a_worker_ends_by_a_signal_of_its_parent_alone(folder: Path) -> None:
    """Otherwise one that is left at the end of a program would be waited for without end."""
    data = _folder(folder, num_workers=1)
    data.setup("fit")
    iterator = data.val_dataloader()._get_iterator()
    next(iterator)
    (worker,) = iterator._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    next(iterator)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_one_process_alone_can_ask_for_training_images() -> None:
    class Asking(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            def alone(*_: Any) -> None:
                raise AssertionError("the other processes would be waited for")

            with pytest.MonkeyPatch.context() as patch:
                for collective in ("broadcast", "barrier", "all_gather", "reduce"):
                    patch.setattr(trainer.strategy, collective, alone)
                data = trainer.datamodule
                self.looked = [next(iter(make())) for make in (data.train_dataloader, data.val_dataloader)]

    asking = Asking()
    _fit(Digits([1, 2], batch_size=4), callbacks=[asking])
    assert len(asking.looked) == 2


@pytest.mark.parametrize("kind", ["digits", "few digits", "files", "memory", "table"])
def test_data_sets_know_their_labels(kind: str, folder: Path, tmp_path: Path) -> None:
    """In the order of their samples, so that a pass that is limited takes each class in its share."""
    rows = [f"{path},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    makers: dict[str, Callable[[], ImageDataModule]] = {
        "digits": lambda: Digits([7, 3, 5]),
        "few digits": lambda: Digits([7, 3, 5], shots=6, batch_size=5),
        "files": lambda: _folder(folder),
        "memory": lambda: _folder(folder, in_memory=True),
        "table": lambda: _folder(folder, labels=str(tmp_path / "table.csv")),
    }
    data = makers[kind]()
    data.setup("fit")
    for loader in (data.train_plain_dataloader(), data.val_dataloader(), data.train_dataloader()):
        drawn = [int(loader.dataset[index][1]) for index in range(len(loader.dataset))]
        assert known_labels(loader.dataset).tolist() == drawn
        taken = torch.cat([labels for _, labels in evenly(loader, 6)])
        shares = np.bincount(drawn) * 6 / len(drawn)
        assert np.abs(taken.bincount(minlength=3).numpy() - shares).max() <= 1


def test_no_choice_of_digits_moves_an_image_to_another_part() -> None:
    """Images by their pixels: what ten digits train on is tested by none of fewer."""
    every, some = Digits(), [Digits([5, 9, 3]), Digits([8, 2]), Digits([0, 1, 2, 3, 4])]
    parts = {name: {image.numpy().tobytes() for image in _stored(every, name)[0]} for name in ("train", "val", "test")}
    for data in some:
        for name, own in parts.items():
            assert {image.numpy().tobytes() for image in _stored(data, name)[0]} <= own


def test_digits_are_scikit_learns_with_their_labels() -> None:
    data = Digits([7, 3])
    for split in ("train", "val", "test"):
        for image, label in zip(*_stored(data, split), strict=True):
            assert _digits()[image.numpy().tobytes()] == data.classes[label]
    assert data.class_names == ["7", "3"]
    assert data.num_classes == 2


def test_test_images_do_not_depend_on_the_users_choices() -> None:
    expected = _stored(Digits([5, 6]), "test")[0]
    assert torch.equal(expected, _stored(Digits([5, 6], shots=2, seed=7), "test")[0])
    assert torch.equal(expected, _stored(Digits([5, 6], fraction=0.1, val_fraction=0.5), "test")[0])


def test_few_labels_cut_only_the_training_part() -> None:
    data = Digits([5, 6, 7], shots=4)
    assert torch.bincount(_stored(data, "train")[1]).tolist() == [4, 4, 4]
    assert torch.equal(_stored(data, "val")[0], _stored(Digits([5, 6, 7]), "val")[0])
    assert torch.bincount(_stored(Digits([5, 6, 7], fraction=0.5), "train")[1]).tolist() == [54, 54, 54]


def test_few_labels_are_the_same_for_every_method_and_a_choice_of_the_seed() -> None:
    first = _stored(Digits(shots=3, augmentation="simclr", views=2, batch_size=7), "train")[0]
    assert torch.equal(first, _stored(Digits(shots=3), "train")[0])
    assert not torch.equal(first, _stored(Digits(shots=3, seed=1), "train")[0])


def test_a_validation_fraction_is_cut_from_train_and_own_validation_images() -> None:
    whole, data = Digits([5, 6]), Digits([5, 6], val_fraction=0.25)
    together = len(_stored(whole, "train")[0]) + len(_stored(whole, "val")[0])
    train, val = _stored(data, "train")[0], _stored(data, "val")[0]
    assert len(train) + len(val) == together
    assert len(val) == pytest.approx(together / 4, abs=1)


def test_no_validation_part_trains_on_everything_and_validates_on_nothing() -> None:
    whole, data = Digits([5, 6]), Digits([5, 6], val_fraction=0)
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        model = _fit(data)
    assert len(model.labels("train0")) == len(_stored(whole, "train")[0]) + len(_stored(whole, "val")[0])
    assert "val" not in model.seen


def test_batches_are_normalised() -> None:
    data = Digits(batch_size=2000)
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape[1:] == data.input_size
    assert labels.dtype == torch.int64
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("make", [list, torch.tensor, np.array])
def test_mean_and_std_can_be_given(make: Any) -> None:
    data = Digits(mean=make([0.5]), std=make([0.25]))
    images, _ = data.on_after_batch_transfer((torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(2)), 0)
    torch.testing.assert_close(images, torch.full((2, 1, 8, 8), 2.0))


def test_mean_and_std_of_another_datamodule_can_be_given(folder: Path) -> None:
    of_another = _folder(folder, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    data = _folder(folder, mean=of_another.mean, std=of_another.std)
    model = Recorder()
    model.net = timm.create_model("test_vit", num_classes=3)  # whose own are 0.5
    _trainer(max_steps=1).fit(model, data)
    assert torch.equal(data.mean, of_another.mean)
    assert torch.equal(data.std, of_another.std)


def test_images_can_be_enlarged_on_the_device() -> None:
    data = Digits(image_size=16)
    stored = _stored(data, "test")
    images, _ = data.on_after_batch_transfer(stored, 0)
    assert images.shape[1:] == data.input_size == (1, 16, 16)
    expected = (resize(stored[0] / 255, [16, 16]) - data.mean) / data.std
    torch.testing.assert_close(images, expected)


def test_plain_training_images_come_in_a_fixed_order() -> None:
    data = Digits(augmentation="standard")
    assert torch.equal(_stored(data, "train")[0], _stored(data, "train")[0])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_only_training_is_augmented(kind: str, folder: Path) -> None:
    data = Digits([1, 2], augmentation=SUBTLE) if kind == "memory" else _folder(folder, augmentation=SUBTLE)
    model = Recorder()
    trainer = _trainer(num_sanity_val_steps=2)
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    plain = {split: data.on_after_batch_transfer(_stored(data, split), 0) for split in ("train", "val")}
    assert torch.equal(model.images("sanity"), plain["val"][0][: len(model.images("sanity"))])
    assert torch.equal(model.images("val"), plain["val"][0].repeat(2, 1, 1, 1))
    rows = {image.numpy().tobytes() for image in plain["train"][0]}
    assert not any(image.numpy().tobytes() in rows for image in model.images("train0"))
    assert sorted(model.labels("train0").tolist()) == sorted(plain["train"][1].tolist())


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_strength_zero_is_plain(kind: str, folder: Path) -> None:
    arguments: dict[str, Any] = {"augmentation": "simclr", "strength": 0.0}
    data = Digits([1, 2], **arguments) if kind == "memory" else _folder(folder, **arguments)
    model = _fit(data)
    plain, _ = data.on_after_batch_transfer(_stored(data, "train"), 0)
    known = sorted(image.numpy().tobytes() for image in plain)
    assert sorted(image.numpy().tobytes() for image in model.images("train0")) == known


@pytest.mark.parametrize("kind", ["memory", "files", "files without crops"])
def test_views_are_different_views_of_one_image(kind: str, folder: Path) -> None:
    crop = {} if kind == "files without crops" else {"min_area": 0.9, "max_aspect": 1.1}
    recipe = Recipe(jitter=1, brightness=0.05, **crop)
    arguments: dict[str, Any] = {"augmentation": recipe, "views": 3, "batch_size": 6}
    data = Digits([1, 2], **arguments) if kind == "memory" else _folder(folder, **arguments)
    images, labels = _fit(data).seen["train0"][0]
    assert images.shape == (6, 3, *data.input_size)
    assert labels.shape == (6,)
    assert not torch.equal(images[:, 0], images[:, 1])
    pixels = images * data.std.view(-1, 1, 1) + data.mean.view(-1, 1, 1)
    flat = pixels.flatten(2)
    nearest = torch.cdist(flat[:, 0], flat[:, 1]).argmin(1)
    assert (nearest == torch.arange(6)).sum() >= 5  # by chance it would be one


@pytest.mark.parametrize("mix", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_labels_are_shares_in_training_alone(mix: dict[str, float]) -> None:
    data = Digits([1, 2, 3], batch_size=32, **mix)
    model = _fit(data)
    shares = model.labels("train0")
    assert shares.shape[1] == 3
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    assert ((shares > 0.05).sum(1) == 2).any()
    assert model.labels("val").dtype == torch.int64


def _mixed(steps: int, **mix: float) -> tuple[Tensor, Tensor]:
    """A black and a white image mixed at each step: pixels ``(steps, 2, 64)``, and shares of white, ``(steps, 2)``."""
    augmentation = BatchAugmentation((1, 8, 8), 2, [0.0], [1.0], Recipe(), **mix)
    images, labels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8), torch.arange(2)
    batches = [augmentation.train(images, labels, (0, step), False) for step in range(steps)]
    return torch.stack([pixels.flatten(1) for pixels, _ in batches]), torch.stack([shares for _, shares in batches])[
        ..., 1
    ]


@pytest.mark.parametrize("mix", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_labels_have_the_shares_that_pixels_have(mix: dict[str, float]) -> None:
    pixels, shares = _mixed(20, **mix)
    torch.testing.assert_close(pixels.mean(2), shares)
    torch.testing.assert_close(shares.sum(1), torch.ones(20))
    if "mixup" in mix:
        torch.testing.assert_close(pixels, shares[..., None].expand(pixels.shape))
    else:
        assert ((pixels == 0) | (pixels == 1)).all()


def test_shares_of_mixup_are_of_the_beta_distribution_of_its_strength() -> None:
    edges = np.array([0, 0.02, 0.5, 0.98, 1])
    found, _ = np.histogram(_mixed(200, mixup=0.1)[1][:, 0], edges)
    assert chisquare(found, 200 * np.diff(beta(0.1, 0.1).cdf(edges))).pvalue > 1e-3


def test_mixup_and_cutmix_together_take_turns_by_chance() -> None:
    pixels, _ = _mixed(200, mixup=1.0, cutmix=1.0)
    assert 70 <= ((pixels == 0) | (pixels == 1)).all(2).all(1).sum() <= 130


def test_grey_images_get_the_mean_of_three_statistics() -> None:
    augmentation = BatchAugmentation((1, 8, 8), 2, [0.3, 0.6, 0.9], [0.1, 0.2, 0.6], Recipe())
    torch.testing.assert_close(torch.cat([augmentation.mean, augmentation.std]), torch.tensor([0.6, 0.3]))


def test_mixing_seeds_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    assert _fit(Digits([1, 2], mixup=1.0, cutmix=1.0)).labels("train0").is_floating_point()
    assert seeded == []


class Frozen(Recorder):
    """A classifier that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.ReLU())
        self.head = torch.nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * self(batch[0].flatten(0, 1)).sum()


def test_collapse_is_measured_on_plain_training_images() -> None:
    found = []
    for arguments in ({}, {"augmentation": "simclr", "views": 2}):
        torch.manual_seed(0)
        trainer = _trainer(callbacks=[NeuralCollapseTracker()], limit_val_batches=0)
        trainer.fit(Frozen(), Digits([1, 2, 3], **arguments))
        found.append(trainer.callback_metrics["nc1/train/penultimate"].item())
    assert found[0] == found[1]


def _epochs(data: ImageDataModule, seed: int = 0, **arguments: Any) -> list[Tensor]:
    pl.seed_everything(seed, workers=True, verbose=False)
    model = _fit(data, max_epochs=2, **arguments)
    return [model.images("train0"), model.images("train1")]


def test_views_of_files_outside_of_training_are_only_normalised(folder: Path) -> None:
    data = _folder(folder, augmentation="standard", views=2)
    data.setup("fit")
    views, labels = next(iter(data.train_dataloader()))
    assert views.shape == (5, 2, 3, 8, 8)
    images, _ = data.on_after_batch_transfer((views, labels), 0)
    one_by_one = [data.on_after_batch_transfer((views[:, view], labels), 0)[0] for view in (0, 1)]
    assert torch.equal(images, torch.stack(one_by_one, 1))


@pytest.mark.parametrize("cut", [{"views": 2}, {"views": 1, "cutmix": 1.0}])
def test_batches_depend_on_the_seed_but_not_on_the_workers(folder: Path, cut: dict[str, Any]) -> None:
    make = functools.partial(_folder, folder, augmentation="simclr", **cut)
    none, two, other = _epochs(make()), _epochs(make(num_workers=2)), _epochs(make(), seed=1)
    assert all(map(torch.equal, none, two))
    assert not torch.equal(none[0], none[1])
    assert not torch.equal(none[0], other[0])


def test_loading_and_augmenting_take_no_number_from_the_models_stream() -> None:
    pl.seed_everything(3, verbose=False)
    before = torch.get_rng_state()
    _fit(Digits([1, 2], augmentation="simclr", mixup=1.0), max_epochs=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_resumed_run_goes_on_with_the_same_batches(kind: str, folder: Path, tmp_path: Path) -> None:
    def make() -> ImageDataModule:
        return Digits([1, 2], augmentation="simclr") if kind == "memory" else _folder(folder, augmentation="simclr")

    through = _epochs(make())
    pl.seed_everything(0, verbose=False)
    first = _trainer()
    first.fit(Recorder(), make())
    first.save_checkpoint(tmp_path / "one.ckpt")
    model = Recorder()
    _trainer(max_epochs=2).fit(model, make(), ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(model.images("train1"), through[1])


def test_a_batch_out_of_a_device_cache_is_one_copy_of_indices() -> None:
    images = torch.zeros(20, 3, 4, 4, dtype=torch.uint8, device="meta")
    data = TensorImages(Labelled(images, np.arange(20), np.arange(5, 15)))
    with Launches("meta") as counted:
        found, labels = data.__getitems__([3, 17])
    assert found.shape == (2, 3, 4, 4)
    assert labels.shape == (2,)
    assert counted.launches == {"_to_copy": 1, "index_select": 2}


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_device_cache_gives_the_same_images(kind: str, folder: Path) -> None:
    def make(**arguments: Any) -> ImageDataModule:
        if kind == "memory":
            return Digits([1, 2], augmentation="simclr", **arguments)
        return _folder(folder, augmentation="simclr", **{"num_workers": None, "in_memory": True, **arguments})

    assert all(map(torch.equal, _epochs(make()), _epochs(make(device_cache=True))))


def test_parts_in_memory_share_their_images() -> None:
    data = Digits(shots=5)
    data.setup("fit")
    train, test = data._parts["train"].images, data._parts["test"].images
    assert train is test


def test_half_precision_models_get_half_precision_images() -> None:
    model = _fit(Digits([1, 2], mixup=1.0), precision="bf16-true")
    assert model.images("train0").dtype == model.images("val").dtype == torch.bfloat16


def test_normalisation_of_a_pretrained_backbone() -> None:
    class Wrapped(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("test_resnet", pretrained=False)

    data = Digits([1, 2], normalize="backbone", std=[0.3])
    _trainer().validate(Wrapped(), data, verbose=False)
    assert data.mean.tolist() == pytest.approx([sum(timm.create_model("test_resnet").pretrained_cfg["mean"]) / 3])
    assert data.std.tolist() == pytest.approx([0.3])
    with pytest.raises(ValueError, match="normalize=backbone needs a model with a timm network; give mean and std"):
        _fit(Digits([1, 2], normalize="backbone"))


@pytest.mark.parametrize(("given", "mean"), [({}, 0.2), ({"normalize": "data"}, 0.485), ({"mean": [0.7] * 3}, 0.7)])
def test_files_are_normalised_as_the_network_was_trained(folder: Path, given: dict[str, Any], mean: float) -> None:
    class Wrapped(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("test_resnet", pretrained=False)
            self.net.pretrained_cfg = {**self.net.pretrained_cfg, "mean": (0.2,) * 3}

    data = _folder(folder, **given)
    _trainer().validate(Wrapped(), data, verbose=False)
    assert data.mean[0].item() == pytest.approx(mean)
    assert data.preprocessing["mean"][0] == pytest.approx(mean)
    other = _folder(folder, **given)
    _trainer().validate(Recorder(), other, verbose=False)
    assert other.mean[0].item() == pytest.approx(0.7 if "mean" in given else 0.485)


def test_predictions_come_in_the_order_of_the_data_set() -> None:
    data = Digits([1, 2])
    predicted = _trainer().predict(Recorder(), data)
    assert torch.equal(torch.cat(predicted), torch.from_numpy(data.parts()["test"].own_labels))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train_plain", "val"])
@pytest.mark.parametrize("batches", [1, 3])
def test_first_batches_have_the_classes_in_their_shares(folder: Path, split: str, batches: int) -> None:
    data = _folder(folder, batch_size=3)
    data.setup("fit")
    loader = getattr(data, f"{split}_dataloader")()
    labels = torch.cat([batch[1] for _, batch in zip(range(batches), loader, strict=False)])
    assert labels.bincount(minlength=3).tolist() == [len(labels) // 3] * 3


@pytest.mark.parametrize(
    ("option", "stage"),
    [("limit_val_batches", "val"), ("overfit_batches", "train0"), ("num_sanity_val_steps", "sanity")],
)
def test_whatever_limits_a_run_leaves_it_all_classes(folder: Path, option: str, stage: str) -> None:
    seen = _fit(_folder(folder, batch_size=3), **{option: 1}).seen[stage]
    assert [sorted(labels.tolist()) for _, labels in seen] == [[0, 1, 2]]


def test_datamodules_can_be_sent_to_processes_that_are_spawned(folder: Path) -> None:
    """A generator cannot: torch sends its state as shared memory that is gone when the other process asks for it."""
    for data in (Digits([0, 1], shots=8, augmentation="standard"), _folder(folder, augmentation="standard")):
        _fit(data)
        assert isinstance(data._augmentation._generator, torch.Generator)
        data.trainer = None
        again = pickle.loads(pickle.dumps(data))
        held = [*vars(again).values(), *vars(again._augmentation).values()]
        assert not any(isinstance(value, torch.Generator) for value in held)
        assert np.array_equal(again._parts["train"].own_labels, data._parts["train"].own_labels)


def test_what_is_done_to_batches_can_be_changed_on_the_datamodule() -> None:
    data = Digits([1, 2])
    stored = _stored(data, "test")
    before = data.on_after_batch_transfer(stored, 0)[0]
    data.mean += 0.1
    data.std = 2 * data.std
    torch.testing.assert_close(data.on_after_batch_transfer(stored, 0)[0], (before - 0.1 / data.std * 2) / 2)
    assert not data.augments
    data.views, data.recipe = 2, SUBTLE
    assert data.augments
    assert _fit(data).images("train0").shape[1] == 2


def test_a_step_goes_on_drawing_until_it_begins_again() -> None:
    augmentation = BatchAugmentation((1, 8, 8), 2, [0.0], [1.0], SUBTLE, mixup=1.0)
    images, labels = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8), torch.arange(6) % 2
    first, second, other = (augmentation.train(images, labels, step, False) for step in ((0, 1), (0, 1), (0, 2)))
    augmentation.restart()
    again = augmentation.train(images, labels, (0, 2), False)
    assert all(map(torch.equal, other, again))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    again = augmentation.train(images, labels, (0, 1), False)
    assert all(map(torch.equal, first, again))


def test_overfitting_on_a_batch_works(folder: Path) -> None:
    model = _fit(_folder(folder), overfit_batches=2, max_epochs=2)
    assert torch.equal(model.labels("train0"), model.labels("train1"))


def test_an_image_left_over_does_not_make_a_batch_of_one() -> None:
    data = Digits([1, 2], shots=13, batch_size=5)
    assert [len(labels) for _, labels in _fit(data).seen["train0"]] == [5] * 5
    assert [len(labels) for _, labels in _fit(Digits([1, 2], shots=13, batch_size=4)).seen["train0"]] == [4] * 6 + [2]


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_the_only_image_of_a_process_is_trained_on(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Digits([1, 2, 8], shots=1, batch_size=batch_size)
    data.setup("fit")
    data.trainer = _trainer()
    monkeypatch.setattr(type(data.trainer), "world_size", 2)
    assert [len(labels) for _, labels in data.train_dataloader()] == [1]


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_a_loop_without_a_trainer_has_the_epochs_of_a_run(folder: Path, sampling: Any) -> None:
    knobs: dict[str, Any] = {"augmentation": Recipe(min_area=0.3), "sampling": sampling}
    torch.manual_seed(3)
    model = _fit(_folder(folder, **knobs), max_epochs=3)
    torch.manual_seed(3)
    data = _folder(folder, **knobs)
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(3):
        images, labels = zip(*(data.on_after_batch_transfer(batch, 0) for batch in loader), strict=True)
        assert torch.equal(torch.cat(images), model.images(f"train{epoch}"))
        assert torch.equal(torch.cat(labels), model.labels(f"train{epoch}"))
    assert not torch.equal(model.images("train0"), model.images("train1"))


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_a_look_at_a_batch_is_no_epoch_of_a_run(folder: Path, sampling: Any) -> None:
    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            next(iter(trainer.train_dataloader))

    seen = []
    for callbacks in ([], [Look()]):
        torch.manual_seed(3)
        seen.append(_fit(_folder(folder, sampling=sampling), max_epochs=3, callbacks=callbacks))
    for epoch in range(3):
        assert torch.equal(*(model.images(f"train{epoch}") for model in seen))


@pytest.mark.parametrize(("images", "processes"), [(10, 1), (10, 2), (11, 3)])
def test_processes_overfit_on_different_images(images: int, processes: int) -> None:
    own = [list(SameSampler(range(images), processes, rank, taken=lambda _: 2)) for rank in range(processes)]
    each = images // processes
    assert own == [list(range(rank, each * processes, processes))[2:] for rank in range(processes)]


@pytest.mark.parametrize(("images", "processes"), [(10, 1), (10, 2), (11, 3), (7, 4)])
def test_training_shards_are_disjoint_and_equally_long(images: int, processes: int) -> None:
    samplers = [EpochSampler(range(images), processes, rank, seed=3, taken=lambda _: 0) for rank in range(processes)]
    orders = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shards = [[divmod(key, images) for key in sampler] for sampler in samplers]
        assert {len(shard) for shard in shards} == {images // processes}
        seen = [index for shard in shards for _, index in shard]
        assert len(set(seen)) == len(seen) == images // processes * processes
        assert {e for shard in shards for e, _ in shard} == {epoch}
        orders.append(seen)
    assert orders[0] != orders[1]


class ShardRecorder(Recorder):
    """Leaves what each process has seen in files; its batch normalisation has buffers to keep in step."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = out
        self.norm = torch.nn.BatchNorm2d(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.norm(batch[0]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.norm(batch[0])

    def on_fit_end(self) -> None:
        keys = {name: self.images(name).flatten(1) for name in self.seen}
        torch.save(keys, f"{self.out}/{self.global_rank}.pt")


@pytest.mark.parametrize("count", [1, 3])
def test_two_processes_evaluate_each_image_once(tmp_path: Path, count: int) -> None:
    data = Digits([1, 2, 8], shots=13 * count, batch_size=13)
    trainer = _trainer(strategy="ddp_fork", devices=2)
    trainer.fit(ShardRecorder(str(tmp_path)), data)
    shards = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = Digits([1, 2, 8], shots=13 * count)
    plain = {split: alone.on_after_batch_transfer(_stored(alone, split), 0)[0].flatten(1) for split in ("train", "val")}
    assert [len(shard["val"]) for shard in shards] == [27, 26]  # that is, three batches of 13 at most and two
    evaluated = torch.cat([shard["val"] for shard in shards])
    assert sorted(map(tuple, evaluated.tolist())) == sorted(map(tuple, plain["val"].tolist()))
    trained = [set(map(tuple, shard["train0"].tolist())) for shard in shards]
    assert not trained[0] & trained[1]
    assert abs(len(trained[0]) - len(trained[1])) <= 1
    assert trained[0] | trained[1] <= set(map(tuple, plain["train"].tolist()))
    assert len(trained[0] | trained[1]) >= len(plain["train"]) - 1


def test_lightning_keeps_the_samplers_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Digits([1, 2])
    data.setup("fit")
    trainer = _trainer()
    data.trainer = trainer
    monkeypatch.setattr(type(trainer), "world_size", 2)
    loader = data.val_dataloader()
    assert isinstance(loader.sampler, UnrepeatedDistributedSampler)  # type: ignore[union-attr]
    assert isinstance(data.train_dataloader().sampler, EpochSampler)


def test_files_are_decoded_and_labelled(folder: Path) -> None:
    data = _folder(folder)
    images, labels = _stored(data, "train")
    numbers = [number_of(image.numpy()) for image in images]
    assert sorted(numbers) == list(range(24))
    assert labels.tolist() == [number // 8 for number in numbers]
    assert images.shape == (24, 3, 8, 8)
    assert torch.equal(images, _stored(_folder(folder, in_memory=True), "train")[0])


def test_workers_are_chosen_by_where_images_lie_and_what_the_machine_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)), raising=False)
    made = {
        "memory": Digits([1, 2]),
        "files": _folder(folder, num_workers=None),
        "given": Digits([1, 2], num_workers=3),
    }
    loaders = {}
    for name, data in made.items():
        data.setup("fit")
        loaders[name] = data.train_dataloader()
    assert {name: loader.num_workers for name, loader in loaders.items()} == {"memory": 0, "files": 8, "given": 3}
    assert [loader.persistent_workers for loader in loaders.values()] == [False, True, True]
    assert not any(loader.pin_memory for loader in loaders.values())
    made["files"].trainer = _trainer(strategy="ddp_fork", devices=2)
    monkeypatch.setattr(pl.Trainer, "world_size", 1)
    assert made["files"].train_dataloader().num_workers == 6


def test_counts_of_the_classes_are_logged(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    with caplog.at_level("INFO"):
        _folder(folder, shots=2).setup("fit")
    assert "ImageFolder images: train 6 (2 per class), val 15 (5 per class)" in caplog.text


@pytest.mark.parametrize("classes", [[1], [1, 1], [3, 10]])
def test_classes_that_are_no_digits(classes: list[int]) -> None:
    with pytest.raises(ValueError, match="expected classes to be at least two different digits of 0..9, got"):
        Digits(classes)


class Own(IndexedImages):
    """Somebody's images."""

    def __init__(self, images: Any, labels: Any) -> None:
        super().__init__(3, (1, 8, 8), [0.5], [0.2])
        self.found = images, labels

    def parts(self) -> dict[str, Labelled]:
        return {"train": Labelled.all(*self.found)}


BYTES = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.rand(6, 1, 8, 8),
            [0, 1, 2] * 2,
            r"expected images \(N, C, H, W\) in uint8, 0..255, got \(6, 1, 8, 8\) in torch.float32; of floats in 0..1 "
            r"make \(images \* 255\).round\(\).byte\(\)",
        ),
        (BYTES[:, 0], [0, 1, 2] * 2, r"in uint8, 0..255, got \(6, 8, 8\) in torch.uint8"),
        (BYTES, [0, 1, 2], r"expected a whole-number label for each of 6 images, got int64 of shape \(3,\)"),
        (BYTES, np.eye(3)[[0, 1, 2] * 2], r"label for each of 6 images, got float64 of shape \(6, 3\)"),
        (BYTES, [0.5, 1, 2] * 2, r"expected a whole-number label for each of 6 images, got float64 of shape \(6,\)"),
        (
            BYTES,
            [1, 2, 3] * 2,
            r"expected labels in 0..2 \(num_classes=3\) of the train images, got 3; number the classes from 0, or "
            "correct num_classes",
        ),
        (BYTES, [-1, 0, 1] * 2, r"of the train images, got -1;"),
        (
            torch.zeros(6, 1, 10, 10, dtype=torch.uint8),
            [0, 1, 2] * 2,
            r"expected train images of 1 channels and 8 rows, as input_size says, got \(1, 10, 10\); give as "
            "input_size the shape in which they are stored, and as image_size the side of images in batches",
        ),
        (BYTES.expand(6, 3, 8, 8), [0, 1, 2] * 2, r"got \(3, 8, 8\); give as input_size"),
    ],
)
def test_own_images_that_cannot_be(images: Tensor, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Own(images, labels).setup("fit")


def _part_without_images() -> None:
    data = Digits([1, 2], val_fraction=0.0)
    data.setup("fit")
    data._loader("val")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(batch_size=0), "expected batch_size of at least 1, got 0"),
        (lambda: Digits(views=0), "expected views of at least 1, got 0"),
        (lambda: Digits(shots=0), "expected shots of at least 1, got 0"),
        (lambda: Digits(image_size=0), "expected image_size of at least 1, got 0"),
        (lambda: Digits(fraction=0.0), r"expected fraction in \(0, 1\], got 0.0"),
        (lambda: Digits(fraction=1.5), r"expected fraction in \(0, 1\], got 1.5"),
        (lambda: Digits(val_fraction=1.0), r"expected val_fraction in \[0, 1\), got 1.0"),
        (lambda: Digits(seed=-1), "expected a seed of at least 0, got -1"),
        (lambda: Digits(shots=1, fraction=0.5), "expected shots or fraction, got both: shots=1, fraction=0.5"),
        (lambda: Digits(views=2, mixup=1.0), "0 with views=2 above 1, got mixup=1.0, cutmix=0.0"),
        (lambda: Digits(cutmix=-1.0), "expected mixup and cutmix of at least 0"),
        (lambda: Digits(device_cache=True, num_workers=2), "expected num_workers of 0 with device_cache, got 2"),
        (lambda: Digits(mean=[0.1, 0.2]), r"expected mean of 1 numbers, got \[0.1, 0.2\]"),
        (lambda: Digits(normalize="imagenet"), "expected normalize to be one of data, backbone, got 'imagenet'"),
        (lambda: Digits(sampling="equal"), "expected sampling to be one of uniform, balanced, got 'equal'"),
        (lambda: Digits(std=[0.0]), r"expected std of 1 positive numbers, got \[0.0\]"),
        (_part_without_images, "Digits has no val images, only train, test"),
    ],
)
def test_arguments_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
