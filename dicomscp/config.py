"""Settings: one TOML file into frozen models; every key, its default, its unit.

    flags  >  environment (DICOMSCP_DIMSE__PORT)  >  file  >  default

Each source is laid over the one below it, key by key, and the result is checked as a whole, so that
every error is reported at once and names where its value came from.  Reasons for the defaults stand beside
each key in conf/dicomscp.toml.  Relative paths are those of the working directory.
"""

import difflib
import ipaddress
import re
import tomllib
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydicom import charset
from pydicom.uid import UID

from dicomscp.dicom.matching import BadValueError, header_tag
from dicomscp.errors import ConfigError

ENVIRONMENT_PREFIX = "DICOMSCP_"
CONFIG_VARIABLE = "DICOMSCP_CONFIG"  # names the file itself, so it is not a key in it

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

# What the web server has beside the viewer, as it is written, and below publish.base_url.
OUR_PATHS = (
    "/changes",
    "/healthz",
    "/metrics",
    "/page.css",
    "/page.js",
    "/page.svg",
    "/readyz",
    "/status",
    "/studies",
    "/wado",
)
DICOMWEB_PATHS = ("/instances", "/series", "/studies")

_NOT_REPEATED = "index.url"  # there may be a password in it

# What pydantic says of Python, said of TOML.
_PLAINER = {
    "model_type": "is a table of keys, not a value",
    "path_type": "is not a path",
    "missing": "is missing",
    "tuple_type": "is a list",
}


def _ae_title(value: str) -> str:
    # PS3.5 6.2, VR AE: default repertoire without backslash and controls; outer spaces carry no meaning.
    title = value.strip(" ")
    if not re.fullmatch(r"[\x20-\x5b\x5d-\x7e]{1,16}", title):
        raise ValueError("an AE title is 1 to 16 ASCII characters without backslash")
    return title


def _uid(value: str) -> str:
    if len(value) > 64 or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", value):
        raise ValueError("is not a UID")
    return value


def _transfer_syntax(value: str) -> str:
    if not UID(_uid(value)).is_transfer_syntax:
        raise ValueError("is not a known transfer syntax UID")
    return value


def _network(value: str) -> str:
    return str(ipaddress.ip_network(value))


def _origin(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s*]+", value):
        raise ValueError("an origin is http(s)://host or http(s)://host:port, with nothing after it")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", value):
        raise ValueError("is neither a host name nor an address")
    return value


def _keys(value: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        try:
            url = urllib.parse.urlsplit(value)
            secure = url.scheme == "https" or (url.scheme == "http" and is_loopback(url.hostname or ""))
            has_credentials = url.username is not None
        except ValueError as error:
            raise ValueError(f"is not a URL: {error}") from error
        if not secure or not url.hostname:
            raise ValueError(
                "is fetched over HTTPS, or from this machine: whoever gives the keys lets people in"
            )
        if has_credentials:
            raise ValueError("has credentials in it, where many see them; public keys need none")
    return value


def _database(value: str) -> str:
    if not value:
        return value
    try:
        url = urllib.parse.urlsplit(value)
        named = urllib.parse.parse_qs(url.query)
        has_place = bool(url.hostname or "host" in named or "service" in named or url.path.strip("/"))
    except ValueError as error:
        raise ValueError(f"is not a URL: {error}") from error
    if url.scheme not in {"postgresql", "postgres"} or not has_place:
        raise ValueError('is "postgresql://user@host:5432/database", or empty for SQLite under the root')
    if url.password is not None or "password" in named:
        raise ValueError("has a password in it, where many see it: put that into a file, index.password_file")
    return value


def _url_path(value: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+", value):
        raise ValueError("is a path such as /ohif, of letters and digits, without a slash at its end")
    return value


def _character_set(value: str) -> str:
    for term in value.split("\\") if value else ():
        if term not in charset.python_encoding:
            raise ValueError(f"{term!r} is not a Specific Character Set term")
    return value


def _timezone(value: str) -> str:
    if value:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError("is no time zone by its IANA name, such as Europe/Berlin") from error
    return value


def _attribute(value: str) -> str:
    try:
        header_tag(value)
    except BadValueError as error:
        raise ValueError(str(error)) from error
    return value


def _path(value: object) -> object:
    """A path, or none if it is empty."""
    return value or None


def _split(value: object) -> object:
    """A list written as one string, as the environment has it: commas between its members."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _number(value: object) -> object:
    """A whole number written as text, as the environment has it."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]  # 0 takes a free one
Host = Annotated[str, AfterValidator(_host)]
AeTitle = Annotated[str, AfterValidator(_ae_title)]
Uids = Annotated[tuple[Annotated[str, AfterValidator(_uid)], ...], BeforeValidator(_split)]
TransferSyntaxes = Annotated[
    tuple[Annotated[str, AfterValidator(_transfer_syntax)], ...], BeforeValidator(_split)
]
AeTitles = Annotated[tuple[AeTitle, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], BeforeValidator(_split)]
Hosts = Annotated[tuple[Host, ...], BeforeValidator(_split)]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_split)]
OptionalPath = Annotated[Path | None, BeforeValidator(_path)]
# Signatures by a private key; what needs none, or one that both know, proves nothing here.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
Attributes = Annotated[tuple[Annotated[str, AfterValidator(_attribute)], ...], BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split)]


class _Table(BaseModel):
    # Defaults are checked like anything else, so that rules across keys hold for them too.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Ae(_Table):
    """A peer that is listed: what may be asked under its title."""

    title: AeTitle
    addresses: Networks = ()  # CIDR; empty: from anywhere
    store: bool = True
    find: bool = False
    default_character_set: Annotated[str, AfterValidator(_character_set)] = ""


class Dimse(_Table):
    """The DIMSE listeners."""

    ae_title: AeTitle = "DICOMSCP"
    host: Host = "127.0.0.1"
    port: Port = 11112
    listeners: Annotated[int, Field(ge=1, le=64)] = 2  # processes
    called_ae_titles: AeTitles = ()  # empty: any
    max_associations: Count = 64
    max_pdu_bytes: Annotated[int, Field(ge=4 * _KIB, le=16 * _MIB)] = 128 * _KIB
    accept_seconds: PositiveSeconds = 30
    idle_seconds: PositiveSeconds = 60
    association_seconds: PositiveSeconds = 86400
    transfer_syntaxes: TransferSyntaxes = ()  # empty: our own order of preference
    unknown_sop_classes: Literal["accept", "reject"] = "accept"
    private_sop_classes: Uids = ()
    ae: tuple[Ae, ...] = ()  # empty: anybody may store

    @field_validator("ae", mode="after")
    @classmethod
    def _titles_differ(cls, value: tuple[Ae, ...]) -> tuple[Ae, ...]:
        titles = [ae.title for ae in value]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"{', '.join(twice)} is listed twice; put all its addresses in one entry")
        return value


class Storage(_Table):
    """What is held, and how safely."""

    reserve: ByteSize = ByteSize(_GIB)
    durability: Literal["full", "relaxed"] = "full"
    duplicates: Literal["first", "last"] = "first"
    max_variants: Count = 8
    inline_max: Annotated[ByteSize, Field(le=16 * _MIB)] = ByteSize(128 * _KIB)
    segment_size: Annotated[ByteSize, Field(ge=_MIB, le=_GIB)] = ByteSize(32 * _MIB)

    @field_validator("segment_size", mode="after")
    @classmethod
    def _holds_entries(cls, value: ByteSize, info: ValidationInfo) -> ByteSize:
        if value < 4 * info.data.get("inline_max", 0):
            raise ValueError("is less than four times storage.inline_max, and an entry lies in one segment")
        return value


class Pipeline(_Table):
    """When a study is published."""

    quiet_seconds: Seconds = 2
    patience_seconds: Seconds = 30
    attempts: Count = 3


class Publish(_Table):
    """What is published."""

    base_url: str = "/dicomweb"
    inline_max: ByteSize = ByteSize(_KIB)
    private_un: Literal["parse", "keep"] = "parse"
    frames: Literal["range", "files"] = "range"

    @field_validator("base_url", mode="after")
    @classmethod
    def _is_prefix(cls, value: str) -> str:
        if not re.fullmatch(r"(https?://[^/\s?#]+)?(/[^/\s?#]+)*", value) or not value:
            raise ValueError("starts with / or http(s)://, and has neither query nor a slash at its end")
        return value


class ExtraKeys(_Table):
    """Attributes of headers that can be asked for beside those that always can, by their level."""

    study: Attributes = ()
    series: Attributes = ()
    instance: Attributes = ()

    @model_validator(mode="after")
    def _differ(self) -> "ExtraKeys":
        names = (*self.study, *self.series, *self.instance)
        tags = [header_tag(name) for name in names]
        if twice := [name for name, tag in zip(names, tags, strict=True) if tags.count(tag) > 1]:
            raise ValueError(f"{', '.join(twice)}: an attribute is listed once, at one level")
        return self


class Index(_Table):
    """What is kept for questions, and in which database."""

    url: Annotated[str, AfterValidator(_database)] = ""  # empty: SQLite, index.sqlite under the root
    password_file: OptionalPath = None
    extra_keys: ExtraKeys = Field(default_factory=ExtraKeys)


class Query(_Table):
    """How C-FIND is answered."""

    max_results: Count = 10000
    wait_seconds: Seconds = 5
    match_unknown: bool = True
    timezone: Annotated[str, AfterValidator(_timezone)] = ""  # IANA name; empty: this machine's


class Store(_Table):
    """What may be stored over HTTP (STOW-RS)."""

    enabled: bool = True
    max_requests: Annotated[int, Field(ge=1, le=256)] = 8
    block_seconds: PositiveSeconds = 60
    max_body: Annotated[ByteSize, Field(ge=_MIB)] = ByteSize(64 * _GIB)
    max_part: Annotated[ByteSize, Field(ge=_MIB)] = ByteSize(16 * _GIB)
    max_parts: Count = 100_000
    calling_ae: Annotated[str, AfterValidator(_ae_title)] = "STOW-RS"


class Tokens(_Table):
    """Bearer tokens: whose, for whom, and what their scopes are called."""

    keys: Annotated[str, AfterValidator(_keys)] = ""  # a JWK Set, file or URL; empty: no tokens are taken
    issuer: str = ""
    audience: str = ""
    algorithms: Annotated[tuple[Algorithm, ...], BeforeValidator(_split), Field(min_length=1)] = (
        "RS256",
        "ES256",
    )
    scope_claim: Annotated[str, Field(min_length=1)] = "scope"
    read: Names = ("read",)
    write: Names = ("write",)
    leeway_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 30

    @model_validator(mode="after")
    def _is_whole(self) -> "Tokens":
        if bool(self.keys) != bool(self.issuer) or bool(self.keys) != bool(self.audience):
            raise ValueError(
                "keys, issuer and audience belong together: tokens are taken by all three, or not"
            )
        return self


# What tells whether a web host is meant; one that is wrong itself is an error already.
_JUDGED = {"open", "plain_http", "users_file", "tokens", "certificate_file"}


class Web(_Table):
    """The web server."""

    # Before host, which is judged by them.
    open: bool = False
    plain_http: bool = False
    users_file: OptionalPath = None
    tokens: Tokens = Field(default_factory=Tokens)
    certificate_file: OptionalPath = None
    key_file: OptionalPath = None
    host: Host = "127.0.0.1"
    port: Port = 8080
    hosts: Hosts = ()
    cors_origins: Origins = ()
    max_connections: Annotated[int, Field(ge=16, le=65536)] = 512
    idle_seconds: PositiveSeconds = 60
    stall_seconds: PositiveSeconds = 30
    wait_seconds: Seconds = 10
    max_results: Count = 1000
    empty_search: Annotated[Literal[200, 204], BeforeValidator(_number)] = 200  # HTTP status
    store: Store = Field(default_factory=Store)

    @property
    def asks(self) -> bool:
        """Whether anybody is asked who they are."""
        return self.users_file is not None or bool(self.tokens.keys)

    @field_validator("host", mode="after")
    @classmethod
    def _is_no_accident(cls, value: str, info: ValidationInfo) -> str:
        told = info.data
        if is_loopback(value) or _JUDGED - told.keys():
            return value
        if not (told["users_file"] or told["tokens"].keys):
            if not told["open"]:
                raise ValueError(
                    "is reached by other machines, and nobody is asked who they are: name users in "
                    "web.users_file, or the issuer of tokens in web.tokens; or keep 127.0.0.1 behind a proxy "
                    "that asks; or say a second time, with web.open = true, that whoever reaches the web "
                    "server may read every study and store others"
                )
        elif not (told["certificate_file"] or told["plain_http"]):
            raise ValueError(
                "is reached by other machines, and passwords or tokens would go there for all to read: give "
                "web.certificate_file and web.key_file; or keep 127.0.0.1 behind a proxy that has them; or "
                "say web.plain_http = true if such a proxy is on another machine and the way to it is safe"
            )
        return value

    @model_validator(mode="after")
    def _does_not_contradict(self) -> "Web":
        if self.open and self.asks:
            raise ValueError(
                "open says that nobody is asked, users_file or tokens say who may: take one of them away"
            )
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file belong together")
        return self


class Render(_Table):
    """What decoding and rendering pixels may cost."""

    processes: Annotated[int, Field(ge=1, le=64)] = 2
    waiting: Annotated[int, Field(ge=0, le=1000)] = 32  # requests beyond those being worked on
    seconds: PositiveSeconds = 20
    memory: Annotated[ByteSize, Field(ge=256 * _MIB)] = ByteSize(_GIB)  # of each process
    result_max: Annotated[ByteSize, Field(ge=_MIB)] = ByteSize(512 * _MIB)
    max_pixels: Annotated[int, Field(ge=1 << 16)] = 1 << 26


class Viewer(_Table):
    """OHIF, where it is installed."""

    base_path: Annotated[str, AfterValidator(_url_path)] = "/ohif"
    settings: OptionalPath = None  # JSON
    preload: bool = True


class Inbox(_Table):
    """The drop folder."""

    enabled: bool = True
    settle_seconds: Seconds = 2
    rescan_seconds: PositiveSeconds = 10
    quarantine_max: ByteSize = ByteSize(_GIB)
    quarantine_files: Count = 10000


class Log(_Table):
    """What is written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Config(_Table):
    """Every setting, checked; only daemon turns it into parts."""

    root: Path = Path("dicomscp-data")
    drain_seconds: Seconds = 30
    dimse: Dimse = Field(default_factory=Dimse)
    storage: Storage = Field(default_factory=Storage)
    pipeline: Pipeline = Field(default_factory=Pipeline)
    publish: Publish = Field(default_factory=Publish)
    index: Index = Field(default_factory=Index)
    query: Query = Field(default_factory=Query)
    web: Web = Field(default_factory=Web)
    render: Render = Field(default_factory=Render)
    viewer: Viewer = Field(default_factory=Viewer)
    inbox: Inbox = Field(default_factory=Inbox)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _viewer_has_a_path_of_its_own(self) -> "Config":
        base = urllib.parse.urlsplit(self.publish.base_url).path
        viewer = f"{self.viewer.base_path}/"
        for ours in (*OUR_PATHS, *(f"{base}{below}" for below in DICOMWEB_PATHS)):
            if viewer.startswith(f"{ours}/") or f"{ours}/".startswith(viewer):
                raise ValueError(
                    f"viewer.base_path is {self.viewer.base_path}, and {ours} is ours already: the viewer "
                    "has a path of its own, with nothing else above or below it, such as /pacs/ohif beside "
                    "/pacs/dicomweb"
                )
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> "Config":
        if self.dimse.port and (self.dimse.host, self.dimse.port) == (self.web.host, self.web.port):
            raise ValueError(f"dimse.port and web.port are both {self.web.port} on {self.web.host}")
        return self


def load(path: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """The settings of the file at *path* under those of *environ* under *overrides*.

    *overrides* are keyed as the file has them, with dots: ``{"dimse.port": 104}``.
    Raises ConfigError with one line for each thing that is wrong.
    """
    layers = [
        (str(path), dict(_flatten(_read(path))) if path else {}),
        ("environment", _from_environment(environ)),
        ("command line", dict(overrides)),
    ]
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for key, value in layer.items():
            _put(settings, key, value)
            sources[key] = f"environment ({variable(key)})" if source == "environment" else source
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        lines = sorted(_line(detail, sources) for detail in error.errors(include_url=False))
        raise ConfigError("\n".join(lines)) from error


def every_key(table: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key there is, with dots, in order; a list of tables is one key."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from every_key(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def variable(key: str) -> str:
    """The environment variable that sets *key*."""
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "__")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on *host*."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != CONFIG_VARIABLE
    }


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _put(settings: dict[str, Any], key: str, value: object) -> None:
    """Set *key* in nested *settings*; below what is no table it is left out, for that is an error already."""
    *tables, name = key.split(".")
    for table in tables:
        settings = settings.setdefault(table, {})
        if not isinstance(settings, dict):
            return
    settings[name] = value


def _line(detail: ErrorDetails, sources: Mapping[str, str]) -> str:
    """One error as a person reads it: where it stands, its key, what is wrong."""
    key = ".".join(part for part in detail["loc"] if isinstance(part, str))
    shown = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, detail["loc"])))
    if not key:  # a rule across tables names its keys itself
        return _reason(detail, key)
    source = next((sources[k] for k in (key, *_parents(key)) if k in sources), None)
    if source is None:  # a table, or a default that another key's value rules out
        source = next((s for k, s in sources.items() if k.startswith(f"{key}.")), "default")
    return f"{source}: {shown}: {_reason(detail, key)}"


def _reason(detail: ErrorDetails, key: str) -> str:
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            key, [*every_key(), *(f"dimse.ae.{name}" for name in Ae.model_fields)], 1
        )
        return f"unknown key{'; did you mean ' + near[0] + '?' if near else ''}"
    message = _PLAINER.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    value = detail["input"]
    if key == _NOT_REPEATED:
        return message
    return f"{message} (is {value!r})" if isinstance(value, str | int | float) else message


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key
