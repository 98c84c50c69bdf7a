"""What a disk may keep when power fails, worked out from a record of what was asked of it.

Recorder is a real Disk that also writes down every write, sync and change of a name.  `survivors`
builds, under another folder, one state that is legal after the power failed behind a given step:

- bytes written to a file are kept if the file, or the whole file system, was synced afterwards;
  else each 512-byte sector of each write is kept or not, as it falls;
- names made or taken away are kept if their folder, or all, was synced afterwards; else each is
  kept or not; a folder whose making was not kept takes what is below with it.

That is more than one file system does to anybody, and all that POSIX allows.
"""

import os
import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from dicomscp.disk import Disk

SECTOR = 512


@dataclass
class Step:
    """One thing asked of the disk."""

    kind: str
    path: str = ""
    other: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    size: int = 0


class Recorder(Disk):
    """The real disk, writing down what it is asked."""

    def __init__(self, root: Path):
        self.root = root
        self.steps: list[Step] = []
        self._inodes: dict[int, int] = {}  # by descriptor
        self._files: dict[int, int] = {}  # which of the files that had an inode number, by that
        self._lock = threading.RLock()

    def note(self, kind, **facts):
        with self._lock:
            self.steps.append(Step(kind, **facts))

    def _name(self, path):
        return str(Path(path).relative_to(self.root))

    def _opened(self, descriptor, *, new=False):
        inode = os.fstat(descriptor).st_ino
        if new:
            self._files[inode] = self._files.get(inode, 0) + 1
        self._inodes[descriptor] = self._numbered(inode)

    def _numbered(self, inode):
        """The file that has this inode number now, told apart from those that had it before."""
        return self._files.get(inode, 0) << 48 | inode

    def _note_others(self, path):
        """Files in the folder *path* that were made by other means than this disk."""
        made = {step.path for step in self.steps if step.kind == "create"}
        for file in path.iterdir():
            if file.is_file() and self._name(file) not in made:
                descriptor = os.open(file, os.O_RDONLY)
                self._opened(descriptor, new=True)
                inode = self._inodes.pop(descriptor)
                os.close(descriptor)
                self.note("create", path=self._name(file), inode=inode)
                self.note("write", inode=inode, data=file.read_bytes())

    def open(self, path, flags):
        with self._lock:
            new = bool(flags & os.O_CREAT) and not Path(path).exists()
            descriptor = super().open(path, flags)
            self._opened(descriptor, new=new)
            if new:
                self.note("create", path=self._name(path), inode=self._inodes[descriptor])
            return descriptor

    def open_direct(self, path):
        with self._lock:
            descriptor = super().open_direct(path)
            self._opened(descriptor)
            return descriptor

    def write(self, descriptor, buffers, offset):
        with self._lock:
            super().write(descriptor, buffers, offset)
            self.note(
                "write", inode=self._inodes[descriptor], offset=offset, data=b"".join(map(bytes, buffers))
            )

    def truncate(self, descriptor, size):
        with self._lock:
            super().truncate(descriptor, size)
            self.note("truncate", inode=self._inodes[descriptor], size=size)

    def sync(self, descriptor):
        with self._lock:
            super().sync(descriptor)
            self.note("sync", inode=self._inodes[descriptor])

    def sync_directory(self, path):
        with self._lock:
            if Path(path).name.startswith("."):  # a journal in the making
                self._note_others(Path(path))
            super().sync_directory(path)
            self.note("sync_directory", path=self._name(path))

    def sync_all(self, descriptor):
        with self._lock:
            super().sync_all(descriptor)
            self.note("sync_all")

    def link(self, path, name):
        with self._lock:
            super().link(path, name)
            inode = self._numbered(Path(name).stat().st_ino)
            self.note("link", path=self._name(path), other=self._name(name), inode=inode)

    def rename(self, path, name):
        with self._lock:
            file = Path(path).is_file()
            inode = self._numbered(Path(path).stat().st_ino) if file else 0
            super().rename(path, name)
            self.note("rename", path=self._name(path), other=self._name(name), inode=inode)

    def unlink(self, path):
        with self._lock:
            there = Path(path).exists()
            super().unlink(path)
            if there:
                self.note("unlink", path=self._name(path))

    def remove_directory(self, path):
        with self._lock:
            gone = super().remove_directory(path)
            if gone:
                self.note("rmdir", path=self._name(path))
            return gone

    def make_directory(self, path):
        with self._lock:
            missing = [one for one in (path, *Path(path).parents) if not one.exists()]
            super().make_directory(path)
            for one in reversed(missing):
                self.note("mkdir", path=self._name(one))


def survivors(steps: list[Step], upto: int, folder: Path, rng: random.Random) -> None:
    """Build in *folder* one legal state after *steps* up to *upto*."""
    past = steps[:upto]
    names, files, folders = _replay(past, rng)
    for path in sorted(folders):
        (folder / path).mkdir(parents=True, exist_ok=True)
    made: dict[int, Path] = {}
    for path, inode in names.items():
        target = folder / path
        if str(Path(path).parent) not in folders:
            continue
        if inode in made:
            os.link(made[inode], target)
        else:
            target.write_bytes(bytes(files.get(inode, b"")))
            made[inode] = target
    for home in (folder / "journal").glob("*-*"):
        (home / "lock").write_bytes(b"")


def _replay(past, rng):
    names: dict[str, int] = {}
    files: dict[int, bytearray] = {}
    folders: set[str] = {"."}
    synced = _Synced(past)
    for index, step in enumerate(past):
        if step.kind in {"write", "truncate"}:
            _apply_bytes(files, step, rng, kept=synced.file(step.inode, index))
        elif step.kind == "mkdir":
            parent = str(Path(step.path).parent)
            if parent in folders and (synced.folder(parent, index) or rng.random() < 0.7):
                folders.add(step.path)
        elif step.kind == "rmdir":
            if synced.folder(str(Path(step.path).parent), index) or rng.random() < 0.5:
                _apply_rmdir(names, folders, step.path)
        elif step.kind in {"create", "link", "unlink", "rename"}:
            touched = [str(Path(p).parent) for p in (step.path, step.other) if p]
            if any(synced.folder(parent, index) for parent in touched) or rng.random() < 0.5:
                _apply_name(names, folders, step)
    return names, files, folders


class _Synced:
    """Whether a file or a folder is synced behind a step: alone, or with all others."""

    def __init__(self, past):
        self._all = -1
        self._files, self._folders = {}, {}
        for index, step in enumerate(past):
            if step.kind == "sync_all":
                self._all = index
            elif step.kind == "sync":
                self._files[step.inode] = index
            elif step.kind == "sync_directory":
                self._folders[step.path] = index

    def file(self, inode, index):
        return max(self._all, self._files.get(inode, -1)) > index

    def folder(self, path, index):
        return max(self._all, self._folders.get(path, -1)) > index


def _apply_name(names, folders, step):
    if step.kind == "create":
        names[step.path] = step.inode
    elif step.kind == "unlink":
        names.pop(step.path, None)
    elif step.kind == "link":
        names[step.other] = step.inode
    elif step.kind == "rename" and step.inode:  # of a file, whatever earlier names of it were kept
        names.pop(step.path, None)
        names[step.other] = step.inode
    elif step.kind == "rename" and step.path in folders:
        _move_folder(names, folders, step.path, step.other)


def _apply_rmdir(names, folders, path):
    """The folder goes with whatever name in it did not go before; it was empty."""
    folders.discard(path)
    for one in [n for n in names if n.startswith(path + "/")]:
        del names[one]


def _move_folder(names, folders, path, other):
    for one in [f for f in folders if f == path or f.startswith(path + "/")]:
        folders.discard(one)
        folders.add(other + one[len(path) :])
    for one in [n for n in names if n.startswith(path + "/")]:
        names[other + one[len(path) :]] = names.pop(one)


def _apply_bytes(files, step, rng, *, kept):
    file = files.setdefault(step.inode, bytearray())
    if step.kind == "truncate":
        if kept or rng.random() < 0.5:
            del file[step.size :]
            file.extend(bytes(step.size - len(file)))
        return
    end = step.offset + len(step.data)
    mode = "all" if kept else rng.choice(["all", "none", "sectors", "prefix"])
    if mode == "none":
        return
    if len(file) < end:
        file.extend(bytes(end - len(file)))
    if mode == "all":
        file[step.offset : end] = step.data
        return
    stop = rng.randrange(len(step.data) + 1)
    for start in range(0, len(step.data), SECTOR):
        if (mode == "prefix" and start < stop) or (mode == "sectors" and rng.random() < 0.5):
            piece = step.data[start : start + SECTOR]
            file[step.offset + start : step.offset + start + len(piece)] = piece


def clear(folder: Path) -> None:
    """Take away a state that was looked at."""
    shutil.rmtree(folder, ignore_errors=True)
