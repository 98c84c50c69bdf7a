"""Which instance a dataset is."""

from typing import NamedTuple


class InstanceKey(NamedTuple):
    """Where an instance belongs: the three UIDs that name it."""

    study_uid: str
    series_uid: str
    sop_uid: str
