"""Class probabilities as a file: CSV, or Parquet with the extra ``parquet``."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def check_format(path: Path) -> None:
    """Refuse a file that `write` cannot write.

    Raises:
        ValueError: Its name ends neither in .csv nor in .parquet, it is a folder, or Parquet without pyarrow.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"expected predictions to be a .csv or .parquet file, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"expected predictions to be a file, got the folder {str(path)!r}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{str(path)!r} needs pyarrow: pip install 'ncfinetune[parquet]', or name a .csv file")


def write(path: Path, samples: Sequence[int] | Sequence[str], names: Sequence[object], probabilities: Tensor) -> None:
    """Write a row for each sample: its index or file, the name of the likeliest class, and every class's probability.

    Args:
        path: Where to, a ``.csv`` or ``.parquet`` file.
        samples: Indices or files, ``N`` of them.
        names: The classes, ``K`` of them.
        probabilities: ``(N, K)``.
    """
    classes = [str(name) for name in names]
    names = ["file" if samples and isinstance(samples[0], str) else "index", "prediction", *classes]
    keys = [samples, [classes[index] for index in probabilities.argmax(1).tolist()]]
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns = [pyarrow.array(column) for column in (*keys, *probabilities.float().numpy().T)]
        parquet.write_table(pyarrow.table(columns, names), path)
        return
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        for *row, shares in zip(*keys, probabilities.tolist(), strict=True):
            table.writerow([*row, *(f"{share:.6f}" for share in shares)])
