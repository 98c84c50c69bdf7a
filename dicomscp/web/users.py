"""Users with passwords: a file of names, scopes and hashes, and HTTP Basic (RFC 7617) against it.

    # one a line; `dicomscp password` writes them
    NAME:read,write:$scrypt$ln=15,r=8,p=3$SALT$HASH

A hash is scrypt's (RFC 7914), with its cost beside it, so that the cost of new ones may grow.  The file is
read again when it changes, and only if nobody else can read or write it.  While it cannot be read nobody is
let in: whoever takes it away means that.
"""

import base64
import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from anyio import CapacityLimiter, to_thread

from dicomscp.errors import BusyError, ConfigError
from dicomscp.web.access import REFUSED_SECONDS, SCOPES, Principal, Verdict, revision_of

log = structlog.get_logger()

ADMITTED_SECONDS = 600.0
"""How long a right password is remembered; a change of the file ends it at once."""

LEAST_PASSWORD = 8
"""Characters of a password, at least (NIST SP 800-63B 5.1.1)."""

_HASHING = 2  # at once: each takes 32 MiB and a core
_WAITING = 16  # different ones; more are sent away, so that guessing does not fill our memory
_SALT_BYTES, _HASH_BYTES = 16, 32
_LINE = re.compile(
    r"(?P<name>[^:#][^:]*):(?P<scopes>[a-z,]+):"
    r"\$scrypt\$ln=(?P<log_n>[0-9]{1,2}),r=(?P<r>[0-9]{1,2}),p=(?P<p>[0-9]{1,2})"
    r"\$(?P<salt>[A-Za-z0-9+/]{11,86})\$(?P<hash>[A-Za-z0-9+/]{22,86})"
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one try takes: 128 * r * 2**log_n bytes, and p times the work (RFC 7914 2)."""

    log_n: int = 15
    r: int = 8
    p: int = 3  # with these, as dear as OWASP asks for; a quarter of a second here

    def hash(self, password: str, salt: bytes, size: int = _HASH_BYTES) -> bytes:
        """The *size* bytes that stand for *password*."""
        bound = 256 * self.r * (self.p + (1 << self.log_n))
        text = unicodedata.normalize("NFC", password).encode()
        return hashlib.scrypt(
            text, salt=salt, n=1 << self.log_n, r=self.r, p=self.p, maxmem=bound, dklen=size
        )


_COST = Cost()


@dataclass(frozen=True, slots=True)
class User:
    """One line of the file."""

    principal: Principal
    cost: Cost
    salt: bytes
    hash: bytes

    def has(self, password: str) -> bool:
        """Whether it is this user's, at an equal cost if not."""
        return hmac.compare_digest(self.cost.hash(password, self.salt, len(self.hash)), self.hash)


def _nobody(users: Mapping[str, User]) -> User:
    """Who is not there costs as much as who is, so that names cannot be told by the time."""
    cost = next((user.cost for user in users.values()), _COST)
    return User(Principal("", frozenset()), cost, bytes(_SALT_BYTES), bytes(_HASH_BYTES))


class Users:
    """The scheme Basic, by the file at *path*; safe within one event loop."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file is not as it should be."""
        self._path = path
        self._read_at = self.revision()
        self._users: Mapping[str, User] | None = read(path)
        self._limiter = CapacityLimiter(_HASHING)
        self._waiting = 0

    def challenge(self, _problem: str) -> str:
        """RFC 7617 2, which knows no reasons."""
        return 'Basic realm="dicomscp", charset="UTF-8"'

    def revision(self) -> Hashable:
        """Another one when the file was changed, replaced or taken away."""
        return revision_of(self._path)

    async def judge(self, credentials: str) -> Verdict:
        """Who these are.  Raises BusyError if the file cannot be read, or too many passwords wait."""
        try:
            name, password = _name_and_password(credentials)
        except ValueError:
            return Verdict(None, REFUSED_SECONDS, "that is not how Basic writes a name and a password")
        if self._waiting >= _WAITING:
            raise BusyError("Many passwords are being looked at; ask again later.")
        self._waiting += 1
        try:
            return await to_thread.run_sync(self._judge, name, password, limiter=self._limiter)
        finally:
            self._waiting -= 1

    def _judge(self, name: str, password: str) -> Verdict:
        users = self._current()
        user = users.get(name) or _nobody(users)
        if user.has(password) and name in users:
            return Verdict(user.principal, ADMITTED_SECONDS)
        return Verdict(None, REFUSED_SECONDS, "name or password is wrong")

    def _current(self) -> Mapping[str, User]:
        revision = self.revision()
        if revision != self._read_at:
            self._read_at = revision
            try:
                self._users = read(self._path)
            except ConfigError as error:
                self._users = None
                log.error("users_file_unreadable", reason=str(error))
        if self._users is None:
            raise BusyError("The gateway cannot read who its users are; its log says why.")
        return self._users


def _name_and_password(credentials: str) -> tuple[str, str]:
    """Raises ValueError, also of binascii and of UTF-8."""
    text = base64.b64decode(credentials, validate=True).decode()
    name, colon, password = text.partition(":")
    if not colon:
        raise ValueError
    return unicodedata.normalize("NFC", name), password


def read(path: Path) -> dict[str, User]:
    """The users of the file at *path* by name.

    Raises ConfigError if it cannot be read, others may read or write it, or a line is none.
    """
    users: dict[str, User] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        user = _user(line)
        if user is None or user.principal.name in users:
            wrong = "is not NAME:SCOPES:HASH" if user is None else "names a user for the second time"
            raise ConfigError(
                f"web.users_file: line {number} of {path} {wrong}; 'dicomscp password' writes lines"
            )
        users[user.principal.name] = user
    return users


def _lines(path: Path) -> Sequence[str]:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"web.users_file: {path} cannot be read: {reason}; 'dicomscp password NAME' makes it"
        ) from error
    if stat.S_IMODE(mode) & (stat.S_IWGRP | stat.S_IRWXO):
        raise ConfigError(
            f"web.users_file: others may read or write {path}: chmod 600, or 640 for a group that reads it"
        )
    return text.splitlines()


def _user(line: str) -> User | None:
    found = _LINE.fullmatch(line.rstrip())
    if found is None:
        return None
    scopes = frozenset(found["scopes"].split(","))
    cost = Cost(int(found["log_n"]), int(found["r"]), int(found["p"]))
    if not scopes <= set(SCOPES) or not (10 <= cost.log_n <= 20 and 1 <= cost.r <= 16 and 1 <= cost.p <= 16):
        return None
    return User(Principal(found["name"], scopes), cost, _bytes(found["salt"]), _bytes(found["hash"]))


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


def set_password(path: Path, name: str, scopes: Sequence[str], password: str, *, cost: Cost = _COST) -> bool:
    """Give the user *name* this password and these scopes, in the file at *path*; False if it is a new user.

    Whoever reads meanwhile reads the old file or the new one.  All other lines stay as they are, and so do
    the file's owner and mode; a file that is new is ours alone.
    Raises ConfigError if the file, the name or the password will not do.
    """
    name = unicodedata.normalize("NFC", name)
    if not re.fullmatch(r"[^:#\s][^:]{0,63}", name) or not name.isprintable() or name != name.strip():
        raise ConfigError("a user's name is 1 to 64 printable characters without a colon")
    if len(password) < LEAST_PASSWORD:
        raise ConfigError(f"a password has at least {LEAST_PASSWORD} characters")
    salt = secrets.token_bytes(_SALT_BYTES)
    hashed = f"ln={cost.log_n},r={cost.r},p={cost.p}${_text(salt)}${_text(cost.hash(password, salt))}"
    line = f"{name}:{','.join(scopes)}:$scrypt${hashed}"
    known = path.exists() and name in read(path)
    lines = list(_lines(path)) if path.exists() else []
    others = [one for one in lines if one.partition(":")[0] != name]
    _replace(path, "".join(f"{one}\n" for one in [*others, line]))
    return known


def remove(path: Path, name: str) -> bool:
    """Take the user *name* out of the file at *path*; False if it has none.  Raises ConfigError as `read`."""
    name = unicodedata.normalize("NFC", name)
    if name not in read(path):
        return False
    others = [one for one in _lines(path) if one.partition(":")[0] != name]
    _replace(path, "".join(f"{one}\n" for one in others))
    return True


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


def _replace(path: Path, text: str) -> None:
    making = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _telling(path):
        try:
            making.touch(0o600, exist_ok=False)
            with making.open("w", encoding="utf-8") as file:
                with contextlib.suppress(FileNotFoundError):
                    before = path.stat()
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            making.replace(path)
        finally:
            making.unlink(missing_ok=True)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"web.users_file: {path} cannot be written: {error.strerror}") from error
