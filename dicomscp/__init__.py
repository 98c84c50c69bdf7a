"""dicomscp takes custody of DICOM instances and publishes each study as static DICOMweb."""

__version__ = "0.1.0"

# Registered root 2.25 (UUID-derived, PS3.5 B.2): ours for ever, of one UUID made for this project.
IMPLEMENTATION_CLASS_UID = "2.25.240826350935731420984416352412437411243"
IMPLEMENTATION_VERSION_NAME = "DICOMSCP_" + __version__.replace(".", "_")
