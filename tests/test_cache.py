"""Training on what the frozen layers made of the images: the same run, without their forward pass."""

import errno
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_image
from tiny import SMALL, plain_sgd, trainer_in

from ncfinetune import FineTuner, cache, store
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.datamodules import Digits, ImageFolder, Recipe, images

KNOBS = [
    {"train": "none"},
    {"train": "none", "skip_from": "layer2.0", "skip_join": "linear"},
    {"train": "layer3.0"},
    {"train": "layer3.0", "skip_from": "layer3.0", "skip_gradient": "skip"},
    {"train": "layer4.0", "skip_from": "layer2.1", "head_init": "mean"},
    {"train": ["layer3.1.bn2", "layer4.1.bn?"]},
]
# Each of these is another way through the cache; the other pairs of KNOBS and place repeat them and are slow.
FAST = [(0, "memory"), (3, "disk"), (4, "memory"), (5, "memory")]
PAIRS = [
    pytest.param(knobs, place, marks=() if (number, place) in FAST else pytest.mark.slow)
    for number, knobs in enumerate(KNOBS)
    for place in ("memory", "disk")
]


def _model(**knobs) -> FineTuner:
    torch.manual_seed(1)
    return FineTuner(3, SMALL, optimizer=plain_sgd, allow_random=True, **knobs)


def _fit(folder: Path, model: FineTuner, data: Digits | None = None, **arguments) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    trainer = trainer_in(folder, max_epochs=2, **arguments)
    trainer.fit(model, data or Digits([0, 1, 2], shots=8, batch_size=7))
    return {**model.state_dict(), **trainer.callback_metrics}


def _fail(*args, **kwargs):
    pytest.fail("the frozen layers ran again")


@pytest.mark.parametrize(("knobs", "place"), PAIRS)
def test_run_with_a_cache_is_the_run_without(knobs: dict, place: str, tmp_path: Path) -> None:
    plain = _fit(tmp_path, _model(**knobs))
    options = {"cache_dir": str(tmp_path / "cache")} if place == "disk" else {}
    cached = _fit(tmp_path, _model(**knobs, cache=place, **options))
    assert {"train/loss", "val/loss", "val/acc"} <= set(plain)
    for key, value in plain.items():
        torch.testing.assert_close(cached[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("place", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_stored_values_are_drawn_as_images_are(place: str, tmp_path: Path) -> None:
    """With replacement too, and by the order of each epoch."""

    def fit(sampling: str = "balanced", **knobs) -> dict[str, torch.Tensor]:
        data = Digits([0, 1, 2], shots=8, batch_size=7, sampling=sampling)
        return _fit(tmp_path, _model(train="layer4.0", **knobs), data)

    options = {"cache_dir": str(tmp_path / "cache")} if place == "disk" else {}
    plain, cached = fit(), fit(cache=place, **options)
    for key, value in plain.items():
        torch.testing.assert_close(cached[key], value, rtol=1e-4, atol=1e-5, msg=key)
    uniform = fit("uniform")
    assert not torch.allclose(uniform["train/loss"], plain["train/loss"], rtol=1e-2)


def test_frozen_layers_run_once_an_image(tmp_path: Path) -> None:
    def images(**knobs) -> int:
        model, seen = _model(train="layer3.0", **knobs), []
        layer = model.backbone.layer("layer1.0")
        layer.forward = lambda x, forward=layer.forward: seen.append(len(x)) or forward(x)
        data = Digits([0, 1, 2], shots=8, batch_size=7)
        _fit(tmp_path, model, data, num_sanity_val_steps=0)
        return sum(seen), 24 + len(data.val_dataloader().dataset)

    without, each = images()
    assert without == 2 * each
    for head_init in ("default", "mean"):
        with_cache, each = images(cache="memory", head_init=head_init)
        assert with_cache <= each + 3 * 8  # and some more to try the cut


class Changed(torch.utils.data.Dataset):
    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        image, label = self.dataset[index]
        image = image.clone()
        image[0, 0, 0] ^= 255 if index % len(self) == 5 else 0
        return image, label


class OnePixel(Digits):
    """One pixel of one image differs, and not of one that would be among a few samples."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Changed(super().train_dataloader().dataset), batch_size=7, shuffle=True)

    def train_plain_dataloader(self):
        return torch.utils.data.DataLoader(Changed(super().train_plain_dataloader().dataset), batch_size=7)


def test_files_are_found_again_and_not_when_anything_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    knobs = {"train": "layer3.0", "cache": "disk", "cache_dir": str(folder)}
    first = _fit(tmp_path, _model(**knobs))
    entries = set(folder.iterdir())
    assert len(entries) == 2  # training and validation images
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", _fail)
        again = _fit(tmp_path, _model(**knobs))
    assert all(torch.equal(again[key], value) for key, value in first.items())

    other_weights = _model(**knobs)
    torch.nn.init.ones_(other_weights.backbone.net.conv1.weight)
    other_pixels = OnePixel([0, 1, 2], shots=8, batch_size=7)
    other_mean = Digits([0, 1, 2], shots=8, batch_size=7)
    other_mean.mean += 0.1
    for model, data, new in [
        (other_weights, None, 2),
        (_model(**knobs), other_pixels, 1),
        (_model(**knobs), other_mean, 2),
    ]:
        _fit(tmp_path, model, data)
        assert len(set(folder.iterdir()) - entries) == new
        entries = set(folder.iterdir())
    _fit(tmp_path, _model(**{**knobs, "train": "layer3.1"}))
    assert len(set(folder.iterdir()) - entries) == 2


def test_files_of_another_skipped_layer_are_others(tmp_path: Path) -> None:
    """A probe stores what the skipped layer gives too; layer4.1 is as wide as layer4.0, and layer3.1 narrower."""

    def loss(**knobs) -> torch.Tensor:
        model = _model(**knobs)
        torch.nn.init.ones_(model.backbone.layer("layer4.1").bn2.weight)  # 0 makes the block an identity
        return _fit(tmp_path, model)["val/loss"]

    disk = {"cache": "disk", "cache_dir": str(tmp_path / "cache")}
    loss(**disk)
    for skip_from in ("layer4.0", "layer4.1", "layer3.1"):
        torch.testing.assert_close(loss(skip_from=skip_from, **disk), loss(skip_from=skip_from), rtol=1e-4, atol=1e-5)


class OneProcess:
    is_global_zero = True

    def barrier(self, name: str) -> None:
        pass


def _rows(value: float, width: int = 2) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
    return lambda: [(torch.full((3, width), value), torch.arange(3))]


def test_files_of_another_width_are_made_anew(tmp_path: Path) -> None:
    for width in (2, 5):
        stored = store.on_disk(_rows(width, width), (3, width), tmp_path / "key", OneProcess())
        assert torch.equal(stored.values, torch.full((3, width), float(width)))


def test_files_of_a_run_that_was_faster_are_taken(tmp_path: Path) -> None:
    def overtaken() -> list[tuple[torch.Tensor, torch.Tensor]]:
        store.on_disk(_rows(1.0), (3, 2), tmp_path / "key", OneProcess())
        return _rows(2.0)()

    stored = store.on_disk(overtaken, (3, 2), tmp_path / "key", OneProcess())
    assert torch.equal(stored.values, torch.ones(3, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def _cut(content: bytes) -> bytes:
    return content[:-5]


def _flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 64]) + content[-4:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("values", _flip),
        ("shapes.json", _cut),
        pytest.param("values", _cut, marks=pytest.mark.slow),
        pytest.param("shapes.json", _flip, marks=pytest.mark.slow),
    ],
)
def test_damaged_files_are_made_anew(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    knobs = {"train": "layer3.0", "cache": "disk", "cache_dir": str(folder)}
    first = _fit(tmp_path, _model(**knobs))
    for entry in folder.iterdir():
        (entry / name).write_bytes(damage((entry / name).read_bytes()))
    again = _fit(tmp_path, _model(**knobs))
    assert all(torch.equal(again[key], value) for key, value in first.items())


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    for name, age in (("other.part-killed", 30 * 3600), ("other.part-writing", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values").write_bytes(b"half")
        for path in (tmp_path / name / "values", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    store.on_disk(_rows(1.0), (3, 2), tmp_path / "key", OneProcess())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "other.part-writing"]


def test_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_shape", crash)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        _fit(tmp_path, _model(train="layer3.0", cache="disk", cache_dir=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk_is_said_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(train="layer3.0", cache="disk", cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
        with pytest.raises(
            OSError, match=r"disk full while caching: the cache needs 0.00 GB in '.*cache', where 0.00 GB"
        ):
            _fit(tmp_path, model)
    written = []

    def write(tensor: torch.Tensor) -> memoryview:
        written.append(tensor)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return memoryview(b"")

    monkeypatch.setattr(store, "raw", write)
    with pytest.raises(
        OSError, match=r"No space left on device; free some space, name a cache_dir on another disk, or"
    ):
        _fit(tmp_path, model)
    assert list((tmp_path / "cache").iterdir()) == []


class RandomOnDevice(Digits):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        return (images + 0.1 * torch.randn_like(images) if self.trainer.training else images), labels


class RandomInData(Digits):
    def train_dataloader(self):
        images = super().train_dataloader().dataset
        drawn = [images[i] for i in range(len(images))]
        flipped = [(image.flip(-1) if np.random.rand() < 0.5 else image, label) for image, label in drawn]
        return torch.utils.data.DataLoader(flipped, batch_size=7, shuffle=True)


@pytest.mark.parametrize("data", [RandomOnDevice, RandomInData])
def test_random_augmentation_is_refused(data: type[Digits], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"stores the frozen layers. output for each training image once, but the images differ .*augmentation",
    ):
        _fit(tmp_path, _model(cache="memory"), data([0, 1, 2], shots=8, batch_size=7))


@pytest.mark.parametrize(
    "options",
    [{"augmentation": Recipe(flip=1e-9)}, {"mixup": 1e-9}, {"views": 2}, {"augmentation": Recipe(min_area=0.999)}],
)
def test_augmentation_that_a_few_images_do_not_show_is_refused(options: dict, tmp_path: Path) -> None:
    data = Digits([0, 1, 2], shots=8, batch_size=7, **options)
    assert data.augments
    with pytest.raises(ValueError, match="the images differ each time they are loaded"):
        _fit(tmp_path, _model(cache="memory"), data)


@pytest.mark.parametrize("options", [{}, {"augmentation": "simclr", "strength": 0}, {"augmentation": Recipe()}])
def test_what_is_not_random_is_no_augmentation(options: dict) -> None:
    assert not Digits([0, 1, 2], **options).augments


def test_files_that_have_not_changed_are_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(120):
        write_image(tmp_path / "images" / "abc"[number % 3] / f"{number}.png", number)
    seen: list[str] = []
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, *a, **k: seen.append(path) or read(path, *a, **k))

    def fit() -> int:
        seen.clear()
        data = ImageFolder(
            str(tmp_path / "images"), image_size=8, num_workers=0, batch_size=4, augmentation="plain", val_fraction=0.2
        )
        folder = str(tmp_path / "cache")
        model = FineTuner(3, {**SMALL, "in_chans": 3}, cache="disk", cache_dir=folder, allow_random=True)
        model.backbone.load_state_dict(weights)
        trainer_in(tmp_path, max_epochs=2).fit(model, data)
        return len(set(seen))

    weights = FineTuner(3, {**SMALL, "in_chans": 3}).backbone.state_dict()
    assert fit() == 120
    assert fit() <= 4 + 8 + 8  # a batch to try the cut, and some images of either part
    write_image(tmp_path / "images" / "a" / "0.png", 7, (40, 40))
    assert fit() > 20


def test_run_after_a_cached_one_has_nothing_to_say_of_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = _model(cache="memory"), Digits([0, 1, 2], shots=8, batch_size=7)
    trainer = trainer_in(tmp_path)
    trainer.fit(model, data)
    trainer.test(model, datamodule=data)
    assert "override" not in caplog.text
    assert trainer.callbacks.count(model._cache) == 1


def test_all_layers_trained_leave_nothing_to_cache() -> None:
    with pytest.raises(
        ValueError, match="cache='disk' stores the outputs of frozen layers, and with train=\"all\" there are"
    ):
        _model(train="all", cache="disk")


def test_a_layer_whose_input_has_no_entry_an_image_is_refused(tmp_path: Path) -> None:
    small = {
        "img_size": 32,
        "depth": 3,
        "embed_dim": 24,
        "inner_dim": 8,
        "num_heads_outer": 2,
        "num_heads_inner": 2,
        "in_chans": 1,
    }
    model = FineTuner(10, {"name": "tnt_s_patch16_224", **small}, train="blocks.2", cache="memory", allow_random=True)
    message = r"cannot run from blocks.2 on in tnt_s_patch16_224: its first argument needs one entry per"
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path).fit(model, Digits(shots=2, image_size=32, augmentation="plain"))


def test_network_that_needs_more_than_the_layers_input_is_refused(tmp_path: Path) -> None:
    model = _model(train="layer3.0", cache="memory")
    net, original = model.backbone.net, model.backbone.net.forward_features
    net.forward_features = lambda x: original(x) + x.mean()
    with pytest.raises(ValueError, match="cannot run from layer3.0 on in resnet18: the layers from there on depend on"):
        _fit(tmp_path, model)


def test_datamodule_has_its_images_back_after_the_run_whatever_its_end(tmp_path: Path) -> None:
    data = Digits([0, 1, 2], shots=8, batch_size=7)
    _fit(tmp_path, _model(cache="memory"), data)
    assert next(iter(data.train_dataloader()))[0].shape == (7, 1, 8, 8)
    assert "on_after_batch_transfer" not in vars(data)

    broken = _model(train="layer3.0", cache="memory")
    broken.on_train_epoch_end = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        _fit(tmp_path, broken, data)
    assert next(iter(data.train_dataloader()))[0].shape == (7, 1, 8, 8)


@pytest.mark.parametrize(
    "knobs",
    [{"train": "layer3.0", "skip_from": "layer3.0"}, pytest.param({"skip_from": "layer2.0"}, marks=pytest.mark.slow)],
)
def test_tracker_of_frozen_layers_gets_validation_images(knobs: dict, tmp_path: Path) -> None:
    numbers = [
        _fit(tmp_path, _model(**knobs, cache=place), callbacks=[NeuralCollapseTracker(layers=["layer*.*"])])
        for place in ("none", "memory")
    ]
    names = [name for name in numbers[0] if name.startswith("nc1/")]
    assert len(names) == 2 * 8
    for name in names:
        torch.testing.assert_close(numbers[1][name], numbers[0][name], rtol=1e-3, atol=1e-6)


def test_tracker_measures_the_same_with_a_cache(tmp_path: Path) -> None:
    numbers = []
    for place in ("none", "memory"):
        tracker = NeuralCollapseTracker(layers=["layer3.0", "layer4.1", "penultimate"])
        model = _model(train="layer3.0", skip_from="layer3.0", cache=place)
        numbers.append(_fit(tmp_path, model, callbacks=[tracker]))
    names = [name for name in numbers[0] if name.startswith("nc1/")]
    assert len(names) == 6
    for name in names:
        torch.testing.assert_close(numbers[1][name], numbers[0][name], rtol=1e-3, atol=1e-6)


def test_stored_values_take_the_sizes_of_batches_of_the_loader() -> None:
    stored = store.StoredSet(torch.randn(10, 3), torch.arange(10))
    theirs = torch.utils.data.DataLoader(range(10), batch_size=4, drop_last=True)
    batches = list(stored.loader_like(theirs))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert isinstance(batches[0][0], store.Stored)
    later = stored.__getitems__([13, 21])
    assert later[1].tolist() == [3, 1]
    assert torch.equal(later[0].value, stored.values[[3, 1]])
    assert cache._same([torch.ones(2)], [torch.ones(2)])
    assert not cache._same([torch.ones(2)], [torch.zeros(2)])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_cache_takes_images_at_any_precision(precision: str, tmp_path: Path) -> None:
    plain = _fit(tmp_path, _model(train="layer3.0"), precision=precision)
    cached = _fit(tmp_path, _model(train="layer3.0", cache="memory"), precision=precision)
    for key, value in plain.items():
        torch.testing.assert_close(cached[key], value, rtol=1e-2, atol=1e-2, msg=key)


def test_cache_is_used_where_the_loaders_were_asked_for_before(tmp_path: Path) -> None:
    def counts_steps(parameters) -> torch.optim.Optimizer:
        assert model.trainer.estimated_stepping_batches == 8
        return plain_sgd(parameters)

    model = _model(train="layer3.0", cache="memory")
    model._optimizer = counts_steps
    seen = []
    model.training_step = lambda batch, index, step=model.training_step: seen.append(batch[0]) or step(batch, index)
    _fit(tmp_path, model)
    assert {type(images) for images in seen} == {store.Stored}


def test_folder_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache_dir='elsewhere' is for cache=\"disk\", and cache='memory' writes no"):
        _model(cache="memory", cache_dir="elsewhere")


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_validation_set_without_images_is_left_alone(place: str, tmp_path: Path) -> None:
    data = Digits([0, 1, 2], shots=8, batch_size=7)
    nothing = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())
    )
    data.val_dataloader = lambda: nothing
    folder = {"cache_dir": str(tmp_path / "cache")} if place == "disk" else {}
    _fit(tmp_path, _model(cache=place, **folder), data)


@pytest.mark.parametrize("pins", [True, False])
def test_stored_values_are_pinned_where_images_are(pins: bool) -> None:
    stored = store.StoredSet(torch.zeros(4, 2), torch.zeros(4).long())
    loader = torch.utils.data.DataLoader(range(4), batch_size=2, pin_memory=pins)
    assert stored.loader_like(loader).pin_memory == pins
