"""A gateway whose index is in PostgreSQL: it receives while the server is away, and catches up after."""

import contextlib
import json
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from tests.gateway import Gateway, run_command, wait_for_instances
from tests.integration.commands import run_here
from tests.processes import free_port, wait_until

STUDY = "1.3.6.1.4.1.5962.1.2.1.20040119072730.12322"  # of CT_small.dcm
OUT_OF_RESOURCES = "A700"


def run(url: str, *arguments: object, password_file: object = ""):
    """A command of dicomscp over the index at *url*."""
    settings = {"DICOMSCP_INDEX__URL": url, "DICOMSCP_INDEX__PASSWORD_FILE": str(password_file)}
    return run_command(*arguments, **settings)


def sent(port: int, *paths: Path) -> dict:
    return json.loads(run_here("send", "--json", f"DICOMSCP@127.0.0.1:{port}", *paths).out)


def instances(pydicom_files: Path, folder: Path, count: int) -> list[Path]:
    """Instances of the study of CT_small.dcm, as files."""
    import pydicom

    dataset = pydicom.dcmread(pydicom_files / "CT_small.dcm")
    paths = [folder / f"{number}.dcm" for number in range(count)]
    for number, path in enumerate(paths, 1):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        dataset.InstanceNumber = number
        dataset.save_as(path)
    return paths


def asked(gateway: Gateway) -> int:
    """The status of a search by QIDO-RS."""
    try:
        gateway.get(f"/dicomweb/studies?StudyInstanceUID={STUDY}")
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def test_a_gateway_outlives_its_database_and_a_database_is_made_again(
    postgresql, new_database, pydicom_files, tmp_path
):
    url, paths = new_database(), instances(pydicom_files, tmp_path, 4)
    root, port = tmp_path / "root", free_port()
    gateway = Gateway(
        root,
        settings={
            "index.url": url,
            "pipeline.quiet_seconds": 0.2,
            "dimse.listeners": 1,
            "query.wait_seconds": 1,
        },
        arguments=["--dimse-port", str(port)],
    )
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        stack.callback(postgresql.start)
        stack.callback(gateway.kill)

        postgresql.stop()
        starting = pool.submit(gateway.start, 120)
        gateway.wait_for_event("index_awaited", 60)
        wait_until(
            lambda: sent(port, paths[0])["sent"] == 1, 30, "an instance to be taken without a database"
        )
        assert not starting.done(), "nothing is answered before there is an index"
        postgresql.start()
        assert starting.result() is gateway
        wait_for_instances(gateway, STUDY, 1)

        parts = gateway.parts()
        postgresql.stop(immediately=True)
        again = sent(port, *paths[:3])  # the first is a resend
        assert (again["sent"], again["refused"]) == (3, [])
        assert asked(gateway) == 503
        find = run_here("find", f"DICOMSCP@127.0.0.1:{port}", "StudyDate=")
        assert OUT_OF_RESOURCES in find.out + find.err
        status = json.loads(run(url, "status", "--root", root, "--json").stdout)
        assert "cannot be reached" in status["index_away"]
        assert status["journal_waiting_bytes"] > 0
        gateway.wait_for_event("filing_failed", 30)
        postgresql.start()
        wait_for_instances(gateway, STUDY, 3)
        assert gateway.parts() == parts, "no part died of it"
        wait_until(lambda: len(gateway.get_json(f"/dicomweb/studies/{STUDY}/metadata")) == 3, 30, "documents")

        assert gateway.stop() == 0
        postgresql.drop(url)
        postgresql.execute("postgres", f"CREATE DATABASE {url.rpartition('/')[2]}")
        with gateway:
            gateway.wait_for_event("index_rebuilt", 30)
            assert sent(port, paths[3])["sent"] == 1
            wait_for_instances(gateway, STUDY, 4)
            with psycopg.connect(url) as connection:
                seen = connection.execute(
                    "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
                )
                assert {("dicomscp questions",), ("dicomscp filing",)} <= set(seen.fetchall())

    check_commands(url, root, tmp_path / "other", paths[0])


def check_commands(url: str, root: Path, other_root: Path, path: Path) -> None:
    """What the commands say of a root with four instances, and of an index that is not for them."""
    verified = run(url, "verify", "--root", root)
    assert (verified.returncode, verified.stdout) == (0, "4 instances checked, 0 findings\n"), verified.stderr
    with psycopg.connect(url) as later:
        later.execute("UPDATE dicomscp_revision SET version_num = '9999'")
        later.execute("UPDATE setting SET value = '9998' WHERE name = 'compatible'")
    refused = run(url, "status", "--root", root)
    assert refused.returncode == 2
    assert "version 9999" in refused.stderr
    rebuilt = run(url, "rebuild", "--index", "--root", root)
    assert rebuilt.stdout == "4 instances indexed, 0 studies published\n", rebuilt.stderr
    other = run(url, "import", "--root", other_root, path)
    assert other.returncode == 2
    assert "another root" in other.stderr
    assert not list((root / "incoming").rglob("*.dcm"))


@pytest.fixture
def behind_a_password(postgresql):
    """The name of a role that the server lets in by password alone, and the password."""
    postgresql.execute("postgres", "CREATE ROLE keeper LOGIN SUPERUSER PASSWORD 'not to be shown'")
    rules = postgresql.data / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text("host all keeper 127.0.0.1/32 scram-sha-256\n" + before)
    postgresql.execute("postgres", "SELECT pg_reload_conf()")
    yield "keeper", "not to be shown"
    rules.write_text(before)
    postgresql.execute("postgres", "SELECT pg_reload_conf()")


def test_the_password_is_read_from_its_file(new_database, behind_a_password, tmp_path, ct_small):
    role, password = behind_a_password
    url = new_database().replace("dicomscp@", f"{role}@")
    arguments = ("import", "--root", tmp_path / "root", ct_small)
    refused = run(url, *arguments)
    assert refused.returncode == 1
    assert "password" in refused.stderr
    file = tmp_path / "password"
    file.write_text(f"{password}\n")
    done = run(url, *arguments, password_file=file)
    assert done.returncode == 0, done.stderr
    assert password not in done.stdout + done.stderr
