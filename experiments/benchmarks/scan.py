"""CPU time of a scan of all blocks against one forward pass over the same images, one thread.

The passes are timed in pairs on ``--timed`` images, in batches of 16, and scaled to ``--images``; the scores of all
blocks and of the network are computed on that many made features, of the blocks' widths, and timed whole. A pass of a
scan catches and pools the output of every block. Weights and pixels are random, which changes no time.

    python experiments/benchmarks/scan.py [--networks resnet50 vit_small_patch16_224] [--images 5000] [--timed 320]
"""

import platform

import torch
from common import median_and_range, options_of, quiet, seconds, written

from ncfinetune import Backbone
from ncfinetune.bank import Bank, Source
from ncfinetune.scores import layer_scores, model_scores

BATCH = 16


def made(source: Source, images: int, classes: int) -> Bank:
    """Noisy class means of every block's width."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    widths = source.widths()
    features = {}
    for layer, width in widths.items():
        means = torch.randn(classes, width, generator=generator)
        features[f"{source.name}/{layer}"] = means[labels] + 3 * torch.randn(images, width, generator=generator)
    model = {"name": source.name, "layers": {layer: [width, 0] for layer, width in widths.items()}}
    facts = {"models": [model], "classes": list(range(classes)), "part": [1, 1]}
    return Bank(facts, features, labels, torch.zeros_like(labels))


def passes(source: Source, images: int, repeats: int) -> list[tuple[float, float]]:
    """CPU seconds of a forward pass and of a pass of a scan, in turns, every other turn backwards."""
    batches = torch.rand(images, *source.backbone.input_size()).split(BATCH)
    works = (
        lambda: [source.backbone(batch) for batch in batches],
        lambda: [source.backbone.stages(batch, source.layers) for batch in batches],
    )
    turns = []
    with torch.inference_mode():
        source.backbone(batches[0])
        for turn in range(repeats):
            taken = {which: seconds(works[which]) for which in ((0, 1) if turn % 2 == 0 else (1, 0))}
            turns.append((taken[0], taken[1]))
    return turns


def row(name: str, images: int, timed: int, classes: int, repeats: int) -> str:
    source = Source.of(name, Backbone(name).eval())
    turns, scale = passes(source, timed, repeats), images / timed
    bank = made(source, images, classes)
    scores = seconds(lambda: model_scores(bank, layer_scores(bank)))
    forward, scan = ([scale * turn[which] for turn in turns] for which in (0, 1))
    ratios = [(theirs + scores) / own for own, theirs in zip(forward, scan, strict=True)]
    taken = [median_and_range(forward, 0), median_and_range(scan, 0), f"{scores:.0f}"]
    cells = [name, len(source.layers), *taken, median_and_range(ratios)]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = options_of(__doc__, "scan.md", repeats=3)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--timed", type=int, default=320)
    parser.add_argument("--classes", type=int, default=37)
    options = parser.parse_args()
    quiet()
    with written(options.out) as say:
        say(f"`python experiments/benchmarks/scan.py --repeats {options.repeats} --timed {options.timed}`: torch")
        say(f"{torch.__version__}, {platform.machine()}, one thread, {options.images} images, passes timed on")
        say(f"{options.timed} of them; median (range) of {options.repeats} turns, CPU seconds.\n")
        say("| network | layers | forward pass | pass of a scan | scores | scan / forward |")
        say("|---|---|---|---|---|---|")
        for name in options.networks:
            sizes = {"images": options.images, "timed": options.timed, "classes": options.classes}
            say(row(name, **sizes, repeats=options.repeats))


if __name__ == "__main__":
    main()
