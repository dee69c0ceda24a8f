"""What a command may say under ``--safe``; a configuration is code otherwise, whose paths are imported and called.

Every string is looked at, in the command and in its configuration files, since each may be given to an argument that
takes a class or a function.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
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
_FILE_OF_OPTIONS = (".yaml", ".yml", ".json")


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
                "torch.optim and timm.optim, files of this machine, and other options by --config; without --safe it is run"
            )


def _said(words: list[str]) -> Iterator[tuple[str, str]]:
    """Every string of a command by the option that it is for."""
    option = "the command"
    for word in words:
        if word.startswith("--"):
            option, given, value = word.removeprefix("--").partition("=")
            option = option.removesuffix("+")
            if not given:
                continue
        else:
            value = word
        if option == "config":
            path = Path(value)
            yield from _strings("config", yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else value))
        else:
            yield option, value
            yield from _strings(option, _loaded(value))


def _loaded(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:  # no YAML, and looked at as it is
        return None


def _strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            yield from _strings(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item)


def _fault(value: str) -> str | None:
    if "pipe:" in value:
        return "a shell command"
    if _ELSEWHERE.search(value):
        return "on another machine"
    if value.endswith(_FILE_OF_OPTIONS) and Path(value).is_file():
        return "a file of more options"
    if _DOTTED.fullmatch(value) and not _CLASS.fullmatch(value) and _can_be_imported(value):
        return "something to import"
    return None


def _can_be_imported(value: str) -> bool:
    return importlib.util.find_spec(value.split(".")[0]) is not None
