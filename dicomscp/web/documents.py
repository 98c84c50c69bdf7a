"""Published documents as they lie: gzip on disk, replaced whole by rename.

A document is opened once and answered from that descriptor alone, so what was replaced in the
meantime is still whole, and its length and ETag are its own.  (Handing the path to the server
would open it a second time, and a new document would be cut to the length of the old one.)

The ETag is the SHA-256 of the uncompressed bytes, so that it is the same on every node.  It costs
one inflation of each document each time it is replaced; a bounded number is remembered by the
file's identity: a document is never written in place.
"""

import hashlib
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from dicomscp.errors import DamagedError

CHUNK_BYTES = 256 * 1024


class Fingerprint(NamedTuple):
    """Of a document's uncompressed bytes."""

    digest: str
    size: int


class Document:
    """One published document, open; blocking, one thread at a time, to be closed."""

    def __init__(self, file: FileIO, size: int, fingerprint: Fingerprint) -> None:
        """*size* is that of the compressed bytes."""
        self._file = file
        self.size = size
        self.fingerprint = fingerprint

    def compressed(self) -> Iterator[bytes]:
        """The bytes as they lie."""
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            yield chunk

    def inflated(self) -> Iterator[bytes]:
        """The uncompressed bytes, in pieces of bounded size."""
        return _inflate(self.compressed())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Documents:
    """The published tree, for reading; safe to share between threads."""

    def __init__(self, published: Path, *, remembered: int = 4096) -> None:
        """*remembered* fingerprints take about 300 bytes each."""
        self._published = published
        self._remembered = remembered
        self._fingerprints: OrderedDict[tuple[int, int, int, int], Fingerprint] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, relative: str) -> Document | None:
        """The document at *relative*, which the caller closes, or None if there is none.

        Raises DamagedError if it is no gzip file or ends too early.
        """
        try:
            file = (self._published / relative).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with _closed_on_error(file):
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            document = Document(file, status.st_size, Fingerprint("", 0))
            document.fingerprint = self._fingerprint(identity, document)
        return document

    def _fingerprint(self, identity: tuple[int, int, int, int], document: Document) -> Fingerprint:
        with self._lock:
            if known := self._fingerprints.get(identity):
                self._fingerprints.move_to_end(identity)
                return known
        found = _fingerprint(document.inflated())
        with self._lock:
            self._fingerprints[identity] = found
            if len(self._fingerprints) > self._remembered:
                self._fingerprints.popitem(last=False)
        return found


@contextmanager
def _closed_on_error(file: FileIO) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


def _fingerprint(pieces: Iterator[bytes]) -> Fingerprint:
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return Fingerprint(digest.hexdigest(), size)


def _inflate(chunks: Iterator[bytes]) -> Iterator[bytes]:
    inflator = zlib.decompressobj(wbits=31)
    try:
        for chunk in chunks:
            pending = chunk
            while pending:
                yield inflator.decompress(pending, CHUNK_BYTES)
                pending = inflator.unconsumed_tail
        while piece := inflator.decompress(b"", CHUNK_BYTES):
            yield piece
    except zlib.error as error:
        raise DamagedError("A published document is damaged; run `dicomscp verify --repair`.") from error
    if not inflator.eof:
        raise DamagedError("A published document ends too early; run `dicomscp verify --repair`.")
