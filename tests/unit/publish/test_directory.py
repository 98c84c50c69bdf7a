"""Documents in a folder, made of sections, and the editions they come in."""

import gzip
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isal import isal_zlib

from dicomscp.disk import Disk
from dicomscp.publish.directory import Edition, Section, Writer, deflate, inflate


def publish(folder, path, *sections):
    edition = Edition(folder, Disk())
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
    edition = Edition(folder, Disk())
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
    edition = Edition(tmp_path, Disk())
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
    edition = Edition(tmp_path, Disk())

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
    edition = Edition(tmp_path, Disk())
    pieces = [b"0123456789" * 100_000, memoryview(b"end")]
    edition.files("frames")
    edition.file("frames", "1.mht.gz", pieces)
    edition.file("frames", "deep/2.mht", pieces)
    edition.show()
    frames = tmp_path / "frames"
    assert text_of(frames / "1.mht.gz") == (frames / "deep/2.mht").read_bytes() == b"".join(pieces)


def test_a_file_is_the_same_however_its_pieces_are_cut(tmp_path):
    edition = Edition(tmp_path, Disk())
    whole = b"0123456789" * 100_000
    edition.files("a")
    edition.file("a", "1.gz", [whole])
    edition.file("a", "2.gz", [whole[start : start + 7777] for start in range(0, len(whole), 7777)])
    edition.show()
    assert (tmp_path / "a/1.gz").read_bytes() == (tmp_path / "a/2.gz").read_bytes()


def write_files(folder, **files):
    edition = Edition(folder, Disk())
    edition.files("bulk")
    for name, text in files.items():
        edition.file("bulk", name.replace("_", "/"), [text])
    return edition


def shown(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_files_takes_the_place_of_what_it_held(tmp_path):
    write_files(tmp_path, a=b"1", b=b"2").show()
    edition = write_files(tmp_path, a_1_c=b"3")  # what was a file is a folder
    assert shown(tmp_path / "bulk") == {"a": b"1", "b": b"2"}
    edition.show()
    assert shown(tmp_path) == {"bulk/a/1/c": b"3"}
    write_files(tmp_path, a=b"4").show()  # and the other way round
    assert shown(tmp_path) == {"bulk/a": b"4"}


def test_a_folder_into_which_nothing_is_put_is_gone(tmp_path):
    write_files(tmp_path, a=b"1").show()
    write_files(tmp_path).show()
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_forgotten_are_not_shown_by_the_next(tmp_path):
    write_files(tmp_path, a=b"1").forget()
    write_files(tmp_path, b=b"2").show()
    assert shown(tmp_path) == {"bulk/b": b"2"}


class Watched(Disk):
    """Looks at the tree after each change of a name."""

    def __init__(self, look):
        self.look = look

    def rename(self, path, name):
        super().rename(path, name)
        self.look()

    def exchange(self, path, name):
        super().exchange(path, name)
        self.look()


def test_files_are_there_before_the_documents_that_name_them(tmp_path):
    seen = []

    def look():
        document = (tmp_path / "a.gz").exists() and text_of(tmp_path / "a.gz")
        seen.append((document, shown(tmp_path / "bulk")))

    for text in (b"old", b"new"):
        edition = Edition(tmp_path, Watched(look))
        with edition.document("a.gz") as document:
            document.add(deflate([text]))
        edition.files("bulk")
        edition.file("bulk", "1", [text])
        edition.show()
    assert seen == [
        (False, {"1": b"old"}),
        (b"[old]", {"1": b"old"}),
        (b"[old]", {"1": b"new"}),
        (b"[new]", {"1": b"new"}),
    ]


def test_what_is_no_longer_named_goes_after_what_named_it(tmp_path):
    for name in ("2/metadata.gz", "3/metadata.gz", "index.json.gz"):
        publish(tmp_path, f"studies/1/series/{name}", [b"a"])
    edition = Edition(tmp_path, Disk())
    edition.keep_only("studies/1/series", {"3"})
    with edition.document("studies/1/series/index.json.gz") as document:
        document.add(deflate([b"b"]))
    assert (tmp_path / "studies/1/series/2").is_dir()
    edition.show()
    assert sorted(path.name for path in (tmp_path / "studies/1/series").iterdir()) == ["3", "index.json.gz"]


def test_a_study_is_withdrawn_whole(tmp_path):
    publish(tmp_path, "studies/1/index.json.gz", [b"a"])
    publish(tmp_path, "studies/1/series/2/metadata.gz", [b"a"])
    Edition(tmp_path, Disk()).withdraw("studies/1", "studies/1/index.json.gz")
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

    edition = Edition(tmp_path, Disk())
    with edition.document("a.gz") as document:
        document.add(deflate([b"a"]))
    pickle.loads(pickle.dumps(edition)).show()
    assert Path(tmp_path / "a.gz").is_file()
