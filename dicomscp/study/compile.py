"""The documents of a study, as a function of the headers of its published instances alone.

Headers come as the fragments of `dicom.jsonmodel`: tag to encoded member.  Series stand by number,
then UID, instances by number, then UID; absent numbers last.  Where instances disagree on an
attribute of their study or series, the first non-empty value in that order stands.

Series are compiled one after another, so memory is bounded by the largest series.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import orjson

from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.matching import INSTANCE_TAGS, SERIES_TAGS, STUDY_TAGS
from dicomscp.study import layout

Fragments = Mapping[int, bytes]

SPECIFIC_CHARACTER_SET = 0x00080005
_SOP_CLASS_UID = 0x00080016
_INSTANCE_AVAILABILITY = 0x00080056
_MODALITY = 0x00080060
_MODALITIES_IN_STUDY = 0x00080061
_SOP_CLASSES_IN_STUDY = 0x00080062
_RETRIEVE_URL = 0x00081190
_STUDY_UID = 0x0020000D
_SERIES_UID = 0x0020000E
_SERIES_NUMBER = 0x00200011
_INSTANCE_NUMBER = 0x00200013
_STUDY_RELATED_SERIES = 0x00201206
_STUDY_RELATED_INSTANCES = 0x00201208
_SERIES_RELATED_INSTANCES = 0x00201209

_STUDY_LEVEL = tuple(sorted(STUDY_TAGS))
_SERIES_LEVEL = tuple(sorted(SERIES_TAGS))
_INSTANCE_LEVEL = tuple(sorted(INSTANCE_TAGS))


class Member(NamedTuple):
    """A published instance and its header."""

    key: InstanceKey
    fragments: Fragments


class SeriesSummary(NamedTuple):
    """What the study's documents need of a compiled series."""

    series_uid: str
    order: tuple[bool, int, str]
    series_attributes: Fragments
    study_attributes: Fragments
    sop_class_uids: frozenset[str]
    instances: int


class Document(NamedTuple):
    """A body to be published at *path*, relative to the published tree."""

    path: str
    body: Iterable[bytes]


def compile_series(
    study_uid: str, series_uid: str, members: Iterable[Member], base_url: str
) -> tuple[SeriesSummary, list[Document]]:
    """The documents of one series, and what the study needs of it."""
    ordered = sorted(members, key=_instance_order)
    study: dict[int, bytes] = {}
    series: dict[int, bytes] = {}
    classes: set[str] = set()
    for member in ordered:
        _fill(study, member.fragments, _STUDY_LEVEL)
        _fill(series, member.fragments, _SERIES_LEVEL)
        classes.update(_strings(member.fragments.get(_SOP_CLASS_UID)))
    number = _number(series.get(_SERIES_NUMBER))
    order = (number is None, number or 0, series_uid)
    summary = SeriesSummary(series_uid, order, series, study, frozenset(classes), len(ordered))
    documents = [
        Document(
            layout.instances_index(study_uid, series_uid),
            _array([_instance_object(member, base_url) for member in ordered]),
        ),
        Document(
            layout.series_metadata(study_uid, series_uid),
            _array([b",".join(member.fragments.values()) for member in ordered]),
        ),
    ]
    return summary, documents


def study_order(summaries: Iterable[SeriesSummary]) -> list[SeriesSummary]:
    """The series of a study in published order."""
    return sorted(summaries, key=lambda summary: summary.order)


def compile_study(study_uid: str, summaries: Sequence[SeriesSummary], base_url: str) -> list[Document]:
    """The series index and the study index; *summaries* are all series of the study, in published order."""
    study: dict[int, bytes] = {}
    modalities: set[str] = set()
    classes: set[str] = set()
    for summary in summaries:
        _fill(study, summary.study_attributes, _STUDY_LEVEL)
        modalities.update(_strings(summary.series_attributes.get(_MODALITY)))
        classes.update(summary.sop_class_uids)
    study |= {
        _INSTANCE_AVAILABILITY: member(_INSTANCE_AVAILABILITY, "CS", ["ONLINE"]),
        _MODALITIES_IN_STUDY: member(_MODALITIES_IN_STUDY, "CS", sorted(modalities)),
        _SOP_CLASSES_IN_STUDY: member(_SOP_CLASSES_IN_STUDY, "UI", sorted(classes)),
        _RETRIEVE_URL: member(_RETRIEVE_URL, "UR", [layout.study_url(base_url, study_uid)]),
        _STUDY_RELATED_SERIES: member(_STUDY_RELATED_SERIES, "IS", [len(summaries)]),
        _STUDY_RELATED_INSTANCES: member(
            _STUDY_RELATED_INSTANCES, "IS", [sum(summary.instances for summary in summaries)]
        ),
    }
    return [
        Document(
            layout.series_index(study_uid),
            _array([_series_object(study_uid, summary, base_url) for summary in summaries]),
        ),
        Document(layout.study_index(study_uid), _array([_joined(study)])),
    ]


def member(tag: int, vr: str, values: Sequence[object]) -> bytes:
    """One encoded member of a DICOM JSON object."""
    model: dict[str, object] = {"vr": vr, "Value": values} if values else {"vr": vr}
    return b'"%08X":%b' % (tag, orjson.dumps(model))


def _series_object(study_uid: str, summary: SeriesSummary, base_url: str) -> bytes:
    url = layout.series_url(base_url, study_uid, summary.series_uid)
    return _joined(
        dict(summary.series_attributes)
        | {
            _INSTANCE_AVAILABILITY: member(_INSTANCE_AVAILABILITY, "CS", ["ONLINE"]),
            _RETRIEVE_URL: member(_RETRIEVE_URL, "UR", [url]),
            _STUDY_UID: member(_STUDY_UID, "UI", [study_uid]),
            _SERIES_UID: member(_SERIES_UID, "UI", [summary.series_uid]),
            _SERIES_RELATED_INSTANCES: member(_SERIES_RELATED_INSTANCES, "IS", [summary.instances]),
        }
    )


def _instance_object(one: Member, base_url: str) -> bytes:
    fragments = {tag: one.fragments[tag] for tag in _INSTANCE_LEVEL if tag in one.fragments}
    return _joined(
        fragments
        | {
            _INSTANCE_AVAILABILITY: member(_INSTANCE_AVAILABILITY, "CS", ["ONLINE"]),
            _RETRIEVE_URL: member(_RETRIEVE_URL, "UR", [layout.instance_url(base_url, one.key)]),
            _STUDY_UID: member(_STUDY_UID, "UI", [one.key.study_uid]),
            _SERIES_UID: member(_SERIES_UID, "UI", [one.key.series_uid]),
        }
    )


def _fill(target: dict[int, bytes], fragments: Fragments, tags: Iterable[int]) -> None:
    """Take what *target* has no value for yet."""
    for tag in tags:
        fragment = fragments.get(tag)
        if fragment is not None and (tag not in target or (_empty(target[tag]) and not _empty(fragment))):
            target[tag] = fragment


def _empty(fragment: bytes) -> bool:
    return b'"Value"' not in fragment and b'"InlineBinary"' not in fragment


def _instance_order(one: Member) -> tuple[bool, int, str]:
    number = _number(one.fragments.get(_INSTANCE_NUMBER))
    return number is None, number or 0, one.key.sop_uid


def _number(fragment: bytes | None) -> int | None:
    """The first value of an IS member, or None if it is absent or no whole number."""
    try:
        return int(_values(fragment)[0])  # type: ignore[call-overload,no-any-return] # what is no number raises
    except (IndexError, TypeError, ValueError):
        return None


def _strings(fragment: bytes | None) -> list[str]:
    return [value for value in _values(fragment) if isinstance(value, str)]


def _values(fragment: bytes | None) -> list[object]:
    if fragment is None:
        return []
    (element,) = orjson.loads(b"{%b}" % fragment).values()
    values = element.get("Value", [])
    return values if isinstance(values, list) else []


def _joined(fragments: Fragments) -> bytes:
    return b",".join(fragments[tag] for tag in sorted(fragments))


def _array(objects: Sequence[bytes]) -> list[bytes]:
    """The pieces of a JSON array of objects, each given without its braces."""
    if not objects:
        return [b"[]"]
    pieces = [b"[{"]
    for index, one in enumerate(objects):
        if index:
            pieces.append(b"},\n{")
        pieces.append(one)
    pieces.append(b"}]")
    return pieces
