"""Whether a certificate and a key will do, looked at before anything is served with them.

The server itself would end the process over a file that it cannot use, and says little of why.
"""

import os
import stat
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from dicomscp.errors import ConfigError

SOON = timedelta(days=21)
"""Before so long an end a certificate is warned of; what renews by itself has done so by then."""

_LEAST_RSA_BITS = 2048  # rustls takes 2048 to 8192
_CURVES = (ec.SECP256R1, ec.SECP384R1)  # those of its ring provider


def check_certificate(certificate_file: Path, key_file: Path, now: datetime) -> str:
    """What to warn of: a certificate that has ended, has not begun, or ends soon; else empty.

    Raises ConfigError if the files cannot be read, others may read the key, or they do not fit each other.
    """
    try:
        certificates = x509.load_pem_x509_certificates(_text("certificate_file", certificate_file))
    except ValueError as error:
        raise ConfigError(
            f"web.certificate_file: {certificate_file} has no certificates in PEM, or one is broken"
        ) from error
    key = _key(key_file)
    certificate = certificates[0]
    encoding = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if certificate.public_key().public_bytes(*encoding) != key.public_key().public_bytes(*encoding):
        raise ConfigError(
            f"web.key_file: {key_file} is not the key of the first certificate in {certificate_file}"
        )
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        return f"web.certificate_file: {certificate_file} is valid only from {begins:%Y-%m-%d %H:%M} UTC on"
    if now >= ends:
        return f"web.certificate_file: {certificate_file} ended {ends:%Y-%m-%d %H:%M} UTC"
    if now >= ends - SOON:
        return (
            f"web.certificate_file: {certificate_file} ends {ends:%Y-%m-%d %H:%M} UTC; renew it and restart"
        )
    return ""


def _key(path: Path) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
    text = _text("key_file", path, secret=True)
    try:
        key = load_pem_private_key(text, password=None)
    except TypeError as error:
        raise ConfigError(
            f"web.key_file: {path} has a password; a service has nobody to ask for it"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"web.key_file: {path} has no private key in PEM, or it is broken") from error
    if isinstance(key, rsa.RSAPrivateKey) and _LEAST_RSA_BITS <= key.key_size <= 8192:
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES):
        return key
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    raise ConfigError(
        f"web.key_file: {path} is a key that TLS here does not take: RSA of 2048 to 8192 bits, EC P-256 or "
        "P-384, or Ed25519"
    )


def _text(name: str, path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(1 << 20)
    except OSError as error:
        raise ConfigError(f"web.{name}: {path} cannot be read: {error.strerror}") from error
    if secret and stat.S_IMODE(mode) & (stat.S_IWGRP | stat.S_IRWXO):
        raise ConfigError(
            f"web.{name}: others may read or write {path}: chmod 600, or 640 for a group that reads it"
        )
    return text
