"""An archive that holds files put in directly, as if receiving and filing were done."""

import hashlib
from pathlib import Path

import pydicom
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomscp.archive.archive import Archive
from dicomscp.archive.index import Arrival, Index
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.matching import STANDARD
from dicomscp.dicom.part10 import Origin, Receipt, file_meta, read_file_meta
from dicomscp.study import layout
from tests.databases import open_sqlite

SOURCES = Path(pydicom.__file__).parent / "data" / "test_files"
LITTLE = "1.2.840.10008.1.2.1"


class FilledArchive(Archive):
    """An Archive with an index of its own; what was added is held and found at once."""

    def __init__(self, root, retrieve_url="/dicomweb"):
        self.root = root
        self.engine = open_sqlite(root / "index.sqlite")
        self.index = Index(self.engine, retrieve_url=retrieve_url)
        self.compiler = Compiler()
        super().__init__(root, self.index)

    def add_file(self, name):
        """Hold a file that comes with pydicom, its dataset's bytes as they are."""
        data = (SOURCES / name).read_bytes()
        meta = read_file_meta(data)
        dataset = pydicom.dcmread(SOURCES / name, stop_before_pixels=True)
        return self.add(dataset, meta.transfer_syntax_uid, data[meta.dataset_offset :])

    def add(self, dataset, syntax=LITTLE, encoded=None):
        """Hold *dataset*, whose bytes in that transfer syntax are *encoded*."""
        if encoded is None:
            buffer = DicomBytesIO()
            buffer.is_little_endian, buffer.is_implicit_VR = True, False
            write_dataset(buffer, dataset)
            encoded = buffer.getvalue()
        key = InstanceKey(dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID)
        digest = hashlib.sha256(encoded).digest()
        receipt = Receipt(0, Origin.C_STORE, "SENDER", "DICOMSCP", digest, "")
        file = file_meta(dataset.SOPClassUID, key.sop_uid, syntax, receipt) + encoded
        path = layout.instance_path(key)
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(file)
        header = self.compiler.header(
            encoded, syntax, total_bytes=len(encoded), bulk_uri="", wanted=STANDARD.index_tags
        ).fragments
        what = (key, dataset.SOPClassUID, syntax, digest, 0, "SENDER", path, len(file), header)
        self.index.apply([Arrival(*what)], {})
        (held,) = self.held(*key)
        return held
