"""Labels in a CSV file: class and split of each image."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from .listing import counted, is_image, some

_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image"),
    "label": ("label", "class"),
    "split": ("split",),
}
# The part that a word for a split means, in any case, as a cell of a table and as the name of a folder.
PART_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Separators between the labels of one image in common multi-label files; names of classes have commas too.
_BETWEEN_LABELS, _COMMA = "|;", ","


@dataclass(frozen=True)
class Row:
    """A row of the file: the path, relative to root if it is below it, the name of the class, and the split or None."""

    path: str
    label: str
    part: str | None


def read_labels(file: Path, root: Path) -> list[Row]:
    """The rows of a CSV file with columns path, label and, optionally, split.

    The first line may name the columns, in any order and among others, which are ignored: ``path`` (or ``file``,
    ``filename``, ``file_name``, ``image``), ``label`` (or ``class``) and ``split``. Without such a line the columns are
    path and label, or path, label and split. Splits are ``train``, ``val`` (or ``valid``, ``validation``) and ``test``.
    A duplicate row counts once, also if it writes its path in another way.

    Args:
        file: The file.
        root: The folder that paths are relative to.

    Raises:
        ValueError: The file is no such table, or an image has several labels.
    """
    lines = _cells(file)
    columns, first = _columns(file, lines)
    total = len(lines[0][1]) if lines else 0
    roots = (os.path.realpath(root), os.path.abspath(root))
    rows = [_row(f"line {number} of {str(file)!r}", cells, columns, total, roots) for number, cells in lines[first:]]
    if not rows:
        raise ValueError(f"{str(file)!r} has no rows; expected path,label")
    _refuse_swapped(file, rows)
    _refuse_lists(file, {row.label for row in rows})
    if len({row.part is None for row in rows}) > 1:
        raise ValueError(f"expected a split in every row of {str(file)!r} or in none")
    kept = _one_row_an_image(file, rows, roots[0])
    if len(kept) < len(rows):
        rank_zero_info(f"ignored {counted(len(rows) - len(kept), 'duplicate row')} of {str(file)!r}")
    return kept


def class_names(rows: list[Row]) -> list[str]:
    """The classes in the order of their labels: sorted as numbers if all are digits, and otherwise by name."""
    names = {row.label for row in rows}
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _cells(file: Path) -> list[tuple[int, list[str]]]:
    """Number and cells of each line that is not empty."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {str(file)!r} to be text in UTF-8: {error.reason} at byte {error.start}") from error
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {str(file)!r} is not CSV: {error}") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if lines and len(lines[0][1]) == 1:
        other = next((name for sign, name in ((";", "semicolons"), ("\t", "tabs")) if sign in lines[0][1][0]), "none")
        raise ValueError(f"expected commas between the columns of {str(file)!r}, got {other}; expected path,label")
    return lines


def _columns(file: Path, lines: list[tuple[int, list[str]]]) -> tuple[dict[str, int], int]:
    """The index of each column, and the first line that is a row."""
    if not lines:
        return {}, 0
    first = [cell.lower() for cell in lines[0][1]]
    named = {column: [place for place, cell in enumerate(first) if cell in names] for column, names in _COLUMNS.items()}
    if not named["path"]:
        if len(first) > 3:
            raise ValueError(
                f"expected a first line of {str(file)!r} that names path and label among its {len(first)} columns, "
                f"got {some(lines[0][1])}; several labels per image (multi-label) are not supported"
            )
        return {column: place for place, column in enumerate(("path", "label", "split")[: len(first)])}, 0
    for column, places in named.items():
        could_be = [lines[0][1][place] for place in places]
        if len(could_be) > 1 and (column != "label" or len({first[place] for place in places}) > 1):
            raise ValueError(
                f"expected one column {column} in {str(file)!r}, got {' and '.join(could_be)}, each of which could be "
                "it; rename all but one of them in the first line"
            )
    if len(named["label"]) != 1:
        raise ValueError(
            f"expected one column label in {str(file)!r}, got {', '.join(lines[0][1])}; a column for each class "
            "(multi-label, one-hot) is not supported: give one label per image"
        )
    return {column: places[0] for column, places in named.items() if places}, 1


def _refuse_swapped(file: Path, rows: list[Row]) -> None:
    """Refuse rows whose labels, and not their paths, are names of image files."""
    if all(is_image(row.label) for row in rows) and not any(is_image(row.path) for row in rows):
        raise ValueError(
            f"expected path,label in {str(file)!r}, got images as labels, such as {rows[0].label!r} of the path "
            f"{rows[0].path!r}; the columns may be swapped: exchange them, or name them in a first line label,path"
        )


def _refuse_lists(file: Path, labels: set[str]) -> None:
    """Refuse labels with commas that are lists of labels: each of their parts occurs in another one too."""
    parts = {label: {part.strip() for part in label.split(_COMMA)} for label in labels}
    homes = Counter(part for of_one in parts.values() for part in of_one)
    lists = sorted(label for label, of_one in parts.items() if _COMMA in label and all(homes[p] > 1 for p in of_one))
    if lists:
        raise ValueError(
            f"expected one label a row in {str(file)!r}, got {lists[0]!r}; multi-label images are not supported"
        )


def _row(where: str, cells: list[str], columns: dict[str, int], total: int, roots: tuple[str, str]) -> Row:
    given = ",".join(cells)
    if len(cells) > total:
        raise ValueError(
            f"expected {total} columns in {where}, as in the first line, got {given!r}; several labels per image "
            "(multi-label) are not supported"
        )
    if len(cells) <= max(columns.values()):
        raise ValueError(f"expected {','.join(columns)} in {where}, got {given!r}")
    path, label, part = (cells[columns[name]] if name in columns else "" for name in ("path", "label", "split"))
    if not path or not label:
        raise ValueError(f"expected a path and a label in {where}, got {given!r}")
    if any(sign in label for sign in _BETWEEN_LABELS):
        raise ValueError(f"expected one label in {where}, got {label!r}; multi-label images are not supported")
    if part and part.lower() not in PART_OF:
        raise ValueError(
            f"expected a split train, val or test in {where}, got {part!r}; if that is a further label: multi-label "
            "images are not supported"
        )
    return Row(_below(roots, path), label, PART_OF[part.lower()] if part else None)


def _below(roots: tuple[str, str], path: str) -> str:
    """A path, relative to root if it is below it, whichever way it and root are written."""
    whole = os.path.normpath(os.path.join(roots[0], path))
    for root in roots:
        if whole.startswith(start := os.path.join(root, "")):
            return whole.removeprefix(start)
    folder, name = os.path.split(whole)
    start = os.path.join(roots[0], "")
    resolved = os.path.join(os.path.realpath(folder), name)
    return resolved.removeprefix(start) if resolved.startswith(start) else os.path.normpath(path)


def _one_row_an_image(file: Path, rows: list[Row], root: str) -> list[Row]:
    """The first row of each image; others must say the same."""
    kept: dict[str, Row] = {}
    resolved = cache(os.path.realpath)  # of folders, which have many images
    for row in rows:
        folder, name = os.path.split(os.path.normpath(os.path.join(root, row.path)))
        other = kept.setdefault(os.path.join(resolved(folder), name), row)
        if other.label != row.label:
            raise ValueError(
                f"{str(file)!r} has {row.path} with the labels {other.label!r} and {row.label!r}; multi-label images "
                "are not supported: give each image one label"
            )
        if other.part != row.part:
            raise ValueError(f"{str(file)!r} has {row.path} in {other.part} and in {row.part}; give it one split")
    return list(kept.values())
