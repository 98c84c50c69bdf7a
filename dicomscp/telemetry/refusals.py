"""Refusals: what was not taken lately, and why, for a person to look at.

    run/refusals/<part>     a fixed number of records of a fixed length, one for each kind of refusal

A process notes what it refuses; whoever shows it reads the files of all.  The same refusal again, of the
same sender for the same reason, is counted in the record that it has: a modality that resends a thousand
instances fills one.  A new one takes the place of the one that was met longest ago, so neither the number
of senders nor that of reasons makes a file grow.  It is not synced, and an earlier run's are taken away:
the log has them all.

A record has AE titles, addresses and sentences of ours.  UIDs, and what a sentence quotes of a sender, are
taken out: nothing of a patient is there.
"""

import os
import re
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import orjson

_RECORDS, _RECORD_BYTES = 32, 1024
_RECORD = struct.Struct("<IH")  # CRC-32 of length and text, length
_TEXT, _AE_TITLE, _ADDRESS, _KIND = 160, 64, 45, 16  # characters; four bytes each still fit
_QUOTED = re.compile(r"""(?<!\w)(['"]).*\1|[0-9]+(?:\.[0-9]+){4,}""", re.DOTALL)


class Refusal(NamedTuple):
    """What was refused so many *times*, first and last at these seconds since 1970.

    *kind* is one of a few words.  *address* is "" where it says nothing.
    """

    calling_ae: str
    address: str
    kind: str
    reason: str
    times: int
    first_at: float
    last_at: float


class Refusals:
    """The refusals of one part; safe to share between threads.

    Nothing is raised: what the disk does not take is not told here.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        """Note in the file *path*, and go on from what the part noted there before it was restarted."""
        self._now, self._lock = now, threading.Lock()
        self._noted: OrderedDict[tuple[str, ...], tuple[int, Refusal]] = OrderedDict()
        self._descriptor = -1
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(
                self._descriptor, 0, _RECORDS * _RECORD_BYTES
            )  # so that a full disk takes them
            before = sorted(_records(os.pread(self._descriptor, _RECORDS * _RECORD_BYTES, 0)), key=_age)
        except OSError:
            return
        self._noted.update((_what(refusal), (place, refusal)) for place, refusal in before)

    def note(self, kind: str, reason: str, *, calling_ae: str = "", address: str = "") -> None:
        """Something of *calling_ae* was not taken, because of *reason*."""
        what = (
            _plain(calling_ae, _AE_TITLE),
            _plain(address, _ADDRESS),
            _plain(kind, _KIND),
            _plain(_QUOTED.sub("…", reason), _TEXT),
        )
        now = self._now()
        with self._lock:
            if what not in self._noted:
                self._noted[what] = self._free(), Refusal(*what, 0, now, now)
            place, refusal = self._noted.pop(what)
            refusal = refusal._replace(times=refusal.times + 1, last_at=now)
            self._noted[what] = place, refusal
            self._write(place, refusal)

    def close(self) -> None:
        """Give the descriptor back; what is noted after is not told."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def _free(self) -> int:
        """A place for a record: one that has none, or that of the refusal that was met longest ago."""
        if len(self._noted) >= _RECORDS:
            _, (place, _) = self._noted.popitem(last=False)
            return place
        taken = {place for place, _ in self._noted.values()}
        return next(place for place in range(_RECORDS) if place not in taken)

    def _write(self, place: int, refusal: Refusal) -> None:
        text = orjson.dumps(refusal._asdict())
        told = struct.pack("<H", len(text)) + text
        record = struct.pack("<I", zlib.crc32(told)) + told
        if self._descriptor >= 0:
            try:
                os.pwrite(self._descriptor, record.ljust(_RECORD_BYTES, b"\0"), place * _RECORD_BYTES)
            except OSError:
                return


def recent(directory: Path, most: int) -> list[Refusal]:
    """The refusals noted by all parts in *directory*, at most so many, those met last first.

    What several parts refused in the same way is one.
    """
    found: dict[tuple[str, ...], Refusal] = {}
    for path in sorted(directory.glob("*")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        for _, refusal in _records(data):
            other = found.get(_what(refusal), refusal._replace(times=0))
            found[_what(refusal)] = refusal._replace(
                times=refusal.times + other.times,
                first_at=min(refusal.first_at, other.first_at),
                last_at=max(refusal.last_at, other.last_at),
            )
    return sorted(found.values(), key=lambda refusal: refusal.last_at, reverse=True)[:most]


def clean(directory: Path) -> None:
    """Begin without any: what an earlier run left goes.  Before any process notes."""
    for path in directory.glob("*"):
        path.unlink(missing_ok=True)


def _records(data: bytes) -> list[tuple[int, Refusal]]:
    """The records that are whole, with their places: one may be read while it is written."""
    found = []
    for place in range(min(_RECORDS, len(data) // _RECORD_BYTES)):
        start = place * _RECORD_BYTES
        crc, length = _RECORD.unpack_from(data, start)
        told = data[start + 4 : start + _RECORD.size + length]
        if length and zlib.crc32(told) == crc:
            found.append((place, Refusal(**orjson.loads(told[2:]))))
    return found


def _what(refusal: Refusal) -> tuple[str, ...]:
    return refusal[:4]


def _age(record: tuple[int, Refusal]) -> float:
    return record[1].last_at


def _plain(text: str, most: int) -> str:
    """*text* in so many characters, all of which can be printed."""
    short = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(character if character.isprintable() else "�" for character in short)
