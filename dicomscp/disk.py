"""The seam between the durable parts and the operating system.

Every write, sync and change of a name on the way to Success, and after it until an instance is
settled, goes through a Disk, and so do the names of documents.  A test puts one in that records, fails or
forgets.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

Buffer = bytes | bytearray | memoryview

BLOCK_BYTES = 4096
"""Alignment that O_DIRECT asks of addresses, offsets and lengths on every disk in use."""

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _EXCHANGE = -100, 2  # renameat2(2)


MOST_AT_ONCE_BYTES = 4 * 1024 * 1024
"""Of what is held whole, and read where others wait meanwhile: a millisecond's worth of copying."""


def read_at_once(descriptor: int, size: int, offset: int = 0) -> bytearray | None:
    """*size* bytes from *offset* if the page cache has all of them and they are not too many; never waits."""
    if size > MOST_AT_ONCE_BYTES:
        return None
    content = bytearray(size)
    try:
        read = os.preadv(descriptor, [content], offset, os.RWF_NOWAIT)
    except OSError:  # nothing of it is there, or the file system cannot say: whoever waits is told why
        return None
    return content if read == size else None


class Disk:
    """The real disk.  Methods raise OSError as the operating system does; safe to share between threads."""

    def open(self, path: Path, flags: int) -> int:
        """Open *path*, private to our user; the caller closes."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def open_direct(self, path: Path) -> int:
        """Open *path* for aligned writes past the page cache, or for plain writes where that cannot be."""
        with contextlib.suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def close(self, descriptor: int) -> None:
        """Close *descriptor*."""
        os.close(descriptor)

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of *buffers* at *offset*."""
        wanted = sum(map(len, buffers))
        try:
            written = os.pwritev(descriptor, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                raise
            written = os.pwritev(descriptor, buffers, offset)
        if written != wanted:
            rest = memoryview(b"".join(buffers))[written:]
            while rest:
                written = os.pwrite(descriptor, rest, offset + wanted - len(rest))
                rest = rest[written:]

    def truncate(self, descriptor: int, size: int) -> None:
        """Make the file *size* bytes long."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Return once the file's bytes, and what is needed to read them back, are on stable storage."""
        os.fdatasync(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Return once the names in the folder *path* are on stable storage."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_all(self, descriptor: int) -> None:
        """Return once everything on the file system of *descriptor* is on stable storage.

        Keep one descriptor open over time: errors met since it was opened or last asked are told
        to it (Linux 5.8 and later).
        """
        if _libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def link(self, path: Path, name: Path) -> None:
        """Give the file at *path* a second *name*; FileExistsError if that is taken."""
        os.link(path, name)

    def rename(self, path: Path, name: Path) -> None:
        """Give the file at *path* another *name*, in place of what had it."""
        os.rename(path, name)

    def exchange(self, path: Path, name: Path) -> None:
        """Give the folder at *path* the *name*, and what had that the name *path*.

        In one step, where the file system can.
        """
        if not name.exists():
            os.rename(path, name)
        elif _libc.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(name), _EXCHANGE) != 0:
            code = ctypes.get_errno()
            if code not in {errno.EINVAL, errno.ENOSYS}:
                raise OSError(code, os.strerror(code))
            aside = path.with_name(f"{path.name}.old")
            os.rename(name, aside)
            os.rename(path, name)
            os.rename(aside, path)

    def unlink(self, path: Path) -> None:
        """Take the name *path* away, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def make_directory(self, path: Path) -> None:
        """Make the folder *path* and those above it, private to our user, where they are missing."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove_directory(self, path: Path) -> bool:
        """Take the folder *path* away if it is empty; False if it stays."""
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                raise
            return False
        return True

    def free_bytes(self, path: Path) -> int:
        """What an ordinary user may still write on the file system of *path*."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


def _leave_direct(descriptor: int) -> bool:
    """Go on through the page cache where the disk asks for another alignment; False if we were there."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)
