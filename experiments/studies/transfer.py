"""A picture of source collapse against transfer: a row a downstream set, a column a measure, a point a network.

Rows are those of sources.py, means over seeds; ``--measures`` are columns of it.

    python experiments/studies/transfer.py sources.csv --out transfer.png [--measures nc1 nc1_ratio]
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from gains import OKABE_ITO
from matplotlib.figure import Figure
from study import rows

LABELS = {"nc1": "NC1 on the source", "cv_nc1": "cross-validated NC1", "cdnv": "CDNV", "nc1_ratio": "trace ratio"}
COLOURS = {"ce": OKABE_ITO["blue"], "mse": OKABE_ITO["vermilion"], "SupCon": OKABE_ITO["green"]}
COLOURS |= {"SimCLR": OKABE_ITO["purple"], "PGD": OKABE_ITO["orange"]}
MARKERS = {"linear head": "s", "mlp head": "^", "plain": "v", "strength 0.25": "<", "strength 1": ">"}
MARKERS |= {"2/255": "P", "4/255": "X"}


def means(path: Path) -> dict[str, dict[str, float]]:
    """Means over seeds of the numbers of each method."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(path):
        for name, value in row.items():
            if name != "method":
                found[row["method"]][name].append(float(value))
    return {method: {name: statistics.fmean(values) for name, values in own.items()} for method, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--measures", nargs="+", choices=list(LABELS), default=["nc1", "nc1_ratio"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = means(options.rows)
    sets = [name for name in next(iter(found.values())) if name.endswith("_acc") and name != "source_acc"]
    figure = Figure(figsize=(3.4 * len(options.measures) + 1.6, 3 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), len(options.measures), sharex="col", sharey="row", squeeze=False)
    for (row, downstream), (column, measure) in ((r, c) for r in enumerate(sets) for c in enumerate(options.measures)):
        axes = panels[row][column]
        for method, own in found.items():
            loss, *rest = method.replace(",", "").split(" ", 1)
            place = own[measure], 100 * own[downstream]
            how = {"color": COLOURS.get(loss, "0.5"), "marker": MARKERS.get("".join(rest), "o"), "label": method}
            axes.plot(*place, **how, linestyle="", markersize=6)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        panels[-1][column].set_xlabel(LABELS[measure])
        panels[row][0].set_ylabel(f"accuracy % on {downstream.removesuffix('_acc')}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(options.out, dpi=140)


if __name__ == "__main__":
    main()
