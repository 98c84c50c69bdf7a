"""The tables of docs/conformance.md that say what the code does, made from the code.

    python -m tests.conformance.statement

writes them anew, between their marks.
"""

import re
from pathlib import Path

from pydicom.datadict import dictionary_description
from pydicom.uid import UID, UID_dictionary

from dicomscp.archive.index import Held
from dicomscp.dicom import matching
from dicomscp.dicom.dictionary import public_vr
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.matching import STANDARD, Level
from dicomscp.dimse import query
from dicomscp.web import instances, render, search, store, studies, wado_uri
from dicomscp.web.media import DICOM, DICOM_JSON, DICOM_XML

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
MARKED = re.compile(r"(<!-- made from the code: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)

_MODEL = STANDARD
_FOUND = {Level.STUDY: "studies", Level.SERIES: "series", Level.IMAGE: "instances"}
_RANGED = ("DA", "TM", "DT")


def rewritten(document):
    """*document* with its tables as the code has them."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], document)


def keys():
    """Every attribute, by level."""
    parts = []
    for level in Level:
        own = [(_MODEL.unique(level), "U"), *((tag, "R") for tag in sorted(_MODEL.required(level)))]
        own += [(tag, "O") for tag in sorted(_MODEL.optional(level))]
        own += [(tag, "O, computed") for tag in sorted(_MODEL.computed(level))]
        rows = [(*_named(tag), kind, _returned(level, tag)) for tag, kind in own]
        parts.append(f"**{level}**\n\n" + _table(("attribute", "tag", "VR", "key", "QIDO-RS"), rows))
    return "\n".join(parts)


def matching_by_vr():
    """How each VR that there is among the attributes is matched."""
    tags = frozenset().union(*(_MODEL.supported(level) for level in Level))
    return _table(
        ("VR", "matching"), [(vr, _matching(vr)) for vr in sorted({public_vr(tag) for tag in tags})]
    )


def models():
    """The information models of C-FIND, and their levels."""
    rows = [
        (UID(uid).name.split(" - ")[0], uid, ", ".join(_levels(uid, root)))
        for uid, root in query.ROOTS.items()
    ]
    return _table(("information model", "SOP class", "levels"), rows)


def _levels(uid, root):
    if uid == query.PATIENT_STUDY_ONLY:
        return [level for level in Level if level in query._PATIENT_STUDY_LEVELS]
    return [level for level in Level if root == "PATIENT" or level is not Level.PATIENT]


def negotiation():
    """The sub-fields of extended negotiation, and whether they are granted."""
    rows = [
        (str(at + 1), of, "yes" if granted else "no")
        for at, (of, granted) in enumerate(zip(_SUB_FIELDS, query.granted(b"\1" * 7), strict=True))
    ]
    return _table(("byte", "what is asked for", "granted"), rows)


# PS3.4 table C.5-1.
_SUB_FIELDS = (
    "relational queries",
    "combined date and time matching",
    "fuzzy semantic matching of person names",
    "time zone query adjustment",
    "enhanced multi-frame image conversion",
    "empty value matching",
    "multiple value matching",
)


def resources():
    return _table(
        ("resource", "finds"),
        [(f"`{{base}}{path}`", _FOUND[level]) for path, level in search.RESOURCES.items()],
    )


def media():
    rows = [(f"`{offer.content_type('...').partition('; boundary')[0]}`",) for offer in search.OFFERS]
    return _table(("media type, the default first",), rows)


def _types(offers):
    """Media types in the order of preference, each once; those in parts are told so."""
    told = [f"{'parts of ' if offer.multipart else ''}{offer.media_type}" for offer in offers]
    return ", ".join(f"`{one}`" for one in dict.fromkeys(told))


def retrieved():
    """The resources of the Retrieve Transaction that give instances, frames and what is made of them."""
    held = Held(InstanceKey("1", "2", "3"), "", _JPEG_2000, "", b"", 0, 0)
    rows = []
    for path, name in (("", "instances of a study"), ("/series/{series}", "of a series")):
        offers = instances.dicom_offers([held], single=False)
        rows.append((f"`{{base}}/studies/{{study}}{path}`", name, "`accept`", _types(offers)))
    rows += [
        (f"`{_INSTANCE}`", "one instance", "`accept`", _types(instances.dicom_offers([held], single=True))),
        (
            f"`{_INSTANCE}/frames/{{frames}}`",
            "frames",
            "`accept`",
            _types(studies._frame_offers(_JPEG_2000, 1)),
        ),
    ]
    for path, frames in (("", 0), ("/frames/{frames}", 1)):
        rows.append(
            (
                f"`{_INSTANCE}{path}/rendered`",
                "an image, or the document or video that it is",
                _listed(render.PARAMETERS["rendered"]),
                _types(render.image_offers(frames)),
            )
        )
    rows.append(
        (
            "`.../rendered` of a study or series",
            "images, a part a frame",
            _listed(render.PARAMETERS["rendered"]),
            _types(offer for offer in render.image_offers(0) if offer.multipart),
        )
    )
    rows.append(
        (
            "`.../thumbnail` of a study, series, instance or frame",
            "a small image",
            _listed(render.PARAMETERS["thumbnail"]),
            _types(offer for offer in render.image_offers(1) if not offer.multipart),
        )
    )
    return _table(("resource", "gives", "parameters", "media types, the default first"), rows)


_JPEG_2000 = "1.2.840.10008.1.2.4.90"
_INSTANCE = "{base}/studies/{study}/series/{series}/instances/{instance}"


def _listed(names):
    return ", ".join(f"`{name}`" for name in names)


def transcoded():
    """Transfer syntaxes of what can be had in Explicit VR Little Endian, and be rendered."""
    rows = [(UID(uid).name, uid) for uid in sorted(UID_dictionary) if instances.is_transcodable(uid)]
    return _table(("transfer syntax", "UID"), rows)


def documents():
    """What is given as what it is."""
    rows = [(UID(uid).name, f"`{media_type}`") for uid, media_type in render._DOCUMENT_CLASSES.items()]
    return _table(("SOP class", "media type, unless it says another of the list"), rows)


def wado_uri_parameters():
    """The parameters of WADO-URI."""
    done = [("requestType", "`WADO`"), *((name, "the UIDs of the instance") for name in wado_uri.UIDS)]
    done += [("contentType", "media types; without it the Accept header decides")]
    done += [(name, "with `application/dicom` alone") for name in wado_uri.FOR_FILES]
    done += [(name, "with images alone") for name in wado_uri.FOR_IMAGES]
    done += [(name, "406: the answer would be another") for name in wado_uri.REFUSED]
    done += [(name, "passed over, and named in a Warning") for name in wado_uri.PASSED_OVER]
    return _table(("parameter", "done"), [(f"`{name}`", what) for name, what in done])


def payloads():
    """What the body of a request to store has in it, by its media type."""
    had = {DICOM: "Part 10 files", DICOM_JSON: "metadata and bulk data", DICOM_XML: "metadata and bulk data"}
    rows = [
        (f'`multipart/related; type="{media_type}"`, `{media_type}`', had[media_type])
        for media_type in store.PAYLOADS
    ]
    return _table(("Content-Type, in several parts and in one", "the body has"), rows)


def store_media():
    """The media types of responses."""
    rows = [(f"`{offer.content_type('...').partition('; boundary')[0]}`",) for offer in store.OFFERS]
    return _table(("media type, the default first",), rows)


def store_reasons():
    """The Failure Reasons, and of what."""
    rows = [(f"{reason:04X}", _FAILURES[family.__name__]) for family, reason in store._FAILURE_REASON]
    return _table(("Failure Reason", "why the instance is not stored"), rows)


_FAILURES = {
    "TransferSyntaxError": "its transfer syntax is none that instances are held in, or is not to be known",
    "LimitError": "it, or the body, is larger, or has more in it, than is taken",
    "CrowdedError": "as many different datasets under its SOP Instance UID are held as may be",
    "MismatchError": "it is of another study than the address has",
    "RefusedError": "it cannot be read, is cut short, lacks a UID, or its bulk data are not there",
    "BusyError": "the disk is too full or fails: it may be stored another time",
    "DicomscpError": "anything else",
}


TABLES = {
    "keys": keys,
    "matching": matching_by_vr,
    "models": models,
    "negotiation": negotiation,
    "resources": resources,
    "media": media,
    "retrieved": retrieved,
    "transcoded": transcoded,
    "documents": documents,
    "wado": wado_uri_parameters,
    "payloads": payloads,
    "store_media": store_media,
    "store_reasons": store_reasons,
}


def _named(tag):
    return dictionary_description(tag), f"({tag >> 16:04X},{tag & 0xFFFF:04X})", public_vr(tag)


def _returned(level, tag):
    of = Level.STUDY if level is Level.PATIENT else level
    if tag in matching._ALWAYS[of]:
        return "always"
    return "known" if tag in matching._UNASKED[of] else "asked"


def _matching(vr):
    if vr == "SQ":
        return "sequence: an item that matches all that is asked of items"
    if vr == "UI":
        return "single value, list of UIDs"
    if vr in _RANGED:
        return "single value, range"
    if vr in matching._NUMBER_VRS:
        return "single value, as a number"
    return "single value, wildcards" if vr in matching._WILDCARD_VRS else "single value"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
