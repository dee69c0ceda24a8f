"""Files of class probabilities, written batch by batch: CSV, or Parquet with the extra ``parquet``."""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ncfinetune.atomic import sync, unwritten


def check_format(path: Path) -> None:
    """Refuse a file that `Table` cannot write.

    Raises:
        ValueError: Its name ends neither in .csv nor in .parquet, it is a folder, or pyarrow is missing for Parquet.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"expected predictions to be a .csv or .parquet file, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"expected predictions to be a file, got the folder {str(path)!r}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{str(path)!r} needs pyarrow: pip install 'ncfinetune[parquet]', or name a .csv file")


class Table:
    """A table of predictions with a row per sample: index or file, most probable class, class probabilities, error.

    Rows are written when they are added, to ``NAME.partial`` beside the file, which is renamed when the table is
    complete: a file with the final name is complete, and an interrupted run leaves its predictions so far. A sample
    that could not be read has an error and no numbers.

    Args:
        path: The ``.csv`` or ``.parquet`` file to write. Parquet gets a row group for each `add`.
        key: Name of the first column, ``index`` or ``file``.
        names: Names of the ``K`` classes.

    Attributes:
        rows: Number of rows.
        errors: Number of rows with an error.
        first_error: The first error; empty if there is none.
    """

    def __init__(self, path: Path, key: str, names: Sequence[object]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.rows = self.errors = 0
        self.first_error = ""
        self._classes = [str(name) for name in names]
        columns = [key, "prediction", *self._classes, "error"]
        with self._naming():
            kind: Any = _Parquet if path.suffix == ".parquet" else _CSV
            self._file = kind(self.partial, columns)

    def add(self, samples: Sequence[int] | Sequence[str], probabilities: Tensor, errors: Sequence[str]) -> None:
        """Write a batch.

        Args:
            samples: ``N`` indices or files.
            probabilities: ``(N, K)``.
            errors: Error of each sample that could not be read; empty for the others.

        Raises:
            OSError: The disk is full; rows added before are kept.
            ValueError: There are more or fewer classes than names.
        """
        if probabilities.shape[1] != len(self._classes):
            raise ValueError(f"expected probabilities of {len(self._classes)} classes, got {probabilities.shape[1]}")
        likeliest = probabilities.argmax(1).tolist()
        numbers = [None if error else row for row, error in zip(probabilities.float().tolist(), errors, strict=True)]
        names = [None if error else self._classes[index] for index, error in zip(likeliest, errors, strict=True)]
        with self._naming():
            self._file.write(samples, names, numbers, [error or None for error in errors])
        self.rows += len(samples)
        self.errors += sum(map(bool, errors))
        self.first_error = self.first_error or next(filter(None, errors), "")

    def finish(self) -> None:
        """Rename the complete file to its final name.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        with self._naming():
            self._file.close()
            sync(self.partial)
            self.partial.replace(self.path)
            sync(self.path.parent)

    def keep(self) -> bool:
        """Close the partial file so that it can be read, and return whether it can; otherwise remove it."""
        try:
            self._file.close()
        except OSError:
            with suppress(OSError):
                self.partial.unlink()
            return False
        return True

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritten(self.path, error) from error


class _CSV:
    def __init__(self, path: Path, columns: list[str]) -> None:
        self._path = path
        self._file = path.open("w", newline="", encoding="utf-8")
        self._table = csv.writer(self._file)
        self._blank = [""] * (len(columns) - 3)
        self._table.writerow(columns)
        self._file.flush()
        # Size in whole batches: a batch that a full disk truncates is cut off again.
        self._whole = self._file.tell()

    def write(self, samples: Any, names: list[Any], numbers: list[list[float] | None], errors: list[Any]) -> None:
        for sample, name, shares, error in zip(samples, names, numbers, errors, strict=True):
            cells = self._blank if shares is None else [f"{share:.6f}" for share in shares]
            self._table.writerow([sample, name, *cells, error])
        self._file.flush()
        self._whole = self._file.tell()

    def close(self) -> None:
        with suppress(OSError):  # flushing a failed write
            self._file.close()
        os.truncate(self._path, self._whole)


class _Parquet:
    def __init__(self, path: Path, columns: list[str]) -> None:
        import pyarrow
        from pyarrow import parquet

        key = pyarrow.string() if columns[0] == "file" else pyarrow.int64()
        kinds = [key, pyarrow.string(), *[pyarrow.float32()] * (len(columns) - 3), pyarrow.string()]
        self._schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
        self._writer = parquet.ParquetWriter(path, self._schema)

    def write(self, samples: Any, names: list[Any], numbers: list[list[float] | None], errors: list[Any]) -> None:
        import pyarrow

        blank: list[float | None] = [None] * (len(self._schema) - 3)
        shares = zip(*(row or blank for row in numbers), strict=True)
        columns = [samples, names, *shares, errors]
        arrays = [pyarrow.array(column, kind.type) for column, kind in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
