import gzip
import os
import threading

import pytest

from dicomscp.disk import MOST_AT_ONCE_BYTES
from dicomscp.errors import DamagedError
from dicomscp.web.documents import CHUNK_BYTES, Documents


def put(folder, data, *, level=6):
    making = folder / ".making"
    making.write_bytes(gzip.compress(data, level, mtime=0))
    making.replace(folder / "metadata.gz")


def read(documents):
    document = documents.open("metadata.gz")
    try:
        return document.fingerprint, b"".join(document.compressed()), b"".join(document.inflated())
    finally:
        document.close()


def test_a_document_is_read_both_ways_any_number_of_times(tmp_path):
    body = os.urandom(CHUNK_BYTES) + b"same " * CHUNK_BYTES
    put(tmp_path, body)
    documents = Documents(tmp_path)
    for _ in range(2):
        fingerprint, compressed, inflated = read(documents)
        assert fingerprint.size == len(body)
        assert gzip.decompress(compressed) == inflated == body


def test_the_fingerprint_is_of_the_uncompressed_bytes(tmp_path):
    documents = Documents(tmp_path)
    put(tmp_path, b"the same bytes " * 1000, level=1)
    first = read(documents)
    put(tmp_path, b"the same bytes " * 1000, level=9)
    second = read(documents)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_no_document_is_none(tmp_path):
    assert Documents(tmp_path).open("studies/1/metadata.gz") is None


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: b"no gzip", lambda data: b""])
def test_a_damaged_document_is_said_to_be_damaged(tmp_path, spoil):
    put(tmp_path, b"x" * 1000)
    path = tmp_path / "metadata.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DamagedError):
        Documents(tmp_path).open("metadata.gz")


def test_a_document_is_known_once_it_was_looked_at_and_until_it_is_replaced(tmp_path):
    documents = Documents(tmp_path)
    assert documents.open_known("metadata.gz") is None
    for body in (b"one " * 1000, b"two " * 2000):
        put(tmp_path, body)
        assert documents.open_known("metadata.gz") is None
        fingerprint, compressed, _ = read(documents)
        known = documents.open_known("metadata.gz")
        assert (known.fingerprint, known.at_once()) == (fingerprint, compressed)
        known.close()


def test_what_takes_long_to_copy_is_not_given_at_once(tmp_path):
    put(tmp_path, os.urandom(MOST_AT_ONCE_BYTES))
    document = Documents(tmp_path).open("metadata.gz")
    assert document.at_once() is None
    document.close()


def test_few_fingerprints_are_remembered_and_all_are_right(tmp_path):
    documents = Documents(tmp_path, remembered=2)
    for number in range(5):
        put(tmp_path, b"%d" % number * 100)
        assert read(documents)[0].size == 100


def test_a_reader_never_meets_a_mixture_of_two_documents(tmp_path):
    bodies = [bytes([65 + n]) * (1000 + 7000 * n) for n in range(6)]
    put(tmp_path, bodies[0])
    done = threading.Event()

    def publish():
        while not done.is_set():
            for body in bodies:
                put(tmp_path, body)

    writer = threading.Thread(target=publish)
    writer.start()
    try:
        documents = Documents(tmp_path)
        for _ in range(500):
            fingerprint, compressed, inflated = read(documents)
            assert inflated in bodies
            assert gzip.decompress(compressed) == inflated
            assert fingerprint.size == len(inflated)
    finally:
        done.set()
        writer.join()
