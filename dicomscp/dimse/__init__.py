"""DICOM over TCP (PS3.7, PS3.8): the only room that imports pynetdicom."""
