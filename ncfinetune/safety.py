"""The check of a command under ``--safe``; otherwise a configuration is code, whose paths are imported and called.

Every string in the command and in its configuration files is checked, since any argument may take a class or function.
"""

from __future__ import annotations

import codecs
import importlib.util
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

# Classes in the packages that a configuration may choose from.
_CLASS = re.compile(
    r"(ncfinetune(\.\w+)*|lightning\.pytorch\.(callbacks|cli|loggers|plugins|profilers|strategies)"
    r"|timm\.optim|torch\.optim(\.lr_scheduler)?)\.[A-Z]\w*"
)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_ELSEWHERE = re.compile(r"\w+://|hf[-_]hub:")
# Options with data sets, in whose shards a colon marks a command or another machine.
_DATA = {"data", "downstream"}
# Bytes of the largest file of options that is read, and of the beginning that tells a larger text from data.
_LARGEST, _BEGINNING = 2**20, 2**16


def refuse_code(words: list[str]) -> None:
    """Refuse a command, with its configuration files, if it could run foreign code.

    Raises:
        ValueError: It imports something other than our classes, Lightning's, and the optimisers of torch and timm, runs
            a shell command, or reads from another machine.
    """
    for key, value in _said(words):
        if fault := _fault(key, value.strip()):
            raise ValueError(
                f"--safe refuses {value!r} for {key}, {fault}; expected classes of ncfinetune, lightning.pytorch, "
                "torch.optim and timm.optim, and files of this machine; without --safe it is run"
            )


def _said(words: list[str]) -> Iterator[tuple[str, str]]:
    """Every string of a command with its option."""
    option, seen = "the command", set[Path]()
    for word in words:
        value = word
        if word.startswith("--"):
            option, _, value = word.removeprefix("--").partition("=")
            option = option.removesuffix("+")
        yield from _strings(option, value, Path(), seen)


def _strings(key: str, value: Any, folder: Path, seen: set[Path]) -> Iterator[tuple[str, str]]:
    """The strings in a value, in the YAML that they contain, and in the files that they name."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            yield from _strings(f"{key}.{name}", item, folder, seen)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item, folder, seen)
    elif isinstance(value, str):
        yield key, value
        if (inner := _loaded(value)) != value:
            yield from _strings(key, inner, folder, seen)
        yield from _in_files(key, value, folder, seen)


def _in_files(key: str, name: str, folder: Path, seen: set[Path]) -> Iterator[tuple[str, str]]:
    """The strings in the file of options with this name, in the working directory or in the folder."""
    for path in {Path(name).absolute(), (folder / name).absolute()} - seen:
        with suppress(OSError, UnicodeDecodeError):  # not a file, or not one of options
            if path.stat().st_size >= _LARGEST:
                _refuse_text(key, path)
                continue
            seen.add(path)
            content = _loaded(path.read_text(encoding="utf-8"))
            yield from _strings(key, None if isinstance(content, str) else content, path.parent, seen)


def _refuse_text(key: str, path: Path) -> None:
    """Refuse a large file that begins as text: options could be read from it, and looking for them takes long."""
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    if b"\0" in beginning:  # as the length of a safetensors file's header has
        return
    codecs.getincrementaldecoder("utf-8")().decode(beginning)
    raise ValueError(
        f"--safe refuses {str(path)!r} for {key}, a text of {path.stat().st_size:,} bytes that it does not look "
        f"through; expected files of options below {_LARGEST:,} bytes; without --safe it is run"
    )


def _loaded(text: str) -> Any:
    """A text parsed as YAML; None if it is not YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _fault(key: str, value: str) -> str | None:
    if "pipe:" in value or (
        ":" in value and _DATA & set(key.split(".")) and not isinstance(_loaded(value), dict | list)
    ):
        return "which may be a shell command"
    if _ELSEWHERE.search(value):
        return "on another machine"
    if _DOTTED.fullmatch(value) and not _CLASS.fullmatch(value) and _can_be_imported(value):
        return "something to import"
    return None


def _can_be_imported(value: str) -> bool:
    return importlib.util.find_spec(value.split(".")[0]) is not None
