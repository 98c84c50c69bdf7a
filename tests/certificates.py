"""Certificates made on the spot, for servers and clients of one test."""

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

LOOPBACK = ipaddress.ip_address("127.0.0.1")


def certified(
    folder,
    key=None,
    *,
    now=None,
    begins=timedelta(days=-10),
    ends=timedelta(days=90),
    form=PrivateFormat.PKCS8,
    encryption=None,
):
    """A certificate of "localhost" for *key*, and that key, as files in *folder*.

    It is valid from *begins* to *ends*, counted from *now*.
    """
    now = now or datetime.now(UTC)
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(LOOPBACK)]), critical=False
        )
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.touch(0o600)
    key_file.write_bytes(key.private_bytes(Encoding.PEM, form, encryption or NoEncryption()))
    return certificate_file, key_file
