"""Names of many scripts, of pydicom's files: found by each of their representations, in any character set."""

import hashlib
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomscp.archive import sqlite
from dicomscp.archive.index import Arrival, Index
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.dicom.matching import STANDARD, Level, Options, Query, query_from_identifier
from dicomscp.dicom.names import fold, name_parts
from dicomscp.dicom.part10 import read_file_meta
from dicomscp.dimse.query import carrier, decode_identifier
from dicomscp.study import layout

EXPLICIT = "1.2.840.10008.1.2.1"
NAME, SOP_UID, STUDY_UID = "00100010", "00080018", "0020000D"
# By file, and the character sets that the question may be asked in beside UTF-8.
SETS = {
    "chrArab.dcm": ["ISO_IR 127"],
    "chrFren.dcm": ["ISO_IR 100", "GB18030"],
    "chrFrenMulti.dcm": ["ISO_IR 100"],
    "chrGerm.dcm": ["ISO_IR 100", "ISO_IR 148"],
    "chrGreek.dcm": ["ISO_IR 126"],
    "chrH31.dcm": ["\\ISO 2022 IR 87"],
    "chrH32.dcm": ["ISO 2022 IR 13\\ISO 2022 IR 87"],
    "chrHbrw.dcm": ["ISO_IR 138"],
    "chrI2.dcm": ["\\ISO 2022 IR 149"],
    "chrKoreanMulti.dcm": ["\\ISO 2022 IR 149"],
    "chrRuss.dcm": ["ISO_IR 144"],
    "chrX1.dcm": ["GB18030"],
    "chrX2.dcm": ["GB18030", "GBK"],
}


def arrival(compiler, path, number):
    data = path.read_bytes()
    try:
        meta = read_file_meta(data)
        offset, syntax = meta.dataset_offset, meta.transfer_syntax_uid
    except pydicom.errors.InvalidDicomError:
        offset, syntax = 0, EXPLICIT
    dataset = data[offset:]
    header = compiler.header(
        dataset, syntax, total_bytes=len(dataset), bulk_uri="", wanted=STANDARD.index_tags
    )
    # Some of them have the same UIDs, or none.
    key = InstanceKey(f"1.{number}", f"1.{number}.1", f"1.{number}.1.1")
    digest = hashlib.sha256(data).digest()
    path = layout.instance_path(key)
    return Arrival(key, "1.2", syntax, digest, number, "CT", path, len(data), header.fragments)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """An index of all those files, and the names in them by file, as pydicom reads them."""
    folder = Path(pydicom.__file__).parent / "data" / "charset_files"
    engine = sqlite.open_engine(tmp_path_factory.mktemp("names") / "index.sqlite", read_only=False)
    index, compiler = Index(engine), Compiler()
    index.apply([arrival(compiler, folder / file, number) for number, file in enumerate(SETS)], {})
    names = {file: str(pydicom.dcmread(folder / file).PatientName) for file in SETS}
    yield index, names
    engine.dispose()


def encoded(text, charset):
    """An identifier of studies with this patient's name."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = charset.split("\\")
    dataset.QueryRetrieveLevel = "STUDY"
    dataset.PatientName = text
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = False, True
    write_dataset(file, dataset)
    return file.getvalue()


def studies(index, text, charset, *, is_fuzzy=False):
    """The UIDs of studies that a C-FIND for the name gives, asked in that character set."""
    identifier = decode_identifier(encoded(text, charset), EXPLICIT)
    assert identifier[0x00100010] == ("PN", [text])
    query = query_from_identifier(identifier, root="STUDY", options=Options(fuzzy=is_fuzzy))
    return {one[STUDY_UID]["Value"][0] for one in index.find(query)}


def sets_of(file, text):
    """UTF-8, and those of the file that carry *text*."""
    return [
        "ISO_IR 192",
        *(one for one in SETS[file] if carrier(text, tuple(one.split("\\"))) != ("ISO_IR 192",)),
    ]


@pytest.mark.parametrize("file", SETS)
def test_a_name_is_found_by_each_representation_in_each_character_set(held, file):
    index, names = held
    uid, name = f"1.{list(SETS).index(file)}", names[file]
    groups = [group for group in name.split("=") if group]
    assert groups
    for group in groups:
        parts = name_parts(fold(group))
        for charset in sets_of(file, group):
            assert uid in studies(index, group, charset), (group, charset)
            assert uid in studies(index, f"?{group[1:-1]}*", charset)
            assert uid in studies(index, f"*{group[1:]}", charset)
            assert uid in studies(index, " ".join(reversed(parts)), charset, is_fuzzy=True)
        assert uid in studies(index, group.upper(), "ISO_IR 192")
        assert uid in studies(index, fold(group), "ISO_IR 192")
    assert uid in studies(index, name, "ISO_IR 192")
    assert uid not in studies(index, f"x{name}", "ISO_IR 192")


def test_the_files_have_names_of_every_script(held):
    _, names = held
    scripts = (
        "Äneas",
        "Buc^Jérôme",
        "Διονυσιος",
        "김희중",
        "山田^太郎",
        "やまだ",
        "ﾔﾏﾀﾞ",
        "Люкceмбypг",
        "王^小东",
        "שרון",
        "قباني",
    )
    assert all(any(script in name for name in names.values()) for script in scripts), names


def test_a_name_in_halfwidth_kana_is_one_in_fullwidth(held):
    index, names = held
    uid = f"1.{list(SETS).index('chrH32.dcm')}"
    assert "ﾔﾏﾀﾞ^ﾀﾛｳ" in names["chrH32.dcm"]
    assert uid in studies(index, "ヤマダ^タロウ", "ISO_IR 192")
    assert uid not in studies(index, "ヤマタ^タロウ", "ISO_IR 192")


def test_every_file_is_one_study(held):
    index, _ = held
    assert len(list(index.find(Query(Level.STUDY, (), None, None)))) == len(SETS)
