"""The configuration files of ``experiments/``, which an installation carries."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def installed(word: str) -> str:
    """A word of a command line; of a path ``experiments/...`` that the working folder lacks, the installed file's path.

    >>> installed("experiments/none.yaml"), installed("runs/a.yaml")
    ('experiments/none.yaml', 'runs/a.yaml')
    """
    option, equals, path = word.rpartition("=") if word.startswith("--") else ("", "", word)
    if not path.startswith("experiments/") or Path(path).exists():
        return word
    # In a checkout the folder lies beside the package, in an installation inside it.
    found = [str(folder / path) for folder in (_PACKAGE, _PACKAGE.parent) if (folder / path).exists()]
    return f"{option}{equals}{found[0]}" if found else word
