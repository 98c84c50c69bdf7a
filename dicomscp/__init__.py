"""dicomscp takes custody of DICOM instances and publishes each study as static DICOMweb."""

__version__ = "0.1.0"

# Root 2.25 (UUID-derived, PS3.5 B.2), of one UUID made for this project.
IMPLEMENTATION_CLASS_UID = "2.25.240825849830274951133380366996014594603"
IMPLEMENTATION_VERSION_NAME = "DICOMSCP_" + __version__.replace(".", "_")
