"""An archive that is stored into over HTTP, and what files what came."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from dicomscp.archive.archive import Archive, Intake
from dicomscp.archive.filing import Filing
from dicomscp.archive.index import Index
from dicomscp.disk import Disk
from dicomscp.telemetry.metrics import IntakeMetrics
from dicomscp.web.store import StoreSettings
from tests.databases import open_sqlite

SEGMENT = 4 << 20
BOUNDARY = "a-boundary"


class StoringArchive:
    """An archive with a journal; *file* does what the pipeline would."""

    def __init__(self, root, disk=None, *, inline_bytes=64 << 10, reserve_bytes=0, max_variants=3):
        self.root, self.disk = root, disk or Disk()
        self.engine = open_sqlite(root / "index.sqlite")
        self.index = Index(self.engine)
        self.intake = Intake(
            root,
            "web",
            self.disk,
            relaxed=False,
            reserve_bytes=reserve_bytes,
            max_variants=max_variants,
            inline_bytes=inline_bytes,
            segment_bytes=SEGMENT,
        )
        self.archive = Archive(root, self.index, intake=self.intake, wait_seconds=0)
        self.metrics = IntakeMetrics()

    def settings(self, **settings):
        return StoreSettings(
            archive=lambda: self.archive, aside=self.root / "incoming", metrics=self.metrics, **settings
        )

    def file(self):
        """File what survives: that is what the journal has synced."""
        filing = Filing(self.root, self.index, Disk(), segment_bytes=SEGMENT)
        while filing.step().entries:
            pass
        filing.settle()
        filing.close()

    def slots(self):
        """What was received into files of its own, complete or not."""
        return [
            path for path in (self.root / "incoming" / self.intake.journal.name).iterdir() if _has_bytes(path)
        ]

    def close(self):
        self.archive.close()
        self.engine.dispose()


def _has_bytes(path: Path) -> bool:
    """Unless it is gone since it was listed."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size > 0
    return False


def multipart(parts: Iterable[bytes], content_type="application/dicom", *, heads=None) -> bytes:
    """A body of *parts*, each under the head of its own or one that names *content_type*."""
    body = b""
    for number, part in enumerate(parts):
        head = heads[number] if heads else f"Content-Type: {content_type}\r\n"
        body += f"--{BOUNDARY}\r\n{head}\r\n".encode() + part + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def said(content_type="application/dicom", **fields):
    """The header fields of a request with such a body."""
    return {"content-type": f'multipart/related; type="{content_type}"; boundary={BOUNDARY}', **fields}
