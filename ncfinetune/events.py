"""Scalars out of TensorBoard's event files, and what in those files is damaged.

TensorBoard's own reader goes on in silence where a record is cut or its checksum is wrong, keeps a sample of the points
of a long run, and takes seconds for it, since it reads the pictures too. A record is an ``Event`` message of Protocol
Buffers. Those of one scalar, which are nearly all, are decoded together; the others by the library.

Legend: ``R`` records, ``L`` bytes of each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from numpy.lib.stride_tricks import sliding_window_view
from tensorboard.compat.proto.event_pb2 import Event

from ncfinetune.tfrecords import sound_records

# What was logged: by tag the steps and values, as they were written.
Points = dict[str, list[tuple[int, float]]]
# The places of some records in their file, their steps and their values, ``(R,)`` each.
_Scalars = tuple[np.ndarray, np.ndarray, np.ndarray]

# A record with one scalar has less than this many bytes; pictures, which have more, are passed over.
_LONGEST = 4096
# A step has at most this many bytes of 7 bits in a record that is decoded here: it is below 2^35.
_STEP_BYTES = 5
# Bytes before the step: the key of the time, the time, the key of the step.
_TIME = 10


def read_events(run: Path) -> tuple[Points, list[str]]:
    """What was logged under each tag, in the order in which it was written, and a line for each file that is damaged.

    Tags are in the order in which they were logged first.

    Args:
        run: The folder with the event files.
    """
    points: Points = defaultdict(list)
    faults = []
    for path in event_files(run):
        scalars, fault = _read(path.read_bytes())
        for tag, (steps, values) in scalars.items():
            points[tag] += zip(steps.tolist(), values.tolist(), strict=True)
        if fault is not None:
            last = max((int(steps.max()) for steps, _ in scalars.values()), default=-1)
            faults.append(f"{path}: {fault}; {taken_until(last)}")
    return dict(points), faults


def taken_until(step: int) -> str:
    """What is taken of a damaged file whose last whole number is of this step; -1 where there is none."""
    return f"numbers until step {step} are taken" if step >= 0 else "no number in it is taken"


def event_files(run: Path) -> list[Path]:
    """The event files in a folder, the oldest first."""
    return sorted(filter(Path.is_file, run.glob("events.out.tfevents.*")), key=_age)


def _age(path: Path) -> tuple[int, ...]:
    """The numbers in a file's name: the second in which it was begun, the process, and which of its files it is."""
    return tuple(map(int, re.findall(r"\d+", path.name)))


def _read(content: bytes) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str | None]:
    """Steps and values by tag in the order of a file, and what is damaged in it."""
    starts, lengths, fault = sound_records(content, _LONGEST)
    found: dict[str, list[_Scalars]] = defaultdict(list)
    plain = np.zeros(len(starts), bool)
    for tag, scalars in _plain_scalars(np.frombuffer(content, np.uint8), starts, lengths):
        plain[scalars[0]] = True
        found[tag].append(scalars)
    others: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    end = len(starts)
    for place in np.flatnonzero(~plain).tolist():
        try:
            for tag, step, value in _scalars_of(content[starts[place] : starts[place] + lengths[place]]):
                others[tag].append((place, step, value))
        except (ValueError, TypeError, DecodeError) as error:
            end, fault = place, str(error)
            break
    for tag, rows in others.items():
        places, steps, numbers = zip(*rows, strict=True)
        found[tag].append((np.array(places), np.array(steps), np.array(numbers)))
    joined = {tag: scalars for tag, parts in found.items() if len((scalars := _in_order(parts, end))[0])}
    first = sorted(joined, key=lambda tag: int(joined[tag][0][0]))
    return {tag: joined[tag][1:] for tag in first}, fault


def _in_order(parts: list[_Scalars], end: int) -> _Scalars:
    """The scalars of one tag in the order of their records, of those before the place ``end``."""
    places, steps, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = places.argsort(kind="stable")
    kept = order[places[order] < end]
    return places[kept], steps[kept], values[kept]


def _scalars_of(record: bytes) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of each scalar in a record.

    Raises:
        DecodeError: The record is no event.
    """
    event = Event.FromString(record)
    for value in event.summary.value:
        if value.HasField("simple_value"):
            yield value.tag, event.step, value.simple_value
        elif value.metadata.plugin_data.plugin_name == "scalars":
            # Imported here alone: it takes as long as the rest of the report's modules together.
            from tensorboard.util.tensor_util import make_ndarray

            yield value.tag, event.step, float(make_ndarray(value.tensor))


def _plain_scalars(content: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[str, _Scalars]]:
    """The records of a time, a step and one scalar, by tag; see `_fields` for what they look like."""
    for length in np.unique(lengths).tolist():
        own = np.flatnonzero(lengths == length)
        rows = sliding_window_view(content, length)[starts[own]]
        for width in range(1, _STEP_BYTES + 1):
            fields = _fields(length, width)
            if fields is None:
                continue
            fits = (rows[:, [*fields]] == [*fields.values()]).all(1)
            fits &= (rows[:, _TIME : _TIME + width - 1] >= 128).all(1) & (rows[:, _TIME + width - 1] < 128)
            chosen, places = rows[fits], own[fits]
            steps = _steps(chosen[:, _TIME : _TIME + width])
            values = np.ascontiguousarray(chosen[:, -4:]).view("<f4")[:, 0].astype(np.float64)
            for tag, which in _tags(chosen[:, _TIME + width + 6 : -5]):
                yield tag, (places[which], steps[which], values[which])


def _fields(length: int, width: int) -> dict[int, int] | None:
    """The bytes, by their place, that a record with one scalar has; None if there is none of this size.

    Protocol Buffers put a key in front of each field, its number and kind: 0x09 the time, 0x10 the step, 0x2a the
    summary, 0x0a its value, 0x0a the tag, 0x15 the number, and behind the key of what has no fixed size its length.

    Args:
        length: Bytes of the record.
        width: Bytes of the step.
    """
    first = _TIME + width
    if length - first - 2 > 127 or length - first - 11 < 1:  # a length of a single byte; a tag
        return None
    sizes = (length - first - 2, length - first - 4, length - first - 11)
    keys = {0: 0x09, _TIME - 1: 0x10, first: 0x2A, first + 2: 0x0A, first + 4: 0x0A, length - 5: 0x15}
    return keys | {first + 1: sizes[0], first + 3: sizes[1], first + 5: sizes[2]}


def _tags(names: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tags in bytes ``(R, L)``, and which rows have each."""
    if not len(names):
        return
    joined = np.ascontiguousarray(names).view(f"S{names.shape[1]}")[:, 0]
    tags, which = np.unique(joined, return_inverse=True)
    order = which.argsort(kind="stable")
    ends = np.bincount(which).cumsum()[:-1]
    for tag, rows in zip(tags.tolist(), np.split(order, ends), strict=True):
        yield tag.decode(errors="replace"), rows


def _steps(digits: np.ndarray) -> np.ndarray:
    """Whole numbers of their bytes ``(R, L)``, each of which has 7 bits, the lowest first."""
    shifts = 7 * np.arange(digits.shape[1], dtype=np.int64)
    return ((digits.astype(np.int64) & 127) << shifts).sum(1)
