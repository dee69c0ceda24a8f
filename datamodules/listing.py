"""Image files below a folder, by one rule for training and prediction, and files with identical content."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# File suffixes of Pillow's still-picture formats; .avif from Pillow 11.3 on.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif", ".gif", ".bmp", ".dib", ".avif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)
# Folders of file systems and archivers, with thumbnails, resource forks and deleted files.
_NOT_THE_USERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
# Bytes in the middle of a file: enough to distinguish most files of the same size.
_GLIMPSE = 4096


def is_image(name: str) -> bool:
    """Whether a file counts as an image, by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder below the root is ignored, with its contents."""
    return name.startswith(".") or name in _NOT_THE_USERS


@dataclass
class Found:
    """The contents of a folder.

    Attributes:
        images: Paths of the image files, by folder and name.
        others: Numbers of files that are not images, by suffix.
        hidden: Number of hidden files and folders, which were ignored.
        circles: Links to folders that contain the link.
    """

    images: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    circles: list[str] = field(default_factory=list)

    def add(self, folder: str | Path) -> Found:
        """Search a folder recursively, following links to folders."""
        # Sorted by the path of the folder, then by name, as in torchvision, on every file system.
        for here, files in sorted(_walk(folder, self)):
            for name in sorted(files):
                if is_hidden(name):
                    self.hidden += 1
                elif is_image(name):
                    self.images.append(os.path.join(here, name))
                else:
                    self.others[Path(name).suffix.lower() or "without a suffix"] += 1
        return self

    def report(self, where: str, warn: bool = False) -> None:
        """Report the files and folders that were ignored or left out, a line for each kind."""
        say = rank_zero_warn if warn else rank_zero_info
        if self.hidden:
            kind = "file or folder" if self.hidden == 1 else "files and folders"
            rank_zero_info(f"ignored {self.hidden} hidden {kind} in {where}")
        if self.others:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.others.most_common(5))
            say(f"left out {counted(self.others.total(), 'file')} in {where} without an image suffix: {kinds}")
        if self.circles:
            say(f"left out {counted(len(self.circles), 'link')} in {where} leading back: {some(self.circles)}")


def _walk(root: str | Path, found: Found) -> Iterator[tuple[str, list[str]]]:
    for here, folders, files in os.walk(root, followlinks=True):
        found.hidden += sum(map(is_hidden, folders))
        seen = [name for name in folders if not is_hidden(name)]
        circles = [name for name in seen if _leads_back(here, name)]
        found.circles += [os.path.join(here, name) for name in circles]
        folders[:] = [name for name in seen if name not in circles]
        yield here, files


def _leads_back(here: str, name: str) -> bool:
    path = os.path.join(here, name)
    return os.path.islink(path) and Path(path).resolve() in (inside := Path(here).resolve(), *inside.parents)


def holds_images(folder: Path) -> bool:
    """Whether there is an image below a folder, which is searched only up to it."""
    names = (name for _, files in _walk(folder, Found()) for name in files)
    return any(is_image(name) and not is_hidden(name) for name in names)


def image_paths(folder: str | Path) -> list[str]:
    """The image files below a folder, searched recursively; files left out are reported. A file is the only one.

    Raises:
        FileNotFoundError: No such folder or file, or no images in the folder.
    """
    if Path(folder).is_file():
        return [str(folder)]
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; expected one with images")
    found = Found().add(folder)
    found.report(repr(str(folder)))
    if not found.images:
        raise FileNotFoundError(f"no images in {str(folder)!r}; expected files {', '.join(IMAGE_SUFFIXES)}")
    return found.images


def counted(number: int, noun: str) -> str:
    """A number and its noun, for a message: 1 file, 2 files."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(things: Sequence[object]) -> str:
    """The first three, for a message."""
    return ", ".join(map(str, things[:3])) + (", ..." if len(things) > 3 else "")


def same_content(paths: Iterable[str], matters: Callable[[list[str]], bool]) -> list[list[str]]:
    """Groups of identical files that satisfy ``matters``. Only files of equal size are opened, and few read whole."""
    groups = [list(paths)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for key in (_size, _glimpse, _digest):
            groups = [alike for group in groups for alike in _alike(group, key, threads) if matters(alike)]
    return groups


def _alike(paths: list[str], key: Callable[[str], Hashable], threads: ThreadPoolExecutor) -> list[list[str]]:
    groups = defaultdict(list)
    for path, value in zip(paths, threads.map(key, paths), strict=True):
        groups[value].append(path)
    return [group for value, group in groups.items() if len(group) > 1 and value is not None]


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path) or None
    except OSError:  # decoding it will report the error
        return None


def _glimpse(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, (os.path.getsize(path) - _GLIMPSE) // 2))
            return file.read(_GLIMPSE)
    except OSError:
        return None


def _digest(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            digest = hashlib.blake2b()
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.digest()
    except OSError:
        return None
