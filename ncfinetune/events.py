"""Scalars out of TensorBoard's event files, and what in those files is damaged.

TensorBoard's own reader goes on in silence where a record is cut or its checksum is wrong, and takes seconds for the
scalars of a long run, since it reads the pictures too. The format is that of TFRecord: length, its checksum, data,
their checksum; the data are an ``Event`` message.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
# A record with one scalar has less than this many bytes; pictures, which have more, are passed over.
_LONGEST = 4096


def read_scalars(run: Path) -> tuple[dict[str, list[float]], list[str]]:
    """Values by tag in the order of their steps, and a line for each file that is damaged.

    Of two values at one step the later one counts, as where a run was resumed from before its end.

    Args:
        run: The folder with the event files.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    faults = []
    for path in sorted(run.glob("events.out.tfevents.*"), key=_age):
        last = -1
        try:
            for event in _events(path):
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        values[value.tag][event.step] = value.simple_value
                    elif value.metadata.plugin_data.plugin_name == "scalars":
                        values[value.tag][event.step] = float(make_ndarray(value.tensor))
                last = max(last, event.step)
        except (ValueError, TypeError, DecodeError) as error:
            until = f"numbers until step {last} are taken" if last >= 0 else "no number in it is taken"
            faults.append(f"{path}: {error}; {until}")
    return {tag: [found[step] for step in sorted(found)] for tag, found in values.items()}, faults


def _age(path: Path) -> tuple[int, ...]:
    """The numbers in a file's name: the second in which it was begun, the process, and which of its files it is."""
    return tuple(map(int, re.findall(r"\d+", path.name)))


def _events(path: Path) -> Iterator[Event]:
    """The events of a file that are no pictures.

    Raises:
        ValueError: The file is cut, or a checksum is wrong; what follows cannot be told apart from noise.
    """
    content = memoryview(path.read_bytes())
    start = 0
    while start < len(content):
        head = content[start : start + _LENGTH.size]
        if len(content) - start < _LENGTH.size + _CHECKSUM.size:
            raise ValueError(f"cut within the record at byte {start}")
        if masked_crc32c(bytes(head)) != _CHECKSUM.unpack_from(content, start + _LENGTH.size)[0]:
            raise ValueError(f"the record at byte {start} has a wrong checksum")
        (length,) = _LENGTH.unpack(head)
        first = start + _LENGTH.size + _CHECKSUM.size
        if len(content) < first + length + _CHECKSUM.size:
            raise ValueError(f"cut within the record at byte {start}")
        if length <= _LONGEST:
            data = bytes(content[first : first + length])
            if masked_crc32c(data) != _CHECKSUM.unpack_from(content, first + length)[0]:
                raise ValueError(f"the record at byte {start} has a wrong checksum")
            yield Event.FromString(data)
        start = first + length + _CHECKSUM.size
