"""Time and memory of the metric family against the usual way of computing the same numbers.

The usual way: a pass for the class means, a pass for the d x d covariance within classes, a float32 pseudo-inverse of
the one between. It is written here three times: class by class within each batch, as the code of Papyan et al. (2020)
has it and most papers after it; as the accumulators of the library neural-collapse do it
(github.com/rhubarbwu/neural-collapse), with products of one-hot labels, and covariance and variances apart, less its
hashing of the means; and rewritten with one product of residuals a batch and nothing else, the fastest that plain torch
does. All get the same features in the same batches, in one process and on one thread, in turn, every other time
backwards. CPU seconds of ours, of the accumulators and of the rewriting are compared within each turn; class by class,
which can take minutes, runs once. The bound is what the ratio to the rewriting would be if ours cost no more than the
products on and above the diagonal of the d x d matrix, multiplied 2,048 rows at a time. Memory is the peak of a fresh
process that makes its features batch by batch, less what it held with the first batch made and no metric yet; rows that
wait to be multiplied are not counted in the state.

    python experiments/benchmarks/metrics.py [--repeats 5] [--out experiments/results/metrics.md]
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from common import in_a_new_process, median_and_range, options_of, peak_megabytes, seconds, seconds_and_value, written
from torch import Tensor

from ncfinetune.collapse import FAMILY
from ncfinetune.metrics import neural_collapse

SIZES = [(10, 512), (100, 512), (100, 2048), (1000, 2048)]
BATCH = 256
MEMBERS = (*FAMILY, "nc3")
Batches = list[tuple[Tensor, Tensor]]
Sums = tuple[Tensor, Tensor, Tensor, Tensor]


def batches(classes: int, dim: int, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noisy class means of norm about sqrt(d), batch by batch."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, dim, generator=generator)
    for start in range(0, samples, BATCH):
        labels = torch.randint(0, classes, (min(BATCH, samples - start),), generator=generator)
        yield means[labels] + torch.randn(len(labels), dim, generator=generator), labels


def ours(data: Batches | Iterator[tuple[Tensor, Tensor]], classes: int, weight: Tensor | None) -> dict[str, float]:
    collection = neural_collapse(classes, MEMBERS)
    for features, labels in data:
        collection.update(features, labels, weight)
        weight = None  # it stays the same, and the collection has it
    return {name: value.item() for name, value in collection.compute().items()}


def at_once(data: Batches, classes: int, dim: int) -> Sums:
    sums, count = torch.zeros(classes, dim), torch.zeros(classes)
    for features, labels in data:
        sums.index_add_(0, labels, features)
        count += torch.bincount(labels, minlength=classes)
    means = sums / count[:, None]
    scatter, squares = torch.zeros(dim, dim), torch.zeros(classes)
    for features, labels in data:
        residual = features - means[labels]
        scatter += residual.T @ residual
        squares.index_add_(0, labels, residual.square().sum(1))
    return count, means, scatter, squares


def with_accumulators(data: Batches, classes: int, dim: int) -> Sums:
    def one_hot(labels: Tensor, count: Tensor) -> Tensor:
        hot = labels[:, None] == torch.arange(classes)
        count += hot.sum(0)
        return hot.T.float()

    sums, count = torch.zeros(classes, dim), torch.zeros(classes)
    for features, labels in data:
        sums += one_hot(labels, count) @ features
    means = sums / count[:, None]
    scatter, squares, unused = torch.zeros(dim, dim), torch.zeros(classes), torch.zeros(classes)
    for features, labels in data:
        one_hot(labels, unused)  # each accumulator counts for itself
        residual = features - means[labels]
        scatter += residual.T @ residual
        squares += (one_hot(labels, unused) @ (features - means[labels]).square()).sum(1)
    return count, means, scatter, squares


def class_by_class(data: Batches, classes: int, dim: int) -> Sums:
    sums, count = torch.zeros(classes, dim), torch.zeros(classes)
    for features, labels in data:
        for label in labels.unique().tolist():
            rows = features[labels == label]
            sums[label] += rows.sum(0)
            count[label] += len(rows)
    means = sums / count[:, None]
    scatter, squares = torch.zeros(dim, dim), torch.zeros(classes)
    for features, labels in data:
        for label in labels.unique().tolist():
            residual = features[labels == label] - means[label]
            scatter += residual.T @ residual
            squares[label] += residual.square().sum()
    return count, means, scatter, squares


def usual(two_passes: Callable[[Batches, int, int], Sums], data: Batches, weight: Tensor) -> dict[str, float]:
    classes, dim = weight.shape
    count, means, scatter, squares = two_passes(data, classes, dim)
    centred = means - means.mean(0)
    sigma_w, variance = scatter / count.sum(), squares / count
    sigma_b = centred.T @ centred / classes

    norms = centred.norm(dim=1)
    cosines = (centred / norms[:, None]) @ (centred / norms[:, None]).T
    off = ~torch.eye(classes, dtype=torch.bool)
    distances = torch.cdist(means, means).square()
    gram = centred @ centred.T
    etf = (torch.eye(classes) - 1 / classes) / (classes - 1) ** 0.5
    pairs = (variance[:, None] + variance) / (2 * distances)
    return {
        "nc1": (torch.trace(sigma_w @ torch.linalg.pinv(sigma_b)) / classes).item(),
        "nc1_ratio": (torch.trace(sigma_w) / torch.trace(sigma_b)).item(),
        "cdnv": pairs[off].mean().item(),
        "nc2_equinorm": (norms.std(correction=0) / norms.mean()).item(),
        "nc2_equiangularity": (cosines[off] + 1 / (classes - 1)).abs().mean().item(),
        "nc2_etf": (gram / gram.norm() - etf).norm().item(),
        "nc3": (weight / weight.norm() - centred / centred.norm()).square().sum().item(),
    }


def products(data: Batches, dim: int, samples: int) -> float:
    """CPU seconds of the products of all rows, on and above the diagonal in blocks, and of nothing else."""
    rows, block = torch.cat([features for features, _ in data[:8]]), max(64, dim // 8)
    total = torch.zeros(dim, dim)
    start = time.process_time()
    turns = max(1, samples // len(rows))
    for _ in range(turns):
        for first in range(0, dim, block):
            columns = slice(first, first + block)
            total[columns, first:].addmm_(rows[:, columns].T, rows[:, first:])
    return (time.process_time() - start) * samples / (turns * len(rows))


def compare(classes: int, dim: int, samples: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each way and of the products alone, and the largest relative difference of the numbers."""
    data, weight = list(batches(classes, dim, samples)), torch.randn(classes, dim)
    ways = {
        "ours": lambda some: ours(some, classes, weight),
        "accumulators": lambda some: usual(with_accumulators, some, weight),
        "at once": lambda some: usual(at_once, some, weight),
    }
    for way in ways.values():
        way(data)
    orders = itertools.islice(itertools.cycle((list(ways), list(ways)[::-1])), repeats)
    turns = [{name: seconds_and_value(lambda way=ways[name]: way(data)) for name in order} for order in orders]
    mine, *others = (turns[0][name][1] for name in ways)
    apart = max(abs(mine[name] - other[name]) / abs(other[name]) for name in MEMBERS for other in others)
    spent = {name: [turn[name][0] for turn in turns] for name in ways}
    spent["class by class"] = [seconds(lambda: usual(class_by_class, data, weight))]
    spent["products"] = [products(data, dim, samples) for _ in range(repeats)]
    return spent, apart


def ratios(spent: dict[str, list[float]], way: str) -> str:
    """Seconds of a way by ours, turn by turn: the median and the range."""
    turns = [theirs / mine for theirs, mine in zip(spent[way], spent["ours"], strict=True)]
    return median_and_range(turns)


def megabytes(classes: int, dim: int, samples: int) -> float:
    """Growth of this process's peak memory over an evaluation."""
    ours(batches(10, 8, 1000), 10, torch.randn(10, 8))
    data, weight = batches(classes, dim, samples), torch.randn(classes, dim)
    first = next(data)  # makes the means that features lie around
    before = peak_megabytes()
    ours(itertools.chain([first], data), classes, weight)
    return peak_megabytes() - before


def state_megabytes(classes: int, dim: int) -> float:
    collection = neural_collapse(classes, MEMBERS)
    collection.update(*next(batches(classes, dim, BATCH)), torch.randn(classes, dim))
    leader = collection["nc1"]
    return sum(state.numel() * state.element_size() for state in leader.metric_state.values()) / 2**20


def _size(text: str) -> tuple[int, int]:
    classes, dim = map(int, text.split("x"))
    return classes, dim


def main() -> None:
    parser = options_of(__doc__, "metrics.md")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--sizes", nargs="+", default=SIZES, type=_size, metavar="KxD", help="classes x width")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with written(options.out) as say:
        say(
            f"`python experiments/benchmarks/metrics.py --repeats {options.repeats}`: {options.samples:,} samples in "
            "batches of"
        )
        say(f"{BATCH}, one thread, torch {torch.__version__}, {platform.machine()}. Seconds of the usual two passes by")
        say("ours, for three ways to write these: class by class, as the code of most papers has them (one run); as")
        say("the accumulators of the library neural-collapse; rewritten with one product a batch (both medians, range,")
        say("of turns). `bound` is how far the rewriting could be beaten by the products alone.")
        say("")
        say(
            "| K | d | ours, s | class by class / ours | accumulators / ours | rewritten / ours | bound | "
            "state, MB | peak at N/5 | peak, MB | apart |"
        )
        say("|" + "---|" * 11)
        for classes, dim in options.sizes:
            spent, apart = compare(classes, dim, samples=options.samples, repeats=options.repeats)
            middle = {name: statistics.median(values) for name, values in spent.items()}
            short, long = (
                in_a_new_process(megabytes, classes, dim, n) for n in (options.samples // 5, options.samples)
            )
            say(
                f"| {classes} | {dim} | {middle['ours']:.2f} | {middle['class by class'] / middle['ours']:.1f} | "
                f"{ratios(spent, 'accumulators')} | {ratios(spent, 'at once')} | "
                f"{middle['at once'] / middle['products']:.2f} | "
                f"{state_megabytes(classes, dim):.0f} | {short:.0f} | {long:.0f} | {apart:.0e} |"
            )


if __name__ == "__main__":
    main()
