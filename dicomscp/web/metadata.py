"""The metadata of one instance, made out of its file when they are asked for, as documents are compiled.

What that costs grows with the header: a sequence of a million items takes seconds, and in XML a hundred times
its bytes of memory.  So only a small header is compiled in the process that serves; any other, and what is
deflated, whose size nobody knows, in a child (`decoders`), which has its bounds.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from dicomscp.dicom.bulk import after_pixels, before_pixels
from dicomscp.dicom.elements import Buffer, is_deflated
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.xmlmodel import native_model
from dicomscp.errors import LimitError

_SMALL_BYTES = 256 << 10  # 30,000 items at most; of the images of most modalities it is some 10 KiB
_MAX_OBJECTS = 250_000  # in JSON of which XML is made here: the functional groups of 5,000 frames


class Metadata(NamedTuple):
    """How the metadata of an instance are made: as documents are, and as XML instead of JSON if *is_xml*."""

    bulk_uri: str
    default_charset: str
    inline_bytes: int
    private_un: Literal["parse", "keep"]
    is_xml: bool

    def of(self, dataset: Buffer, transfer_syntax_uid: str) -> bytes:
        """Those of *dataset*: an array of one object, or a Native DICOM Model.

        Raises RefusedError if it cannot be read.
        """
        compiler = Compiler(cache_bytes=0, inline_bytes=self.inline_bytes, private_un=self.private_un)
        header = compiler.header(
            dataset,
            transfer_syntax_uid,
            total_bytes=len(dataset),
            bulk_uri=self.bulk_uri,
            default_charset=self.default_charset,
        )
        text = b"[{" + header.body + b"}]"
        return b"".join(_native_models(text)) if self.is_xml else text


def is_small(dataset: Buffer, transfer_syntax_uid: str) -> bool:
    """Whether *dataset* has a small header, which may be looked through here."""
    if is_deflated(transfer_syntax_uid):
        return False
    view = memoryview(dataset)
    if len(view) <= _SMALL_BYTES:
        return True
    _, pixels = before_pixels(view[:_SMALL_BYTES], transfer_syntax_uid)
    return bool(pixels) and len(after_pixels(view, transfer_syntax_uid)) <= _SMALL_BYTES


def native_models(lines: Iterable[bytes]) -> Iterator[bytes]:
    """A document for each object in the *lines* of an array, its numbers with the digits they have there.

    Raises LimitError at one that has more in it than is made XML of here.
    """
    for line in lines:
        if line.count(b"{") > _MAX_OBJECTS:
            raise LimitError("The metadata of an instance have too much in them for XML. Ask for JSON.")
        yield from _native_models(b"[%b]" % line.strip(b"[], "))


def _native_models(text: bytes) -> Iterator[bytes]:
    for found in json.loads(text, parse_float=str, parse_int=str):
        yield native_model(found).document
