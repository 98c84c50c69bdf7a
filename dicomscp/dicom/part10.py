"""Part 10 files: the file meta information before a dataset (PS3.10 section 7), and our receipt in it.

The receipt says when, from whom and by which way an instance came, and what its bytes are.  It uses the
standard's elements for the AE titles and the private pair (0002,0100), (0002,0102), under our
implementation's UID:

    version u8 = 1 | origin u8 | received_at i64 LE | SHA-256 of the dataset | default character set, ASCII

Everything of variable length comes from the association, so that a header can be written before the dataset
has arrived, and overwritten by one of equal length that has the digest.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from dicomscp import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomscp.dicom.elements import (
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    SHORT_VRS,
    UNDEFINED,
    Buffer,
    Encoding,
    PrefixError,
    encoding_of,
    inflate,
    is_deflated,
    read_element,
)
from dicomscp.errors import RefusedError

_SOP_CLASS_UID, _SOP_UID = _UIDS = 0x00080016, 0x00080018
_META_LENGTH = _GROUP_2 = 0x00020000
_META_SOP_CLASS_UID, _META_SOP_UID, _META_TRANSFER_SYNTAX_UID = 0x00020002, 0x00020003, 0x00020010
_SENDING_AE, _RECEIVING_AE, _CREATOR_UID, _PRIVATE = 0x00020017, 0x00020018, 0x00020100, 0x00020102
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"

_RECEIPT = struct.Struct("<BBq32s")
_SHORT, _LONG = struct.Struct("<HH2sH"), struct.Struct("<HH2sxxL")
_EXPLICIT = Encoding(explicit=True, little=True)
_LENGTH = struct.Struct("<HH2sHL")
_META_CUT_SHORT = "The file meta information is cut short."
_UIDS_WITHIN = 1 << 16  # bytes of a deflated dataset

# What is put in drop folders beside DICOM.
_OTHER_FORMATS = (
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"%PDF", "PDF"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\xfd7zXZ", "xz"),
    (b"BZh", "bzip2"),
    (b"7z\xbc\xaf", "7-Zip"),
)


class Origin(IntEnum):
    """By which door an instance came."""

    C_STORE = 1
    STOW_RS = 2
    INBOX = 3
    IMPORT = 4


@dataclass(frozen=True, slots=True)
class Receipt:
    """What we know of an instance that its dataset does not say."""

    received_at: int  # microseconds since 1970, UTC
    origin: Origin
    calling_ae: str
    called_ae: str
    digest: bytes  # SHA-256 of the dataset
    default_charset: (
        str  # Specific Character Set for objects that declare none; "" for the standard's default
    )


@dataclass(frozen=True, slots=True)
class FileMeta:
    """What stands before a dataset, and where that begins."""

    sop_class_uid: str
    sop_uid: str
    transfer_syntax_uid: str
    dataset_offset: int
    receipt: Receipt | None


def file_meta(sop_class_uid: str, sop_uid: str, transfer_syntax_uid: str, receipt: Receipt) -> bytes:
    """Preamble and file meta information for a dataset.

    Its length depends on the strings alone, not on when the instance came nor on its digest.
    """
    private = _RECEIPT.pack(1, receipt.origin, receipt.received_at, receipt.digest)
    private += receipt.default_charset.encode("ascii")
    body = (
        _META_VERSION
        + _short(0x0002, b"UI", sop_class_uid, b"\0")
        + _short(0x0003, b"UI", sop_uid, b"\0")
        + _short(0x0010, b"UI", transfer_syntax_uid, b"\0")
        + _IMPLEMENTATION
        + _short(0x0017, b"AE", receipt.calling_ae, b" ")
        + _short(0x0018, b"AE", receipt.called_ae, b" ")
        + _CREATOR
        + _long(0x0102, b"OB", private)
    )
    return _PREAMBLE + _LENGTH.pack(2, 0, b"UL", 4, len(body)) + body


def _short(number: int, vr: bytes, text: str, pad: bytes) -> bytes:
    value = text.encode("latin-1", "replace")
    if len(value) & 1:
        value += pad
    return _SHORT.pack(2, number, vr, len(value)) + value


def _long(number: int, vr: bytes, value: bytes) -> bytes:
    if len(value) & 1:
        value += b"\0"
    return _LONG.pack(2, number, vr, len(value)) + value


_PREAMBLE = bytes(128) + b"DICM"
_META_VERSION = _long(0x0001, b"OB", b"\x00\x01")
_IMPLEMENTATION = _short(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\0") + _short(
    0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "
)
_CREATOR = _short(0x0100, b"UI", IMPLEMENTATION_CLASS_UID, b"\0")


def read_file_meta(data: Buffer) -> FileMeta:
    """What the file of which *data* is the whole or the first 64 KiB or more says of its dataset.

    A file without preamble or file meta information is accepted if a dataset can be read: its transfer syntax
    is then guessed.  The UIDs are the dataset's, for those in the meta information are often left behind when
    a dataset is edited; the latter serve where the dataset's cannot be read.

    Raises RefusedError for what is no DICOM instance, saying what it is where that is known.
    """
    start = _after_preamble(data)
    values, offset, named_syntax = _read_group_2(data, start)
    dataset = memoryview(data)[offset:]
    if _text(values, _META_SOP_CLASS_UID) == _MEDIA_STORAGE_DIRECTORY or _starts_in_group_4(dataset):
        raise RefusedError("This is a DICOMDIR, the index of a medium, and no instance.")
    transfer_syntax_uid = named_syntax or _guessed_transfer_syntax(dataset)
    sop_class_uid, sop_uid = _dataset_uids(dataset, transfer_syntax_uid)
    sop_class_uid = sop_class_uid or _text(values, _META_SOP_CLASS_UID)
    sop_uid = sop_uid or _text(values, _META_SOP_UID)
    if not (sop_class_uid and sop_uid):
        raise RefusedError(_no_instance(data, start, offset))
    return FileMeta(sop_class_uid, sop_uid, transfer_syntax_uid, offset, _receipt(values))


def _after_preamble(data: Buffer) -> int:
    if data[128:132] == b"DICM":
        return 132
    return 4 if data[:4] == b"DICM" else 0


def _no_instance(data: Buffer, start: int, offset: int) -> str:
    if offset > start:
        return "The file has no SOP Class UID or no SOP Instance UID."
    for magic, name in _OTHER_FORMATS:
        if data[: len(magic)] == magic:
            return f"The file is not DICOM but {name}."
    return "The file is not DICOM."


def _read_group_2(data: Buffer, pos: int) -> tuple[dict[int, bytes], int, str]:
    """The values of the file meta information from *pos*, where it ends, and the transfer syntax it names."""
    values: dict[int, bytes] = {}
    transfer_syntax_uid, declared_end = "", -1
    while data[pos : pos + 2] == b"\x02\x00" and not (
        # Deflated bytes can look like anything, so there alone the group length is relied upon.
        pos == declared_end and is_deflated(transfer_syntax_uid)
    ):
        try:
            _, number, vr, length = _SHORT.unpack_from(data, pos)  # read_element costs twice as much
            start = pos + 8
            if vr not in SHORT_VRS:
                _, _, _, start, length, pos = read_element(data, pos, _EXPLICIT)
            else:
                pos = start + length
        except (PrefixError, struct.error) as error:
            raise RefusedError(_META_CUT_SHORT) from error
        if pos > len(data) or length == UNDEFINED:
            raise RefusedError(_META_CUT_SHORT)
        tag = _GROUP_2 | number
        value = values[tag] = bytes(data[start:pos])
        if tag == _META_LENGTH and len(value) == 4:
            declared_end = pos + int.from_bytes(value, "little")
        elif tag == _META_TRANSFER_SYNTAX_UID:
            transfer_syntax_uid = _text(values, _META_TRANSFER_SYNTAX_UID)
    return values, pos, transfer_syntax_uid


def _text(values: dict[int, bytes], tag: int) -> str:
    return values.get(tag, b"").decode("latin-1").strip(" \0")


def _starts_in_group_4(dataset: memoryview) -> bool:
    return bytes(dataset[:2]) in (b"\x04\x00", b"\x00\x04")


def _guessed_transfer_syntax(dataset: memoryview) -> str:
    encoding = encoding_of(dataset, EXPLICIT_LITTLE)
    if encoding.explicit:
        return EXPLICIT_LITTLE if encoding.little else EXPLICIT_BIG
    return IMPLICIT_LITTLE


def _dataset_uids(dataset: Buffer, transfer_syntax_uid: str) -> tuple[str, str]:
    """SOP Class and SOP Instance UID of *dataset*; empty if it has none or cannot be read."""
    values: dict[int, bytes] = {}
    try:
        if is_deflated(transfer_syntax_uid):
            dataset = inflate(dataset, _UIDS_WITHIN)[0]
        encoding, pos, tag = encoding_of(dataset, transfer_syntax_uid), 0, 0
        while tag < _SOP_UID:
            number, _, _, start, _, end = read_element(dataset, pos, encoding)
            if number <= tag or end > len(dataset):
                break
            tag, pos = number, end
            if tag in _UIDS:
                values[tag] = bytes(dataset[start:end])
    except (PrefixError, RefusedError):
        pass  # whatever it is, it shows no UIDs; the caller says so
    return _text(values, _SOP_CLASS_UID), _text(values, _SOP_UID)


def _receipt(values: dict[int, bytes]) -> Receipt | None:
    """Our receipt, or None if the file has none that we wrote and can read."""
    private = values.get(_PRIVATE, b"")
    if (
        _text(values, _CREATOR_UID) != IMPLEMENTATION_CLASS_UID
        or len(private) < _RECEIPT.size
        or private[0] != 1
    ):
        return None
    _, origin, received_at, digest = _RECEIPT.unpack_from(private)
    charset = private[_RECEIPT.size :].rstrip(b"\0")
    if origin not in Origin.__members__.values() or not charset.isascii():
        return None
    calling_ae, called_ae = _text(values, _SENDING_AE), _text(values, _RECEIVING_AE)
    return Receipt(received_at, Origin(origin), calling_ae, called_ae, digest, charset.decode())
