"""The page at /: what the gateway does now, the newest studies, what went wrong; for a person with a browser.

    /                 all of it          /?q=TEXT      studies whose patient's name or ID has TEXT in it
    /?study=UID       one study          /status       how the gateway stands, as JSON

Rendered on the server, whole without script.  The script, ours too, asks /status every two seconds; when
that says something new it fetches the page and puts what changed in the place of what it was.  So all is
rendered in one place, and shown is the same with and without script.

Names, reasons and titles come from outside.  `_html` escapes whatever was not made by it, and the policy lets
nothing run and nothing load but what this gateway serves.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import quote, urlencode

import orjson
import structlog
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomscp.archive.archive import Archive
from dicomscp.dicom.identity import is_filable
from dicomscp.dicom.matching import Level, query_from_parameters
from dicomscp.errors import DicomscpError
from dicomscp.study import layout
from dicomscp.telemetry.rested import Rested
from dicomscp.telemetry.units import readable_size
from dicomscp.web.exchange import is_known
from dicomscp.web.problem import problem_of

log = structlog.get_logger()

Facts = Mapping[str, Any]
"""How the gateway stands, as `dicomscp status --json` says it."""

_NEWEST = 24  # studies on the page
_MOST = 100  # studies found, or series of a study; a person who wants others searches
_LISTED = 10  # of each kind of trouble
_LEAST_SECONDS = 1.0  # between two looks, however many ask
_DIGITS = 3  # of free bytes: all that people see, and less that changes without a cause

_NAME, _ID, _BIRTH_DATE, _ACCESSION = "00100010", "00100020", "00100030", "00080050"
_DATE, _TIME, _DESCRIPTION, _MODALITIES = "00080020", "00080030", "00081030", "00080061"
_STUDY_UID, _SERIES_COUNT, _INSTANCE_COUNT = "0020000D", "00201206", "00201208"
_SERIES_UID, _MODALITY, _SERIES_NUMBER, _SERIES_DESCRIPTION = "0020000E", "00080060", "00200011", "0008103E"
_SERIES_INSTANCES = "00201209"

_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
)
_FILES = {"page.css": "text/css", "page.js": "text/javascript", "page.svg": "image/svg+xml"}


class _Html(str):
    """Markup that we made."""

    __slots__ = ()


def _html(template: LiteralString, **values: object) -> _Html:
    """*template* with *values*, each as text unless it is markup that we made."""
    texts = {name: text if isinstance(text, _Html) else escape(str(text)) for name, text in values.items()}
    return _Html(template.format(**texts))


def _joined(pieces: Iterable[_Html]) -> _Html:
    return _Html("".join(pieces))


@dataclass(frozen=True)
class _Look:
    """What there was to see at one moment; *trouble* says why facts or studies are missing."""

    facts: Facts
    studies: _Html
    count: int
    trouble: tuple[str, ...]

    @cached_property
    def told(self) -> bytes:
        """What /status says of it."""
        shown = hashlib.sha256(self.studies.encode()).hexdigest()[:16]
        return orjson.dumps({**self.facts, "trouble": self.trouble, "studies_shown": shown})

    @cached_property
    def etag(self) -> str:
        """The entity tag of that."""
        return f'"{hashlib.sha256(self.told).hexdigest()[:32]}"'


class Page:
    """The page of one gateway, which is looked at once a second at most, by a worker thread."""

    def __init__(
        self,
        archive: Archive,
        state: Path,
        base_url: str,
        *,
        ae_title: str,
        version: str,
        status: Callable[[], Facts],
        viewer_url: Callable[[str], str | None],
    ) -> None:
        """*state* holds a record of each study's last publish.

        *status* says how the gateway stands; *viewer_url* where a study can be viewed, None if nowhere.
        """
        self._archive, self._state, self._base_url = archive, state, base_url
        self._ae_title, self._version = ae_title, version
        self._ask_status, self._viewer_url = status, viewer_url
        self._look = Rested(self._look_now, least_seconds=_LEAST_SECONDS)
        self._files = {name: Path(__file__).with_name(name).read_bytes() for name in _FILES}

    def routes(self) -> list[Route]:
        """The page, what it is made of, and /status."""
        return [
            Route("/", self.show, methods=["GET"]),
            Route("/status", self.status, methods=["GET"]),
            *(Route(f"/{name}", self.file, methods=["GET"]) for name in _FILES),
        ]

    async def show(self, request: Request) -> Response:
        """The page: all of it, the studies that are searched for, or one of them."""
        html, status = await to_thread.run_sync(self._render, request)
        headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
        return Response(html, status, headers, media_type="text/html")

    async def status(self, request: Request) -> Response:
        """How the gateway stands; it changes when anything on the page does."""
        look = await to_thread.run_sync(self._look)
        headers = {"etag": look.etag, "cache-control": "no-cache, private"}
        if is_known(request, look.etag):
            return Response(status_code=304, headers=headers)
        return Response(look.told, headers=headers, media_type="application/json")

    async def file(self, request: Request) -> Response:
        """Style sheet, script or icon; the page names each with a digest of it, so they are kept for good."""
        name = request.url.path.rpartition("/")[2]
        headers = {"cache-control": "public, max-age=31536000, immutable"}
        return Response(self._files[name], headers=headers, media_type=_FILES[name])

    def _look_now(self) -> _Look:
        facts: Facts = {}
        studies: Sequence[Facts] = ()
        trouble = []
        try:
            facts = _steady(self._ask_status())
        except DicomscpError as error:
            trouble.append(str(error))
        try:
            studies = self._archive.newest(_NEWEST)
        except DicomscpError as error:
            trouble.append(str(error))
        return _Look(facts, self._cards(studies), len(studies), tuple(dict.fromkeys(trouble)))

    def _render(self, request: Request) -> tuple[str, int]:
        wanted, study_uid = _wanted(request), request.query_params.get("study", "")
        look, status = self._look(), 200
        try:
            if study_uid:
                title, main = "Study", self._study(study_uid)
                if not main:
                    main, status = _NO_STUDY, 404
            elif wanted:
                title, main = f"Search for {wanted}", self._found_by(wanted)
            else:
                sections = _now(look.facts), self._newest(look), _troubles(look.facts)
                title, main = "Status", _joined(sections)
        except DicomscpError as error:
            log.warning("page_not_shown", reason=str(error))
            problem = problem_of(error)
            title, main, status = "Not answered", _html(_FAILED, reason=problem.detail), problem.status
        html = _html(
            _PAGE,
            etag=look.etag,
            title=title,
            ae_title=self._ae_title,
            style=self._address("page.css"),
            script=self._address("page.js"),
            icon=self._address("page.svg"),
            wanted=wanted,
            alerts=_alerts(look),
            main=main,
            version=self._version,
            since=_since(look.facts),
        )
        return html, status

    def _address(self, name: str) -> str:
        return f"{name}?{hashlib.sha256(self._files[name]).hexdigest()[:16]}"

    # ── studies ──────────────────────────────────────────────────────────────────────────────────

    def _newest(self, look: _Look) -> _Html:
        cards = look.studies
        if not look.count and not look.trouble:
            cards = _html(
                '<li class="empty">No studies yet. Send some to the AE title <b>{ae}</b>.</li>',
                ae=self._ae_title,
            )
        return _html(_STUDIES, heading="Newest studies", note="by arrival", live=_LIVE, cards=cards)

    def _found_by(self, wanted: str) -> _Html:
        studies = self._search(wanted)
        if not studies:
            return _html(
                '<section><h2>Nothing found</h2><p class="empty">No study has “{wanted}” in its '
                "patient's name or ID. "
                '<a href="./">All studies</a></p></section>',
                wanted=wanted,
            )
        note = f"the newest {_MOST}; say more to find others" if len(studies) >= _MOST else "by date"
        heading = f"{_counted(len(studies), 'study', 'studies')} found"
        return _html(_STUDIES, heading=heading, note=note, live=_html(""), cards=self._cards(studies))

    def _search(self, wanted: str) -> list[Facts]:
        either = [*self._find(PatientName=f"*{wanted}*"), *self._find(PatientID=f"*{wanted}*")]
        found = {_first(study, _STUDY_UID): study for study in either}.values()
        return sorted(found, key=lambda one: (_first(one, _DATE), _first(one, _TIME)), reverse=True)[:_MOST]

    def _find(self, **parameters: str) -> list[Facts]:
        query, _ = query_from_parameters(
            Level.STUDY, parameters.items(), max_results=_MOST, model=self._archive.model
        )
        return list(islice(self._archive.find(query), _MOST))

    def _cards(self, studies: Iterable[Facts]) -> _Html:
        return _joined(self._card(study) for study in studies)

    def _card(self, study: Facts) -> _Html:
        uid = _first(study, _STUDY_UID)
        record = self._record(uid)
        address = f"{self._base_url}/studies/{quote(uid, safe='')}"
        viewer = self._viewer_url(uid)
        thumbnail = _html(
            _THUMBNAIL, modality=_modalities(study).partition(",")[0], source=f"{address}/thumbnail"
        )
        name = _html("{name}", name=_name(study) or "No name")
        if viewer is not None:
            thumbnail = _html(
                '<a href="{viewer}" tabindex="-1" aria-hidden="true">{image}</a>',
                viewer=viewer,
                image=thumbnail,
            )
            name = _html('<a href="{viewer}">{name}</a>', viewer=viewer, name=name)
        kind, state = _published(record, _first(study, _INSTANCE_COUNT))
        return _html(
            _CARD,
            uid=uid,
            thumbnail=thumbnail,
            name=name,
            who=_dotted(_first(study, _ID) or "no ID", _date(_first(study, _BIRTH_DATE))),
            what=_first(study, _DESCRIPTION) or "No description",
            when=_dotted(_when(study) or "no date", _first(study, _ACCESSION)),
            modalities=_modalities(study),
            series=_counted(int(_first(study, _SERIES_COUNT) or 0), "series", "series"),
            instances=_counted(int(_first(study, _INSTANCE_COUNT) or 0), "instance", "instances"),
            kind=kind,
            state=state,
            received=_moment(record.get("last_received_at")),
            link="./?" + urlencode({"study": uid}),
            address=address,
        )

    def _study(self, study_uid: str) -> _Html:
        """One study, with its series; nothing if it is not held."""
        found = self._find(StudyInstanceUID=study_uid) if is_filable(study_uid) else []
        if not found:
            return _html("")
        query, _ = query_from_parameters(
            Level.SERIES, [], study_uid=study_uid, max_results=_MOST, model=self._archive.model
        )
        series = [self._series(study_uid, one) for one in islice(self._archive.find(query), _MOST)]
        more = int(_first(found[0], _SERIES_COUNT) or 0) - len(series)
        warnings = self._record(study_uid).get("warnings") or ()
        return _html(
            _STUDY,
            card=self._card(found[0]),
            series=_joined(series),
            more=_html('<p class="soft">and {more} more series</p>', more=more) if more > 0 else _html(""),
            warnings=_html(
                _WARNINGS, entries=_joined(_html("<li>{text}</li>", text=text) for text in warnings)
            )
            if warnings
            else _html(""),
        )

    def _series(self, study_uid: str, series: Facts) -> _Html:
        uid, modality = _first(series, _SERIES_UID), _first(series, _MODALITY)
        address = f"{self._base_url}/studies/{quote(study_uid, safe='')}/series/{quote(uid, safe='')}"
        return _html(
            _SERIES,
            thumbnail=_html(_THUMBNAIL, modality=modality, source=f"{address}/thumbnail"),
            number=_first(series, _SERIES_NUMBER) or "-",
            modality=modality,
            description=_first(series, _SERIES_DESCRIPTION) or "No description",
            instances=_counted(int(_first(series, _SERIES_INSTANCES) or 0), "instance", "instances"),
            address=address,
        )

    def _record(self, study_uid: str) -> Facts:
        """What is on record of the study's last publish; nothing if there was none."""
        try:
            record = orjson.loads((self._state.parent / layout.state_path(study_uid)).read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return {}
        return record if isinstance(record, dict) else {}


def _published(record: Facts, instances: str) -> tuple[str, str]:
    """How far a study is published: a class of the style sheet, and words."""
    if not record:
        return "waits", "in preparation"
    if str(record.get("instances")) != instances:
        return "waits", f"{record.get('instances', 'some')} published"
    if warnings := record.get("warnings_count"):
        return "warns", f"published, {_counted(warnings, 'warning', 'warnings')}"
    return "good", "published"


# ── now, and what went wrong ─────────────────────────────────────────────────────────────────────


def _steady(facts: Facts) -> Facts:
    """*facts* without changes that nobody sees, so that /status changes when something does."""
    if not facts:
        return facts
    free = int(facts["disk_free_bytes"])
    rounded = 10 ** max(0, len(str(free)) - _DIGITS)
    return {**facts, "disk_free_bytes": free // rounded * rounded}


def _alerts(look: _Look) -> _Html:
    """What a person should look at now, before all else."""
    facts = look.facts
    said = [("bad", _html("{reason}", reason=reason)) for reason in look.trouble]
    for part in facts.get("parts", ()):
        if not part["alive"]:
            sentence = "{name} ended with exit status {status} and is to be started again."
            said.append(("bad", _html(sentence, name=part["name"], status=part["exit_status"])))
    if facts and facts["disk_free_bytes"] < facts["disk_reserve_bytes"]:
        said.append(("bad", _html("The disk is below its reserve: nothing is taken until there is room.")))
    if reason := facts.get("index_away"):
        said.append(
            ("bad", _html("The index is away; what comes is taken all the same. {reason}", reason=reason))
        )
    if facts.get("index_rebuilding"):
        said.append(("warns", _html("The index is being made anew; searches wait for it.")))
    if keys := facts.get("extra_keys_not_askable"):
        sentence = "What was held before index.extra_keys named {keys} is not found by it: rebuild the index."
        said.append(("warns", _html(sentence, keys=", ".join(keys))))
    if count := facts.get("set_aside_studies"):
        sentence = '{count} could not be published: <a href="#set-aside">why</a>'
        said.append(("warns", _html(sentence, count=_counted(count, "study", "studies"))))
    lines = _joined(_html('<p class="{kind}">{text}</p>', kind=kind, text=text) for kind, text in said)
    return _html('<div id="alerts" data-live>{lines}</div>', lines=lines)


def _now(facts: Facts) -> _Html:
    """The figures, the parts, and what comes in."""
    if not facts:
        return _html("")
    held = facts.get("held")
    waiting, lag = facts["journal_waiting_bytes"], facts["journal_lag_seconds"]
    due = facts.get("due")
    tiles = [
        _tile("Associations", facts["associations"], "open now"),
        _tile(
            "To be indexed",
            readable_size(waiting) if waiting else "nothing",
            f"{lag:.0f} s behind" if lag else "on the way" if waiting else "all that came can be found",
        ),
        _tile("To be published", "-" if due is None else due, "studies" if due != 1 else "study"),
        _tile(
            "Refused",
            f"{facts['refused']:,}",
            _html(
                '<a href="#refused">since the start</a> · <a href="#quarantined">{files} quarantined</a>',
                files=_counted(facts["quarantined"], "file", "files"),
            ),
        ),
        _tile(
            "Held",
            f"{held['studies']:,}",
            f"{'study' if held['studies'] == 1 else 'studies'} · "
            f"{_counted(held['instances'], 'instance', 'instances')} · {readable_size(held['bytes'])}",
        )
        if held
        else _tile("Held", "-", "the index cannot say"),
        _disk(facts),
    ]
    parts = _joined(
        _html(
            '<li class="{kind}">{name}<span> {state}</span></li>',
            kind="good" if part["alive"] else "bad",
            name=part["name"],
            state=_part_state(part),
        )
        for part in facts["parts"]
    )
    return _html(
        _NOW, tiles=_joined(tiles), parts=parts, arriving=_arriving(facts["calling_aes"]), live=_LIVE
    )


def _tile(name: str, figure: object, note: str) -> _Html:
    tile = '<div data-key="{name}"><dt>{name}</dt><dd><b>{figure}</b> <span>{note}</span></dd></div>'
    return _html(tile, name=name, figure=figure, note=note)


def _disk(facts: Facts) -> _Html:
    free, size, reserve = (facts[f"disk_{what}_bytes"] for what in ("free", "size", "reserve"))
    return _html(
        '<div data-key="disk"><dt>Disk</dt><dd><b>{free}</b> <span>free of {size}, {reserve} kept free</span>'
        '<meter min="0" max="{size_bytes}" value="{used}" high="{high}" optimum="0" '
        'aria-label="Disk used">{percent} % used</meter></dd></div>',
        free=readable_size(free),
        size=readable_size(size),
        reserve=readable_size(reserve),
        size_bytes=size,
        used=size - free,
        high=max(0, size - 2 * reserve),
        percent=round(100 * (size - free) / size) if size else 0,
    )


def _part_state(part: Facts) -> str:
    if not part["alive"]:
        return "is down"
    return f"works, {_counted(part['deaths'], 'restart', 'restarts')}" if part["deaths"] else "works"


def _arriving(calling_aes: Iterable[Facts]) -> _Html:
    rows = [
        _html(
            _ARRIVING_ROW,
            name=one["calling_ae"] or "drop folder",
            kind="busy" if one["instances_per_second"] else "idle",
            per_second=_rate(one["instances_per_second"]),
            bytes_per_second=_byte_rate(one["bytes_per_second"]),
            instances=f"{one['instances']:,}",
            size=readable_size(one["bytes"]),
            last=_moment(one["last_at"]),
        )
        for one in calling_aes
    ]
    if not rows:
        return _html(
            '<tr data-key="none"><td colspan="6" class="soft">Nothing has come since the start.</td></tr>'
        )
    return _joined(rows)


def _troubles(facts: Facts) -> _Html:
    """What was refused, quarantined and set aside, each with its reason."""
    if not facts:
        return _html("")
    refused = [
        _trouble(
            f"{_REFUSED.get(one['kind'], 'refused')} {_counted(one['times'], 'time', 'times')}",
            _dotted(one["calling_ae"] or "unknown AE", one["address"]),
            one["reason"],
            one["last_at"],
        )
        for one in facts["refusals"][:_LISTED]
    ]
    quarantined = [
        _trouble("file", one["file"], one["reason"], one["time"]) for one in facts["quarantine"][:_LISTED]
    ]
    set_aside = [
        _trouble(f"{one['attempts']} attempts", one["study_uid"], one["reason"], None)
        for one in facts["set_aside"][:_LISTED]
    ]
    refused_instances = _counted(facts["refused"], "instance", "instances")
    rejected_associations = _counted(facts["rejected_associations"], "association", "associations")
    sections = (
        (
            "refused",
            "Refused",
            f"{refused_instances} and {rejected_associations} since the start",
            refused,
        ),
        ("quarantined", "Quarantined", _counted(facts["quarantined"], "file", "files"), quarantined),
        ("set-aside", "Set aside", _counted(facts["set_aside_studies"], "study", "studies"), set_aside),
    )
    return _joined(
        _html(
            _TROUBLE,
            key=key,
            heading=heading,
            note=note,
            entries=_joined(entries) or _html('<li class="soft">None.</li>'),
            live=_LIVE,
        )
        for key, heading, note, entries in sections
    )


def _trouble(what: str, whose: object, reason: object, when: object) -> _Html:
    return _html(_TROUBLE_ENTRY, what=what, whose=whose, reason=reason, when=_moment(when))


def _since(facts: Facts) -> _Html:
    serve = facts.get("serve") or {}
    return (
        _html(" · started {when}", when=_moment(serve["started_at"])) if "started_at" in serve else _html("")
    )


_REFUSED = {"rejected": "association rejected", "busy": "refused for now"}

_LIVE = _Html("data-live")
_PAGE = """<!doctype html>
<html lang="en" data-status="{etag}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · {ae_title}</title>
<link rel="icon" href="{icon}">
<link rel="stylesheet" href="{style}">
<script src="{script}" defer></script>
</head>
<body>
<header>
<h1><a href="./">{ae_title}</a></h1>
<form role="search" action="./">
<input type="search" name="q" value="{wanted}" maxlength="64" placeholder="Patient name or ID"
aria-label="Patient name or ID">
<button>Search</button>
</form>
</header>
<main>
<p id="stale" class="bad" role="alert" hidden></p>
<p id="said" class="unseen" role="status"></p>
{alerts}
{main}
</main>
<footer>dicomscp {version}{since}</footer>
</body>
</html>
"""
_NOW = """<section aria-labelledby="h-now">
<h2 id="h-now">Now</h2>
<dl class="tiles" id="tiles" {live}>{tiles}</dl>
<ul class="parts" id="parts" aria-label="Parts of the gateway" {live}>{parts}</ul>
</section>
<section aria-labelledby="h-arriving">
<h2 id="h-arriving">Arriving</h2>
<table>
<thead><tr><th scope="col">Calling AE</th><th scope="col">Instances/s</th><th scope="col">Data rate</th>
<th scope="col">Instances</th><th scope="col">Size</th><th scope="col">Last seen</th></tr></thead>
<tbody id="arriving" {live}>{arriving}</tbody>
</table>
</section>
"""
_ARRIVING_ROW = """<tr data-key="{name}" class="{kind}"><th scope="row">{name}</th>
<td data-name="Instances/s">{per_second}</td><td data-name="Data rate">{bytes_per_second}</td>
<td data-name="Instances">{instances}</td><td data-name="Size">{size}</td>
<td data-name="Last seen">{last}</td></tr>
"""
_STUDIES = """<section aria-labelledby="h-studies">
<h2 id="h-studies">{heading} <small>{note}</small></h2>
<ul class="studies" id="studies" {live}>{cards}</ul>
</section>
"""
_THUMBNAIL = (
    '<span class="thumbnail"><span aria-hidden="true">{modality}</span>'
    '<img loading="lazy" src="{source}" alt="" data-modality="{modality}"></span>'
)
_CARD = """<li class="study" data-key="{uid}">
{thumbnail}
<div>
<h3>{name}</h3>
<p class="soft">{who}</p>
<p>{what}</p>
<p class="soft">{when}</p>
<p><b>{modalities}</b> {series} · {instances}</p>
<p><span class="state {kind}">{state}</span> <span class="soft">{received}</span></p>
<p class="links"><a href="{link}">Series</a>
<a href="{address}/metadata?accept=application/json">Metadata</a></p>
</div>
</li>
"""
_STUDY = """<section aria-labelledby="h-study">
<h2 id="h-study">Study</h2>
<ul class="studies one">{card}</ul>
</section>
<section aria-labelledby="h-series">
<h2 id="h-series">Series</h2>
<ul class="studies">{series}</ul>
{more}
</section>
{warnings}
"""
_NO_STUDY = _Html(
    '<section><h2>No such study</h2><p class="empty">It is not held, or not any more. '
    '<a href="./">All studies</a></p></section>'
)
_FAILED = '<section><h2>Not answered</h2><p class="empty">{reason}</p></section>'
_WARNINGS = """<section aria-labelledby="h-warnings">
<h2 id="h-warnings">Warnings</h2>
<ul class="troubles">{entries}</ul>
</section>
"""
_SERIES = """<li class="study">
{thumbnail}
<div>
<h3>{number} · {modality}</h3>
<p>{description}</p>
<p>{instances}</p>
<p class="links"><a href="{address}/instances?accept=application/json">Instances</a>
<a href="{address}/metadata?accept=application/json">Metadata</a></p>
</div>
</li>
"""
_TROUBLE = """<section aria-labelledby="{key}">
<h2 id="{key}">{heading} <small id="{key}-note" {live}>{note}</small></h2>
<ul class="troubles" id="{key}-list" {live}>{entries}</ul>
</section>
"""
_TROUBLE_ENTRY = "<li><b>{what}</b> <span>{whose}</span> <span class=soft>{when}</span><p>{reason}</p></li>"


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def _wanted(request: Request) -> str:
    """What to search for; a backslash would separate values."""
    return request.query_params.get("q", "").replace("\\", "").strip()


def _values(found: Facts, tag: str) -> list[Any]:
    values: list[Any] = found.get(tag, {}).get("Value", [])
    return [value for value in values if value is not None]


def _first(found: Facts, tag: str) -> str:
    values = _values(found, tag)
    return str(values[0]) if values else ""


def _name(study: Facts) -> str:
    """The patient's name as people write it: its groups apart, family name first."""
    groups: dict[str, str] = next(iter(_values(study, _NAME)), {})
    written = (groups.get(group, "") for group in ("Alphabetic", "Ideographic", "Phonetic"))
    return " · ".join(", ".join(part for part in group.split("^") if part) for group in written if group)


def _modalities(study: Facts) -> str:
    return ", ".join(map(str, _values(study, _MODALITIES)))


def _when(study: Facts) -> str:
    return f"{_date(_first(study, _DATE))} {_time(_first(study, _TIME))}".strip()


def _date(value: str) -> str:
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if len(value) == len("YYYYMMDD") else value


def _time(value: str) -> str:
    return f"{value[:2]}:{value[2:4]}" if len(value) >= len("HHMM") else value


def _dotted(*texts: str) -> str:
    return " · ".join(filter(None, texts))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _moment(text: object) -> _Html:
    """A moment told in ISO 8601; the script says how long ago that was."""
    try:
        moment = datetime.fromisoformat(str(text)).astimezone(UTC)
    except ValueError:
        return _html("")
    return _html(
        '<time datetime="{moment}">{written} UTC</time>',
        moment=moment.isoformat(timespec="seconds"),
        written=f"{moment:%Y-%m-%d %H:%M:%S}",
    )


def _rate(per_second: float | None) -> str:
    return "-" if not per_second else f"{per_second:,.1f}" if per_second < 10 else f"{per_second:,.0f}"


def _byte_rate(per_second: float | None) -> str:
    return "-" if not per_second else f"{readable_size(per_second)}/s"
