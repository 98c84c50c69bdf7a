"""What an instance adds to the documents of its study, as a function of its header alone.

Documents are arrays with one line an instance.  Encoded JSON holds no line end, so the lines of a
document can be told apart again without reading them as JSON.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import orjson

from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.matching import (
    INSTANCE_AVAILABILITY,
    INSTANCE_TAGS,
    RETRIEVE_URL,
    SERIES_UID,
    STUDY_UID,
    TIMEZONE,
)
from dicomscp.study import layout

Fragments = Mapping[int, bytes]

SECTION_BYTES = 1 << 18
"""About how much of its longest document makes a section; an instance with more has one for itself."""

_SECTION_INSTANCES = 64
_CRCS = 1 << 32
_INSTANCE_LEVEL = tuple(sorted((INSTANCE_TAGS | {TIMEZONE}) - {STUDY_UID, SERIES_UID}))


class Lines(NamedTuple):
    """Those of one instance in the metadata, in its series' list, and in what the viewer opens a study with.

    The last is None if there is no such document.
    """

    metadata: bytes
    listed: bytes
    viewer: bytes | None = None

    @property
    def present(self) -> tuple[bytes, ...]:
        """Those that there are."""
        return (
            (self.metadata, self.listed) if self.viewer is None else (self.metadata, self.listed, self.viewer)
        )

    @property
    def longest(self) -> int:
        """The bytes of the longest."""
        return max(map(len, self.present))


def lines(key: InstanceKey, body: bytes, fragments: Fragments, base_url: str) -> Lines:
    """The lines of the instance at *key*, whose header is *body*, and member by member *fragments*."""
    own = {tag: fragments[tag] for tag in _INSTANCE_LEVEL if tag in fragments} | {
        INSTANCE_AVAILABILITY: member(INSTANCE_AVAILABILITY, "CS", ["ONLINE"]),
        RETRIEVE_URL: member(RETRIEVE_URL, "UR", [layout.instance_url(base_url, key)]),
        STUDY_UID: member(STUDY_UID, "UI", [key.study_uid]),
        SERIES_UID: member(SERIES_UID, "UI", [key.series_uid]),
    }
    return Lines(b"{%b}" % body, b"{%b}" % b",".join(own[tag] for tag in sorted(own)))


def member(tag: int, vr: str, values: Sequence[object]) -> bytes:
    """One encoded member of a DICOM JSON object."""
    model: dict[str, object] = {"vr": vr, "Value": values} if values else {"vr": vr}
    return b'"%08X":%b' % (tag, orjson.dumps(model))


def ends_section(sop_uid: str, line_bytes: int) -> bool:
    """Whether a section of a document ends behind the instance, whose longest line has *line_bytes*.

    That is so for one instance in some, the more often the longer its line; it follows from the
    instance alone, so another one that comes between moves the ends next to it and no others.
    """
    share = max(1 / _SECTION_INSTANCES, line_bytes / SECTION_BYTES)
    return crc32(sop_uid.encode()) < share * _CRCS
