"""Balanced sampling: classes in equal shares, exactly the same draws however a run is made and wherever it stops."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from image_files import write_image
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_datamodules import SUBTLE, Recorder, _epochs, _fit, _looking, _stored, _trainer
from torch.utils.data import WeightedRandomSampler

from ncfinetune.cli import main
from ncfinetune.datamodules import Digits, ImageDataModule, ImageFolder
from ncfinetune.datamodules.images import Labelled
from ncfinetune.datamodules.loading import EpochSampler
from ncfinetune.datamodules.splits import draw_balanced
from ncfinetune.loaders import evenly

# Label 1 has no image.
LABELS = np.array([0] * 30 + [2] * 9 + [5] * 2)[np.random.default_rng(0).permutation(41)]
COUNTS = (13, 5, 2)


class Uneven(Digits):
    """Three digits, of which 13, 5 and 2 images are for training."""

    def parts(self) -> dict[str, Labelled]:
        parts = super().parts()
        labels = parts["train"].own_labels
        few = [np.flatnonzero(labels == label)[:count] for label, count in enumerate(COUNTS)]
        return {**parts, "train": parts["train"].take(np.concatenate(few))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 13, 5 and 2 training images of many colours, and 3 of each for validation."""
    root = tmp_path_factory.mktemp("uneven")
    numbers = iter(range(216))
    for name, count in zip("abc", COUNTS, strict=True):
        for i in range(count):
            write_image(root / "train" / name / f"{i}.png", next(numbers), (20, 24))
        for i in range(3):
            write_image(root / "val" / name / f"{i}.png", next(numbers), (20, 24))
    return root


def _make(kind: str, folder: Path, **arguments: Any) -> ImageDataModule:
    arguments = {"sampling": "balanced", "augmentation": SUBTLE, "batch_size": 4, **arguments}
    if kind == "memory":
        return Uneven([1, 2, 3], **arguments)
    return ImageFolder(str(folder), image_size=8, **{"num_workers": 2 if kind == "2 workers" else 0, **arguments})


def _scores(found: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How many standard errors the frequencies of a multinomial sample are from what is expected."""
    total = found.sum()
    return (found - total * shares) / np.sqrt(total * shares * (1 - shares))


def test_each_class_and_each_image_within_it_is_as_likely_as_another() -> None:
    drawn = draw_balanced(LABELS, 60_000, seed=3)
    per_class = np.bincount(LABELS[drawn], minlength=6)
    assert per_class[[1, 3, 4]].sum() == 0
    assert np.abs(_scores(per_class[[0, 2, 5]], np.full(3, 1 / 3))).max() < 4
    weights = 1 / np.bincount(LABELS)[LABELS]
    scores = _scores(np.bincount(drawn, minlength=41), weights / weights.sum())
    assert np.abs(scores).max() < 4
    # They vary as independent draws do, and no less: 41 squared scores sum to 40 in the mean, and deviate by 9.
    assert 15 < (scores**2).sum() < 75


def test_draws_are_spread_as_those_of_torch() -> None:
    """The distribution of how often the images are drawn, not only its mean."""
    weights = torch.from_numpy(1 / np.bincount(LABELS)[LABELS])
    torch.manual_seed(0)
    theirs = [np.bincount(list(WeightedRandomSampler(weights, 41)), minlength=41) for _ in range(2000)]
    ours = [np.bincount(draw_balanced(LABELS, 41, seed), minlength=41) for seed in range(2000)]
    for times in range(5):
        shares = [np.mean([(counts == times).mean() for counts in many]) for many in (ours, theirs)]
        error = np.sqrt(2 * shares[1] / (41 * 2000))
        assert abs(shares[0] - shares[1]) < 4 * error, times


def test_an_epoch_has_a_binomial_number_of_each_class() -> None:
    """Draws are independent, as torch's are, and not dealt out in turn."""
    counts = np.array([np.bincount(LABELS[draw_balanced(LABELS, 41, seed)], minlength=6) for seed in range(2000)])
    variance = 41 * 1 / 3 * 2 / 3
    for label in (0, 2, 5):
        assert abs(counts[:, label].var() - variance) < 4 * variance * np.sqrt(2 / 2000)


def test_a_class_of_one_image_and_no_other_class() -> None:
    assert draw_balanced(np.array([3, 3, 3]), 100, seed=0).max() <= 2
    assert set(draw_balanced(np.array([3]), 5, seed=0)) == {0}


def _sampler(processes: int = 1, rank: int = 0, seed: int = 3, taken: int = 0, epoch: int = 0) -> EpochSampler:
    sampler = EpochSampler(range(41), processes, rank, seed, lambda _: taken, LABELS)
    sampler.set_epoch(epoch)
    return sampler


@pytest.mark.parametrize("epoch", [0, 7])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_draw_disjoint_parts_of_one_sequence(processes: int, epoch: int) -> None:
    """Key ``(e N + t) N + i`` is draw t, of image i."""
    whole = list(_sampler(epoch=epoch))
    assert [key // 41 for key in whole] == list(range(41 * epoch, 41 * (epoch + 1)))
    assert len({key % 41 for key in whole}) < 41  # some image comes twice
    total = 41 // processes * processes
    shares = [list(_sampler(processes, rank, epoch=epoch)) for rank in range(processes)]
    for rank, share in enumerate(shares):
        assert share == whole[rank:total:processes]
        assert len(share) == len(_sampler(processes, rank)) == 41 // processes


def test_draws_are_of_the_seed_and_the_epoch() -> None:
    assert list(_sampler()) == list(_sampler())
    orders = [[key % 41 for key in _sampler(seed=seed, epoch=epoch)] for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]  # of the seed plus the epoch they would be the same


@pytest.mark.parametrize("taken", [0, 1, 13, 20])
def test_what_an_epoch_has_had_already_is_left_out(taken: int) -> None:
    for rank in range(2):
        assert list(_sampler(2, rank, taken=taken, epoch=2)) == list(_sampler(2, rank, epoch=2))[taken:]


def test_training_has_the_classes_in_equal_shares(folder: Path) -> None:
    for kind in ("memory", "files"):
        pl.seed_everything(1, verbose=False)
        model = _fit(_make(kind, folder, batch_size=20), max_epochs=30)
        labels = torch.cat([model.labels(f"train{epoch}") for epoch in range(30)])
        assert len(labels) == 30 * 20
        assert np.abs(_scores(labels.bincount(minlength=3).numpy(), np.full(3, 1 / 3))).max() < 4


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_plain_training_images_and_evaluation_are_as_ever(kind: str, folder: Path) -> None:
    for split in ("train", "val"):
        balanced, uniform = (_stored(_make(kind, folder, sampling=way), split) for way in ("balanced", "uniform"))
        assert all(map(torch.equal, balanced, uniform))
    assert _stored(_make(kind, folder), "train")[1].bincount().tolist() == list(COUNTS)


def test_a_pass_over_the_training_loader_takes_each_image_once(folder: Path) -> None:
    data = _make("memory", folder)
    data.setup("fit")
    found = torch.cat([labels for _, labels in evenly(data.train_dataloader(), 20)])
    assert found.bincount().tolist() == list(COUNTS)


def test_an_image_that_is_drawn_again_is_cropped_anew(tmp_path: Path) -> None:
    """In equal shares a class of few images has each of them many times in an epoch."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 24, 24, 3), dtype=np.uint8)
    for number in range(10):
        path = tmp_path / ("one" if number == 0 else "others") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[number]).save(path)
    data = _make("files", tmp_path, val_fraction=0.0, batch_size=10)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    again = images[labels == 0]
    assert len(again) > 2
    assert len({image.numpy().tobytes() for image in again}) == len(again)


def _steps(
    make: Callable[[], ImageDataModule], folder: Path, resume: Path | None = None, callbacks: Sequence[pl.Callback] = ()
) -> Recorder:
    pl.seed_everything(0, verbose=False)
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    model = Recorder()
    callbacks = [saving, *callbacks]
    _trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True).fit(model, make(), ckpt_path=resume)
    return model


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("kind", ["memory", pytest.param("2 workers", marks=pytest.mark.slow)])
def test_a_run_that_stopped_within_an_epoch_goes_on_with_the_same_draws(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    make = functools.partial(_make, kind, folder, device_cache=kind == "memory")
    whole = _steps(make, tmp_path)
    batches = [batch for epoch in ("train0", "train1") for batch in whole.seen[epoch]]
    assert len(batches) == 10
    for step, callbacks in itertools.product((2, 5, 8), ([], [_looking("on_train_start", "train_dataloader")])):
        rest = _steps(make, tmp_path, tmp_path / f"step={step}.ckpt", callbacks)
        found = [batch for epoch in ("train0", "train1") for batch in rest.seen.get(epoch, [])]
        assert len(found) == 10 - step
        for ours, theirs in zip(found, batches[step:], strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_batches_do_not_depend_on_workers_or_on_where_images_lie(folder: Path) -> None:
    none, two = (_epochs(_make(kind, folder)) for kind in ("files", "2 workers"))
    assert all(map(torch.equal, none, two))
    memory, cached = (_epochs(_make("memory", folder, device_cache=cache)) for cache in (False, True))
    assert all(map(torch.equal, memory, cached))
    assert not torch.equal(*memory)


class Draws(Recorder):
    """Leaves the images that each process has trained on in a file."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = out

    def on_fit_end(self) -> None:
        torch.save([self.images("train0"), self.images("train1")], f"{self.out}/{self.global_rank}.pt")


def test_two_processes_train_on_the_draws_of_one(folder: Path, tmp_path: Path) -> None:
    make = functools.partial(_make, "memory", folder, augmentation="plain")
    alone = _epochs(make())
    pl.seed_everything(0, workers=True, verbose=False)
    trainer = _trainer(strategy="ddp_fork", devices=2, max_epochs=2)
    trainer.fit(Draws(str(tmp_path)), make())
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for epoch in range(2):
        for rank in range(2):
            assert torch.equal(ranks[rank][epoch], alone[epoch][rank::2])


def test_balanced_sampling_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "Supervised", "--model.backbone", "{name: test_resnet, in_chans: 1}"]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "1", "--trainer.enable_progress_bar", "false"]
    data = ["--data", "Digits", "--data.sampling"]
    main(["fit", *model, *trainer, *data, "balanced"])
    with pytest.raises(SystemExit):
        main(["fit", *model, *trainer, *data, "equal"])
    assert "sampling: expected one of uniform, balanced, got 'equal'" in capsys.readouterr().err
