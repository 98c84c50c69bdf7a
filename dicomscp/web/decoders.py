"""Decoders: child processes in which pixels are decoded, rendered and transcoded, and large headers compiled.

Codecs are C, and what they read came from outside.  So no codec runs in the process that serves: a child
is given the file and a place for the result, both as descriptors, and one job at a time.  One that crashes,
hangs or grows costs the job that it has, and the next gets a new one.

    time            an alarm that the kernel rings, whatever a decoder is busy with; then who waits kills
    memory          RLIMIT_DATA: what a child allocates, without the file, which is mapped
    result          RLIMIT_FSIZE on the memory file that it is written to
    waiting         a bounded number of jobs; more are told to come again
    secrets         no core is dumped, for there are patients in it

A child serves many jobs, ends when the process that serves does, and is replaced now and then, so what a
library leaks does not add up.
"""

import contextlib
import mmap
import os
import resource
import signal
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Literal

import orjson
import structlog
from anyio import CapacityLimiter, sleep, to_thread

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Held
from dicomscp.children import Child, start
from dicomscp.dicom.codestream import Codestream
from dicomscp.dicom.elements import is_deflated
from dicomscp.dicom.pixels import NoFrameError, NoPixelsError, Pixels, TooLargeError
from dicomscp.dicom.render import Window
from dicomscp.dicom.transcode import explicit_part10
from dicomscp.errors import BusyError, DicomscpError, RefusedError, TransferSyntaxError
from dicomscp.web.documents import CHUNK_BYTES
from dicomscp.web.imaging import Picture, View, pictured, samples_of
from dicomscp.web.metadata import Metadata

log = structlog.get_logger()

_JOBS_OF_A_CHILD = 500
_MESSAGE_BYTES = 1 << 17
_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 3.0  # after a child should have ended itself

_REFUSALS: dict[str, type[RefusedError]] = {
    "no frame": NoFrameError,
    "no pixels": NoPixelsError,
    "too large": TooLargeError,
    "unknown": TransferSyntaxError,
    "refused": RefusedError,
}


class DecoderError(DicomscpError):
    """The child that had the job crashed or took too long: another one is there for the next."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What decoding may cost, all in all and each job.

    *waiting*: jobs beyond those that *processes* are busy with.  *result_bytes*: of what a job makes.
    *max_pixels*: of one frame decoded, and of all that a picture has.
    """

    processes: int = 2
    waiting: int = 32
    seconds: float = 20.0
    memory_bytes: int = 1 << 30
    result_bytes: int = 1 << 30
    max_pixels: int = 1 << 26


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be made of the dataset that begins at *offset* of a file.

    picture: an image of the media type that *picture* names, and what more it says.
    frame: frame *frame*, native.
    file: the Part 10 file in Explicit VR Little Endian.
    samples: the samples of an image, of *size* bytes and the media type that *picture* names.
    metadata: its metadata, as *metadata* says.
    """

    kind: Literal["picture", "frame", "file", "samples", "metadata"]
    offset: int
    transfer_syntax_uid: str = ""
    size: int = 0
    sop_uid: str = ""
    frame: int = 1
    picture: Picture | None = None
    metadata: Metadata | None = None


class Made:
    """What a job made.  Its memory is given back when nobody has it any more.

    *frames*: how many frames the instance, or image, tells of, and *there* how many of them its pixel data
    hold; 0 for a Part 10 file and for metadata.  *image*: what the samples of an image are.
    """

    def __init__(self, result: int, frames: int, there: int, image: Codestream | None = None) -> None:
        """Of the memory file *result*, which may be closed then."""
        self.size = os.fstat(result).st_size
        self.frames, self.there, self.image = frames, there, image
        self._data = mmap.mmap(result, self.size, access=mmap.ACCESS_READ)

    def chunks(self, size: int) -> Iterator[bytes]:
        """All of it in pieces of *size*."""
        return (self._data[start : start + size] for start in range(0, self.size, size))

    async def sent(self) -> AsyncIterator[bytes]:
        """All of it for a response; it counts as made until the last piece was taken."""
        for piece in self.chunks(CHUNK_BYTES):
            yield piece


class Decoders:
    """The children of this process that decode, started as they are needed; made and closed by one thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Threads of their own: whoever waits for a decoder takes none from the rest of the web server.
        self._places = CapacityLimiter(limits.processes + limits.waiting)
        self._seats = threading.Semaphore(limits.processes)
        self._lock = threading.RLock()  # the collector may let something go in a thread that has it
        self._idle: list[_Decoder] = []
        self._closed = False
        self._kept_bytes = 0  # of what was made and is still being sent

    async def run(self, open_file: Callable[[], tuple[BinaryIO, Job]], *, patient: bool = False) -> Made:
        """What the job makes; *open_file*, called in a thread, says of which file, and it is closed.

        Raises BusyError if too many wait, or there is no room for what is made beside what is still being
        sent; who is *patient* waits, and keeps nothing meanwhile.  Raises RefusedError for what the file does
        not have (`NoPixelsError`, `TooLargeError`), DecoderError if the child died of it.
        """
        size = 0  # that it had when there was no room for it
        while True:
            if self._places.borrowed_tokens < self._places.total_tokens and self._has_room(size):
                made = await to_thread.run_sync(self._run, open_file, limiter=self._places)
                if isinstance(made, Made):
                    return made
                size = made
            if not patient:
                raise BusyError("More images are asked for than can be made at a time; ask again shortly")
            await sleep(_LOOK_SECONDS)

    def _has_room(self, size: int) -> bool:
        """Whether *size* bytes more may be kept; whatever one job may make has room if nothing else is."""
        limit = self._limits.result_bytes
        return not self._kept_bytes or (self._kept_bytes < limit and self._kept_bytes + size <= limit)

    def close(self) -> None:
        """End the children; those that are busy end with their job."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for decoder in idle:
            decoder.end()

    def _run(self, open_file: Callable[[], tuple[BinaryIO, Job]]) -> Made | int:
        """What the job makes, or its size if there is no room for it; 0 if there was none before it began."""
        with self._seats:
            if not self._has_room(0):  # any more: others have made something while this one waited
                return 0
            file, job = open_file()
            with file:
                decoder = self._take()
                try:
                    made = decoder.do(job, file)
                except DecoderError as error:
                    decoder.end()
                    log.warning("decoder_died", sop_uid=job.sop_uid, reason=str(error))
                    raise
                except BaseException:
                    self._give_back(decoder)
                    raise
                self._give_back(decoder)
                return made if self._is_kept(made) else made.size

    def _is_kept(self, made: Made) -> bool:
        """Whether there is room for *made*; then it is counted until nobody has it any more."""
        with self._lock:
            if not self._has_room(made.size):
                return False
            self._kept_bytes += made.size
        weakref.finalize(made, self._let_go, made.size)
        return True

    def _let_go(self, size: int) -> None:
        with self._lock:
            self._kept_bytes -= size

    def _take(self) -> "_Decoder":
        with self._lock:
            while self._idle:
                decoder = self._idle.pop()
                if decoder.is_alive:
                    return decoder
                decoder.end()
        return _Decoder(self._limits)

    def _give_back(self, decoder: "_Decoder") -> None:
        with self._lock:
            if not self._closed and decoder.done < _JOBS_OF_A_CHILD:
                self._idle.append(decoder)
                return
        decoder.end()


def opened(
    archive: Archive,
    held: Held,
    kind: Literal["picture", "frame", "file", "metadata"],
    *,
    frame: int = 1,
    picture: Picture | None = None,
    metadata: Metadata | None = None,
) -> tuple[BinaryIO, Job]:
    """The file of *held*, open, and the job of that *kind* to be done with it."""
    with archive.open(held) as instance:
        file = instance.reopened()
        return file, Job(
            kind=kind,
            offset=instance.dataset_offset,
            transfer_syntax_uid=instance.transfer_syntax_uid,
            sop_uid=held.key.sop_uid,
            frame=frame,
            picture=picture,
            metadata=metadata,
        )


class _Decoder:
    """One child, seen from us."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = limits.seconds
        self.done = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(limits.seconds + _GRACE_SECONDS)
        try:
            with theirs:
                self._child: Child = start("decoder", _serve, theirs, limits)
        except BaseException:
            self._socket.close()
            raise

    @property
    def is_alive(self) -> bool:
        return self._child.is_alive()

    def do(self, job: Job, file: BinaryIO) -> Made:
        self.done += 1
        result = os.memfd_create("made", os.MFD_CLOEXEC)
        try:
            said = self._asked(job, file.fileno(), result)
            if refused := _REFUSALS.get(said["outcome"]):
                raise refused(said["sentence"])
            if said["outcome"] != "made":
                raise DecoderError(said["sentence"])
            image = Codestream(*said["image"]) if said["image"] else None
            return Made(result, said["frames"], said["there"], image)
        finally:
            os.close(result)

    def _asked(self, job: Job, file: int, result: int) -> dict[str, Any]:
        """What the child says of *job*.  Raises DecoderError if it says nothing any more."""
        began = time.monotonic()
        reply = b""
        with contextlib.suppress(OSError):  # a timeout is one too: its end is what is told
            socket.send_fds(self._socket, [_message(job)], [file, result])
            reply = self._socket.recv(_MESSAGE_BYTES)
        if reply:
            return dict(orjson.loads(reply))
        late = time.monotonic() - began >= self._seconds
        self._child.kill()
        self._child.join()
        status = self._child.exitcode or 0
        if late or status == -signal.SIGALRM:
            raise DecoderError(f"It took more than {self._seconds:g} s to make, and was given up.")
        end = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise DecoderError(f"It cannot be made: what makes it came to an end ({end}).")

    def end(self) -> None:
        """Have it end: it does when its socket is closed."""
        self._socket.close()
        self._child.join(_GRACE_SECONDS)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()


# ── in the child ─────────────────────────────────────────────────────────────────────────────────


def _serve(connection: socket.socket, limits: Limits) -> None:
    """Do the jobs that come by *connection*, until its end."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for output in (1, 2):  # libraries tell of every bitstream that they do not like
        os.dup2(nowhere, output)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.result_bytes, limits.result_bytes))
    lately = _Lately()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 2)
        if not message:
            return
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        file, result = descriptors
        try:
            said = _done(_job(orjson.loads(message)), file, result, limits, lately)
        finally:
            os.close(file)
            os.close(result)
            signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(orjson.dumps(said))


def _message(job: Job) -> bytes:
    tuples = {
        "picture": job.picture and job.picture._asdict(),
        "metadata": job.metadata and job.metadata._asdict(),
    }
    return orjson.dumps(asdict(job) | tuples)


def _job(said: dict[str, Any]) -> Job:
    picture, metadata = said.pop("picture"), said.pop("metadata")
    if metadata:
        return Job(**said, metadata=Metadata(**metadata))
    if picture is None:
        return Job(**said)
    window, view = picture["window"], picture["view"]
    picture |= {
        "frames": tuple(picture["frames"]),
        "window": Window(**window) if window else None,
        "view": View(**view) if view else None,
    }
    return Job(**said, picture=Picture(**picture))


class _Lately:
    """What was read of the last instance, for viewers ask for frame after frame.

    While it is here its file is mapped, so no other can have its number.
    """

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._pixels: Pixels | None = None

    def pixels(self, job: Job, file: int, limits: Limits) -> Pixels:
        """The pixels of the dataset in *file* that *job* is of."""
        stat = os.fstat(file)
        key = (stat.st_dev, stat.st_ino, job.offset)
        if self._pixels is None or key != self._key:
            self._pixels = None
            pixels = Pixels(_dataset(job, file), job.transfer_syntax_uid, max_pixels=limits.max_pixels)
            if is_deflated(job.transfer_syntax_uid):
                return pixels  # which holds all of it, inflated
            self._key, self._pixels = key, pixels
        return self._pixels


def _dataset(job: Job, file: int) -> memoryview:
    """The dataset that *job* is of, mapped for as long as somebody looks at it."""
    return memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))[job.offset :]


def _done(job: Job, file: int, result: int, limits: Limits, lately: _Lately) -> dict[str, Any]:
    """What became of *job*; what was made is in *result*."""
    try:
        if job.kind == "samples":
            return {"outcome": "made", **_decoded_image(job, file, result, limits)}
        return {"outcome": "made", **_made(job, file, result, limits, lately), "image": None}
    except NoFrameError as error:
        return {"outcome": "no frame", "sentence": str(error)}
    except NoPixelsError as error:
        return {"outcome": "no pixels", "sentence": str(error)}
    except TooLargeError as error:
        return {"outcome": "too large", "sentence": str(error)}
    except TransferSyntaxError as error:
        return {"outcome": "unknown", "sentence": str(error)}
    except RefusedError as error:
        return {"outcome": "refused", "sentence": str(error)}
    except MemoryError:
        sentence = f"It takes more than {limits.memory_bytes >> 20} MiB of memory to make."
        return {"outcome": "too large", "sentence": sentence}
    except OSError as error:
        sentence = f"What is made is more than {limits.result_bytes >> 20} MiB ({error.strerror})."
        return {"outcome": "too large", "sentence": sentence}
    except Exception as error:  # noqa: BLE001 -- one job is one unit of work
        sentence = f"It cannot be made: {type(error).__name__} in what makes it."
        return {"outcome": "failed", "sentence": sentence}


def _made(job: Job, file: int, result: int, limits: Limits, lately: _Lately) -> dict[str, int]:
    """Make what is asked for; how many frames the instance tells of, and how many are there, 0 for a file."""
    if job.kind == "file":
        for piece in explicit_part10(
            _dataset(job, file), job.transfer_syntax_uid, max_pixels=limits.max_pixels
        ):
            _write(result, piece)
        return {"frames": 0, "there": 0}
    if job.metadata:
        _write(result, job.metadata.of(_dataset(job, file), job.transfer_syntax_uid))
        return {"frames": 0, "there": 0}
    pixels = lately.pixels(job, file, limits)
    if job.picture:
        _write(result, pictured(pixels, job.picture, limits.max_pixels))
    else:
        _write(result, pixels.native(job.frame)[0])
    return {"frames": pixels.frames, "there": pixels.there}


def _decoded_image(job: Job, file: int, result: int, limits: Limits) -> dict[str, Any]:
    """Write the samples of an image; what is said of them."""
    data = bytes(_dataset(job, file)[: job.size])
    media_type = job.picture.media_type if job.picture else ""
    image, frames, samples = samples_of(data, media_type, limits.max_pixels)
    for frame in samples:
        _write(result, frame)
    return {"frames": frames, "there": frames, "image": list(image)}


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
