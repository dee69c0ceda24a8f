"""``--model.help`` and ``--data.help`` without a class: which classes there are, with a line on each."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence

from ncfinetune.cli_errors import BASES, own_subclasses

_OPTIONS = ("model", "data")
_LINE = 120


def asked(words: Sequence[str]) -> str | None:
    """The option whose classes a command asks for, ``model`` or ``data``; None if it asks for none."""
    for word, after in zip(words, (*words[1:], "-"), strict=True):
        option = word.removeprefix("--").removesuffix(".help")
        if word == f"--{option}.help" and option in _OPTIONS and after.startswith("-"):
            return option
    return None


def classes(option: str) -> str:
    """Our classes that an option takes, as text."""
    base = BASES[option]
    own = {c.__name__: c for c in own_subclasses(base)}
    width = max(map(len, own)) + 2
    lines = [name.ljust(width) + _summary(own[name], _LINE - width) for name in sorted(own)]
    return "\n".join(
        [
            f"--{option} takes one of these, or the class path of another {base.__name__}; "
            f"--{option}.help NAME lists the options of one:",
            *lines,
        ]
    )


def _summary(owner: type, width: int) -> str:
    """The first sentence of a class's docstring, as far as it fits."""
    text = " ".join((inspect.getdoc(owner) or "").split("\n\n")[0].split()).replace("`", "")
    first = re.split(r"(?<! al)\. ", text)[0]
    return textwrap.shorten(first.rstrip(".:"), width, placeholder=" ...")
