"""A certificate and a key that will not do are refused before anything is served with them."""

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, PrivateFormat

from dicomscp.errors import ConfigError
from dicomscp.web.certificate import check_certificate
from tests import certificates

NOW = datetime(2026, 6, 1, tzinfo=UTC)
certified = partial(certificates.certified, now=NOW)


@pytest.mark.parametrize(
    "key",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
)
def test_a_certificate_and_its_key_will_do(tmp_path, key):
    assert check_certificate(*certified(tmp_path, key()), NOW) == ""


def test_older_forms_of_a_key_will_do(tmp_path):
    files = certified(tmp_path, form=PrivateFormat.TraditionalOpenSSL)
    assert check_certificate(*files, NOW) == ""


@pytest.mark.parametrize(
    ("begins", "ends", "warning"),
    [
        (-1, 22, ""),
        (-1, 20, "ends 2026-06-21 00:00 UTC; renew it"),
        (-9, -1, "ended 2026-05-31 00:00 UTC"),
        (1, 90, "valid only from 2026-06-02 00:00 UTC on"),
    ],
)
def test_a_certificate_out_of_its_time_is_warned_of(tmp_path, begins, ends, warning):
    files = certified(tmp_path, begins=timedelta(days=begins), ends=timedelta(days=ends))
    found = check_certificate(*files, NOW)
    assert (warning in found) if warning else not found


def test_a_chain_goes_by_its_first_certificate(tmp_path):
    certificate_file, key_file = certified(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = certified(tmp_path / "other")
    first = certificate_file.read_bytes()
    certificate_file.write_bytes(first + other.read_bytes())
    assert check_certificate(certificate_file, key_file, NOW) == ""
    certificate_file.write_bytes(other.read_bytes() + first)
    with pytest.raises(ConfigError, match="is not the key of the first certificate"):
        check_certificate(certificate_file, key_file, NOW)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (lambda: rsa.generate_private_key(65537, 1024), "does not take"),
        (lambda: ec.generate_private_key(ec.SECP521R1()), "does not take"),
        (lambda: dsa.generate_private_key(1024), "does not take"),
    ],
)
def test_a_key_that_the_server_could_not_use_is_refused(tmp_path, key, what):
    with pytest.raises(ConfigError, match=what):
        check_certificate(*certified(tmp_path, key()), NOW)


def test_a_key_with_a_password_is_refused_without_asking_for_it(tmp_path):
    files = certified(tmp_path, encryption=BestAvailableEncryption(b"secret"))
    with pytest.raises(ConfigError, match="has a password"):
        check_certificate(*files, NOW)


def test_files_that_are_none_are_refused_each_by_its_key(tmp_path):
    certificate_file, key_file = certified(tmp_path)
    certificate_file.chmod(0o600)
    for certificate, key, name in (
        (tmp_path / "none", key_file, "web.certificate_file: .* cannot be read"),
        (certificate_file, tmp_path / "none", "web.key_file: .* cannot be read"),
        (key_file, key_file, "web.certificate_file: .* no certificates"),
        (certificate_file, certificate_file, "web.key_file: .* no private key"),
    ):
        with pytest.raises(ConfigError, match=name):
            check_certificate(certificate, key, NOW)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    certificate_file, key_file = certified(tmp_path)
    key_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        check_certificate(certificate_file, key_file, NOW)
    key_file.chmod(0o640)
    assert check_certificate(certificate_file, key_file, NOW) == ""
