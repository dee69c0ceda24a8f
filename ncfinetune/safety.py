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
# Options are in smaller files, in bytes.
_LARGEST = 2**20


def refuse_code(words: list[str]) -> None:
    """Refuse the words of a command, and the configuration files that they name, if they could run code of their own.

    Raises:
        ValueError: They name something to import that is no class of ours or of Lightning's and no optimiser of torch's
            or timm's, run a shell command, or read from another machine.
    """
    for key, value in _said(words):
        if fault := _fault(value):
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
        yield from _strings(option, _loaded(value), Path(), seen)


def _strings(key: str, value: Any, folder: Path, seen: set[Path]) -> Iterator[tuple[str, str]]:
    """The strings in a value, and in the file of options that it may be the name of, there or in the folder."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            yield from _strings(f"{key}.{name}", item, folder, seen)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item, folder, seen)
    elif isinstance(value, str):
        yield key, value
        for path in {Path(value).absolute(), (folder / value).absolute()} - seen:
            with suppress(OSError, UnicodeDecodeError):  # no file, or none of options
                if path.stat().st_size < _LARGEST:
                    seen.add(path)
                    yield from _strings(key, _loaded(path.read_text(encoding="utf-8")), path.parent, seen)


def _loaded(text: str) -> Any:
    """What YAML there is in a text; text alone is nothing more."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return None if isinstance(content, str) else content


def _fault(value: str) -> str | None:
    if "pipe:" in value:
        return "a shell command"
    if _ELSEWHERE.search(value):
        return "on another machine"
    if _DOTTED.fullmatch(value) and not _CLASS.fullmatch(value) and _can_be_imported(value):
        return "something to import"
    return None


def _can_be_imported(value: str) -> bool:
    return importlib.util.find_spec(value.split(".")[0]) is not None
