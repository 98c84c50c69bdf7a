"""The VR of elements that do not say theirs: implicit VR, and UN (PS3.5 sections 6.2.2 and 7.1.3).

The tables are pydicom's.  A VR that depends on other elements is given as it stands in PS3.6 ("US or SS").
"""

from functools import lru_cache

from pydicom._dicom_dict import DicomDictionary, RepeatersDictionary
from pydicom._private_dict import private_dictionaries

_REPEATERS = [
    (
        int("".join("0" if digit == "x" else digit for digit in mask), 16),
        int("".join("0" if digit == "x" else "F" for digit in mask), 16),
        entry[0],
    )
    for mask, entry in RepeatersDictionary.items()
]


@lru_cache(maxsize=8192)
def public_vr(tag: int) -> str:
    """The VR of a standard element; "UN" if the standard has none."""
    if entry := DicomDictionary.get(tag):
        return entry[0]
    return next((vr for fixed, mask, vr in _REPEATERS if tag & mask == fixed), "UN")


@lru_cache(maxsize=8192)
def private_vr(tag: int, creator: str) -> str:
    """The VR of the private element *tag* in a block of *creator*; "UN" if it is not known."""
    entries = private_dictionaries.get(creator, {})
    group, number = f"{tag >> 16:04X}", f"{tag & 0xFFFF:04X}"
    for key in (group + number, f"{group}xx{number[2:]}", f"{group[:2]}xxxx{number[2:]}"):
        if key in entries:
            return entries[key][0].replace("OB_OW", "OB or OW")
    return "UN"


def is_creator(tag: int) -> bool:
    """Whether *tag* reserves a block of private elements (PS3.5 section 7.8.1)."""
    return bool(tag >> 16 & 1) and 0x10 <= tag & 0xFFFF <= 0xFF


def known_vr(tag: int, written: bytes, *, undefined_length: bool, creator: str) -> str:
    """The VR of an element: as *written* (b"" and b"UN" say nothing), or by its tag and private creator.

    An element of undefined length that no dictionary knows is a sequence (PS3.5 section 6.2.2, note 2).
    """
    if written not in (b"", b"UN"):
        return written.decode("ascii")
    if is_creator(tag):
        vr = "LO"
    elif tag >> 16 & 1:
        vr = private_vr(tag, creator)
    else:
        vr = public_vr(tag)
    return "SQ" if undefined_length and vr != "OB or OW" else vr
