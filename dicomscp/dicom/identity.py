"""Which instance a dataset is, and whether it is all there.

Before anybody hears Success, the top level of the dataset is walked from its first element to its last:
that finds the four UIDs, and shows a dataset that was cut short.  Values are jumped over, so a prefix with
the headers is as good as the whole.
"""

import struct
import sys
from dataclasses import dataclass
from typing import NamedTuple

from dicomscp.dicom.elements import (
    BIG,
    BIG_PIXELS,
    IMPLICIT_LITTLE,
    LITTLE,
    LONG_VRS,
    SEQUENCE_END_BYTES,
    SHORT_VRS,
    UNDEFINED,
    Buffer,
    Encoding,
    PrefixError,
    encoding_of,
    inflate,
    inner_encoding,
    is_deflated,
    skip_items,
    unknown_vr,
)
from dicomscp.errors import RefusedError

__all__ = [
    "Buffer",
    "Identity",
    "InstanceKey",
    "PrefixError",
    "is_filable",
    "is_filable_syntax",
    "is_regular",
    "read_identity",
]

_SOP_CLASS_UID, _SOP_UID, _STUDY_UID, _SERIES_UID = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
_WANTED = {
    _SOP_CLASS_UID: "SOP Class UID",
    _SOP_UID: "SOP Instance UID",
    _STUDY_UID: "Study Instance UID",
    _SERIES_UID: "Series Instance UID",
}
# No datasets of their own: MIME, XML, live video.
_UNFILABLE = ("1.2.840.10008.1.2.6.", "1.2.840.10008.1.2.7.")
_SYNTAX_ROOT = IMPLICIT_LITTLE  # the first one; those of the standard begin with it
_PRIVATE_SYNTAXES = frozenset({BIG_PIXELS, "1.2.840.10008.1.20", "1.3.46.670589.33.1.4.1"})
_CUT_SHORT = "The dataset is cut short: it ends within an element. Send it again from where it is whole."


class InstanceKey(NamedTuple):
    """Where an instance belongs: the three UIDs that name it."""

    study_uid: str
    series_uid: str
    sop_uid: str


@dataclass(frozen=True, slots=True)
class Identity:
    """What an instance is: its place, its class, how it is encoded."""

    key: InstanceKey
    sop_class_uid: str
    transfer_syntax_uid: str


def is_regular(uid: str) -> bool:
    """Whether *uid* is at most 64 characters, digits and single dots: it can name a file as it is."""
    return len(uid) <= 64 and uid.isascii() and all(map(str.isdigit, uid.split(".")))


def is_filable(uid: str) -> bool:
    """Whether an instance can be held under *uid*: 1 to 64 graphic ASCII characters, no slash or backslash.

    More than PS3.5 section 9.1 allows, because devices send it.
    """
    return (
        0 < len(uid) <= 64
        and uid.isascii()
        and uid.isprintable()
        and not any(character in uid for character in " /\\")
    )


def is_filable_syntax(transfer_syntax_uid: str) -> bool:
    """Whether instances in that transfer syntax can be held: those of the standard that encode datasets."""
    if transfer_syntax_uid in _PRIVATE_SYNTAXES:
        return True
    standard = f"{transfer_syntax_uid}.".startswith(f"{_SYNTAX_ROOT}.") and is_regular(transfer_syntax_uid)
    return standard and not transfer_syntax_uid.startswith(_UNFILABLE)


def read_identity(
    dataset: Buffer,
    transfer_syntax_uid: str,
    *,
    total_bytes: int,
    tail: bytes = b"",
    max_inflated_bytes: int = 16 << 20,
) -> Identity:
    """The instance that *dataset* is, its end having been seen.

    *dataset* has no group 2; it may be a prefix of *total_bytes*.  If it ends inside encapsulated pixel
    data, *tail*, the last eight bytes of the dataset, shows that they end.  Of a deflated dataset that
    inflates past *max_inflated_bytes* the end is not seen, but its identity must be within.

    Raises PrefixError if the prefix is too short to know, and RefusedError for a dataset that is cut short,
    nested too deep, does not inflate, or whose UIDs are missing or cannot be filed.
    """
    found: dict[int, bytes] = {}
    if is_deflated(transfer_syntax_uid):
        _walk_deflated(dataset, transfer_syntax_uid, total_bytes, max_inflated_bytes, found)
    else:
        try:
            _walk(dataset, encoding_of(dataset, transfer_syntax_uid), total_bytes, tail, found)
        except PrefixError as error:
            if len(dataset) < total_bytes:
                raise
            raise RefusedError(_CUT_SHORT) from error
    uids = {tag: found.get(tag, b"").decode("latin-1").strip(" \0") for tag in _WANTED}
    if missing := [_WANTED[tag] for tag, uid in uids.items() if not uid]:
        raise RefusedError(f"The dataset has no {_either(missing)}, so it cannot be filed.")
    sop_class_uid, sop_uid, study_uid, series_uid = (_usable(uid, tag) for tag, uid in uids.items())
    return Identity(InstanceKey(study_uid, series_uid, sop_uid), sop_class_uid, transfer_syntax_uid)


def _either(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _usable(uid: str, tag: int) -> str:
    if not is_filable(uid):
        raise RefusedError(
            f"The {_WANTED[tag]} cannot be filed: not 1 to 64 graphic ASCII characters without slash."
        )
    return uid


def _walk_deflated(
    dataset: Buffer, transfer_syntax_uid: str, total_bytes: int, max_bytes: int, found: dict[int, bytes]
) -> None:
    if len(dataset) < total_bytes:
        raise PrefixError
    inflated, whole = inflate(dataset, max_bytes)
    total = len(inflated) if whole else sys.maxsize
    try:
        _walk(inflated, encoding_of(inflated, transfer_syntax_uid), total, b"", found)
    except PrefixError as error:
        if whole:
            raise RefusedError(_CUT_SHORT) from error
        if len(found) < len(_WANTED):
            raise RefusedError(f"The dataset inflates past {max_bytes} bytes before its UIDs.") from error


def _walk(  # noqa: C901, PLR0912 -- every instance received pays for it: one plain loop, 0.3 us an element
    data: Buffer, encoding: Encoding, total: int, tail: bytes, found: dict[int, bytes]
) -> None:
    """Put the values wanted into *found* on the way to the end, which is at *total*."""
    reader = LITTLE if encoding.little else BIG
    explicit_head, implicit_head = reader.explicit.unpack_from, reader.implicit.unpack_from
    explicit, pos, vr = encoding.explicit, 0, b""
    while pos < total:
        start = pos
        try:
            if explicit:
                group, number, vr, length = explicit_head(data, pos)
                pos += 8
                if vr in LONG_VRS:
                    length = reader.ulong.unpack_from(data, pos)[0]
                    pos += 4
                elif vr not in SHORT_VRS:
                    vr, length, pos = unknown_vr(data, start, vr, length, reader)
            else:
                group, number, length = implicit_head(data, pos)
                pos += 8
        except struct.error as error:
            if start < len(data) == total and not any(data[start:]):
                return  # writers pad with zeros, to an even length or a block
            raise PrefixError from error
        if length == UNDEFINED:
            try:
                pos = skip_items(data, pos, inner_encoding(vr, encoding))
            except PrefixError:
                if (group, number) == (0x7FE0, 0x0010) and len(data) < total and tail == SEQUENCE_END_BYTES:
                    return
                raise
            continue
        end = pos + length
        if group <= 0x0020 and (tag := group << 16 | number) in _WANTED:
            if end > len(data):
                raise PrefixError
            found[tag] = bytes(data[pos:end])
        pos = end
    if pos > total:
        raise RefusedError(_CUT_SHORT)
