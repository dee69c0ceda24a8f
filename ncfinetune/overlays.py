"""The configuration files of ``experiments/``, which an installation carries."""

from __future__ import annotations

from contextlib import suppress
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
    found = [str(path) for path in _candidates(path) if path.is_file()]
    return f"{option}{equals}{found[0]}" if found else word


def installed_folder(path: Path) -> Path:
    """A folder; of one ``experiments/...`` of the working folder that is not there, the installed one."""
    with suppress(ValueError):
        own = path.absolute().relative_to(Path.cwd())
        if not path.is_dir() and own.parts[:1] == ("experiments",):
            return next((folder for folder in _candidates(str(own)) if folder.is_dir()), path)
    return path


def _candidates(path: str) -> list[Path]:
    """Where it may be: in a checkout the folder lies beside the package, in an installation inside it."""
    return [_PACKAGE / path, _PACKAGE.parent / path]
