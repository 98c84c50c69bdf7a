"""The files of one instance for hosting without us: its frames and bulk values (`publish.frames = "files"`).

Frames are what our own server would answer: a multipart/related body of one part, because OHIF reads a
single part wrongly that arrives in pieces, and takes the transfer syntax from the part's header alone.  A
static server tells no boundary; OHIF then takes the first line of the body.  Names are those of Static
DICOMweb, `.mht.gz` where gzip gains something, so its nginx recipe serves them.  The boundary is the SHA-256
of the content, so that equal frames are equal files on every node.

Bulk values are the bare bytes in little endian order, under the very path that BulkDataURI names, without a
suffix.  Any static server sends that as application/octet-stream without a rule written for it, and in
ranges, as browsers ask for video and PDF; dicomweb-client in JavaScript (OHIF) takes it as it comes, with
`singlepart: "bulkdata,video"` or `staticWado`, as it unwraps only what begins like multipart; the one in
Python takes a whole body that is labelled multipart/related without a boundary, which a multipart file would
fill with its framing.  Encapsulated values in several parts do not occur outside of pixel data.

A video is a bulk value, not a frame: viewers play it from its BulkDataURI, and none decodes it as a frame.
What is not whole in the instance has no file.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dicomscp.dicom.bulk import Frame, Piece, bulk_value, frame_table, inflated, is_video, read_frame
from dicomscp.dicom.elements import EXPLICIT_LITTLE, Buffer
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.multipart import OCTET_STREAM, framed, part_type
from dicomscp.errors import RefusedError
from dicomscp.study import layout

_PIECE_BYTES = 1 << 20  # whoever writes a video copies no more of it at a time
_PIXELS = re.compile(r"7FE000(?:08|09|10)")


class File(NamedTuple):
    """A file at *path*, relative to the published tree; the caller gzips what ends in `.gz`.

    The pieces may be views of the dataset: they are to be used before the next file is asked for.
    """

    path: str
    pieces: Iterable[Piece]


def instance_files(
    key: InstanceKey, dataset: Buffer, transfer_syntax_uid: str, bulk_paths: Iterable[str]
) -> Iterator[File]:
    """The frames of *dataset*, ascending, and its values at *bulk_paths*.

    Memory is at most what one frame takes, and only if its bytes must change.  Pixel data among the paths are
    left out: those are the frames.  Raises RefusedError if a deflated dataset cannot be inflated.
    """
    dataset, transfer_syntax_uid = inflated(dataset, transfer_syntax_uid)
    paths = [path for path in bulk_paths if not _PIXELS.fullmatch(path)]
    if is_video(transfer_syntax_uid):
        paths.append("7FE00010")
    else:
        yield from _frame_files(key, dataset, transfer_syntax_uid)
    for path in paths:
        if (value := _value(dataset, transfer_syntax_uid, path)) is not None:
            yield File(layout.bulk_path(key, path), _cut(value))


def bulk_paths(header: Buffer, bulk_uri: str) -> list[str]:
    """The paths of the BulkDataURIs in *header*, encoded DICOM JSON whose links begin with *bulk_uri*."""
    # Inside of a JSON string a quote is escaped, so this is never part of a value.
    link = rb'"BulkDataURI":"%b/([0-9A-F/]+)"' % re.escape(bulk_uri.encode())
    return [path.decode() for path in re.findall(link, header)]


def _frame_files(key: InstanceKey, dataset: Buffer, transfer_syntax_uid: str) -> Iterator[File]:
    table = frame_table(dataset, transfer_syntax_uid)
    compressed = table.transfer_syntax_uid != EXPLICIT_LITTLE
    for number in range(1, table.frames + 1):
        try:
            frame = read_frame(dataset, table, number)
        except RefusedError:
            continue
        yield File(layout.frame_path(key, number, compressed=compressed), _cut(_body(frame)))


def _body(frame: Frame) -> Iterator[Buffer]:
    content_type = part_type(OCTET_STREAM, frame.transfer_syntax_uid)
    digest = hashlib.sha256(content_type.encode())
    for piece in frame.data:
        digest.update(piece)
    return framed(digest.hexdigest(), content_type, [frame.data])


def _value(dataset: Buffer, transfer_syntax_uid: str, path: str) -> list[Piece] | None:
    """The bulk value at *path*, or None if it is not there, or not all of it."""
    try:
        return bulk_value(dataset, transfer_syntax_uid, path).data
    except RefusedError:
        return None


def _cut(pieces: Iterable[Buffer]) -> Iterator[Piece]:
    """The same bytes in pieces of bounded size."""
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]
