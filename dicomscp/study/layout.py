"""Where an instance lies and what its documents are called.

    instances/<xx>/<study>/<series>/<sop>.dcm          the first variant under a name
    instances/<xx>/<study>/<series>/<sop>~<digest>.dcm  others under the same name
    studies/<S>/...                                     documents, relative to the published tree

<xx> spreads studies over 256 folders.  A regular UID is its own component; any other UID that we
take stands under "~" and a hash, which no UID can look like.
"""

import hashlib
import re
from functools import lru_cache
from urllib.parse import quote

from dicomscp.dicom.identity import InstanceKey

_REGULAR = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)

STUDIES_INDEX = "studies/index.json.gz"


@lru_cache(maxsize=4096)
def component(uid: str) -> str:
    """The path and URL component of *uid*: never empty, never with a slash or a leading dot."""
    if len(uid) <= 64 and _REGULAR.fullmatch(uid):
        return uid
    return "~" + hashlib.sha256(uid.encode()).hexdigest()[:32]


@lru_cache(maxsize=4096)
def fan_out(study_uid: str) -> str:
    """The first two hex digits of SHA-256 of *study_uid*."""
    return hashlib.sha256(study_uid.encode()).hexdigest()[:2]


def series_directory(study_uid: str, series_uid: str) -> str:
    """The folder of a series' instances, relative to the root."""
    return f"instances/{fan_out(study_uid)}/{component(study_uid)}/{component(series_uid)}"


def instance_path(key: InstanceKey, digest: bytes | None = None) -> str:
    """The file of an instance, relative to the root; with *digest*, of a further variant of it."""
    suffix = f"~{digest.hex()[:16]}" if digest else ""
    return f"{series_directory(key.study_uid, key.series_uid)}/{component(key.sop_uid)}{suffix}.dcm"


def state_path(study_uid: str) -> str:
    """The state document of a study, relative to the root."""
    return f"state/{fan_out(study_uid)}/{component(study_uid)}.json"


def contents_directory(study_uid: str) -> str:
    """The folder of what the documents of a study's series are made of, relative to the root."""
    return f"state/{fan_out(study_uid)}/{component(study_uid)}"


def contents_path(study_uid: str, series_uid: str) -> str:
    """What the documents of a series are made of, relative to the root."""
    return f"{contents_directory(study_uid)}/{component(series_uid)}.contents"


def attempt_path(study_uid: str) -> str:
    """The record that a compile of the study was begun and not ended, relative to the root."""
    return f"state/attempts/{component(study_uid)}.json"


def study_directory(study_uid: str) -> str:
    """The folder of a study's documents, relative to the published tree."""
    return f"studies/{component(study_uid)}"


def study_index(study_uid: str) -> str:
    """The QIDO-RS object of the study, an array of one."""
    return f"{study_directory(study_uid)}/index.json.gz"


def study_metadata(study_uid: str) -> str:
    """The WADO-RS metadata of all instances of the study."""
    return f"{study_directory(study_uid)}/metadata.gz"


def series_index(study_uid: str) -> str:
    """The QIDO-RS objects of the series of the study."""
    return f"{study_directory(study_uid)}/series/index.json.gz"


def series_metadata(study_uid: str, series_uid: str) -> str:
    """The WADO-RS metadata of all instances of the series."""
    return f"{study_directory(study_uid)}/series/{component(series_uid)}/metadata.gz"


def instances_index(study_uid: str, series_uid: str) -> str:
    """The QIDO-RS objects of the instances of the series."""
    return f"{study_directory(study_uid)}/series/{component(series_uid)}/instances/index.json.gz"


def study_viewer(study_uid: str) -> str:
    """The document that the viewer opens the study with."""
    return f"{study_directory(study_uid)}/ohif-dicom-json.gz"


def series_viewer(study_uid: str, series_uid: str) -> str:
    """What the series adds to that document: the entries of its instances."""
    return f"{study_directory(study_uid)}/series/{component(series_uid)}/ohif-dicom-json.gz"


def instance_directory(key: InstanceKey) -> str:
    """The folder of what is published of one instance beside its metadata."""
    series = f"{study_directory(key.study_uid)}/series/{component(key.series_uid)}"
    return f"{series}/instances/{component(key.sop_uid)}"


def frame_path(key: InstanceKey, number: int, *, compressed: bool) -> str:
    """The multipart body of one frame; *compressed* in its transfer syntax, it gains nothing by gzip."""
    return f"{instance_directory(key)}/frames/{number}.mht" + ("" if compressed else ".gz")


def bulk_directory(key: InstanceKey) -> str:
    """The folder of the bulk values of one instance, which has the address that its links begin with."""
    folder = f"{study_directory(key.study_uid)}/bulkdata"
    return f"{folder}/{component(key.series_uid)}/{component(key.sop_uid)}"


def bulk_path(key: InstanceKey, path: str) -> str:
    """The bulk value at *path*, which is a tag, or tag/item/tag in sequences."""
    return f"{bulk_directory(key)}/{path}"


def study_url(base_url: str, study_uid: str) -> str:
    """The RetrieveURL of the study."""
    return f"{base_url}/studies/{_segment(study_uid)}"


def series_url(base_url: str, study_uid: str, series_uid: str) -> str:
    """The RetrieveURL of the series."""
    return f"{study_url(base_url, study_uid)}/series/{_segment(series_uid)}"


def instance_url(base_url: str, key: InstanceKey) -> str:
    """The RetrieveURL of the instance."""
    return f"{series_url(base_url, key.study_uid, key.series_uid)}/instances/{_segment(key.sop_uid)}"


def bulk_uri(base_url: str, key: InstanceKey) -> str:
    """What the BulkDataURIs of the instance begin with."""
    series, sop = _segment(key.series_uid), _segment(key.sop_uid)
    return f"{study_url(base_url, key.study_uid)}/bulkdata/{series}/{sop}"


def _segment(uid: str) -> str:
    """The UID as it stands in an address, where only one that is irregular needs an escape."""
    return uid if _REGULAR.fullmatch(uid) else quote(uid, safe="")
