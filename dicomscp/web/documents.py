"""Published documents as they lie: gzip on disk, replaced whole by rename.

A document is opened once and answered from that descriptor alone, so what was replaced in the
meantime is still whole, and its length and ETag are its own.  (Handing the path to the server
would open it a second time, and a new document would be cut to the length of the old one.)

The ETag is the SHA-256 of the uncompressed bytes, so that it is the same on every node.  It costs
one inflation of each document each time it is replaced; a bounded number is remembered by the
file's identity: a document is never written in place.

What lies in the page cache is read where it is asked for (RWF_NOWAIT): to hand 80 KB to another thread and
back costs more than to read them.  What would have to wait for the disk is read in a thread.

Frames that are published as files are documents too, but for their ETag: it is the boundary, which is a
digest of the content and stands at the start, so that no frame is inflated to be sent once.
"""

import hashlib
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeAlias

from dicomscp.dicom.identity import InstanceKey
from dicomscp.disk import read_at_once
from dicomscp.errors import DamagedError
from dicomscp.study import layout

CHUNK_BYTES = 256 * 1024

_DAMAGED = "A published document is damaged; run `dicomscp verify --repair`."
_HEAD_BYTES = 256  # the head of a frame's part has half of it
_DEFLATED_HEAD_BYTES = 1024  # a table of codes comes before it
_PART_HEAD = re.compile(
    rb"--([0-9a-f]{64})\r\nContent-Type: application/octet-stream; transfer-syntax=([0-9.]+)\r\n"
)


class Fingerprint(NamedTuple):
    """Of a document's uncompressed bytes."""

    digest: str
    size: int


_UNKNOWN = Fingerprint("", 0)
_Identity: TypeAlias = tuple[int, int, int, int]  # the last is the size


class FrameHead(NamedTuple):
    """What the body of one frame begins with: its boundary, and the transfer syntax of its part."""

    boundary: str
    transfer_syntax_uid: str


class Document:
    """One published document, open; blocking, one thread at a time, to be closed."""

    def __init__(self, file: FileIO, size: int, fingerprint: Fingerprint) -> None:
        """*size* is that of the compressed bytes."""
        self._file = file
        self.size = size
        self.fingerprint = fingerprint

    def at_once(self) -> bytes | None:
        """The bytes as they lie, if that takes no wait for the disk."""
        return _at_once(self._file, self.size)

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


class FrameFile:
    """A frame that was published as a file, a multipart body; to be closed."""

    def __init__(self, file: FileIO, *, deflated: bool) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self.deflated = deflated

    def at_once(self) -> bytes | None:
        """The bytes as they lie, if that takes no wait for the disk."""
        return _at_once(self._file, self.size)

    def whole(self) -> bytes:
        """The bytes as they lie; blocking."""
        self._file.seek(0)
        return self._file.read()

    def head(self, body: bytes) -> FrameHead:
        """What the *body*, bytes as they lie, begins with.  Raises DamagedError if it is no frame's."""
        begin = body[:_DEFLATED_HEAD_BYTES]
        try:
            head = zlib.decompressobj(wbits=31).decompress(begin, _HEAD_BYTES) if self.deflated else begin
        except zlib.error as error:
            raise DamagedError(_DAMAGED) from error
        part = _PART_HEAD.match(head)
        if part is None:
            raise DamagedError(_DAMAGED)
        return FrameHead(part[1].decode(), part[2].decode())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Documents:
    """The published tree, for reading; safe to share between threads."""

    def __init__(self, published: Path, *, remembered: int = 4096) -> None:
        """*remembered* fingerprints take about 300 bytes each."""
        self._published = published
        self._remembered = remembered
        self._fingerprints: OrderedDict[_Identity, Fingerprint] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, relative: str) -> Document | None:
        """The document at *relative*, which the caller closes, or None if there is none.

        Raises DamagedError if it is no gzip file or ends too early.
        """
        if (file := self._file(relative)) is None:
            return None
        with _closed_on_error(file):
            identity = _identity(file)
            document = Document(file, identity[-1], _UNKNOWN)
            document.fingerprint = self._known(identity) or self._fingerprint(identity, document)
        return document

    def open_known(self, relative: str) -> Document | None:
        """The same without waiting for its bytes; None also if it was not looked at before."""
        if (file := self._file(relative)) is None:
            return None
        with _closed_on_error(file):
            identity = _identity(file)
            if fingerprint := self._known(identity):
                return Document(file, identity[-1], fingerprint)
        file.close()
        return None

    def open_frame(self, key: InstanceKey, number: int, *, gzip: bool) -> FrameFile | None:
        """The file of one frame, a deflated one only if *gzip*; to be closed.  None if there is none."""
        for compressed in (False, True) if gzip else (True,):
            if file := self._file(layout.frame_path(key, number, compressed=compressed)):
                with _closed_on_error(file):
                    return FrameFile(file, deflated=not compressed)
        return None

    def _file(self, relative: str) -> FileIO | None:
        try:
            return FileIO(f"{self._published}/{relative}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _known(self, identity: _Identity) -> Fingerprint | None:
        with self._lock:
            if known := self._fingerprints.get(identity):
                self._fingerprints.move_to_end(identity)
            return known

    def _fingerprint(self, identity: _Identity, document: Document) -> Fingerprint:
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


def _identity(file: FileIO) -> _Identity:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _at_once(file: FileIO, size: int) -> bytes | None:
    content = read_at_once(file.fileno(), size)
    return None if content is None else bytes(content)


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
        raise DamagedError(_DAMAGED) from error
    if not inflator.eof:
        raise DamagedError("A published document ends too early; run `dicomscp verify --repair`.")
