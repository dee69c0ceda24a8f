"""Tar shards: their sizes, exact epochs over processes and workers, and what can be wrong with them."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from image_files import number_of, write_image
from PIL import Image
from test_datamodules import SUBTLE, Frozen, Recorder, ShardRecorder, _fit, _trainer
from tiny import SMALL, plain_sgd, trainer_in

from ncfinetune import FineTuner, Supervised
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.cli import main
from ncfinetune.datamodules import ImageFolder, Recipe, Unlabelled, WebDataset
from ncfinetune.datamodules.shards import ShardBatches, Shards, count_samples, read_index

CLASSES = 3
SIZES = (5, 1, 7, 0, 4)


def _png(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _write_shards(root: Path, part: str, sizes: tuple[int, ...] = SIZES, first: int = 0) -> None:
    """Shards of one-colour images; a sample's number is in its key and its colour, its label the number mod 3."""
    numbers = iter(range(first, first + sum(sizes)))
    for shard, size in enumerate(sizes):
        files = []
        for number in (next(numbers) for _ in range(size)):
            write_image(root / "one.png", number)
            files.append((f"images/{number:03d}.png", (root / "one.png").read_bytes()))
            files.append((f"images/{number:03d}.cls", str(number % CLASSES).encode()))
        _write_tar(root / f"{part}-{shard}.tar", files)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 training samples in 5 shards, one of them empty, and 9 for validation in 2."""
    root = tmp_path_factory.mktemp("shards")
    _write_shards(root, "train")
    _write_shards(root, "val", (4, 5), first=100)
    return root


def _make(root: Path, **arguments: Any) -> WebDataset:
    defaults = {
        "num_classes": CLASSES,
        "train": f"{root}/train-{{0..4}}.tar",
        "val": f"{root}/val-*.tar",
        "image_size": 8,
        "num_workers": 0,
        "batch_size": 4,
    }
    return WebDataset(**{**defaults, **arguments})


def _numbers(images: torch.Tensor) -> list[int]:
    return [number_of(image.numpy()) for image in images]


def _raw(data: WebDataset, split: str) -> list[list[int]]:
    """Numbers of the images of each batch, as they are read."""
    data.setup("fit")
    loader = getattr(data, f"{split}_dataloader")()
    found = [_numbers(images) for images, _ in loader]
    assert len(loader) == len(found)
    return found


def _read(data: WebDataset, split: str) -> list[int]:
    """Numbers of the images in their order."""
    return [number for batch in _raw(data, split) for number in batch]


def test_samples_are_decoded_and_labelled(root: Path) -> None:
    data = _make(root, test=[f"{root}/val-1.tar"], val=None)
    data.setup("fit")
    for images, labels in data.train_plain_dataloader():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 8, 8)
        assert labels.tolist() == [number % CLASSES for number in _numbers(images)]
    assert _raw(data, "train_plain") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16]]
    assert _raw(data, "test") == [[104, 105, 106, 107], [108]]
    assert data.val_dataloader() == []


def test_a_learning_rate_is_scaled_to_the_batches_of_shards(root: Path, tmp_path: Path) -> None:
    model = Supervised(CLASSES, {**SMALL, "in_chans": 3}, optimizer=plain_sgd, lr_batch=16)
    trainer = trainer_in(tmp_path, limit_val_batches=0)
    trainer.fit(model, datamodule=_make(root))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 4 / 16)


@pytest.mark.parametrize(("size", "share"), [(14, 1.0), (8, 0.875)])
def test_evaluation_of_shards_and_predictions_elsewhere_crop_the_same(size: int, share: float, tmp_path: Path) -> None:
    """Images that have the size already are not cropped, in whatever way they come."""
    shard, photos = [], tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
        shard += [(f"{number}.png", (photos / f"{number}.png").read_bytes()), (f"{number}.cls", b"0")]
    for part in ("train", "val"):
        _write_tar(tmp_path / f"{part}-0.tar", shard)
    data = _make(tmp_path, train=f"{tmp_path}/train-0.tar", image_size=size)
    data.setup("fit")
    elsewhere = Unlabelled(["ant", "bee", "cow"], data.preprocessing, num_workers=0)
    elsewhere.predict_files(photos)
    (evaluated, _), (predicted, _) = next(iter(data.val_dataloader())), next(iter(elsewhere.predict_dataloader()))
    assert data.preprocessing["crop_pct"] == share
    assert torch.equal(evaluated, predicted)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 20])
@pytest.mark.parametrize("shuffle", [0, 10])
def test_stretches_share_out_the_stream(world_size: int, workers: int, batch_size: int, shuffle: int) -> None:
    shards = Shards([str(i) for i in range(len(SIZES))], np.array(SIZES))
    seen, batches = [], set()
    for rank in range(world_size):
        own = ShardBatches(shards, batch_size, CLASSES, 8, world_size=world_size, rank=rank, shuffle=shuffle)
        stretches = [own._own(number, workers) for number in range(workers)]
        counts = [-(-(stop - start) // batch_size) for start, stop in stretches]
        smaller = [number for number, (start, stop) in enumerate(stretches) if (stop - start) % batch_size]
        assert sum(counts) == len(own)
        assert max(counts) - min(counts) <= 1
        assert smaller in ([], [(len(own) - 1) % workers])
        batches.add(len(own))
        for start, stop in stretches:
            for shard, first, last in shards.sections(np.array([4, 2, 3, 0, 1]), start, stop):
                seen += [(shard, position) for position in range(first, last)]
    assert len(set(seen)) == len(seen)
    if shuffle:
        left_over = 17 % world_size
        single = 1 < batch_size < 17 // world_size and 17 // world_size % batch_size == 1
        assert len(seen) == 17 - left_over - single * world_size
        assert len(batches) == 1
    else:
        assert set(seen) == {(shard, position) for shard, size in enumerate(SIZES) for position in range(size)}


def test_the_only_sample_of_a_process_is_trained_on() -> None:
    shards = Shards(["0"], np.array([3]))
    own = [ShardBatches(shards, 4, CLASSES, 8, world_size=2, rank=rank, shuffle=10) for rank in range(2)]
    assert [(len(part), part.start, part.stop) for part in own] == [(1, 0, 1), (1, 1, 2)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, pytest.param(6, marks=pytest.mark.slow)])
def test_workers_read_each_sample_once(root: Path, workers: int) -> None:
    data = _make(root, num_workers=workers, batch_size=3)
    for split, numbers in (("train_plain", range(17)), ("val", range(100, 109)), ("train", range(17))):
        found = _raw(data, split)
        assert sorted(number for batch in found for number in batch) == list(numbers)
        assert [len(batch) for batch in found[:-1]] == [3] * (len(found) - 1)


def _epochs(root: Path, seed: int = 0, limit_train_batches: float = 1.0, **arguments: Any) -> list[torch.Tensor]:
    pl.seed_everything(seed, workers=True, verbose=False)
    model = _fit(_make(root, **arguments), max_epochs=2, limit_train_batches=limit_train_batches)
    return [model.images("train0"), model.images("train1")]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_order_is_of_the_seed_and_the_epoch(root: Path, workers: int) -> None:
    arguments: dict[str, Any] = {"augmentation": "simclr", "views": 2, "num_workers": workers}
    once, again, other = (_epochs(root, seed, **arguments) for seed in (0, 0, 1))
    assert all(map(torch.equal, once, again))
    assert not torch.equal(once[0], once[1])
    assert not torch.equal(once[0], other[0])
    assert once[0].shape == (16, 2, 3, 8, 8)  # of 17 in fours one is left over


def test_the_buffer_mixes_within_and_across_shards(root: Path) -> None:
    def changes_of_shard(order: list[int]) -> int:
        return int((np.diff(np.repeat(np.arange(5), SIZES)[order]) != 0).sum())

    mixed = _read(_make(root, batch_size=17), "train")
    kept = _read(_make(root, batch_size=17, shuffle=1), "train")
    assert sorted(mixed) == sorted(kept) == list(range(17))
    assert changes_of_shard(mixed) > 5
    assert changes_of_shard(kept) == 3
    assert kept != sorted(kept)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_resumed_run_goes_on_with_the_same_batches(root: Path, workers: int, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"augmentation": "simclr", "num_workers": workers}
    through = _epochs(root, **arguments)
    pl.seed_everything(0, verbose=False)
    first = _trainer()
    first.fit(Recorder(), _make(root, **arguments))
    first.save_checkpoint(tmp_path / "one.ckpt")
    model = Recorder()
    _trainer(max_epochs=2).fit(model, _make(root, **arguments), ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(model.images("train1"), through[1])


def _write_pictures(root: Path) -> None:
    """The same images, none of one colour, as shards and as a folder."""
    for part, numbers in (("train", range(12)), ("val", range(12, 18))):
        files: list[tuple[str, bytes]] = []
        for number in numbers:
            folder = root / part / "abc"[number % CLASSES]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}.png").write_bytes(_png(number))
            files += [(f"{number:02d}.png", _png(number)), (f"{number:02d}.cls", str(number % CLASSES).encode())]
        _write_tar(root / f"{part}-0.tar", files)


def _sorted_rows(model: Recorder, name: str) -> list[tuple[int, bytes]]:
    rows = zip(model.labels(name).tolist(), model.images(name), strict=True)
    return sorted((label, image.numpy().tobytes()) for label, image in rows)


@pytest.mark.parametrize("augmentation", ["plain", SUBTLE])
def test_images_are_treated_as_those_of_a_folder(augmentation: Any, tmp_path: Path) -> None:
    _write_pictures(tmp_path)
    arguments: dict[str, Any] = {"augmentation": augmentation, "num_workers": 0, "batch_size": 4, "image_size": 8}
    shards = _fit(_make(tmp_path, train=f"{tmp_path}/train-0.tar", val=f"{tmp_path}/val-0.tar", **arguments))
    folder = _fit(ImageFolder(str(tmp_path), **arguments))
    assert _sorted_rows(shards, "val") == _sorted_rows(folder, "val")
    assert (_sorted_rows(shards, "train0") == _sorted_rows(folder, "train0")) == (augmentation == "plain")
    assert sorted(shards.labels("train0").tolist()) == sorted(folder.labels("train0").tolist())


def test_the_crop_of_a_sample_does_not_depend_on_who_decodes_it(root: Path, tmp_path: Path) -> None:
    _write_pictures(tmp_path)
    shards = Shards([f"{tmp_path}/train-0.tar"], np.array([12]))
    found = []
    for world_size in (1, 3):
        rows = []
        for rank in range(world_size):
            own = ShardBatches(shards, 2, CLASSES, 8, world_size, rank, shuffle=5, recipe=SUBTLE, views=2, seed=3)
            rows += [image.numpy().tobytes() for images, _ in own for image in images]
        found.append(sorted(rows))
    assert found[0] == found[1]
    assert len(set(found[0])) == 12


def test_views_of_a_recipe_without_crops(root: Path) -> None:
    data = _make(root, views=3, augmentation="plain")
    assert _fit(data).images("train0").shape == (16, 3, 3, 8, 8)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_two_processes_train_equally_long_and_evaluate_each_sample_once(
    root: Path, tmp_path: Path, workers: int
) -> None:
    data = _make(root, num_workers=workers, augmentation="plain", mean=[0, 0, 0], std=[1, 1, 1], batch_size=3)
    trainer = _trainer(strategy="ddp_fork", devices=2, max_epochs=2)
    trainer.fit(ThreeChannels(str(tmp_path)), data)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    numbers = [{name: _numbers((255 * rows).view(-1, 3, 8, 8)) for name, rows in rank.items()} for rank in ranks]
    assert sorted(numbers[0]["val"] + numbers[1]["val"]) == sorted(2 * list(range(100, 109)))
    for epoch in ("train0", "train1"):
        trained = numbers[0][epoch] + numbers[1][epoch]
        assert len(numbers[0][epoch]) == len(numbers[1][epoch]) == 8
        assert len(set(trained)) == 16
        assert set(trained) <= set(range(17))
    assert numbers[0]["train0"] != numbers[0]["train1"]


def test_two_processes_start_from_the_closed_form_of_all_samples(tmp_path: Path) -> None:
    _write_pictures(tmp_path)

    class Keep(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            torch.save(pl_module.head.weight.detach(), tmp_path / f"{trainer.world_size}{trainer.global_rank}.pt")

    data = _make(tmp_path, train=f"{tmp_path}/train-0.tar")
    for spread in ({}, {"strategy": "ddp_fork", "devices": 2}):
        torch.manual_seed(0)
        model = FineTuner(CLASSES, {**SMALL, "in_chans": 3}, optimizer=plain_sgd, allow_random=True, head_init="ridge")
        _trainer(callbacks=[Keep()], max_steps=1, **spread).fit(model, data)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("10", "20", "21"))
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second)


class ThreeChannels(ShardRecorder):
    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.norm = torch.nn.BatchNorm2d(3)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_collapse_is_measured_on_plain_training_images(tmp_path: Path, workers: int) -> None:
    _write_pictures(tmp_path)
    found = []
    for arguments in ({}, {"augmentation": "simclr"}):
        torch.manual_seed(0)
        model = Frozen()
        model.features[1] = torch.nn.Linear(3 * 8 * 8, 6)
        model.training_step = lambda batch, batch_idx, model=model: 0 * model(batch[0]).sum()  # type: ignore
        trainer = _trainer(callbacks=[NeuralCollapseTracker()], limit_val_batches=0)
        shards = {"train": f"{tmp_path}/train-0.tar", "val": None, "num_workers": workers}
        trainer.fit(model, _make(tmp_path, **shards, **arguments))
        found.append(trainer.callback_metrics["nc1/train/penultimate"].item())
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_epoch_that_is_cut_short_does_not_change_the_next(root: Path, workers: int) -> None:
    whole = _epochs(root, num_workers=workers)
    short = _epochs(root, num_workers=workers, limit_train_batches=2)
    for epoch in range(2):
        assert torch.equal(short[epoch], whole[epoch][:8])


def test_shards_on_the_command_line(root: Path) -> None:
    arguments = {"num_classes": CLASSES, "train": f"{root}/train-{{0..4}}.tar", "val": f"[{root}/val-0.tar]"}
    arguments |= {"sizes": "{train: [5, 1, 7, 0, 4], val: [4]}", "image_size": 32, "num_workers": 0, "views": 1}
    data = [word for name, value in arguments.items() for word in (f"--data.{name}", str(value))]
    model = ["--model", "Supervised", "--model.backbone", "test_resnet"]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "1", "--trainer.enable_progress_bar", "false"]
    main(["fit", *model, "--data", "WebDataset", *data, *trainer])


def test_the_length_of_an_epoch_is_known(root: Path) -> None:
    data = _make(root, batch_size=2, num_workers=2)
    trainer = _trainer(max_epochs=3, limit_val_batches=0.5)
    trainer.fit(Recorder(), data)
    assert trainer.num_training_batches == 8
    assert trainer.num_val_batches == [2]
    assert trainer.global_step == trainer.estimated_stepping_batches == 24


def test_overfitting_sees_the_same_batches_each_epoch(root: Path) -> None:
    with pytest.warns(UserWarning, match="requested to overfit"):
        model = _fit(_make(root, augmentation="plain"), overfit_batches=2, max_epochs=2)
    assert torch.equal(model.images("train0"), model.images("train1"))


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_come_in_the_order_of_the_shards(root: Path, workers: int) -> None:
    data = _make(root, test=f"{root}/train-{{0..4}}.tar", train=f"{root}/val-0.tar", val=None, num_workers=workers)
    predicted = _trainer().predict(Recorder(), data)
    assert torch.cat(predicted).tolist() == [number % CLASSES for number in range(17)]


def _index(kind: str) -> dict[str, Any]:
    names = [f"train-{i}.tar" for i in range(5)]
    if kind == "sizes":
        return dict(zip(names, SIZES, strict=True))
    if kind == "widsindex":
        return {"shardlist": [{"url": f"far/{n}", "nsamples": s} for n, s in zip(names, SIZES, strict=True)]}
    return {"splits": {"train": {"filenames": names, "shard_lengths": SIZES}}}


@pytest.mark.parametrize("kind", ["sizes", "widsindex", "_info"])
def test_sizes_of_an_index_are_taken_without_reading_shards(
    root: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.json").write_text(json.dumps(_index(kind)))
    monkeypatch.delattr("ncfinetune.datamodules.shards.count_samples")
    data = _make(root, val=None, sizes=str(tmp_path / "index.json"))
    assert _read(data, "train_plain") == list(range(17))


def test_sizes_of_shards_that_a_command_fetches(root: Path) -> None:
    shards = [f"pipe:cat {root}/train-{i}.tar" for i in range(5)]
    data = _make(root, train=shards, val=None, sizes={"train": list(SIZES)}, num_workers=2)
    assert sorted(_read(data, "train_plain")) == list(range(17))


def test_samples_are_counted_by_the_librarys_rule(tmp_path: Path) -> None:
    names = ["a/0.cls", "a/0.png", "a/0.seg.png", "b/0.png", "__meta__/x.png", "README", "1.PNG", "1.cls"]
    _write_tar(tmp_path / "0.tar", [(name, b"x") for name in names])
    assert count_samples(str(tmp_path / "0.tar")) == 3


def test_sizes_are_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _make(root).setup("fit")
    assert "WebDataset images: train 17 in 5 shards, val 9 in 2 shards" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"png": _png(0)}, r"expected cls and one of jpg, jpeg, png, webp, .* for img/7 in .*bad.tar, got png"),
        ({"cls": b"0", "txt": b""}, r"expected cls and one of .* for img/7 in .*bad.tar, got cls, txt"),
        ({"png": _png(0)[:99], "cls": b"0"}, r"cannot read img/7 in .*bad.tar \(png\) as an image: "),
        (
            {"png": _png(0), "cls": b"3"},
            r"expected a label in 0..2 for img/7 in .*bad.tar, got b'3'; correct num_classes",
        ),
        ({"png": _png(0), "cls": b"-1"}, r"expected a label in 0..2 for img/7 in .*, got b'-1'"),
        ({"png": _png(0), "cls": b"cat"}, r"expected a label in 0..2 for img/7 in .*, got b'cat'"),
    ],
)
def test_samples_that_cannot_be_are_named(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    _write_tar(tmp_path / "bad.tar", [(f"img/7.{key}", content) for key, content in files.items()])
    with pytest.raises(ValueError, match=message):
        _raw(_make(tmp_path, train=f"{tmp_path}/bad.tar", val=None), "train_plain")


def test_a_worker_names_the_sample_that_it_cannot_read(tmp_path: Path) -> None:
    _write_tar(tmp_path / "bad.tar", [("7.png", b"x"), ("7.cls", b"0")])
    with pytest.raises(ValueError, match=r"cannot read 7 in .*bad.tar \(png\) as an image: "):
        _raw(_make(tmp_path, train=f"{tmp_path}/bad.tar", val=None, num_workers=1), "train_plain")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([5, 1, 8, 0, 4], r"expected 8 samples in .*train-2.tar, got 7; the shard is truncated, or sizes are wrong"),
        ([5, 1, 6, 0, 4], r"expected 6 samples in .*train-2.tar, got more; the shard is truncated, or sizes"),
        ([5, 1, 7, 0], r"expected sizes of the 5 train shards, got 4"),
    ],
)
def test_sizes_that_are_not_those_of_the_shards(root: Path, sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _raw(_make(root, val=None, sizes={"train": sizes}), "train_plain")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"train-0.tar": 5}, r"index.json lacks the size of .*train-1.tar; name each shard there as its file is named"),
        ({"a/0.tar": 5, "b/0.tar": 6}, r"index.json has two sizes of shards named 0.tar; give sizes as numbers"),
    ],
)
def test_indices_that_cannot_be(root: Path, index: dict[str, int], message: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        _make(root, sizes=str(tmp_path / "index.json")).setup("fit")


def test_shards_that_cannot_be_read_are_named(root: Path, tmp_path: Path) -> None:
    whole = (root / "train-2.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (tmp_path / "text.tar").write_text("x")
    for name in ("cut", "text"):
        data = _make(root, train=f"{tmp_path}/{name}.tar", val=None, sizes={"train": [7]})
        with pytest.raises(ValueError, match=rf"cannot read shard .*{name}.tar: |expected 7 samples in .*, got \d"):
            _raw(data, "train_plain")
    with pytest.raises(ValueError, match=r"cannot read shard .*text.tar: .*could not be opened"):
        _make(root, train=f"{tmp_path}/text.tar", val=None).setup("fit")
    data = _make(root, train="pipe:exit 3", val=None, sizes={"train": [7]})
    with pytest.raises(ValueError, match="cannot read shard pipe:exit 3: .*(exit 3|empty file)"):
        _raw(data, "train_plain")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize(
    "kind", ["between members", "between samples", "within a header", "a second archive", "damage"]
)
def test_a_shard_without_its_end_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    """tarfile takes each of these for the end of the archive, and would count fewer samples without a word."""
    write_image(tmp_path / "one.png", 0)
    files = [
        (f"{n}.{key}", (tmp_path / "one.png").read_bytes() if key == "png" else b"0")
        for n in range(4)
        for key in ("cls", "png")
    ]
    _write_tar(tmp_path / "whole.tar", files)
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        starts = [member.offset for member in tar]
    spoilt = {
        "between members": whole[: starts[3]],
        "between samples": whole[: starts[4]],
        "within a header": whole[: starts[4] + 100],
        "a second archive": whole + whole,
        "damage": whole[: starts[4]] + b"x" * 512 + whole[starts[4] + 512 :],
    }[kind]
    pack = gzip.compress if suffix == "tar.gz" else bytes
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(pack(whole))
    assert count_samples(str(path)) == 4
    path.write_bytes(pack(spoilt))
    message = (
        "it continues after its end of archive at byte" if kind == "a second archive" else "it has no end of archive"
    )
    with pytest.raises(ValueError, match=rf"cannot read shard .*bad.{suffix}: {message}"):
        _make(tmp_path, train=str(path), val=None).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_is_refused_where_sizes_are_given(workers: int, tmp_path: Path) -> None:
    write_image(tmp_path / "one.png", 0)
    files = [
        (f"{n}.{key}", (tmp_path / "one.png").read_bytes() if key == "png" else b"0")
        for n in range(4)
        for key in ("cls", "png")
    ]
    _write_tar(tmp_path / "0.tar", files)
    with tarfile.open(tmp_path / "0.tar") as tar:
        start = [member.offset for member in tar][6]
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:start])
    data = _make(tmp_path, train=f"{tmp_path}/0.tar", val=None, sizes={"train": [4]}, num_workers=workers)
    with pytest.raises(ValueError, match=r"expected 4 samples in .*0.tar, got 3; the shard is truncated, or sizes"):
        _raw(data, "train_plain")


def test_samples_are_decoded_as_files_are(tmp_path: Path) -> None:
    """Formats, orientation and range."""
    exif = Image.Exif()
    exif[0x0112] = 3
    half = Image.new("L", (16, 16), 0)
    half.paste(255, (0, 0, 16, 8))
    files: list[tuple[str, bytes]] = []
    for number, kind in enumerate(("JPEG", "TIFF", "PNG")):
        out = io.BytesIO()
        (half if kind != "TIFF" else Image.fromarray(np.asarray(half).astype(np.int32) * 10)).save(out, kind, exif=exif)
        files += [(f"{number}.{kind[:3].lower()}".replace("jpe", "jpg"), out.getvalue()), (f"{number}.cls", b"0")]
    _write_tar(tmp_path / "0.tar", files)
    for augmentation in ("plain", Recipe(min_area=0.95, max_aspect=1.01)):
        arguments: dict[str, Any] = {"augmentation": augmentation, "value_range": (0, 2550), "image_size": 12}
        data = _make(tmp_path, train=f"{tmp_path}/0.tar", val=None, **arguments)
        data.setup("fit")
        images = torch.cat([images for images, _ in data.train_dataloader()])
        assert images[:, :, 1].max() < 10
        assert images[:, :, -2].min() > 245


@pytest.mark.parametrize(
    "option",
    [
        "shots",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("fraction", "seed", "val_fraction", "sampling")),
        "device_cache",
    ],
)
def test_a_stream_has_no_options_that_need_labels_before_they_are_read(
    root: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        _make(root, **{option: 1})
    model = ["--model", "Supervised", "--model.backbone", "test_resnet"]
    data = ["--data", "WebDataset", "--data.num_classes", "3", "--data.train", str(root / "train-0.tar")]
    with pytest.raises(SystemExit):
        main(["fit", *model, *data, f"--data.{option}", "1"])
    error = capsys.readouterr().err
    known = "Aircraft, CIFAR10, CIFAR100, DTD, Digits, Flowers102, Food101, ImageFolder, Pets, StanfordCars"
    assert error.startswith(f"error: WebDataset has no option {option!r}; it belongs to {known}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shuffle": 0}, "expected shuffle of at least 1, got 0"),
        (
            {"train": "ROOT/train-{4..6}.tar"},
            r"no shard .*train-5.tar and 1 more; expected paths or URLs such as train-",
        ),
        ({"train": "ROOT/none-*.tar"}, r"no shard .*none-\*.tar; expected paths or URLs"),
        ({"train": []}, r"no shard \(none given\)"),
        ({"val": "ROOT/train-4.tar"}, r"expected each shard once and in one split, got .*train-4.tar more often"),
        (
            {"train": "https://example.org/{0..1}.tar"},
            "cannot count the samples of https://example.org/0.tar, which is",
        ),
    ],
)
def test_arguments_that_cannot_be(root: Path, arguments: dict[str, Any], message: str) -> None:
    given = {
        name: value.replace("ROOT", str(root)) if isinstance(value, str) else value for name, value in arguments.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _make(root, **given).setup("fit")


def test_a_missing_library_names_the_extra(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ImportError, match=r"shards need the library webdataset: pip install 'ncfinetune\[shards\]'"):
        _make(root)


def test_fewer_samples_than_processes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _make(root, train=f"{root}/train-1.tar", val=None)
    data.setup("fit")
    data.trainer = _trainer()
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="expected at least one train image per process, got 1 for 2"):
        data.train_dataloader()


def test_files_of_a_folder_are_predicted_by_a_model_of_shards(root: Path, tmp_path: Path) -> None:
    for number in (3, 1):
        write_image(tmp_path / f"{number}.png", number)
    data = _make(root)
    assert [Path(path).name for path in data.predict_files(tmp_path)] == ["1.png", "3.png"]
    data.setup("predict")
    assert [number for images, _ in data.predict_dataloader() for number in _numbers(images)] == [1, 3]


@pytest.mark.parametrize("content", ["{", "3", '["a"]', '{"shardlist": [{"url": "a.tar"}]}', '{"a.tar": "many"}'])
def test_what_is_no_index_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot read .*sizes.json as sizes of shards .*; expected JSON as"):
        read_index(str(tmp_path / "sizes.json"))
