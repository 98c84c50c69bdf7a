"""Documents in a folder, made of sections, and the editions they come in."""

import gzip
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isal import isal_zlib

from dicomscp.publish.directory import Edition, Section, Writer, deflate, inflate


def publish(folder, path, *sections):
    edition = Edition(folder)
    with edition.document(path) as document:
        for lines in sections:
            document.add(deflate(lines))
    edition.show()
    return folder / path


def text_of(path):
    return gzip.decompress(path.read_bytes())


def test_a_document_is_gzip_without_a_time(tmp_path):
    stored = publish(tmp_path, "studies/1/metadata.gz", [b"{1}", b"{2}"]).read_bytes()
    assert gzip.decompress(stored) == b"[{1},\n{2}]"
    assert stored[4:8] == b"\0\0\0\0"


def test_a_document_without_lines_is_an_empty_array(tmp_path):
    assert text_of(publish(tmp_path, "a.gz")) == b"[]"


a_line = st.binary(min_size=1, max_size=300).map(lambda line: line.replace(b"\n", b" "))
some_sections = st.lists(st.lists(a_line, min_size=1, max_size=5), max_size=6)


@given(sections=some_sections)
def test_sections_stand_one_after_another_for_every_reader_of_gzip(sections, tmp_path_factory):
    path = publish(tmp_path_factory.mktemp("tree"), "a.gz", *sections)
    whole = b"[" + b",\n".join(line for lines in sections for line in lines) + b"]"
    assert text_of(path) == whole
    piecewise = zlib.decompressobj(wbits=31)
    assert b"".join(piecewise.decompress(bytes([byte])) for byte in path.read_bytes()) == whole
    assert piecewise.eof
    assert piecewise.unused_data == b""


@given(sections=some_sections, other=some_sections)
def test_a_section_says_the_same_in_another_document(sections, other, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    edition = Edition(folder)
    with edition.document("one.gz") as document:
        placed = [(document.add(deflate(lines)), deflate(lines)) for lines in sections]
    edition.show()
    stored = (folder / "one.gz").read_bytes()
    copied = [
        Section(stored[start : start + len(section.deflated)], section.crc, section.size)
        for start, section in placed
    ]
    with edition.document("two.gz") as document:
        for lines in other:
            document.add(deflate(lines))
        for section in copied:
            document.add(section)
    edition.show()
    lines = [line for of in (*other, *sections) for line in of]
    assert text_of(folder / "two.gz") == b"[" + b",\n".join(lines) + b"]"
    assert [inflate(section) for section in copied] == sections


def test_a_section_of_other_bytes_is_known():
    section = deflate([b"abc" * 1000])
    assert inflate(section) == [b"abc" * 1000]
    assert inflate(section._replace(crc=section.crc ^ 1)) is None
    assert inflate(section._replace(deflated=section.deflated[:-9])) is None
    assert inflate(section._replace(deflated=b"\xff" * 40)) is None


def test_the_crc_of_a_document_past_4_gib_fits(tmp_path):
    """The CRC is combined with lengths of more than 32 bits, the size is given modulo 2**32 (RFC 1952)."""
    section = deflate([b" " * (1 << 26)])
    stored = tmp_path / "large.gz"
    with Writer(stored.open("wb")) as document:
        for _ in range(65):
            document.add(section)
    crc = size = 0
    inflator = isal_zlib.decompressobj(wbits=-15)
    with stored.open("rb") as file:
        file.seek(10)
        while chunk := file.read(1 << 12):
            text = inflator.decompress(chunk)
            crc, size = isal_zlib.crc32(text, crc), size + len(text)
    assert size > 1 << 32
    assert inflator.unused_data == crc.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")


def test_equal_documents_are_left_as_they_lie(tmp_path):
    before = publish(tmp_path, "a.gz", [b"x" * 100_000]).stat().st_ino
    assert publish(tmp_path, "a.gz", [b"x" * 100_000]).stat().st_ino == before
    assert publish(tmp_path, "a.gz", [b"y" * 100_000]).stat().st_ino != before


def test_nothing_is_read_before_it_is_shown_and_what_is_forgotten_never(tmp_path):
    publish(tmp_path, "a.gz", [b"old"])
    edition = Edition(tmp_path)
    with edition.document("a.gz") as document:
        document.add(deflate([b"new"]))
    assert text_of(tmp_path / "a.gz") == b"[old]"
    assert text_of(edition.place("a.gz")) == b"[new]"
    edition.forget()
    edition.show()
    assert text_of(tmp_path / "a.gz") == b"[old]"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz"]


def test_what_fails_while_it_is_written_leaves_what_stood(tmp_path):
    publish(tmp_path, "a.gz", [b"old"])
    edition = Edition(tmp_path)

    def fail():
        with edition.document("a.gz") as document:
            document.add(deflate([b"new"]))
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    edition.forget()
    assert text_of(tmp_path / "a.gz") == b"[old]"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz"]


def test_a_file_is_gzip_if_its_name_says_so(tmp_path):
    edition = Edition(tmp_path)
    pieces = [b"0123456789" * 100_000, memoryview(b"end")]
    edition.file("1.mht.gz", pieces)
    edition.file("2.mht", pieces)
    edition.show()
    assert text_of(tmp_path / "1.mht.gz") == (tmp_path / "2.mht").read_bytes() == b"".join(pieces)


def test_a_file_is_the_same_however_its_pieces_are_cut(tmp_path):
    edition = Edition(tmp_path)
    whole = b"0123456789" * 100_000
    edition.file("1.gz", [whole])
    edition.file("2.gz", [whole[start : start + 7777] for start in range(0, len(whole), 7777)])
    edition.show()
    assert (tmp_path / "1.gz").read_bytes() == (tmp_path / "2.gz").read_bytes()


def test_what_is_no_longer_named_goes_after_what_named_it(tmp_path):
    for name in ("2/metadata.gz", "3/metadata.gz", "index.json.gz"):
        publish(tmp_path, f"studies/1/series/{name}", [b"a"])
    edition = Edition(tmp_path)
    edition.keep_only("studies/1/series", {"3"})
    with edition.document("studies/1/series/index.json.gz") as document:
        document.add(deflate([b"b"]))
    assert (tmp_path / "studies/1/series/2").is_dir()
    edition.show()
    assert sorted(path.name for path in (tmp_path / "studies/1/series").iterdir()) == ["3", "index.json.gz"]


def test_a_study_is_withdrawn_whole(tmp_path):
    publish(tmp_path, "studies/1/index.json.gz", [b"a"])
    publish(tmp_path, "studies/1/series/2/metadata.gz", [b"a"])
    Edition(tmp_path).withdraw("studies/1", "studies/1/index.json.gz")
    assert list((tmp_path / "studies").iterdir()) == []


def test_a_reader_never_meets_a_torn_document(tmp_path):
    path = publish(tmp_path, "a.gz", [b"0" * 50_000])
    stop = threading.Event()
    seen = set()

    def read():
        while not stop.is_set():
            seen.add(frozenset(text_of(path)))

    reading = threading.Thread(target=read)
    reading.start()
    for number in range(300):
        publish(tmp_path, "a.gz", [b"%d" % (number % 10) * 50_000])
    stop.set()
    reading.join()
    assert all(len(characters) == 3 for characters in seen)  # brackets and one digit


def test_an_edition_may_go_to_another_process(tmp_path):
    import pickle

    edition = Edition(tmp_path)
    with edition.document("a.gz") as document:
        document.add(deflate([b"a"]))
    pickle.loads(pickle.dumps(edition)).show()
    assert Path(tmp_path / "a.gz").is_file()
