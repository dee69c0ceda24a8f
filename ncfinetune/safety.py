"""What a command may say under ``--safe``; a configuration is code otherwise, whose paths are imported and called.

Every string is looked at, in the command and in its configuration files, since each may be given to an argument that
takes a class or a function.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

# A class, by its name in the packages that define what a configuration is meant to choose.
_CLASS = re.compile(
    r"(ncfinetune(\.\w+)*|lightning\.pytorch\.(callbacks|cli|loggers|plugins|profilers|strategies)"
    r"|timm\.optim|torch\.optim(\.lr_scheduler)?)\.[A-Z]\w*"
)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_ELSEWHERE = re.compile(r"\w+://|hf[-_]hub:")
# Options that take data sets, whose shards a colon makes a command or another machine's, however they are written.
_DATA = {"data", "downstream"}
# Options are in smaller files, in bytes.
_LARGEST = 2**20


def refuse_code(words: list[str]) -> None:
    """Refuse the words of a command, and the configuration files that they name, if they could run code of their own.

    Raises:
        ValueError: They name something to import that is no class of ours or of Lightning's and no optimiser of torch's
            or timm's, run a shell command, or read from another machine.
    """
    for key, value in _said(words):
        if fault := _fault(key, value.strip()):
            raise ValueError(
                f"--safe refuses {value!r} for {key}, {fault}; expected classes of ncfinetune, lightning.pytorch, "
                "torch.optim and timm.optim, and files of this machine; without --safe it is run"
            )


def _said(words: list[str]) -> Iterator[tuple[str, str]]:
    """Every string of a command by the option that it is for."""
    option, seen = "the command", set[Path]()
    for word in words:
        value = word
        if word.startswith("--"):
            option, _, value = word.removeprefix("--").partition("=")
            option = option.removesuffix("+")
        yield from _strings(option, value, Path(), seen)


def _strings(key: str, value: Any, folder: Path, seen: set[Path]) -> Iterator[tuple[str, str]]:
    """The strings in a value, and in what they stand for."""
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
    """The strings in the file of options that has this name, in the working directory or in the folder."""
    for path in {Path(name).absolute(), (folder / name).absolute()} - seen:
        with suppress(OSError, UnicodeDecodeError):  # no file, or none of options
            if path.stat().st_size < _LARGEST:
                seen.add(path)
                content = _loaded(path.read_text(encoding="utf-8"))
                yield from _strings(key, None if isinstance(content, str) else content, path.parent, seen)


def _loaded(text: str) -> Any:
    """What a text is as YAML, None if it is none."""
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
