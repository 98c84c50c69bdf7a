"""Whether two datasets say the same in different bytes.

Sending applications re-encode on a resend, so an instance may come back in another uncompressed
transfer syntax.  It is the same if every attribute has the same values; what one encoding cannot
say (the VR of a private element in implicit VR) does not count.
"""

import orjson

from dicomscp.dicom.bulk import bulk_value
from dicomscp.dicom.elements import DEFLATED, EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, Buffer
from dicomscp.dicom.jsonmodel import Compiler

UNCOMPRESSED = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED})
"""The transfer syntaxes in which an instance may come again."""

_AVAILABLE_TRANSFER_SYNTAX_UID = 0x00083002


def same_values(one: Buffer, one_syntax: str, other: Buffer, other_syntax: str) -> bool:
    """Whether both datasets have the same attributes with the same values.

    Both transfer syntaxes are among UNCOMPRESSED.  Raises RefusedError if one cannot be read.
    """
    compiler = Compiler(cache_bytes=0, inline_bytes=1 << 40)
    headers = []
    for dataset, syntax in ((one, one_syntax), (other, other_syntax)):
        header = compiler.header(dataset, syntax, total_bytes=len(dataset), bulk_uri="")
        if header.warnings:
            return False
        fragments = dict(header.fragments)
        fragments.pop(_AVAILABLE_TRANSFER_SYNTAX_UID, None)
        headers.append(fragments)
    first, second = headers
    if first.keys() != second.keys():
        return False
    for tag, fragment in first.items():
        if fragment == second[tag] and b'"BulkDataURI"' not in fragment:
            continue
        path = f"{tag:08X}"
        if b'"vr":"SQ"' in fragment:
            return False  # another sequence, or bulk data within one: not looked into
        vrs = {orjson.loads(b"{%b}" % piece)[path]["vr"] for piece in (fragment, second[tag])}
        if len(vrs) > 1 and "UN" not in vrs:
            return False
        if _bytes(one, one_syntax, path) != _bytes(other, other_syntax, path):
            return False
    return True


def _bytes(dataset: Buffer, syntax: str, path: str) -> bytes:
    return b"".join(bulk_value(dataset, syntax, path).data)
