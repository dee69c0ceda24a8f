import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ncfinetune.datamodules import Digits
from ncfinetune.datamodules.base import split_indices, take_shots


def _images(data: Digits, split: str) -> torch.Tensor:
    data.setup("fit")
    return data._splits[split].tensors[0]


def _labels(data: Digits, split: str) -> torch.Tensor:
    data.setup("fit")
    return data._splits[split].tensors[1]


def test_parts_are_disjoint_stratified_and_together_everything() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    parts = split_indices(labels, {"test": 0.3, "val": 0.1}, seed=0)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(160))
    assert {name: np.bincount(labels[part]).tolist() for name, part in parts.items()} == {
        "test": [30, 15, 3],
        "val": [10, 5, 1],
        "train": [60, 30, 6],
    }
    assert all(
        np.array_equal(part, split_indices(labels, {"test": 0.3, "val": 0.1}, 0)[name]) for name, part in parts.items()
    )


def test_fewer_shots_are_among_more() -> None:
    labels = np.repeat([0, 1], 30)
    few, many = (set(take_shots(labels, shots, 1, ["a", "b"]).tolist()) for shots in (3, 10))
    assert few < many
    assert few != set(take_shots(labels, 3, 2, ["a", "b"]).tolist())


@pytest.mark.parametrize(
    ("shots", "message"),
    [(31, "expected shots of at most 30, which is all of class 'a', got 31"), (0, "expected shots of at least 1")],
)
def test_shots_that_are_not_there(shots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_shots(np.repeat([0, 1], 30), shots, 0, ["a", "b"])


def test_digits_are_scikit_learns_with_their_labels() -> None:
    images, digits = load_digits(return_X_y=True)
    known = {
        image.tobytes(): digit
        for image, digit in zip(np.round(images * 255 / 16).astype(np.uint8), digits, strict=True)
    }
    data = Digits([7, 3])
    for split in ("train", "val", "test"):
        for image, label in zip(_images(data, split), _labels(data, split), strict=True):
            assert known[image.numpy().tobytes()] == data.classes[label]
    assert data.class_names == ["7", "3"]
    assert data.num_classes == 2


def test_test_images_do_not_depend_on_the_users_choices() -> None:
    assert torch.equal(_images(Digits([5, 6]), "test"), _images(Digits([5, 6], shots=2, seed=7), "test"))


def test_shots_cut_only_the_training_part() -> None:
    data = Digits([5, 6, 7], shots=4)
    assert torch.bincount(_labels(data, "train")).tolist() == [4, 4, 4]
    assert torch.equal(_images(data, "val"), _images(Digits([5, 6, 7]), "val"))


def test_batches_are_normalised() -> None:
    data = Digits(batch_size=2000)
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape[1:] == data.input_size
    assert labels.dtype == torch.int64
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


def test_plain_training_images_come_in_a_fixed_order() -> None:
    data = Digits()
    data.setup("fit")
    first, second = (torch.cat([x for x, _ in data.train_plain_dataloader()]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first) == len(_images(data, "train"))


@pytest.mark.parametrize("classes", [[1], [1, 1], [3, 10]])
def test_classes_that_are_no_digits(classes: list[int]) -> None:
    with pytest.raises(ValueError, match="expected classes to be at least two different digits of 0..9, got"):
        Digits(classes)


def test_empty_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="expected batch_size of at least 1, got 0"):
        Digits(batch_size=0)
