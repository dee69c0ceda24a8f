"""Files of class probabilities, written batch by batch: CSV, or Parquet with the extra ``parquet``.

Legend: ``N`` samples, ``K`` classes.
"""

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

# The error of a sample for which the network gives nan.
_UNDEFINED = "the network gives nan for its class probabilities"
# Names of the columns that are not of a class.
_COLUMNS = ("index", "file", "label", "prediction", "error")


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
    """A table of predictions: index or file, true class if known, most probable class, class probabilities, error.

    The column of a class's probabilities has its name; that of a class named as another column, such as ``error``, is
    called ``probability of error``.

    Rows are written when they are added, to ``NAME.partial`` beside the file, which is renamed when the table is
    complete: a file with the final name is complete, and an interrupted run leaves its predictions so far. A sample
    that could not be read, or whose probabilities are nan, has an error and no numbers.

    Args:
        path: The ``.csv`` or ``.parquet`` file to write. Parquet gets a row group for each `add`.
        key: Name of the first column, ``index`` or ``file``.
        names: Names of the ``K`` classes.
        labelled: Whether there is a column ``label``.
        top_k: Write so many most probable classes and their probabilities, ``top_1``, ``probability_1``, ``top_2`` and
            so on, in place of a column for each class.

    Raises:
        ValueError: ``top_k`` is outside 1..K.

    Attributes:
        rows: Number of rows.
        errors: Number of rows with an error.
        first_error: The first error; empty if there is none.
    """

    def __init__(
        self, path: Path, key: str, names: Sequence[object], labelled: bool = False, top_k: int | None = None
    ) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.rows = self.errors = 0
        self.first_error = ""
        self._classes = [str(name) for name in names]
        check_top_k(top_k, len(self._classes))
        self._labelled, self._top_k = labelled, top_k
        columns: list[tuple[str, type]] = [(key, str if key == "file" else int)]
        columns += [("label", str)] * labelled + [("prediction", str)]
        if top_k is None:
            columns += [(name, float) for name in distinct(self._classes, _COLUMNS, "probability of")]
        else:
            places = range(1, top_k + 1)
            columns += [pair for k in places for pair in ((f"top_{k}", str), (f"probability_{k}", float))]
        with self._naming():
            path.parent.mkdir(parents=True, exist_ok=True)
            kind: Any = _Parquet if path.suffix == ".parquet" else _CSV
            self._file = kind(self.partial, [*columns, ("error", str)])

    def add(
        self,
        samples: Sequence[int] | Sequence[str],
        probabilities: Tensor,
        errors: Sequence[str],
        labels: Sequence[int] = (),
    ) -> None:
        """Write a batch.

        Args:
            samples: ``N`` indices or files.
            probabilities: ``(N, K)``.
            errors: Error of each sample that could not be read; empty for the others.
            labels: True classes, for a labelled table; -1 is unknown.

        Raises:
            OSError: The disk is full; rows added before are kept.
            ValueError: There are more or fewer classes than names.
        """
        if probabilities.shape[1] != len(self._classes):
            raise ValueError(f"expected probabilities of {len(self._classes)} classes, got {probabilities.shape[1]}")
        predicted, errors = map(self._cells, probabilities.float()), all_errors(errors, probabilities)
        given = (
            [[None if label < 0 else self._classes[label]] for label in labels]
            if self._labelled
            else [[]] * len(errors)
        )
        rows = [
            [as_utf_8(sample), *label, *([None] * len(cells) if error else cells), as_utf_8(error) or None]
            for sample, label, cells, error in zip(samples, given, predicted, errors, strict=True)
        ]
        with self._naming():
            self._file.write(rows)
        self.rows += len(samples)
        self.errors += sum(map(bool, errors))
        self.first_error = self.first_error or next(filter(None, errors), "")

    def _cells(self, shares: Tensor) -> list[str | float]:
        """Prediction and probabilities of a sample."""
        best = self._classes[int(shares.argmax())]
        if self._top_k is None:
            return [best, *shares.tolist()]
        top = zip(*(part.tolist() for part in most_probable(shares, self._top_k)), strict=True)
        return [best, *(cell for share, index in top for cell in (self._classes[index], share))]

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


def as_utf_8(text: Any) -> Any:
    r"""A text in UTF-8: bytes of a file's name that are none are shown as ``\udce9``; what is no text stays."""
    return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


class _CSV:
    def __init__(self, path: Path, columns: list[tuple[str, type]]) -> None:
        self._path = path
        self._file = path.open("w", newline="", encoding="utf-8")
        self._table = csv.writer(self._file)
        self._table.writerow([name for name, _ in columns])
        self._file.flush()
        # Size in whole batches: a batch that a full disk truncates is cut off again.
        self._whole = self._file.tell()

    def write(self, rows: list[list[Any]]) -> None:
        for row in rows:
            self._table.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row])
        self._file.flush()
        self._whole = self._file.tell()

    def close(self) -> None:
        with suppress(OSError):  # flushing a failed write
            self._file.close()
        os.truncate(self._path, self._whole)


class _Parquet:
    def __init__(self, path: Path, columns: list[tuple[str, type]]) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float32()}
        self._schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns])
        self._writer = parquet.ParquetWriter(path, self._schema)

    def write(self, rows: list[list[Any]]) -> None:
        import pyarrow

        columns = zip(*rows, strict=True)
        arrays = [pyarrow.array(column, kind.type) for column, kind in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def distinct(names: Sequence[str], others: Sequence[str], words: str) -> list[str]:
    """Names of columns for classes, each different: where a class is named as another column, after these words.

    Args:
        names: Names of the classes.
        others: Names of the columns that are not of a class.
        words: What goes before the name of such a class, as often as needed.
    """
    columns: list[str] = []
    taken = set(others)
    for name in names:
        column = name
        while column in taken or (column != name and column in names):
            column = f"{words} {column}"
        columns.append(column)
        taken.add(column)
    return columns


def all_errors(errors: Sequence[str], probabilities: Tensor) -> list[str]:
    """The errors of samples, and of those without one whose probabilities are nan that they are.

    Args:
        errors: Error of each of ``N`` samples that could not be read; empty for the others.
        probabilities: ``(N, K)``.
    """
    undefined = (~probabilities.isfinite()).any(1).tolist()
    return [error or (_UNDEFINED if nan else "") for error, nan in zip(errors, undefined, strict=True)]


def most_probable(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest probabilities and their classes, of equal ones the first class first, as `argmax` has it.

    ``topk`` gives equal ones in any order, so that the first of them would not be the prediction.

        >>> most_probable(Tensor([0.2, 0.4, 0.4]), 2)[1].tolist()
        [1, 2]

    Args:
        probabilities: ``(..., K)``.
        k: How many, within 1..K.

    Returns:
        Probabilities and classes, ``(..., k)`` each.
    """
    shares, classes = probabilities.sort(dim=-1, descending=True, stable=True)
    return shares[..., :k], classes[..., :k]


def check_top_k(top_k: int | None, classes: int) -> None:
    """Refuse a number of most probable classes that there are not.

    Raises:
        ValueError: It is not within 1..K.
    """
    if top_k is not None and not 1 <= top_k <= classes:
        raise ValueError(f"expected top_k in 1..{classes}, the number of classes, got {top_k}")
