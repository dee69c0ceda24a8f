"""Time and accuracy of closed-form heads against scikit-learn's, one thread, on cached features.

Rows:

- ``probe``: a ridge head with 45 strengths and exact leave-one-out errors; RidgeCV with the same strengths on the same
  one-hot targets, which finds leave-one-out errors too; and 45 logistic regressions by L-BFGS over the strengths 1e-6
  to 1e5 of DINOv3's evaluation and up to 1,000 iterations, as fast as they come (float32, features scaled to a
  deviation of 1, scikit-learn's tolerance) and, with ``--tight``, as that evaluation has them (float64, as they are,
  tolerance 1e-12), which takes much longer still; the test labels choose the best of them, in its favour. CPU seconds
  are compared within each turn, every other turn backwards; the logistic fits, which take minutes, run once.
- ``large``: the same head on 50,000 made features of width 2,048, by the one pass that forms ``z^T z`` in float64.

Features are made (noisy class means with a decaying spectrum), and those of each FILE, a dictionary by `torch.save`
with ``features`` (N, d), ``labels`` (N,) and ``train`` (N,), the mask of the training rows.

    python experiments/benchmarks/probes.py [--features FILE ...] [--tight] [--repeats 5] [--only probe|large]
"""

import itertools
import platform
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from common import median_and_range, options_of, seconds, seconds_and_value, written
from sklearn.linear_model import LogisticRegression, RidgeCV
from threadpoolctl import threadpool_limits
from torch import Tensor

from ncfinetune.probes import ridge

STRENGTHS = 45
LARGE = 50_000, 2048, 37  # rows, width and classes
HEADER = "| features | N | d | K | ours, s | RidgeCV / ours | logistic / ours | at 1e-12 | % | RidgeCV | logistic |"
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def made(samples: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """Class means and noise in directions whose variance falls as 1/j."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, dim + 1).rsqrt()
    labels = torch.arange(samples) % classes
    means = torch.randn(classes, dim, generator=generator)
    return (means[labels] + 7 * torch.randn(samples, dim, generator=generator)) * scale, labels


def split(path: Path | None) -> tuple[str, Split]:
    if path is None:
        features, labels = made(6000, 768, 37)
        return "made", (features[:3000], labels[:3000], features[3000:], labels[3000:])
    stored = torch.load(path)
    train = stored["train"]
    return path.stem, (
        stored["features"][train],
        stored["labels"][train],
        stored["features"][~train],
        stored["labels"][~train],
    )


def ours(data: Split, classes: int) -> float:
    features, labels, test, test_labels = data
    head = ridge(features, labels, classes)
    return (head.scores(test).argmax(1) == test_labels).double().mean().item()


def ridge_cv(data: Split, classes: int, lams: np.ndarray) -> float:
    features, labels, test, test_labels = (part.numpy() for part in data)
    model = RidgeCV(lams).fit(features.astype(np.float64), np.eye(classes)[labels])
    return float((model.predict(test.astype(np.float64)).argmax(1) == test_labels).mean())


def logistic(data: Split, fast: bool) -> float:
    """The best of 45 fits by the test labels."""
    features, labels, test, test_labels = (part.numpy() for part in data)
    if fast:
        mean, deviation = features.mean(0), features.std()
        features, test = (features - mean) / deviation, (test - mean) / deviation
    else:
        features, test = features.astype(np.float64), test.astype(np.float64)
    best = 0.0
    for strength in np.logspace(-6, 5, STRENGTHS):
        model = LogisticRegression(C=strength, max_iter=1000, tol=1e-4 if fast else 1e-12).fit(features, labels)
        best = max(best, float(model.score(test, test_labels)))
    return best


def probe(path: Path | None, repeats: int, tight: bool) -> str:
    name, data = split(path)
    classes = int(data[1].max()) + 1
    lams = ridge(data[0], data[1], classes).curve.lams.numpy()
    ways = {"ours": lambda: ours(data, classes), "RidgeCV": lambda: ridge_cv(data, classes, lams)}
    orders = itertools.islice(itertools.cycle((list(ways), list(ways)[::-1])), repeats)
    turns = [{way: seconds_and_value(ways[way]) for way in order} for order in orders]
    fits = [seconds_and_value(lambda fast=fast: logistic(data, fast)) for fast in (True, False)[: 1 + tight]]
    spent = {way: statistics.median(turn[way][0] for turn in turns) for way in ways}
    ratios = [turn["RidgeCV"][0] / turn["ours"][0] for turn in turns]
    size = f"{len(data[0]):,} | {data[0].shape[1]:,} | {classes}"
    slower = [f"{took / spent['ours']:.0f}" for took, _ in fits] + [""] * (2 - len(fits))
    right = [100 * value for value in (turns[0]["ours"][1], turns[0]["RidgeCV"][1], max(value for _, value in fits))]
    cells = [name, size, f"{spent['ours']:.2f}", median_and_range(ratios, 1), *slower]
    cells += [f"{value:.2f}" for value in right]
    return f"| {' | '.join(cells)} |"


def product(features: Tensor) -> float:
    total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows in features.split(4096):
        total.addmm_(rows.double().T, rows.double())
    return total[0, 0].item()


def large(repeats: int) -> list[str]:
    samples, dim, classes = LARGE
    features, labels = made(samples, dim, classes)
    ways = {"ours": lambda: ridge(features, labels, classes).loo_error.item(), "z^T z": lambda: product(features)}
    orders = itertools.islice(itertools.cycle((list(ways), list(ways)[::-1])), repeats)
    turns = [{way: seconds(ways[way]) for way in order} for order in orders]
    ratios = [turn["ours"] / turn["z^T z"] for turn in turns]
    spent = statistics.median(turn["ours"] for turn in turns)
    return [
        "| N | d | K | ours, s | ours / z^T z |",
        "|" + "---|" * 5,
        f"| {samples:,} | {dim:,} | {classes} | {spent:.1f} | {median_and_range(ratios)} |",
    ]


def main() -> None:
    parser = options_of(__doc__, "probes.md")
    parser.add_argument("--features", type=Path, nargs="+", default=[])
    parser.add_argument("--tight", action="store_true")
    parser.add_argument("--only", choices=["probe", "large"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="lbfgs failed to converge")
    torch.set_num_threads(1)
    # NumPy's and SciPy's threads too, whose waiting would count as the rivals' CPU seconds.
    with threadpool_limits(1), written(options.out) as say:
        say(f"torch {torch.__version__}, {platform.machine()}, one thread, {options.repeats} turns: median (range).\n")
        if options.only != "large":
            say(HEADER)
            say("|" + "---|" * 11)
            for path in [None, *options.features]:
                say(probe(path, options.repeats, options.tight))
        for line in ["", *large(options.repeats)] if options.only != "probe" else []:
            say(line)


if __name__ == "__main__":
    main()
