"""Datasets written by hand, byte by byte, for tests that must know every byte."""

import struct
import zlib

LONG = {"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"}
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
SEQUENCE_END = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
ITEM_END = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00"
UNDEFINED = 0xFFFFFFFF

CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"


def explicit(tag, vr, value=b"", *, length=None, order="<"):
    if isinstance(value, str):
        value = value.encode("latin-1")
        value += (b"\0" if vr == "UI" else b" ") * (len(value) & 1)
    length = len(value) if length is None else length
    head = struct.pack(order + "HH2s", tag >> 16, tag & 0xFFFF, vr.encode())
    return head + struct.pack(order + ("xxL" if vr in LONG else "H"), length) + value


def big(tag, vr, value=b"", *, length=None):
    return explicit(tag, vr, value, length=length, order=">")


def implicit(tag, value=b"", *, length=None, order="<"):
    if isinstance(value, str):
        value = value.encode("latin-1")
        value += b" " * (len(value) & 1)
    length = len(value) if length is None else length
    return struct.pack(order + "HHL", tag >> 16, tag & 0xFFFF, length) + value


def item(content=b"", *, length=None, order="<"):
    return implicit(0xFFFEE000, content, length=length, order=order)


def open_item(content=b""):
    return item(content, length=UNDEFINED) + ITEM_END


def fragments(*parts, table=b""):
    return b"".join(item(part) for part in (table, *parts)) + SEQUENCE_END


def uids(sop_uid="1.2.3", series_uid="1.2", study_uid="1", write=explicit):
    def one(tag, uid):
        uid = uid.encode() + b"\0" * (len(uid) & 1)
        return write(tag, uid) if write is implicit else write(tag, "UI", uid)

    return (
        one(0x00080016, CT_CLASS) + one(0x00080018, sop_uid),
        one(0x0020000D, study_uid) + one(0x0020000E, series_uid),
    )


def dataset(*more, write=explicit, **names):
    return b"".join(uids(write=write, **names)) + b"".join(more)


def deflate(data):
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(data) + deflater.flush()
