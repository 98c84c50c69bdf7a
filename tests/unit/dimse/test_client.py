"""The SCU, against our listener, DCMTK and pynetdicom."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom import dcmread

from dicomscp.dimse.client import Peer, echo, find, parse_peer, send
from dicomscp.dimse.server import KnownAe
from dicomscp.errors import ConfigError, RefusedError, UnreachableError
from tests.peers import StoreScp, require
from tests.processes import free_port
from tests.unit.dimse.conftest import Listen
from tests.unit.dimse.held import MemoryArchive, study


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("DICOMSCP@127.0.0.1:11112", Peer("DICOMSCP", "127.0.0.1", 11112)),
        ("MY PACS@pacs.example:104", Peer("MY PACS", "pacs.example", 104)),
        ("A@[::1]:104", Peer("A", "::1", 104)),
    ],
)
def test_a_peer_is_read_and_written(text: str, peer: Peer):
    assert parse_peer(text) == peer
    assert str(peer) == text


@pytest.mark.parametrize(
    "text",
    ["", "DICOMSCP", "A@host", "@host:104", "A@host:0", "A@host:70000", "SEVENTEEN_LETTERS@host:1", "A@:1"],
)
def test_what_is_no_peer_is_said_to_be_none(text: str):
    with pytest.raises(ConfigError, match="AE@HOST:PORT"):
        parse_peer(text)


def test_an_echo_tells_its_seconds(listen: Listen):
    gateway = listen()
    assert 0 < echo(Peer("ANY", "127.0.0.1", gateway.port), calling_ae="ME") < 5
    (ended,) = gateway.logged("association_ended")
    assert (ended["calling_ae"], ended["called_ae"], ended["how"]) == ("ME", "ANY", "released")


def test_a_peer_that_is_away_is_unreachable():
    with pytest.raises(UnreachableError, match=r"A@127\.0\.0\.1:\d+ cannot be reached: Connection refused"):
        echo(Peer("A", "127.0.0.1", free_port()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"called_ae_titles": ("X",)}, "does not know the called AE title"),
        ({"known_aes": (KnownAe("X"),)}, "does not know our calling AE title"),
        ({"seats": 0}, "limit of associations is reached"),
    ],
)
def test_a_rejection_is_told_in_words(listen: Listen, settings, words: str):
    gateway = listen(**settings)
    with pytest.raises(UnreachableError, match=words):
        echo(Peer("A", "127.0.0.1", gateway.port))


@contextmanager
def _answering(data: bytes) -> Iterator[Peer]:
    """A peer that answers anything with *data*, and hangs up."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        yield Peer("A", "127.0.0.1", server.getsockname()[1])
        thread.join(10)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak DICOM"),
        (bytes.fromhex("07000000000400000206"), "aborts"),
        (bytes.fromhex("03000000000400010101"), "rejects the association: result 1, source 1, reason 1"),
        (bytes.fromhex("06000000000400000000"), "out of turn"),
        (
            b"\x02\x00\x00\x00\x00\x50" + bytes(68) + bytes.fromhex("2100ffff00000000aaaaaaaa"),
            "cannot be read",
        ),
    ],
)
def test_a_peer_that_answers_nonsense_is_unreachable(data: bytes, words: str):
    with _answering(data) as peer, pytest.raises(UnreachableError, match=words):
        echo(peer, timeout_seconds=5)


def test_files_are_sent_byte_for_byte_in_their_own_syntax(
    listen: Listen, pydicom_files: Path, tmp_path: Path
):
    gateway = listen()
    names = [
        "CT_small.dcm",
        "MR_small_implicit.dcm",
        "JPEG2000.dcm",
        "MR_small_bigendian.dcm",
        "image_dfl.dcm",
        "rtplan.dcm",
    ]
    paths = [pydicom_files / name for name in names]
    told = []
    outcomes = list(send(paths, Peer("A", "127.0.0.1", gateway.port), progress=told.append))
    assert told == outcomes
    assert [(outcome.path.name, outcome.status) for outcome in outcomes] == [(name, 0) for name in names]
    for path, incoming in zip(paths, gateway.archive.incoming, strict=True):
        data = path.read_bytes()
        assert data.endswith(incoming.data)
        assert len(incoming.data) > 0.5 * len(data)
        assert incoming.claim.transfer_syntax_uid == dcmread(path).file_meta.TransferSyntaxUID
    assert len(gateway.logged("association_ended")) == 1


def test_a_file_that_is_refused_or_none_does_not_keep_the_others(
    listen: Listen, ct_small: Path, tmp_path: Path
):
    text, gone, cut = tmp_path / "notes.txt", tmp_path / "gone.dcm", tmp_path / "cut.dcm"
    text.write_text("no DICOM")
    cut.write_bytes(ct_small.read_bytes()[:-100])
    gateway = listen()
    outcomes = {
        outcome.path.name: outcome
        for outcome in send([text, gone, cut, ct_small], Peer("A", "127.0.0.1", gateway.port))
    }
    assert outcomes["notes.txt"].status is None
    assert "not DICOM" in outcomes["notes.txt"].reason
    assert outcomes["gone.dcm"].reason == "No such file or directory"
    assert (outcomes["cut.dcm"].status, outcomes["cut.dcm"].is_stored) == (0xC000, False)
    assert "cut short" in outcomes["cut.dcm"].reason
    assert outcomes["CT_small.dcm"].is_stored


def test_a_large_file_is_streamed(listen: Listen, ct_small: Path, tmp_path: Path):
    dataset = dcmread(ct_small)
    dataset.PixelData = bytes(range(256)) * 40_000
    path = tmp_path / "large.dcm"
    dataset.save_as(path)
    gateway = listen()
    (outcome,) = send([path], Peer("A", "127.0.0.1", gateway.port))
    assert outcome.is_stored
    assert path.read_bytes().endswith(gateway.archive.held[dataset.SOPInstanceUID])


def test_a_syntax_the_peer_does_not_take_is_told_by_name(listen: Listen, pydicom_files: Path):
    gateway = listen(transfer_syntaxes=("1.2.840.10008.1.2",))
    (outcome,) = send([pydicom_files / "JPEG2000.dcm"], Peer("A", "127.0.0.1", gateway.port))
    assert outcome.status is None
    assert outcome.reason.startswith("the peer does not take ")
    assert "JPEG 2000" in outcome.reason


def test_more_kinds_than_an_association_has_contexts_take_two(listen: Listen, ct_small: Path, tmp_path: Path):
    dataset = dcmread(ct_small)
    for number in range(130):
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = f"1.2.3.{number}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.4.{number}"
        dataset.save_as(tmp_path / f"{number}.dcm")
    gateway = listen()
    outcomes = list(send(sorted(tmp_path.iterdir()), Peer("A", "127.0.0.1", gateway.port)))
    assert all(outcome.is_stored for outcome in outcomes)
    assert len(gateway.archive.held) == 130
    assert len(gateway.logged("association_ended", 2)) == 2


def test_an_association_lost_in_a_file_costs_that_file(listen: Listen, ct_small: Path, tmp_path: Path):
    paths = [shutil.copy(ct_small, tmp_path / f"{number}.dcm") for number in range(3)]

    class Dropping(MemoryArchive):
        def admit(self, incoming):
            if len(self.incoming) == 2:
                (association,) = gateway.listener._open
                association._socket.shutdown(socket.SHUT_RDWR)
            return super().admit(incoming)

    gateway = listen(Dropping())
    outcomes = list(send(map(Path, paths), Peer("A", "127.0.0.1", gateway.port)))
    assert [outcome.is_stored for outcome in outcomes] == [True, False, True]
    assert outcomes[1].status is None
    assert outcomes[1].reason


def test_find_gives_dicom_json(listen: Listen):
    gateway = listen(MemoryArchive([study(name="Müller^Jörg"), study("1.2.4", "Roe")]))
    (match,) = find(Peer("A", "127.0.0.1", gateway.port), "STUDY", {"PatientName": "müller*", "00201208": ""})
    assert match["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "Müller^Jörg"}]}
    assert match["00201208"] == {"vr": "IS", "Value": [7]}
    assert match["0020000D"]["Value"] == ["1.2.3"]
    assert match["00080052"]["Value"] == ["STUDY"]


def test_a_find_that_fails_is_told_with_the_peers_comment(listen: Listen):
    gateway = listen(open_find=False)
    with pytest.raises(RefusedError, match="0124 This AE may not query here"):
        list(find(Peer("A", "127.0.0.1", gateway.port), "PATIENT", {}))


@pytest.mark.parametrize(
    ("level", "keys"), [("IMAGINARY", {}), ("STUDY", {"Nonsense": ""}), ("IMAGE", {"Rows": "x"})]
)
def test_a_find_of_what_there_is_not_is_a_usage_error(level: str, keys: dict[str, str]):
    with pytest.raises(ConfigError):
        list(find(Peer("A", "127.0.0.1", 1), level, keys))


def test_dcmtk_takes_what_we_send(ct_small: Path, pydicom_files: Path, tmp_path: Path):
    require("storescp", "dcmtk")
    with StoreScp(tmp_path) as scp:
        peer = Peer(scp.ae_title, "127.0.0.1", scp.port)
        assert echo(peer) < 5
        outcomes = list(send([ct_small, pydicom_files / "JPEG2000.dcm"], peer))
        assert outcomes[0].is_stored
        assert "does not take" in outcomes[1].reason  # storescp without +x
        (received,) = scp.files()
        assert dcmread(received).PixelData == dcmread(ct_small).PixelData


def test_every_file_of_a_collection_arrives_as_it_lies_or_with_a_reason(listen: Listen, shared_data: Path):
    gateway = listen()
    paths = sorted(path for path in shared_data.rglob("*") if path.is_file())
    outcomes = list(send(paths, Peer("A", "127.0.0.1", gateway.port)))
    assert sorted(outcome.path for outcome in outcomes) == paths
    assert all(outcome.is_stored or outcome.reason for outcome in outcomes)
    asked = [outcome for outcome in outcomes if outcome.status is not None]
    assert len(asked) > 600
    for outcome, incoming in zip(asked, gateway.archive.incoming, strict=True):
        assert outcome.size == len(incoming.data)
        assert outcome.path.read_bytes().endswith(incoming.data)
