"""A picture of what methods gain on ridge regression on the same splits: a panel a data set, over images per class.

Rows are those of closed_forms.py and of study.py with ``--validation none``. Bars are standard errors over splits.

    python experiments/studies/gains.py --out gains.png --set "ten textures, MobileNetV2" rows_closed.csv rows.csv \\
        [--set TITLE FILE ...] [--methods METHOD ...]
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import matched

METHODS = ("linear probe", "ridge, 3 skips", "layer FT", "SCL FT", "full FT", "LP-FT")
# Okabe and Ito's colours, told apart by colour-blind readers too.
OKABE_ITO = {"blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "vermilion": "#D55E00", "purple": "#CC79A7"}
OKABE_ITO |= {"sky blue": "#56B4E9", "black": "#000000"}
COLOURS = ("0.5", *OKABE_ITO.values())


def curves(paths: list[Path], methods: Sequence[str]) -> dict[str, list[tuple[int, float, float]]]:
    """Images per class, mean gain and its standard error, of each method that has rows."""
    found: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for shots, (name, *_), _, gains in matched(paths, "ridge"):
        if name in methods:
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            found[name].append((shots, statistics.fmean(gains), error))
    return {name: found[name] for name in methods if name in found}


def draw(axes: Axes, title: str, found: dict[str, list[tuple[int, float, float]]], methods: Sequence[str]) -> None:
    axes.axhline(0, color="0.2", linewidth=1)
    for place, (name, points) in enumerate(found.items()):
        shots, means, errors = zip(*points, strict=True)
        # Apart from each other, so that no bar hides another.
        moved = [shot * 1.02 ** (place - len(found) / 2) for shot in shots]
        colour = COLOURS[methods.index(name) % len(COLOURS)]
        axes.errorbar(moved, means, errors, fmt="o-", color=colour, label=name, markersize=4, capsize=2)
    known = sorted({shots for points in found.values() for shots, *_ in points})
    axes.set_xscale("log")
    axes.set_xticks(known, [str(shots) for shots in known])
    axes.minorticks_off()
    axes.set(xlabel="training images per class")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", action="append", required=True, metavar=("TITLE", "FILE"), dest="sets")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure = Figure(figsize=(3.6 * len(options.sets), 3.8), layout="constrained")
    panels = figure.subplots(1, len(options.sets), sharey=True, squeeze=False)[0]
    for axes, (title, *files) in zip(panels, options.sets, strict=True):
        draw(axes, title, curves([Path(file) for file in files], options.methods), options.methods)
    panels[0].set_ylabel("points of test accuracy above ridge regression")
    panels[-1].legend(frameon=False, fontsize="small")
    figure.savefig(options.out, dpi=140)


if __name__ == "__main__":
    main()
