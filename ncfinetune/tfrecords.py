"""Records in files of TensorFlow's format, and where such a file is damaged.

A record is its length, that one's checksum, data, and their checksum. The checksums of all records are computed at
once, byte by byte.

Legend: ``R`` records, ``L`` bytes of each.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_HEAD = _LENGTH.size + _CHECKSUM.size


def sound_records(content: bytes, longest: int) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Where the data of records start and how long they are, up to the first damage, and what that is.

    What follows damage cannot be told apart from noise.

    Args:
        content: A file.
        longest: Records with more bytes of data are left out; of them the checksum of the length alone counts.
    """
    data = np.frombuffer(content, np.uint8)
    starts, lengths, end = _records(content)
    wrong = _wrong(data, starts, lengths, longest)
    fault = None
    if wrong.any():
        first = int(wrong.argmax())
        fault = f"the record at byte {starts[first]} has a wrong checksum"
        starts, lengths = starts[:first], lengths[:first]
    elif end < len(content):
        head = data[end : end + _HEAD]
        whole = len(head) < _HEAD or _stated(head[None], _LENGTH.size) == _checksums(head[None, : _LENGTH.size])
        fault = f"cut within the record at byte {end}" if whole else f"the record at byte {end} has a wrong checksum"
    short = lengths <= longest
    return starts[short] + _HEAD, lengths[short], fault


def _records(content: bytes) -> tuple[np.ndarray, np.ndarray, int]:
    """Where records start and how long their data are, as far as they are all there, and where the next would start."""
    ends, end, whole, length_at = [0], 0, len(content), _LENGTH.unpack_from
    while end + _HEAD <= whole:
        end += length_at(content, end)[0] + _HEAD + _CHECKSUM.size
        ends.append(end)
    if end > whole:
        ends.pop()
    places = np.array(ends, np.int64)
    return places[:-1], np.diff(places) - _HEAD - _CHECKSUM.size, ends[-1]


def _wrong(content: np.ndarray, starts: np.ndarray, lengths: np.ndarray, longest: int) -> np.ndarray:
    """Which records have a wrong checksum, of their length or, if they are not too long, of their data."""
    wrong = np.zeros(len(starts), bool)
    for length in np.unique(lengths[lengths <= longest]):
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
