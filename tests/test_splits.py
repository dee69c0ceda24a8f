from itertools import pairwise

import numpy as np
import pytest

from ncfinetune.datamodules.splits import (
    absent_classes,
    describe_counts,
    split_indices,
    spread_classes,
    take_fraction,
    take_shots,
)


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


def test_the_split_of_a_seed_is_the_same_in_every_version() -> None:
    """A user's test images stay the test images."""
    labels, names = np.repeat([0, 1], [7, 5]), [f"image{number}.png" for number in range(12)]
    for seed, by_name, by_place in ((0, [1, 4, 5, 8, 9], [2, 3, 4, 8, 11]), (1, [0, 2, 5, 7, 11], [0, 1, 5, 9, 10])):
        assert split_indices(labels, {"test": 0.4}, seed, names)["test"].tolist() == by_name
        assert split_indices(labels, {"test": 0.4}, seed)["test"].tolist() == by_place


def test_fewer_labels_are_among_more() -> None:
    labels = np.repeat([0, 1], 30)
    chosen = [
        set(take_shots(labels, 1, 1, ["a", "b"]).tolist()),
        set(take_shots(labels, 3, 1, ["a", "b"]).tolist()),
        set(take_fraction(labels, 0.2, 1).tolist()),
        set(take_shots(labels, 10, 1, ["a", "b"]).tolist()),
        set(take_fraction(labels, 1.0, 1).tolist()),
    ]
    assert [len(some) for some in chosen] == [2, 6, 12, 20, 60]
    assert all(few < many for few, many in pairwise(chosen))
    assert chosen[1] != set(take_shots(labels, 3, 2, ["a", "b"]).tolist())


def test_a_fraction_leaves_every_class_an_image() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    assert np.bincount(labels[take_fraction(labels, 0.1, 0)]).tolist() == [10, 1, 1]


def test_shots_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="expected shots of at most 30, which is all of class 'a', got 31"):
        take_shots(np.repeat([0, 1], [30, 40]), 31, 0, ["a", "b"])
    with pytest.raises(ValueError, match="expected shots of at most 0, which is all of class 'c', got 1"):
        take_shots(np.repeat([0, 1], 30), 1, 0, ["a", "b", "c"])


def test_counts_are_told() -> None:
    assert describe_counts(np.repeat([0, 1], 5), 2) == "10 (5 per class)"
    assert describe_counts(np.repeat([0, 1], [5, 7]), 3) == "12 (0 to 7 per class)"


@pytest.mark.parametrize(
    ("present", "told"),
    [(range(6), ""), (range(3), "d, e, f"), (range(2), "c, d, e and 1 more"), (range(1), "b, c, d and 2 more")],
)
def test_absent_classes_are_named_up_to_three(present: range, told: str) -> None:
    assert absent_classes(np.array(present), "abcdef") == told


def test_the_spread_order_begins_with_the_largest_class() -> None:
    labels = np.repeat([0, 1, 2], [1, 2, 5])
    assert labels[spread_classes(labels)].tolist() == [2, 1, 2, 0, 2, 2, 1, 2]


def test_every_beginning_of_the_spread_order_has_the_classes_in_their_shares() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 6])
    order = spread_classes(labels)
    assert sorted(order) == list(range(96))
    assert np.array_equal(order, spread_classes(labels))
    for stop in range(1, 97):
        counts = np.bincount(labels[order[:stop]], minlength=3)
        assert np.abs(counts - stop * np.array([60, 30, 6]) / 96).max() < 1.5
