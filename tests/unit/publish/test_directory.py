"""Documents in a folder."""

import gzip
import hashlib
import threading

import pytest

from dicomscp.publish import directory as published


class Directory(published.Directory):
    """A directory whose documents are shown as they are written."""

    def publish(self, path, body):
        try:
            digest = self.write(path, body)
        except OSError:
            self.forget()
            raise
        self.show()
        return digest


def test_a_document_is_gzip_of_its_body_without_a_time(tmp_path):
    digest = Directory(tmp_path).publish("studies/1/metadata.gz", [b"[", b"{}", b"]"])
    stored = (tmp_path / "studies/1/metadata.gz").read_bytes()
    assert gzip.decompress(stored) == b"[{}]"
    assert stored[4:8] == b"\0\0\0\0"
    assert digest == hashlib.sha256(b"[{}]").digest()


def test_equal_bodies_give_equal_files_and_are_left_as_they_lie(tmp_path):
    directory = Directory(tmp_path)
    directory.publish("a.gz", [b"x" * 100_000] * 20)
    before = (tmp_path / "a.gz").stat().st_ino
    directory.publish("a.gz", [b"x" * 2_000_000])
    assert (tmp_path / "a.gz").stat().st_ino == before


def test_a_body_that_fails_leaves_what_stood(tmp_path):
    directory = Directory(tmp_path)
    directory.publish("a.gz", [b"old"])

    def failing():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        directory.publish("a.gz", failing())
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"old"


def test_a_document_is_read_back_in_pieces(tmp_path):
    directory = Directory(tmp_path)
    body = b"0123456789" * 300_000
    directory.publish("a.gz", [body])
    assert b"".join(directory.read("a.gz")) == body


def test_what_is_no_longer_named_is_removed(tmp_path):
    directory = Directory(tmp_path)
    directory.publish("studies/1/series/2/metadata.gz", [b"a"])
    directory.publish("studies/1/series/3/metadata.gz", [b"b"])
    directory.publish("studies/1/series/index.json.gz", [b"c"])
    directory.keep_only("studies/1/series", {"3"})
    directory.show()
    assert sorted(path.name for path in (tmp_path / "studies/1/series").iterdir()) == ["3", "index.json.gz"]
    directory.withdraw("studies/1")
    assert not (tmp_path / "studies/1").exists()


def test_a_reader_never_meets_a_torn_document(tmp_path):
    directory = Directory(tmp_path)
    directory.publish("a.gz", [b"0" * 50_000])
    stop = threading.Event()
    seen = set()

    def read():
        while not stop.is_set():
            seen.add(frozenset(gzip.decompress((tmp_path / "a.gz").read_bytes())))

    reading = threading.Thread(target=read)
    reading.start()
    for number in range(300):
        directory.publish("a.gz", [b"%d" % (number % 10) * 50_000])
    stop.set()
    reading.join()
    assert all(len(digits) == 1 for digits in seen)


def test_nothing_is_read_before_it_is_shown(tmp_path):
    directory = Directory(tmp_path)
    directory.write("a.gz", [b"a"])
    assert not (tmp_path / "a.gz").exists()
    assert b"".join(directory.read("a.gz")) == b"a"
    directory.show()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"a"
