import gzip
import hashlib
import io
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file

from dicomscp.dicom.part10 import FileMeta, Origin, Receipt, file_meta, read_file_meta
from dicomscp.errors import RefusedError
from tests.unit.dicom.encoding import (
    CT_CLASS,
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    big,
    dataset,
    deflate,
    explicit,
    implicit,
)

RECEIPT = Receipt(
    received_at=1_700_000_000_123_456,
    origin=Origin.C_STORE,
    calling_ae="MODALITY1",
    called_ae="DICOMSCP",
    digest=hashlib.sha256(dataset()).digest(),
    default_charset="ISO_IR 100",
)


def part10(data=None, transfer_syntax_uid=EXPLICIT_LITTLE, receipt=RECEIPT):
    return file_meta(CT_CLASS, "1.2.3", transfer_syntax_uid, receipt) + (dataset() if data is None else data)


def group_2(*elements, preamble=bytes(128) + b"DICM"):
    return preamble + b"".join(elements)


@pytest.mark.parametrize("default_charset", ["", "ISO_IR 100", "GB18030", "ISO 2022 IR 13"])
@pytest.mark.parametrize("calling_ae", ["", "A", "MODALITY1", "SIXTEEN CHARS AE"])
def test_a_receipt_is_read_as_it_was_written(default_charset, calling_ae):
    receipt = replace(RECEIPT, default_charset=default_charset, calling_ae=calling_ae)
    file = part10(receipt=receipt)

    found = read_file_meta(file)
    assert found == FileMeta(CT_CLASS, "1.2.3", EXPLICIT_LITTLE, len(file) - len(dataset()), receipt)


def test_pydicom_reads_what_we_write():
    found = pydicom.dcmread(io.BytesIO(part10()))

    assert found.file_meta.FileMetaInformationGroupLength == len(part10()) - len(dataset()) - 144
    assert found.file_meta.SendingApplicationEntityTitle == "MODALITY1"
    assert found.file_meta.MediaStorageSOPInstanceUID == found.SOPInstanceUID == "1.2.3"


def test_the_length_does_not_depend_on_time_or_digest():
    later = replace(RECEIPT, received_at=-1, digest=b"\xff" * 32)

    assert len(part10(receipt=later)) == len(part10())


def test_a_private_element_of_somebody_else_is_no_receipt():
    file = part10().replace(b"2.25.240825849830274951133380366996014594603", b"2.25" + b".1" * 20)

    assert read_file_meta(file).receipt is None


@pytest.mark.parametrize("damage", [b"\x02", b"\x01\x09"], ids=["version", "origin"])
def test_a_receipt_that_we_cannot_read_is_none(damage):
    file = bytearray(part10())
    at = file.index(b"\x02\x00\x02\x01OB\0\0") + 12
    file[at : at + len(damage)] = damage

    assert read_file_meta(file).receipt is None


@pytest.mark.parametrize(
    ("data", "transfer_syntax_uid"),
    [
        (dataset(), EXPLICIT_LITTLE),
        (dataset(write=big), EXPLICIT_BIG),
        (dataset(write=implicit), IMPLICIT_LITTLE),
    ],
)
@pytest.mark.parametrize(
    "preamble", [b"", bytes(128) + b"DICM", b"DICM"], ids=["none", "whole", "magic only"]
)
def test_without_meta_information_the_dataset_speaks(preamble, data, transfer_syntax_uid):
    found = read_file_meta(preamble + data)

    assert found == FileMeta(CT_CLASS, "1.2.3", transfer_syntax_uid, len(preamble), None)


def test_a_transfer_syntax_left_out_is_guessed():
    file = group_2(explicit(0x00020002, "UI", CT_CLASS), dataset(write=implicit))

    assert read_file_meta(file).transfer_syntax_uid == IMPLICIT_LITTLE


def test_a_wrong_group_length_does_no_harm():
    for length in (0, 10, 10_000):
        file = group_2(
            explicit(0x00020000, "UL", length.to_bytes(4, "little")),
            explicit(0x00020010, "UI", IMPLICIT_LITTLE),
            dataset(write=implicit),
        )
        assert read_file_meta(file).dataset_offset == len(file) - len(dataset(write=implicit))


def test_deflated_bytes_that_look_like_group_2_are_the_dataset():
    stored = b"\x02\x00\x00\x00garbage"
    syntax = explicit(0x00020010, "UI", DEFLATED) + explicit(0x00020003, "UI", "1.2.3")
    syntax = explicit(0x00020002, "UI", CT_CLASS) + syntax
    length = explicit(0x00020000, "UL", len(syntax).to_bytes(4, "little"))
    file = group_2(length, syntax, stored)

    assert read_file_meta(file).dataset_offset == len(file) - len(stored)


def test_uids_left_out_are_taken_from_a_deflated_dataset():
    file = group_2(explicit(0x00020010, "UI", DEFLATED), deflate(dataset()))

    assert read_file_meta(file).sop_uid == "1.2.3"


def test_the_datasets_uids_are_believed_before_those_of_the_meta_information():
    stale = file_meta(CT_CLASS, "9.9.9", EXPLICIT_LITTLE, RECEIPT)

    assert read_file_meta(stale + dataset()).sop_uid == "1.2.3"
    assert read_file_meta(stale).sop_uid == "9.9.9"


def test_a_prefix_is_enough():
    file = part10(dataset(explicit(0x7FE00010, "OW", bytes(1 << 20))))

    assert read_file_meta(memoryview(file)[: 1 << 16]) == read_file_meta(file)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gzip.compress(part10()), "gzip"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"%PDF-1.7", "PDF"),
        (b"", "not DICOM"),
        (b"MZ", "not DICOM"),
        (b"once upon a time" * 100, "not DICOM"),
        (bytes(10_000), "not DICOM"),
        (bytes(128) + b"DICM", "not DICOM"),
        (part10()[:200], "cut short"),
        (group_2(explicit(0x00020010, "UI", EXPLICIT_LITTLE)), "no SOP Class"),
        (group_2(explicit(0x00020002, "UI", "1.2.840.10008.1.3.10")), "DICOMDIR"),
        (explicit(0x00041130, "CS", "MEDIA"), "DICOMDIR"),
    ],
)
def test_what_is_no_instance_is_refused_by_name(data, reason):
    with pytest.raises(RefusedError, match=reason):
        read_file_meta(data)


@pytest.mark.parametrize("end", range(133, 280, 7))
def test_meta_information_cut_short_is_refused(end):
    with pytest.raises(RefusedError):
        read_file_meta(part10(b"")[:end])


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "rtplan.dcm"])
def test_pydicoms_files_are_read_as_pydicom_reads_them(name):
    path = get_testdata_file(name, download=False)
    reference = pydicom.dcmread(path)
    found = read_file_meta(Path(path).read_bytes()[: 1 << 16])

    assert found.sop_uid == reference.SOPInstanceUID
    assert found.transfer_syntax_uid == reference.file_meta.TransferSyntaxUID
    assert found.receipt is None
