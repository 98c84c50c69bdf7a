"""What an instance adds to the document that OHIF opens a study with, as a function of its header alone.

The document is that of OHIF's DICOM JSON data source: attributes by keyword, values as they are, one entry a
frame, each with the address of its pixels.  OHIF keeps the first entry of an instance and of the others only
the address, so the first one says everything, functional groups of all frames too, and the others that they
are of that instance.

    {"studies":[{..., "wadoRoot":..., "series":[{..., "instances":[<a line an instance>]}]}]}

Attributes without a keyword (private ones) and without a value are left out.  Links to bulk data stay links;
a document and a video are given where a browser shows them from.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import orjson
from pydicom.datadict import keyword_for_tag

from dicomscp.dicom.bulk import is_video
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.jsonmodel import PIXEL_TAGS
from dicomscp.study import layout

OPENING, CLOSING = b'{"studies":[{', b"]}]}]}"
"""What begins the document and what ends it."""

_FRAMES, _SOP_CLASS_UID, _SYNTAX = 0x00280008, 0x00080016, 0x00083002
_DOCUMENT, _DOCUMENT_TYPE = 0x00420011, 0x00420012
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # its frames are tiles, which OHIF reads by DICOMweb alone
_MOST_FRAMES = 100_000  # what a header says may be anything; an entry takes 150 to 300 bytes
_LONG_BYTES = 1 << 16  # hardly ever the same in two instances, and read in steps
_MOST_TRIES = 16
_KNOWN_BYTES = 8 << 20

_STUDY = {
    "StudyInstanceUID": "0020000D",
    "StudyDate": "00080020",
    "StudyTime": "00080030",
    "StudyDescription": "00081030",
    "AccessionNumber": "00080050",
    "PatientName": "00100010",
    "PatientID": "00100020",
    "PatientBirthDate": "00100030",
    "PatientSex": "00100040",
}
_SERIES = {
    "SeriesInstanceUID": "0020000E",
    "SeriesNumber": "00200011",
    "SeriesDescription": "0008103E",
    "Modality": "00080060",
    "SeriesDate": "00080021",
    "SeriesTime": "00080031",
}


class Entries:
    """Makes the entries of instances, and remembers what elements say.  For one thread at a time."""

    def __init__(self, base_url: str) -> None:
        """*base_url* begins every link."""
        self._base_url = base_url
        self._known: dict[bytes, bytes] = {}
        self._size = 0

    def of(self, key: InstanceKey, texts: Iterable[bytes], fragments: Mapping[int, bytes]) -> bytes:
        """The entries of the instance at *key*, separated by commas.

        Its header is *texts*, members joined by commas, and member by member *fragments*.  Memory is a few
        times what the longest member takes, and that of the entries.
        """
        members = [made for text in texts if (made := self._natural(text))]
        address = layout.instance_url(self._base_url, key)
        frames = _frames(fragments)
        if special := _special(layout.bulk_uri(self._base_url, key), fragments):
            members.append(special)
        if not frames:
            url = orjson.dumps(f"dicomweb:{address}?accept=application/dicom")
            return b'{"metadata":{%b},"url":%b}' % (b",".join(members), url)
        start = orjson.dumps(f"wadors:{address}/frames/")[:-1]
        of_same = b',{"metadata":{"SOPInstanceUID":%b},"url":%b' % (orjson.dumps(key.sop_uid), start)
        first = b'{"metadata":{%b},"url":%b1"}' % (b",".join(members), start)
        return b"".join([first, *(b'%b%d"}' % (of_same, number) for number in range(2, frames + 1))])

    def _natural(self, text: bytes) -> bytes:
        """The members of *text* by keyword, joined by commas; b"" if none has one."""
        if len(text) > _LONG_BYTES:
            return _natural_long(text)
        made = self._known.get(text)
        if made is None:
            made = _encoded(_natural_object(orjson.loads(b"{%b}" % text)))
            self._size += len(text) + len(made)
            if self._size > _KNOWN_BYTES:
                self._known.clear()
                self._size = len(text) + len(made)
            self._known[text] = made
        return made


def study_head(study: Mapping[str, Any], instances: int, base_url: str) -> bytes:
    """What stands before the series: *study* is the object that QIDO-RS gives."""
    modalities = study.get("00080061", {}).get("Value", [])
    told = _told(study, _STUDY) | {
        "NumInstances": instances,
        "Modalities": "\\".join(one for one in modalities if one),
        # With it OHIF retrieves whole what it does not show frame by frame: segmentations, structures.
        "wadoRoot": base_url,
    }
    return OPENING + orjson.dumps(told)[1:-1] + b',"series":['


def series_head(series: Mapping[str, Any]) -> bytes:
    """What stands before the instances of a series, which its object is *series*; `SERIES_END` ends them."""
    return orjson.dumps(_told(series, _SERIES))[:-1] + b',"instances":['


SERIES_END = b"]}"


def _told(found: Mapping[str, Any], wanted: Mapping[str, str]) -> dict[str, Any]:
    values = {keyword: _natural(found.get(tag, {})) for keyword, tag in wanted.items()}
    return {keyword: value for keyword, value in values.items() if value is not None}


def _frames(fragments: Mapping[int, bytes]) -> int:
    """How many entries have frames to show; 0 if the instance has none, or none that are shown so."""
    if not PIXEL_TAGS & fragments.keys() or is_video(str(_value(fragments, _SYNTAX))):
        return 0
    if _value(fragments, _SOP_CLASS_UID) == _SLIDE:
        return 1
    count = _value(fragments, _FRAMES)
    return min(max(count, 1), _MOST_FRAMES) if isinstance(count, int) else 1


def _special(bulk_uri: str, fragments: Mapping[int, bytes]) -> bytes:
    """A member for what a browser itself shows: a document, or a video."""
    if b'"BulkDataURI"' in fragments.get(_DOCUMENT, b""):
        media_type = quote(str(_value(fragments, _DOCUMENT_TYPE) or "application/pdf"), safe="/+")
        return b'"EncapsulatedDocument":' + _at(f"{bulk_uri}/{_DOCUMENT:08X}?accept={media_type}")
    if is_video(str(_value(fragments, _SYNTAX))):
        return b'"PixelData":' + _at(f"{bulk_uri}/7FE00010")
    return b""


def _at(address: str) -> bytes:
    return orjson.dumps({"DirectRetrieveURL": address})


def _value(fragments: Mapping[int, bytes], tag: int) -> Any:
    """The first value of an attribute, or None."""
    if (fragment := fragments.get(tag)) is None:
        return None
    (model,) = orjson.loads(b"{%b}" % fragment).values()
    return next(iter(model.get("Value", ())), None)


@lru_cache(maxsize=8192)
def _keyword(name: str) -> str:
    """The keyword of the tag written as *name*; "" if it has none, or is not told as an attribute."""
    tag = int(name, 16)
    return "" if tag in PIXEL_TAGS or tag == _DOCUMENT else keyword_for_tag(tag)


def _natural_object(found: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset by keyword."""
    made = {}
    for name, element in found.items():
        if (keyword := _keyword(name)) and (value := _natural(element)) is not None:
            made[keyword] = value
    return made


def _natural(element: Mapping[str, Any]) -> Any:
    """The value of an element as OHIF has it, or None if there is none."""
    values = element.get("Value")
    if not values:
        link = {name: element[name] for name in ("BulkDataURI", "InlineBinary") if name in element}
        return link or None
    if element["vr"] == "SQ":
        return [_natural_object(item or {}) for item in values]
    if element["vr"] == "PN":
        values = [next(filter(None, (one or {}).values()), "") for one in values]
    return values[0] if len(values) == 1 else values


def _encoded(natural: Mapping[str, Any]) -> bytes:
    return orjson.dumps(natural)[1:-1]


def _natural_long(text: bytes) -> bytes:
    """As `Entries._natural`, of a text that may be one sequence of very many items, item by item."""
    begun = text[:40].find(b':{"vr":"SQ","Value":[')
    if begun < 0 or not text.endswith(b"]}"):
        return _encoded(_natural_object(orjson.loads(b"{%b}" % text)))
    opening = begun + len(b':{"vr":"SQ","Value":[')
    try:
        items = b",".join(_natural_items(text, opening, len(text) - 2))
    except orjson.JSONDecodeError:  # it is not one sequence, or an odd one
        return _encoded(_natural_object(orjson.loads(b"{%b}" % text)))
    keyword = _keyword(text[1 : begun - 1].decode())
    return b'"%b":[%b]' % (keyword.encode(), items) if keyword else b""


def _natural_items(text: bytes, start: int, end: int) -> Iterator[bytes]:
    """The items that *text* has from *start* to *end*, some at a time.

    Items end where "},{" stands; so may what is inside of them.  But an item that begins at its beginning can
    be read only if it ends at its end, so the next such place is tried until it can be.
    """
    while start < end:
        stop, tries = start, 0
        while True:
            found = text.find(b'},{"', max(stop, min(start + _LONG_BYTES, end)), end)
            stop = end if found < 0 else found + 1
            try:
                items = orjson.loads(b"[%b]" % text[start:stop])
                break
            except orjson.JSONDecodeError:
                tries += 1
                if stop == end or tries > _MOST_TRIES:
                    raise
        yield orjson.dumps([_natural_object(item or {}) for item in items])[1:-1]
        start = stop + 1
