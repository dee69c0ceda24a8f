"""Scalars out of the ``metrics.csv`` of Lightning's CSVLogger, and what in that file is damaged.

It has a column for each tag, one more for the step, and a row for each call of the logger; a cell is empty where the
call had nothing for its tag. Columns are in the order of letters, whatever was logged first.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ncfinetune.events import Points, taken_until
from ncfinetune.texts import natural

CSV_NAME = "metrics.csv"


def read_csv(run: Path) -> tuple[Points, list[str]]:
    """What was logged under each tag, in the order in which it was written, and a line if the file is damaged.

    Tags are in the order of `natural`, since that of their layers is lost.

    Args:
        run: The folder with the file; without one nothing was logged.
    """
    path = run / CSV_NAME
    points: Points = defaultdict(list)
    last, faults = -1, []
    try:
        for row in _rows(path) if path.is_file() else ():
            step = int(float(row.pop("step")))
            for tag, value in [(tag, float(cell)) for tag, cell in row.items() if cell]:
                points[tag].append((step, value))
            last = max(last, step)
    except (ValueError, TypeError, OverflowError, csv.Error) as error:  # a step may be inf
        faults = [f"{path}: {error}; {taken_until(last)}"]
    return {tag: points[tag] for tag in sorted(points, key=natural)}, faults


def whole_rows(path: Path) -> tuple[list[dict[str, str]], str | None]:
    """The rows of a file by their column, up to what is damaged in it, and what that is; None if nothing is.

    Args:
        path: The file.
    """
    rows: list[dict[str, str]] = []
    try:
        rows.extend(_rows(path))
    except (ValueError, csv.Error) as error:
        return rows, str(error)
    return rows, None


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The whole rows by their column.

    Raises:
        ValueError: The file is no table of steps, or a row is cut.
    """
    text = path.read_text(encoding="utf-8")
    header, *rows = list(csv.reader(text.splitlines())) or [[]]
    if "step" not in header:
        raise ValueError("expected a column 'step' in its first line")
    # What ends without a line break may be a part of a number.
    whole = rows if text.endswith("\n") else rows[:-1]
    for row in whole:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, and there are {len(header)} columns")
        yield dict(zip(header, row, strict=True))
    if len(whole) < len(rows):
        raise ValueError("its last row is cut")
