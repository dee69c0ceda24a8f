"""Stratified splits by a fixed seed, few labels, and balanced sampling of image indices.

Images of a set that may grow are drawn by their names: how two of them are ordered depends on the seed and their names
alone, so that a further image moves no other from one split to another, but for at most one per class and split, by
rounding. Images of a fixed set are drawn by their place in it.

Legend: ``N`` images, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def split_indices(
    labels: np.ndarray, fractions: dict[str, float], seed: int, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Stratified split of ``0..N-1``: each named split gets its fraction of every class, ``train`` the rest.

    Each split with a fraction gets at least one image of a class, in order, as long as one is left to train on.

    Args:
        labels: Labels, ``(N,)``.
        fractions: Share of each split except ``train``.
        seed: Seed of the shuffling within classes.
        names: Names of the N to draw by, all different; None draws by their place.

    Returns:
        ``{split: sorted indices}``, disjoint, together all of ``0..N-1``.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*fractions, "train")}
    for members in _shuffled_classes(labels, seed, names):
        counts: list[int] = []
        for share in fractions.values():
            wanted = max(1, round(share * len(members))) if share else 0
            counts.append(min(wanted, len(members) - 1 - sum(counts)))
        for name, part in zip(parts, np.split(members, np.cumsum(counts)), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()}


def take_shots(
    labels: np.ndarray, shots: int, seed: int, class_names: Sequence[str], names: Sequence[str] | None = None
) -> np.ndarray:
    """Indices of ``shots`` images of every class; fewer shots give a subset of more shots.

    Args:
        labels: Labels, ``(N,)``.
        shots: Images per class.
        seed: Seed of the choice.
        class_names: Names of the classes, for the error.
        names: As in `split_indices`.

    Raises:
        ValueError: ``shots`` exceeds the images of a class.
    """
    for name, count in zip(class_names, np.bincount(labels, minlength=len(class_names)), strict=True):
        if count < shots:
            raise ValueError(f"expected shots of at most {count}, which is all of class {name!r}, got {shots}")
    return np.sort(np.concatenate([members[:shots] for members in _shuffled_classes(labels, seed, names)]))


def take_fraction(labels: np.ndarray, fraction: float, seed: int, names: Sequence[str] | None = None) -> np.ndarray:
    """Indices of a share of every class, at least one image each; a smaller share gives a subset of a larger one.

    With the same seed, a class's indices and those of `take_shots` are subsets one of the other.

    Args:
        labels: Labels, ``(N,)``.
        fraction: Share of each class, in (0, 1].
        seed: Seed of the choice.
        names: As in `split_indices`.
    """
    classes = _shuffled_classes(labels, seed, names)
    return np.sort(np.concatenate([members[: max(1, round(fraction * len(members)))] for members in classes]))


def draw_balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of ``count`` images drawn with replacement, each present class with the same probability.

    A class is drawn, and then an image of it, so that an image of a class with n images has the weight ``1 / n``, as in
    ``torch.utils.data.WeightedRandomSampler``, but without rounding and for more than 2^24 images.

    Args:
        labels: Labels, ``(N,)``.
        count: Number of draws.
        seed: Seed of the draws.
    """
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    classes = rng.integers(len(sizes), size=count)
    return order[starts[classes] + rng.integers(sizes[classes])]


def spread_classes(labels: np.ndarray) -> np.ndarray:
    """An order of ``0..N-1`` in which every prefix has the class proportions of the whole, as nearly as possible.

    The i-th of a class's n images, shuffled by a fixed seed, is sorted to position ``(i + 1/2) / n`` between 0 and 1.
    """
    places = np.empty(len(labels))
    for members in _shuffled_classes(labels, 0):
        places[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((labels, places))


def describe_counts(labels: np.ndarray, num_classes: int) -> str:
    """Number of images, in all and per class: ``50 (10 per class)`` or ``53 (9 to 12 per class)``."""
    counts = np.bincount(labels, minlength=num_classes)
    low, high = counts.min(), counts.max()
    return f"{len(labels)} ({low if low == high else f'{low} to {high}'} per class)"


def absent_classes(labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Names of the classes without a label, the first three and the number of the rest; empty if there are none."""
    counts = np.bincount(labels, minlength=len(class_names))
    absent = [name for name, count in zip(class_names, counts, strict=True) if not count]
    return ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")


def _shuffled_classes(labels: np.ndarray, seed: int, names: Sequence[str] | None = None) -> list[np.ndarray]:
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if names is None:
        rng = np.random.default_rng(seed)
        return [rng.permutation(own) for own in members]
    places = np.array([_place(name, seed) for name in names], dtype=np.uint64)
    return [own[np.argsort(places[own], kind="stable")] for own in members]


def _place(name: str, seed: int) -> int:
    """A number that is random among names and seeds."""
    digest = blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
