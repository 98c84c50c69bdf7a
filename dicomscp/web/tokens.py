"""Bearer tokens (RFC 6750): JSON Web Tokens of one issuer, checked against its public keys.

Only signatures by a private key count: an algorithm is on the list of the configuration, which has neither
`none` nor any with a shared secret, and it must be one of the key that the token names.  Issuer, audience
and time of expiry must be there and right.  What scopes a token has is read from a claim that the
configuration names.

The keys (a JWK Set, RFC 7517) come from a file, read again when it changes, or by HTTPS: fetched when the
first token comes, again every quarter of an hour, and at once when a token names a key that is not known,
but no more often than once a minute, whoever sends such tokens.  Keys that cannot be fetched anew stay
good.
"""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import structlog
from anyio import CapacityLimiter, to_thread

from dicomscp.errors import BusyError, ConfigError, UnreachableError
from dicomscp.web.access import READ, REFUSED_SECONDS, WRITE, Principal, Verdict, revision_of

log = structlog.get_logger()

ADMITTED_SECONDS = 60.0
"""How long a good token is remembered, if it does not expire before."""

_MINUTE, _REFRESH_SECONDS = 60.0, 900.0
_FETCH_SECONDS, _KEYS_BYTES = 5.0, 1 << 20
_TOKEN_CHARACTERS = 16 << 10
_CHECKING = 4  # at once: one may be fetching keys
_KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}  # of keys, by how an algorithm begins

_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})


@dataclass(frozen=True, slots=True)
class Rules:
    """What a token must say.  *scope_claim* is a name, or names with dots for claims within claims.

    *read* and *write* are the scopes, as the issuer calls them, that give ours.
    """

    issuer: str
    audience: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    scope_claim: str = "scope"
    read: tuple[str, ...] = ("read",)
    write: tuple[str, ...] = ("write",)
    leeway_seconds: float = 30.0


class Tokens:
    """The scheme Bearer; safe within one event loop."""

    def __init__(self, keys: "Keys", rules: Rules) -> None:
        self._keys, self._rules = keys, rules
        self._limiter = CapacityLimiter(_CHECKING)

    def challenge(self, problem: str) -> str:
        """RFC 6750 3: the reason only to who presented a token."""
        return 'Bearer realm="dicomscp"' + (
            f', error="invalid_token", error_description="{problem}"' if problem else ""
        )

    def revision(self) -> Hashable:
        """Another one with other keys."""
        return self._keys.revision()

    async def judge(self, credentials: str) -> Verdict:
        """Whose token it is.  Raises UnreachableError or BusyError while no keys can be had."""
        if len(credentials) > _TOKEN_CHARACTERS:
            return Verdict(None, REFUSED_SECONDS, "the token is longer than any we take")
        return await to_thread.run_sync(self._judge, credentials, limiter=self._limiter)

    def _judge(self, token: str) -> Verdict:
        try:
            claims = self._claims(token)
        except jwt.ExpiredSignatureError:
            return Verdict(None, REFUSED_SECONDS, "the token has expired")
        except jwt.ImmatureSignatureError:
            return Verdict(None, 1, "the token is not valid yet")
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError):
            return Verdict(None, REFUSED_SECONDS, "the token is of another issuer, or for another audience")
        except (jwt.PyJWTError, ValueError, RecursionError):
            return Verdict(None, REFUSED_SECONDS, "the token is not one of the issuer's")
        left = float(claims["exp"]) + self._rules.leeway_seconds - time.time()
        return Verdict(self._principal(claims), max(0.0, min(ADMITTED_SECONDS, left)))

    def _claims(self, token: str) -> Mapping[str, Any]:
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if algorithm not in self._rules.algorithms:
            raise jwt.InvalidAlgorithmError
        key = self._keys.find(header.get("kid"), algorithm)
        if key is None:
            raise jwt.InvalidKeyError
        claims: dict[str, Any] = jwt.decode(
            token,
            jwt.PyJWK(dict(key), algorithm),
            algorithms=list(self._rules.algorithms),
            issuer=self._rules.issuer,
            audience=self._rules.audience,
            leeway=self._rules.leeway_seconds,
            options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
        )
        return claims

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        has = set(_scopes(claims, self._rules.scope_claim))
        given = {READ: self._rules.read, WRITE: self._rules.write}
        name = next((str(claims[key]) for key in ("sub", "client_id", "azp") if claims.get(key)), "token")
        return Principal(
            name[:256], frozenset(scope for scope, names in given.items() if not has.isdisjoint(names))
        )


def _scopes(claims: Mapping[str, Any], name: str) -> list[str]:
    """What the claim says: words with spaces between them, as `scope` (RFC 8693 4.2), or a list."""
    value: Any = claims.get(name)
    if value is None:
        value = claims
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    words = value.split() if isinstance(value, str) else value
    return [word for word in words if isinstance(word, str)] if isinstance(words, Sequence) else []


Jwk = Mapping[str, Any]


class Keys:
    """The public keys of an issuer, out of *source*: a file, or a URL; may be asked by several threads."""

    def __init__(self, source: str, *, now: Callable[[], float] = time.monotonic) -> None:
        """A file is read at once.  Raises ConfigError if it will not do."""
        self._source, self._now = source, now
        self._path = None if source.startswith(("https://", "http://")) else Path(source)
        self._keys: Sequence[Jwk] | None = None
        self._fetching = threading.Lock()
        self._fetched = self._tried = float("-inf")
        self._changes = 0
        self._read_at: Hashable = None
        if self._path is not None:
            self._read_at = revision_of(self._path)
            self._keys = _parsed(self._path, _read(self._path))

    def revision(self) -> Hashable:
        """Another one with other keys."""
        return self._changes if self._path is None else revision_of(self._path)

    def find(self, name: object, algorithm: str) -> Jwk | None:
        """The key called *name* for *algorithm*; the only one for it if a token names none (RFC 7515 4.1.4).

        Raises UnreachableError while there are no keys, BusyError while another thread fetches them.
        """
        keys = self._from_file(self._path) if self._path is not None else self._known()
        found = _fitting(keys, name, algorithm)
        if found is None and self._path is None and self._now() - self._tried >= _MINUTE:
            found = _fitting(self._fetch(), name, algorithm)
        return found

    def _from_file(self, path: Path) -> Sequence[Jwk]:
        if revision_of(path) != self._read_at:
            self._read_at = revision_of(path)
            try:
                self._keys = _parsed(path, _read(path))
            except ConfigError as error:
                self._keys = None
                log.error("token_keys_unreadable", reason=str(error))
        if self._keys is None:
            raise BusyError("The gateway cannot read the issuer's keys; its log says why.")
        return self._keys

    def _known(self) -> Sequence[Jwk]:
        now = self._now()
        if self._keys is None:
            if now - self._tried < 1:  # all who ask would wait, one after the other
                raise UnreachableError("The issuer's keys cannot be had; ask again later.")
            return self._fetch()
        if now - self._fetched >= _REFRESH_SECONDS and now - self._tried >= _MINUTE:
            return self._fetch()
        return self._keys

    def _fetch(self) -> Sequence[Jwk]:
        """The keys as they are now; those that were known if they cannot be had."""
        if not self._fetching.acquire(blocking=False):
            if self._keys is not None:
                return self._keys
            raise BusyError("The issuer's keys are being fetched; ask again.")
        try:
            keys = _parsed(self._source, _get(self._source))
        except (ConfigError, UnreachableError) as error:
            log.error("token_keys_not_fetched", reason=str(error))
            if self._keys is None:
                raise UnreachableError("The issuer's keys cannot be had; ask again later.") from error
            return self._keys
        else:
            self._changes += keys != self._keys
            self._keys, self._fetched = keys, self._now()
            return keys
        finally:
            self._tried = self._now()
            self._fetching.release()


def _fitting(keys: Sequence[Jwk], name: object, algorithm: str) -> Jwk | None:
    fitting = [
        key
        for key in keys
        if key.get("kty") == _KINDS[algorithm[:2]] and key.get("alg", algorithm) == algorithm
    ]
    named = [key for key in fitting if key.get("kid") == name] if name is not None else fitting
    return named[0] if len(named) == 1 else None


def _parsed(source: object, text: bytes) -> Sequence[Jwk]:
    """The keys of a JWK Set that sign, of the kinds that are public."""
    try:
        members = json.loads(text)["keys"]
        signing = [key for key in members if key.get("use", "sig") == "sig"]
        keys = [_public(key) for key in signing if key.get("kty") in _KINDS.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"web.tokens.keys: {source} is not a JWK Set") from error
    if not keys:
        raise ConfigError(f"web.tokens.keys: {source} has no public key that signs")
    return keys


def _public(key: Jwk) -> Jwk:
    """*key* without what RFC 7518 6.2.2 and 6.3.2 call private, should somebody have written it there."""
    return {name: value for name, value in key.items() if name not in _PRIVATE}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"web.tokens.keys: {path} cannot be read: {error.strerror}") from error


class _Stay(urllib.request.HTTPRedirectHandler):
    """Keys come from where the configuration says, not from where an answer points."""

    def redirect_request(self, *_: object) -> None:
        return None


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(_Stay)
    request = urllib.request.Request(url, headers={"Accept": "application/jwk-set+json, application/json"})  # noqa: S310 - https, or http on loopback, by config
    try:
        with opener.open(request, timeout=_FETCH_SECONDS) as answer:
            text: bytes = answer.read(_KEYS_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise UnreachableError(f"{url}: it answers with status {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UnreachableError(f"{url}: {error}") from error
    return text
