"""Time and memory of the contrastive loss, and of a SimCLR step, against lightly's and the plain masked SupCon.

The loss: forward and backward on random projections of two views. `lightly.loss.NTXentLoss` is the rival of
`labels=arange(N)`; the plain SupCon, written here as the field writes it with its N V x N V mask, the rival of ten
classes. All run in one process, on one thread and in turn; ratios are taken pair by pair. Times are CPU time, which
other work on the machine disturbs least. Memory is the growth of a fresh process's peak over one forward and backward.

The step: a ResNet-18 with a CIFAR stem, an MLP projection and 128 images in two views, by our SimCLR in a Lightning
Trainer against lightly's loss in a bare torch loop, on the same network. First in the rival's own precision and memory
format, then with channels_last and bf16-mixed switched on for ours alone.

    pip install '.[benchmark]'
    python experiments/benchmarks/contrastive.py [--repeats 5] [--steps 2] [--out FILE]
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import lightning
import torch
from common import in_a_new_process, median_and_range, options_of, peak_megabytes, plain_supcon, written
from lightly.loss import NTXentLoss
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Backbone, SimCLR
from ncfinetune.losses import contrastive_loss

TEMPERATURE, DIM, CLASSES, BATCH = 0.1, 128, 10, 128
NETWORK = {"name": "resnet18", "stem": "cifar"}
Loss = Callable[[Tensor], Tensor]


def losses(n: int) -> dict[str, tuple[Loss, Loss]]:
    """Ours and the rival, for N pairs."""
    ntxent = NTXentLoss(TEMPERATURE)
    single, classes = torch.arange(n), torch.arange(n) % CLASSES
    return {
        "lightly NTXentLoss": (lambda z: contrastive_loss(z, single, TEMPERATURE), lambda z: ntxent(z[:, 0], z[:, 1])),
        "plain masked SupCon": (
            lambda z: contrastive_loss(z, classes, TEMPERATURE),
            lambda z: plain_supcon(z, classes, TEMPERATURE),
        ),
    }


def milliseconds(loss: Loss, z: Tensor, passes: int) -> tuple[float, Tensor]:
    start = time.process_time()
    for _ in range(passes):
        leaf = z.clone().requires_grad_()
        loss(leaf).backward()
    assert leaf.grad is not None
    return (time.process_time() - start) * 1000 / passes, leaf.grad


def compare(n: int, rival: str, repeats: int) -> tuple[list[float], list[float], float]:
    """Milliseconds of ours and of the rival, and how far apart their gradients are, relative to the largest."""
    ours, theirs = losses(n)[rival]
    z = torch.randn(n, 2, DIM)
    passes = max(1, 4096 // n)
    for loss in (ours, theirs):
        milliseconds(loss, z, 1)
    pairs = [(milliseconds(ours, z, passes), milliseconds(theirs, z, passes)) for _ in range(repeats)]
    (_, mine), (_, other) = pairs[0]
    apart = ((mine - other).abs().max() / other.abs().max()).item()
    return [a[0] for a, _ in pairs], [b[0] for _, b in pairs], apart


def megabytes(n: int, rival: str, which: int) -> float:
    """Growth of this process's peak memory by one pass of ours (0) or the rival (1)."""
    milliseconds(losses(16)[rival][which], torch.randn(16, 2, DIM), 2)
    loss, z = losses(n)[rival][which], torch.randn(n, 2, DIM)
    before = peak_megabytes()
    milliseconds(loss, z, 1)
    return peak_megabytes() - before


class Clock(Callback):
    """CPU time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: object) -> None:
        self.ends.append(time.process_time())


def loader(steps: int) -> DataLoader[tuple[Tensor, ...]]:
    images = torch.randn(BATCH * (steps + 1), 2, 3, 32, 32)
    return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size=BATCH)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def our_steps(data: DataLoader[tuple[Tensor, ...]], switches: bool) -> list[float]:
    clock = Clock()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed" if switches else "32-true",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SimCLR({**NETWORK, "channels_last": switches}, TEMPERATURE, optimizer=sgd), data)
    return [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]


def bare_steps(data: DataLoader[tuple[Tensor, ...]]) -> list[float]:
    backbone, loss = Backbone(**NETWORK), NTXentLoss(TEMPERATURE)
    dim = backbone.dim
    head = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.ReLU(), torch.nn.Linear(dim, DIM))
    network = torch.nn.Sequential(backbone, head).train()
    optimizer = sgd(network.parameters())
    ends = []
    for images, _ in data:
        z = network(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        optimizer.zero_grad()
        loss(z[:, 0], z[:, 1]).backward()
        optimizer.step()
        ends.append(time.process_time())
    return [b - a for a, b in itertools.pairwise(ends)]


def loss_rows(repeats: int) -> Iterator[str]:
    yield "| pairs | rival | ours, ms | rival, ms | rival / ours | ours, MB | rival, MB | gradients apart |"
    yield "|---|---|---|---|---|---|---|---|"
    for n in (256, 4096):
        for rival in losses(n):
            mine, theirs, apart = compare(n, rival, repeats)
            ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
            memory = [in_a_new_process(megabytes, n, rival, which) for which in (0, 1)]
            yield (
                f"| {n} | {rival} | {statistics.median(mine):.1f} | {statistics.median(theirs):.1f} | "
                f"{median_and_range(ratios)} | {memory[0]:.0f} | {memory[1]:.0f} | {apart:.0e} |"
            )


def step_rows(repeats: int, steps: int) -> Iterator[str]:
    data = loader(steps)
    times: dict[str, list[float]] = {"same": [], "switched": [], "bare": []}
    for _ in range(repeats):
        times["bare"] += [statistics.median(bare_steps(data))]
        times["same"] += [statistics.median(our_steps(data, switches=False))]
        times["switched"] += [statistics.median(our_steps(data, switches=True))]
    yield "| step | s | bare loop / this |"
    yield "|---|---|---|"
    names = {
        "bare": "lightly's loss, bare loop, float32",
        "same": "SimCLR and Trainer, float32",
        "switched": "SimCLR and Trainer, channels_last and bf16-mixed",
    }
    for key, name in names.items():
        ratios = [b / a for a, b in zip(times[key], times["bare"], strict=True)]
        yield f"| {name} | {statistics.median(times[key]):.2f} | {median_and_range(ratios)} |"


def main() -> None:
    parser = options_of(__doc__, "contrastive.md")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a repeat, after one that is not")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = (
        f"`python experiments/benchmarks/contrastive.py --repeats {options.repeats} --steps {options.steps}`:\n"
        f"CPU time on one thread, torch {torch.__version__}, lightning {lightning.__version__}, "
        f"{platform.machine()}. Medians (least to most) over the repeats."
    )
    with written(options.out) as say:
        parts = [[head, ""], loss_rows(options.repeats), [""], step_rows(options.repeats, options.steps)]
        for line in itertools.chain.from_iterable(parts):
            say(line)


if __name__ == "__main__":
    main()
