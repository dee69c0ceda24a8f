"""Random features against the formulas in long double: no metric may be wrong without a word.

    python -m tests.fuzz [--inputs 20000] [--seed 0]

prints the worst relative error of each metric, how many numbers were refused by name, and how many were wrong.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ncfinetune import accumulator
from ncfinetune.collapse import EXACT, FAMILY, UndefinedCollapseError, nc1_with_error, self_duality
from ncfinetune.moment_accumulator import MomentAccumulator

TOLERANCE = EXACT
# NC2 and NC3 vanish at collapse and are of the order of one, so that their error is held to this as well.
ABSOLUTE = 1e-9
FAMILIES = [
    "plain",
    "uneven",
    "outlier first",
    "large first",
    "sparse",
    "collapsed",
    "offset",
    "uneven means",
    "coarse",
    "few of many",
    "repeated",
    "balanced",
    "one far",
]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]


@dataclass
class Input:
    """Features ``(N, d)`` in the batches of each part, whose moments are merged; and the classifier's weight."""

    family: str
    classes: int
    features: Tensor
    labels: Tensor
    weight: Tensor
    parts: list[Tensor]
    batch: int
    buffer: int


@dataclass
class Found:
    """What a run found, by metric.

    Values, refusals, values given with a word on their error, wrong values, the worst error of those that are right
    to 1e-6, and the largest share of a stated error that was reached.
    """

    values: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    undefined: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    said: Counter[str] = field(default_factory=Counter)
    largest: float = 0.0


def draw(rng: np.random.Generator) -> Input:
    """One input: shapes, type, scale, offset, spectra, order, parts."""
    classes = int(rng.integers(2, 9) if rng.random() < 0.97 else rng.integers(9, 40))
    width = int(rng.integers(1, 17) if rng.random() < 0.6 else rng.integers(17, 200))
    samples = int(rng.choice([classes + 2, 40, 120, 400]) if rng.random() < 0.97 else rng.choice([2000, 6000]))
    family = str(rng.choice(FAMILIES))
    labels = rng.permutation(np.arange(samples) % classes)
    if rng.random() < 0.3:  # some classes absent, some with one sample
        labels = rng.choice(classes, samples, p=rng.dirichlet(np.full(classes, 0.3)))
    order = [np.arange(samples), labels.argsort(kind="stable"), rng.permutation(samples)][int(rng.integers(3))]
    features = _features(rng, family, classes, width, labels)
    if family == "outlier first":
        first = np.unique(labels, return_index=True)[1]
        features[first] *= 10.0 ** rng.uniform(1, 6)
        order = np.concatenate([first, np.setdiff1d(order, first, assume_unique=True)])
    if family == "large first":
        features[order[: int(rng.integers(1, samples))]] *= 10.0 ** rng.uniform(0, 4)
    cuts = np.sort(rng.integers(0, samples, int(rng.choice([0, 0, 1, 3]))))
    batch, buffer = int(rng.choice([1, 7, 64, samples])), int(rng.choice([8, 32, 2048]))
    if rng.random() < 0.8:  # Many tiny batches take most of the time, and one input in five has them.
        batch, buffer = max(batch, samples // 8), max(buffer, samples // 5)
    return Input(
        family,
        classes,
        _scaled(rng, features),
        torch.from_numpy(labels),
        torch.from_numpy(rng.standard_normal((classes, width))),
        [torch.from_numpy(part) for part in np.split(order, cuts)],
        batch,
        buffer,
    )


def _features(rng: np.random.Generator, family: str, classes: int, width: int, labels: np.ndarray) -> np.ndarray:
    means = rng.standard_normal((classes, width))
    spread = np.full(width, 10.0 ** rng.uniform(-2, 1))
    offset = 10.0 ** rng.uniform(0, 5) if family == "offset" else 0.0
    if family == "uneven":
        spread[: max(1, width // 3)] *= 10.0 ** rng.uniform(1, 5)
    elif family == "few of many":
        few = np.arange(width) < rng.integers(1, 9)
        means, spread = means * few, spread * few
    elif family == "uneven means":
        means *= 10.0 ** -rng.uniform(0, 4, width)
    elif family == "sparse":
        spread = spread * (rng.random((len(labels), width)) < 10.0 ** -rng.uniform(0, 2.5))
    elif family == "collapsed":
        spread *= 10.0 ** -rng.uniform(1, 5)
    features = means[labels] + rng.standard_normal((len(labels), width)) * spread
    if family in ("repeated", "balanced", "one far"):
        return _without_rotation(rng, family, features, labels)
    if width > 1 and rng.random() < 0.7:
        features = features @ np.linalg.qr(rng.standard_normal((width, width)))[0]
    return np.round(features * 4) / 4 if family == "coarse" else features + offset


def _without_rotation(rng: np.random.Generator, family: str, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Features some of which are equal, or one of which is large, with equal class means or far from 0."""
    if family == "repeated":
        width = features.shape[1]
        return features[:, rng.integers(0, int(rng.integers(1, 9)), width) % width]
    if family == "balanced":
        half = rng.standard_normal((len(labels) + 1) // 2) * 10.0 ** rng.uniform(0, 6)
        features[labels.argsort(kind="stable"), 0] = np.stack([half, -half], 1).ravel()[: len(labels)]
    else:
        features[:, 0] += 10.0 ** rng.uniform(0, 8)
    return features


def _scaled(rng: np.random.Generator, features: np.ndarray) -> Tensor:
    """The features in one of the types and at a scale that it has."""
    dtype = DTYPES[rng.integers(len(DTYPES))]
    scale = 10.0 ** rng.uniform(-30, 30) if rng.random() < 0.5 else 1.0
    if dtype == torch.float16:
        features, scale = np.clip(features, -6e4, 6e4), 1.0
    if dtype in (torch.float32, torch.bfloat16):
        scale = min(scale, 1e37 / np.abs(features).max())
    return torch.from_numpy(features * scale).to(dtype)


def measure(case: Input) -> dict[str, tuple[float, float] | str]:
    """Our numbers and the relative error that is stated with them, or why they are refused."""
    before, accumulator.ROWS = accumulator.ROWS, (case.buffer, case.buffer)
    try:
        first, *others = (_accumulated(case, part) for part in case.parts)
        first.merge(others)
        values: dict[str, tuple[float, float] | str] = {}
        try:
            first.check("fuzz")
            found = first.moments(within=False)
        except UndefinedCollapseError as error:
            return dict.fromkeys([*FAMILY, "nc3"], str(error))
        for name in [*FAMILY, "nc3"]:
            try:
                if name == "nc1":
                    number, stated = nc1_with_error(found)
                else:
                    number, stated = FAMILY[name](found) if name in FAMILY else self_duality(found, case.weight), 0.0
                values[name] = float(number), stated
            except UndefinedCollapseError as error:
                values[name] = str(error)
        return values
    finally:
        accumulator.ROWS = before


def _accumulated(case: Input, part: Tensor) -> MomentAccumulator:
    accumulator = MomentAccumulator(case.classes)
    for rows in part.split(case.batch):
        accumulator.update(case.features[rows], case.labels[rows])
    return accumulator


def expected(case: Input) -> dict[str, float]:
    """The formulas in long double, in two passes."""
    x, y = case.features.double().numpy().astype(np.longdouble), case.labels.numpy()
    present = np.unique(y)
    classes = len(present)
    if classes < 2:
        return {}
    position = np.searchsorted(present, y)
    count = np.bincount(position).astype(np.longdouble)
    means = np.zeros((classes, x.shape[1]), np.longdouble)
    np.add.at(means, position, x)
    means /= count[:, None]
    residual = x - means[position]
    variance = np.zeros(classes, np.longdouble)
    np.add.at(variance, position, np.square(residual).sum(1))
    variance /= count
    centred = means - means.mean(0)
    norms = np.sqrt(np.square(centred).sum(1))
    gram = centred @ centred.T
    off = ~np.eye(classes, dtype=bool)
    distances = np.square(means[:, None] - means).sum(2)
    distances[distances <= np.square(1e-13 * np.abs(means).max())] = 0  # means that coincide but for rounding
    etf = (np.eye(classes, dtype=np.longdouble) - np.longdouble(1) / classes) / np.sqrt(np.longdouble(classes - 1))
    weight = case.weight.numpy().astype(np.longdouble)[present]
    total = np.square(centred).sum()
    if np.sqrt(total) <= 1e-13 * np.abs(means).max() * np.sqrt(classes):  # all means coincide but for rounding
        return dict.fromkeys([*FAMILY, "nc3"], np.nan)
    with np.errstate(all="ignore"):
        # A mean that lies on mu_G to the rounding of long double has no direction.
        lengths = np.where(norms > 1e-13 * np.abs(means).max(), norms, np.nan)
        cosines = gram / lengths[:, None] / lengths
        return {
            "nc1": float(nc1(centred, residual)),
            "nc1_ratio": float((count * variance).sum() / count.sum() * classes / total),
            "cdnv": float(((variance[:, None] + variance) / (2 * distances))[off].mean()),
            "nc2_equinorm": float(np.sqrt(np.square(norms - norms.mean()).mean()) / norms.mean()),
            "nc2_equiangularity": float(np.abs(cosines + np.longdouble(1) / (classes - 1))[off].mean()),
            "nc2_etf": float(np.sqrt(np.square(gram / np.sqrt(np.square(gram).sum()) - etf).sum())),
            "nc3": float(np.square(weight / np.sqrt(np.square(weight).sum()) - centred / np.sqrt(total)).sum()),
        }


def nc1(centred: np.ndarray, residual: np.ndarray) -> np.longdouble:
    """Sum over the right singular vectors ``v`` of the centred means, of values ``s``, of ``v^T Sigma_W v / s^2``.

    Nan where it is not clear which values count as zero.
    """
    rows = _orthogonal_rows(centred if len(centred) <= centred.shape[1] else _reduced(centred))
    squares = np.square(rows).sum(1)
    keep = np.argsort(squares)[::-1][: min(len(centred) - 1, centred.shape[1])]
    rows, squares = rows[keep], squares[keep]
    least = max(centred.shape) * np.finfo(np.float64).eps * squares.max()
    if squares.max() == 0 or np.any((squares > least * 0.999) & (squares < least * 1.001)):
        return np.longdouble("nan")
    kept = squares > least
    along = residual @ (rows[kept] / squares[kept, None]).T
    return np.square(along).sum() / len(residual)


def _reduced(rows: np.ndarray) -> np.ndarray:
    """Rows ``(d, d)`` with the same ``R^T R``: Gram-Schmidt, twice, on the columns."""
    basis = rows.copy()
    for column in range(rows.shape[1]):
        for _ in range(2):
            for other in range(column):
                basis[:, column] -= (basis[:, other] @ basis[:, column]) * basis[:, other]
        norm = np.sqrt(np.square(basis[:, column]).sum())
        if norm <= 1e-17 * np.sqrt(np.square(rows).sum()):  # It depends on the columns before it, but for rounding.
            basis[:, column] = 0
        else:
            basis[:, column] /= norm
    return basis.T @ rows


def _orthogonal_rows(rows: np.ndarray) -> np.ndarray:
    """One-sided Jacobi (Demmel and Veselic 1992): rotate rows until they are orthogonal, ``s_j v_j``."""
    rows = rows.copy()
    for _ in range(30):
        largest = np.longdouble(0)
        for i in range(len(rows) - 1):
            for j in range(i + 1, len(rows)):
                a, b, c = rows[i] @ rows[i], rows[j] @ rows[j], rows[i] @ rows[j]
                if a == 0 or b == 0 or c == 0:
                    continue
                largest = max(largest, abs(c) / np.sqrt(a * b))
                zeta = (b - a) / (2 * c)
                t = (1 if zeta >= 0 else -1) / (abs(zeta) + np.sqrt(1 + zeta * zeta))
                cosine = 1 / np.sqrt(1 + t * t)
                rows[i], rows[j] = cosine * (rows[i] - t * rows[j]), cosine * (t * rows[i] + rows[j])
        if largest < 1e-17:
            break
    return rows


def judge(case: Input, found: Found, name: str) -> None:
    """Compare one input's numbers and note what is found."""
    right = expected(case)
    for metric, value in measure(case).items():
        found.values[metric] += 1
        if isinstance(value, str):
            found.refused[metric] += 1
            found.reasons[value.split(":")[-1][-40:]] += 1
            continue
        (number, stated), truth = value, right[metric]
        if np.isnan(truth) or np.isinf(truth):  # class means coincide, or nearly
            found.undefined[metric] += 1
            continue
        error = abs(number - truth)
        allowed = TOLERANCE * abs(truth) + (ABSOLUTE if metric.startswith(("nc2", "nc3")) else 0)
        relative = error / allowed * TOLERANCE if allowed else float(error > 0)
        if stated > TOLERANCE:
            found.said[metric] += 1
            share = error / (stated * abs(number))
            found.largest = max(found.largest, share)
            wrong = not share <= 1
        else:
            wrong = not relative <= TOLERANCE
            found.worst[metric] = max(found.worst.get(metric, 0.0), relative)
        if wrong:
            text = f"{name} {case.family} {metric}: {number!r} for {truth!r}, off by {relative:.1e}"
            found.wrong.append(f"{text}, stated {stated:.1e}")


def run(inputs: int, seed: int) -> Found:
    """Judge this many inputs."""
    found = Found()
    for index in range(inputs):
        judge(draw(np.random.default_rng([seed, index])), found, f"seed {seed} input {index}")
    return found


def lines(found: Found) -> Iterator[str]:
    values, refused, said = (sum(counts.values()) for counts in (found.values, found.refused, found.said))
    yield f"{values} values, {refused} refused, {said} with a stated error, {len(found.wrong)} silently wrong"
    yield from (
        f"{name}: worst {worst:.1e}, {found.refused[name]} refused, {found.said[name]} with a stated error"
        for name, worst in found.worst.items()
    )
    yield f"largest part of a stated error that was reached: {found.largest:.2f}"
    yield f"reasons: {dict(found.reasons)}"
    yield f"without a true value: {dict(found.undefined)}"
    yield from found.wrong[:50]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(lines(run(options.inputs, options.seed))))
