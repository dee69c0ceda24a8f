"""Scalars out of TensorBoard's event files, and what in those files is damaged.

TensorBoard's own reader goes on in silence where a record is cut or its checksum is wrong, and takes seconds for the
scalars of a long run, since it reads the pictures too. The format is that of TFRecord: length, its checksum, data,
their checksum; the data are an ``Event`` message. The checksums of all records are computed at once, byte by byte.

Legend: ``R`` records, ``L`` bytes of each.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from numpy.lib.stride_tricks import sliding_window_view
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.util.tensor_util import make_ndarray

# What was logged: by tag the steps and values, as they were written.
Points = dict[str, list[tuple[int, float]]]

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_HEAD = _LENGTH.size + _CHECKSUM.size
# A record with one scalar has less than this many bytes; pictures, which have more, are passed over.
_LONGEST = 4096


def read_events(run: Path) -> tuple[Points, list[str]]:
    """What was logged under each tag, in the order in which it was written, and a line for each file that is damaged.

    Args:
        run: The folder with the event files.
    """
    points: Points = defaultdict(list)
    faults = []
    for path in event_files(run):
        last = -1
        try:
            for event in _events(path):
                step = event.step
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        points[value.tag].append((step, value.simple_value))
                    elif value.metadata.plugin_data.plugin_name == "scalars":
                        points[value.tag].append((step, float(make_ndarray(value.tensor))))
                last = max(last, step)
        except (ValueError, TypeError, DecodeError) as error:
            faults.append(f"{path}: {error}; {taken_until(last)}")
    return dict(points), faults


def taken_until(step: int) -> str:
    """What is taken of a damaged file whose last whole number is of this step; -1 where there is none."""
    return f"numbers until step {step} are taken" if step >= 0 else "no number in it is taken"


def event_files(run: Path) -> list[Path]:
    """The event files in a folder, the oldest first."""
    return sorted(run.glob("events.out.tfevents.*"), key=_age)


def _age(path: Path) -> tuple[int, ...]:
    """The numbers in a file's name: the second in which it was begun, the process, and which of its files it is."""
    return tuple(map(int, re.findall(r"\d+", path.name)))


def _events(path: Path) -> Iterator[Event]:
    """The events of a file that are no pictures.

    Raises:
        ValueError: The file is cut, or a checksum is wrong; what follows cannot be told apart from noise.
    """
    content = path.read_bytes()
    starts, lengths, end = _records(content)
    wrong = _wrong(np.frombuffer(content, np.uint8), starts, lengths)
    sound = int(wrong.argmax()) if wrong.any() else len(starts)
    for start, length in zip(starts[:sound].tolist(), lengths[:sound].tolist(), strict=True):
        if length <= _LONGEST:
            first = start + _HEAD
            yield Event.FromString(content[first : first + length])
    if sound < len(starts):
        raise ValueError(f"the record at byte {starts[sound]} has a wrong checksum")
    if end < len(content):
        head = np.frombuffer(content, np.uint8)[end : end + _HEAD]
        if len(head) == _HEAD and _stated(head[None], _LENGTH.size) != _checksums(head[None, : _LENGTH.size]):
            raise ValueError(f"the record at byte {end} has a wrong checksum")
        raise ValueError(f"cut within the record at byte {end}")


def _records(content: bytes) -> tuple[np.ndarray, np.ndarray, int]:
    """Where records start and how long their data are, as far as they are all there, and where the next would start."""
    starts, lengths, start = [], [], 0
    while start + _HEAD <= len(content):
        (length,) = _LENGTH.unpack_from(content, start)
        end = start + _HEAD + length + _CHECKSUM.size
        if end > len(content):
            break
        starts.append(start)
        lengths.append(length)
        start = end
    return np.array(starts, np.int64), np.array(lengths, np.int64), start


def _wrong(content: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which records have a wrong checksum, of their length or of their data; of pictures only the length counts."""
    wrong = np.zeros(len(starts), bool)
    for length in np.unique(lengths[lengths <= _LONGEST]):
        own = np.flatnonzero(lengths == length)
        rows = sliding_window_view(content, _HEAD + length + _CHECKSUM.size)[starts[own]]
        data = rows[:, _HEAD : _HEAD + length]
        wrong[own] = _stated(rows, _HEAD + length) != _checksums(data)
    if len(starts):
        heads = sliding_window_view(content, _HEAD)[starts]
        wrong |= _stated(heads, _LENGTH.size) != _checksums(heads[:, : _LENGTH.size])
    return wrong


def _stated(rows: np.ndarray, first: int) -> np.ndarray:
    """The checksums ``(R,)`` that stand in bytes ``(R, L)`` from the given one on."""
    return np.ascontiguousarray(rows[:, first : first + _CHECKSUM.size]).view("<u4")[:, 0]


def _checksums(rows: np.ndarray) -> np.ndarray:
    """CRC-32C of bytes ``(R, L)``, masked as TFRecord has it, ``(R,)``."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


def _table() -> np.ndarray:
    """CRC-32C (RFC 3720, appendix B.4) of each byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _table()
