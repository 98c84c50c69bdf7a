"""Our DICOM JSON beside two independent readings of the same files: pydicom's and DCMTK's dcm2json.

Whatever differs must be in a table below, each kind with the reason why ours stands.  Tests fail for what is
in neither table, and for a kind that no file shows any more, so the tables stay true.
"""

import json
import math
import re
import struct
import subprocess
import warnings
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pydicom

from dicomscp.dicom import part10
from dicomscp.dicom.bulk import bulk_value
from dicomscp.dicom.elements import (
    UNDEFINED,
    Element,
    PrefixError,
    encoding_of,
    is_deflated,
    read_element,
)
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.errors import RefusedError

PIXELS = {"7FE00008", "7FE00009", "7FE00010"}
BINARY_NUMBERS = {"SS": "h", "US": "H", "SL": "i", "UL": "I", "FL": "f", "FD": "d"}

DAMAGED = {
    "GH179A.dcm": "a blank VR: pydicom takes it for implicit VR and reads to the end, DCMTK reads as we do",
    "GH179B.dcm": "a blank VR, and cut short: pydicom takes it for implicit VR, DCMTK refuses",
    "GH626.dcm": "cut short inside a sequence: pydicom gives what follows as one value, DCMTK refuses",
    "rtplan_truncated.dcm": "cut short inside a sequence: pydicom gives part of it, DCMTK refuses",
    "emri_small_jpeg_2k_lossless_too_short.dcm": "pixel data without an end: pydicom gives nothing",
    "MR_truncated.dcm": "pixel data cut short: pydicom gives what is there, our bulk value is refused",
    "no_meta.dcm": "a stray byte before the dataset: pydicom reads garbage",
}


class Difference(NamedTuple):
    """One attribute that is not the same."""

    path: str  # tags and items
    ours: dict[str, Any] | None
    theirs: dict[str, Any] | None
    big_endian: bool

    @property
    def tag(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_private(self) -> bool:
        return int(self.tag[:4], 16) % 2 == 1

    @property
    def vrs(self) -> tuple[str, str]:
        return (self.ours or {}).get("vr", ""), (self.theirs or {}).get("vr", "")

    @property
    def values(self) -> tuple[list[Any], list[Any]]:
        return (self.ours or {}).get("Value", []), (self.theirs or {}).get("Value", [])


class Deviation(NamedTuple):
    """A kind of difference that is meant."""

    code: str  # for tables
    reason: str
    explains: Callable[[Difference], bool]


def _is_available_syntax(it: Difference) -> bool:
    return it.path == "00083002" and it.theirs is None


def _is_charset(it: Difference) -> bool:
    return it.tag == "00080005" and it.values[0] == ["ISO_IR 192"]


def _is_turned_un(it: Difference) -> bool:
    ours, theirs = it.values
    code = BINARY_NUMBERS.get(it.vrs[0])
    if not (it.big_endian and it.is_private and code and len(ours) == len(theirs)):
        return False
    return struct.pack(f"<{len(ours)}{code}", *ours) == struct.pack(f">{len(theirs)}{code}", *theirs)


def _blank_as_null(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip(" \0") or None
    if isinstance(value, dict):
        return {group: name for group, name in value.items() if name} or None
    return value


def _is_turned_words(it: Difference) -> bool:
    if not (it.big_endian and it.vrs == ("OW", "OW")):
        return False
    ours, theirs = (b64decode((one or {})["InlineBinary"]) for one in (it.ours, it.theirs))
    turned = (b"".join(theirs[at : at + word][::-1] for at in range(0, len(ours), word)) for word in (2, 4))
    return ours in turned


def _is_turned_by_halves(it: Difference) -> bool:
    if not (it.big_endian and it.vrs == ("OW", "OW")):
        return False
    ours, theirs = (b64decode((one or {})["InlineBinary"]) for one in (it.ours, it.theirs))
    return ours == b"".join(theirs[at + 2 : at + 4] + theirs[at : at + 2] for at in range(0, len(ours), 4))


def _is_padded(it: Difference) -> bool:
    if it.vrs not in {("OB", "OB"), ("UN", "UN")}:
        return False
    ours, theirs = (b64decode((one or {})["InlineBinary"]) for one in (it.ours, it.theirs))
    return len(ours) % 2 == 1 and theirs == ours + b"\0"


def _is_text_with_nul(it: Difference) -> bool:
    ours, theirs = it.values
    stripped = [value.rstrip("\0") if isinstance(value, str) else value for value in theirs]
    if it.vrs[0] in {"DS", "IS"}:
        stripped = [float(value) for value in stripped if str(value).strip("-").replace(".", "").isdigit()]
    return it.vrs[0] == it.vrs[1] and ours == stripped != theirs


def _whole(value: Any) -> int | None:
    return int(value) if str(value).isdigit() else None


def _are_close(ours: list[Any], theirs: list[Any], tolerance: float) -> bool:
    return len(ours) == len(theirs) and all(
        math.isclose(one, other, rel_tol=tolerance) for one, other in zip(ours, theirs, strict=True)
    )


PYDICOM = (
    Deviation(
        "group length",
        "F.2.2: group lengths are left out",
        lambda it: it.ours is None and it.tag.endswith("0000"),
    ),
    Deviation("syntax", "(0008,3002) tells what the origin server can give", _is_available_syntax),
    Deviation("utf-8", "the JSON is UTF-8, so its character set is ISO_IR 192", _is_charset),
    Deviation(
        "empty SQ",
        "F.2.5: an attribute without items has no Value",
        lambda it: it.ours == {"vr": "SQ"} and it.theirs == {"vr": "SQ", "Value": []},
    ),
    Deviation(
        "null",
        "F.2.5: an empty value among others is null; F.2.2: name components that are empty are left out; "
        "PS3.5 Table 6.2-1: padding is no part of a value",
        lambda it: (
            it.vrs[0] == it.vrs[1]
            and it.values[0] == [_blank_as_null(value) for value in it.values[1]] != it.values[1]
        ),
    ),
    Deviation(
        "OW",
        'JSON has no VR "OB or OW": implicit VR means OW (PS3.5 A.1)',
        lambda it: it.vrs == ("OW", "OB or OW"),
    ),
    Deviation(
        "words", "F.2.7: words are in little endian order; pydicom gives them as stored", _is_turned_words
    ),
    Deviation(
        "UN", "UN is little endian in big endian datasets too (PS3.5 6.2.2); pydicom turns it", _is_turned_un
    ),
)

DCM2JSON = (
    Deviation("D-syntax", "(0008,3002) tells what the origin server can give", _is_available_syntax),
    Deviation(
        "D-UN",
        "DCMTK keeps UN, written or for want of a private dictionary; we look the VR up",
        lambda it: it.vrs[1] == "UN" != it.vrs[0],
    ),
    Deviation(
        "D-cells",
        "big endian pixel cells of 32 bits are turned whole, as pydicom reads them; DCMTK turns the halves",
        _is_turned_by_halves,
    ),
    Deviation(
        "D-float",
        "dcm2json rounds FL to 9 digits and FD to 16 or 17",
        lambda it: (
            it.vrs in {("FL", "FL"), ("FD", "FD")}
            and _are_close(*it.values, 1e-8 if it.vrs[0] == "FL" else 1e-15)
        ),
    ),
    Deviation(
        "D-carets",
        "dcm2json drops carets at the end of a name; they are part of the value",
        lambda it: (
            it.vrs == ("PN", "PN")
            and [{group: name.rstrip("^") for group, name in value.items()} for value in it.values[0]]
            == (it.values[1] or [{"Alphabetic": ""}])
        ),
    ),
    Deviation("D-utf-8", "dcm2json keeps (0008,0005) in items, though it converts their text", _is_charset),
    Deviation(
        "D-IS",
        "dcm2json keeps an IS beyond 32 bits as string; JSON carries it as number",
        lambda it: it.vrs == ("IS", "IS") and it.values[0] == [_whole(value) for value in it.values[1]],
    ),
    Deviation("D-odd", "dcm2json pads a value to even length; we give the bytes that are there", _is_padded),
    Deviation(
        "D-NUL", "NUL is padding; dcm2json takes it for a part of text and of numbers", _is_text_with_nul
    ),
    Deviation(
        "D-OW",
        "implicit VR means OW (PS3.5 A.1); DCMTK takes curves for OB",
        lambda it: it.vrs == ("OW", "OB"),
    ),
)


# --- the three readings -------------------------------------------------------------------------------------


def split(file: bytes) -> tuple[bytes, str]:
    """The dataset of *file* and its transfer syntax, also of a file that is no instance."""
    try:
        meta = part10.read_file_meta(file)
    except RefusedError:
        _, offset, syntax = part10._read_group_2(file, part10._after_preamble(file))
        dataset = file[offset:]
        return dataset, syntax or part10._guessed_transfer_syntax(memoryview(dataset))
    return file[meta.dataset_offset :], meta.transfer_syntax_uid


def read_ours(dataset: bytes, transfer_syntax_uid: str) -> dict[str, Any]:
    """With bulk values inline; encapsulated pixel data are left out."""
    compiler = Compiler(inline_bytes=1 << 30)
    header = compiler.header(dataset, transfer_syntax_uid, total_bytes=len(dataset), bulk_uri="")
    ours = orjson.loads(b"{" + b",".join(header.fragments.values()) + b"}")
    return with_bulk_values(ours, dataset, transfer_syntax_uid, read_bulk_value(dataset, transfer_syntax_uid))


def read_bulk_value(dataset: bytes, transfer_syntax_uid: str) -> Callable[[str], bytes]:
    """What gives the value behind a BulkDataURI of ours, whatever stands before its path."""

    def fetch(uri: str) -> bytes:
        path = re.sub(r"^.*/bulkdata/[^/]+/[^/]+", "", uri).removeprefix("/")
        return b"".join(bulk_value(dataset, transfer_syntax_uid, path).data)

    return fetch


def with_bulk_values(
    ours: dict[str, Any], dataset: bytes, transfer_syntax_uid: str, fetch: Callable[[str], bytes]
) -> dict[str, Any]:
    """The header *ours* with what it links to in place; encapsulated pixel data of *dataset* are left out."""
    if pixels := encapsulated_pixels(dataset, transfer_syntax_uid):
        del ours[f"{pixels.tag:08X}"]
    for attribute in links(ours):
        attribute["InlineBinary"] = b64encode(fetch(attribute.pop("BulkDataURI"))).decode()
    return ours


def links(attributes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for attribute in attributes.values():
        if "BulkDataURI" in attribute:
            yield attribute
        if attribute["vr"] == "SQ":
            for item in attribute.get("Value", []):
                yield from links(item)


def read_by_pydicom(path: Path) -> dict[str, Any] | None:
    """None if pydicom cannot read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = pydicom.dcmread(path, force=True)
            for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
                if keyword in theirs and theirs[keyword].is_undefined_length:
                    del theirs[keyword]
            return theirs.to_json_dict()
        except Exception:  # noqa: BLE001 -- whatever it is, there is nothing to compare with
            return None


def read_by_dcm2json(program: str, path: Path, folder: Path) -> dict[str, Any] | None:
    """None if dcm2json cannot read it.  It gives up on encapsulated pixel data, so these are taken out."""
    file = path.read_bytes()
    cut = folder / f"{abs(hash(path))}.dcm"
    cut.write_bytes(without_encapsulated_pixels(file))
    run = subprocess.run([program, "-fc", "-q", "-ee", cut], capture_output=True, check=False)
    cut.unlink()
    try:
        return json.loads(run.stdout) if run.returncode == 0 else None
    except ValueError:
        return None


def without_encapsulated_pixels(file: bytes) -> bytes:
    dataset, syntax = split(file)
    pixels = encapsulated_pixels(dataset, syntax)
    if pixels is None:
        return file
    return file[: len(file) - len(dataset) + pixels.start] + dataset[pixels.end :]


def encapsulated_pixels(dataset: bytes, transfer_syntax_uid: str) -> Element | None:
    if is_deflated(transfer_syntax_uid):
        return None
    encoding, pos = encoding_of(dataset, transfer_syntax_uid), 0
    try:
        while pos < len(dataset):
            element = read_element(dataset, pos, encoding)
            if f"{element.tag:08X}" in PIXELS and element.length == UNDEFINED:
                return element
            pos = element.end
    except (PrefixError, RefusedError):
        pass  # damaged: it is compared as it is
    return None


# --- the comparison -----------------------------------------------------------------------------------------


def differences(
    ours: dict[str, Any], theirs: dict[str, Any], *, big_endian: bool, path: str = ""
) -> Iterator[Difference]:
    for tag in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(tag), theirs.get(tag)
        here = f"{path}{tag}"
        if one and other and one["vr"] == other["vr"]:
            items, others = one.get("Value", []), other.get("Value", [])
            if one["vr"] == "SQ" and items and len(items) == len(others):
                for number, (item, other_item) in enumerate(zip(items, others, strict=True), 1):
                    inner = f"{here}/{number}/"
                    yield from differences(item, other_item or {}, big_endian=big_endian, path=inner)
                continue
        if one != other:
            yield Difference(here, one, other, big_endian)


def explanations(found: Iterable[Difference], deviations: Sequence[Deviation]) -> tuple[set[str], list[str]]:
    """The codes of what explains the differences *found*, and those that nothing explains."""
    codes: set[str] = set()
    unexplained = []
    for difference in found:
        kinds = {deviation.code for deviation in deviations if deviation.explains(difference)}
        codes |= kinds
        if not kinds:
            unexplained.append(str(difference)[:400])
    return codes, unexplained
