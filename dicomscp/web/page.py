"""The page at /: the newest studies, for a person with a browser and no viewer.

Rendered on the server, without script: the policy sent with it allows its one style sheet, by hash,
and nothing else, so that a patient's name made of markup is text and stays text.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response

from dicomscp.archive.archive import Archive
from dicomscp.dicom.matching import Level, query_from_parameters
from dicomscp.study import layout

SHOWN = 100
"""Studies on the page; a person who wants others searches."""

_NAME, _ID, _BIRTH_DATE, _ACCESSION = "00100010", "00100020", "00100030", "00080050"
_DATE, _TIME, _DESCRIPTION, _MODALITIES = "00080020", "00080030", "00081030", "00080061"
_STUDY_UID, _SERIES_COUNT, _INSTANCE_COUNT = "0020000D", "00201206", "00201208"

_STYLE = """
:root { color-scheme: light dark; --ink: #17202a; --soft: #5d6b7a; --line: #dde3ea; --card: #fff;
  --back: #f4f6f9; --accent: #0b6bcb; --good: #1a7f47; --wait: #9a6700 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #97a5b5; --line: #2a3441; --card: #161d26; --back: #0e141b;
    --accent: #6cb2ff; --good: #57c98a; --wait: #e0b050 }
}
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back) }
header, main, footer { max-width: 72rem; margin: 0 auto; padding: 1rem }
header { display: flex; flex-wrap: wrap; gap: .75rem 2rem; align-items: center;
  justify-content: space-between }
h1 { font-size: 1.25rem; margin: 0 }
h1 small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft) }
form { display: flex; gap: .5rem; flex: 0 1 24rem }
input { flex: 1; min-width: 0; font: inherit; padding: .45rem .7rem; border: 1px solid var(--line);
  border-radius: .5rem; background: var(--card); color: inherit }
button { font: inherit; padding: .45rem .9rem; border: 0; border-radius: .5rem; background: var(--accent);
  color: var(--card) }
main { padding-top: 0 }
table { width: 100%; border-collapse: collapse; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; overflow: hidden }
th, td { padding: .6rem .8rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th { font-size: .75rem; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line) }
tbody tr + tr td { border-top: 1px solid var(--line) }
td:first-child { font-weight: 600 }
td small { display: block; font-weight: 400; color: var(--soft) }
.number { text-align: right; font-variant-numeric: tabular-nums }
.state { white-space: nowrap; color: var(--wait) }
.state.published { color: var(--good) }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
.empty { padding: 3rem 1rem; text-align: center; color: var(--soft); background: var(--card);
  border: 1px dashed var(--line); border-radius: .75rem }
footer { color: var(--soft); font-size: .8rem }
@media (max-width: 44rem) {
  thead { display: none }
  table, tbody, tr, td { display: block }
  tr { padding: .6rem .2rem }
  tbody tr + tr { border-top: 1px solid var(--line) }
  tbody tr + tr td { border: 0 }
  td { padding: .1rem .8rem }
  .number { display: inline-block; text-align: left; padding-right: 0 }
  .number::after { content: " " attr(data-unit); color: var(--soft) }
}
"""
_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)


class Page:
    """Renders the page from the index; each view asks it once, or twice for a search."""

    def __init__(self, archive: Archive, state: Path, base_url: str, ae_title: str, version: str) -> None:
        """*state* holds a record of each study's last publish."""
        self._archive = archive
        self._state = state
        self._base_url = base_url
        self._ae_title = ae_title
        self._version = version

    async def show(self, request: Request) -> Response:
        """The newest studies, or those whose patient's name or ID has what `q` says in it."""
        html = await to_thread.run_sync(self._render, _wanted(request))
        headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
        return Response(html, headers=headers, media_type="text/html")

    def _render(self, wanted: str) -> str:
        studies = self._studies(wanted)
        body = self._table(studies) if studies else _nothing(wanted, self._ae_title)
        return _PAGE.format(
            style=_STYLE,
            title=escape(self._ae_title),
            wanted=escape(wanted),
            body=body,
            version=escape(self._version),
            note=_note(len(studies), wanted),
        )

    def _studies(self, wanted: str) -> list[dict[str, Any]]:
        if not wanted:
            return self._found([])
        either = self._found([("PatientName", f"*{wanted}*")]) + self._found([("PatientID", f"*{wanted}*")])
        return _newest({_first(study, _STUDY_UID): study for study in either}.values())

    def _found(self, parameters: list[tuple[str, str]]) -> list[dict[str, Any]]:
        query, _ = query_from_parameters(
            Level.STUDY, parameters, max_results=SHOWN, model=self._archive.model
        )
        return _newest(islice(self._archive.find(query), SHOWN))

    def _table(self, studies: Iterable[dict[str, Any]]) -> str:
        heads = "<th>Patient<th>Study<th>Modality<th class=number>Series<th class=number>Instances<th>State"
        rows = "".join(self._row(study) for study in studies)
        return f"<table><thead><tr>{heads}</thead><tbody>{rows}</tbody></table>"

    def _row(self, study: Mapping[str, Any]) -> str:
        uid = _first(study, _STUDY_UID)
        address = f"{self._base_url}/studies/{quote(uid, safe='')}"
        kind, state = self._state_of(uid, _first(study, _INSTANCE_COUNT))
        when = f"{_date(_first(study, _DATE))} {_time(_first(study, _TIME))}".strip()
        accession = _first(study, _ACCESSION)
        return (
            f"<tr><td>{escape(_name(study) or 'No name')}<small>{escape(_first(study, _ID) or 'no ID')}"
            f"{_after(' · ', _date(_first(study, _BIRTH_DATE)))}</small>"
            f"<td>{escape(_first(study, _DESCRIPTION) or 'No description')}"
            f"<small>{escape(when or 'no date')}{_after(' · ', accession)}</small>"
            f"<td>{escape(', '.join(map(str, _values(study, _MODALITIES))))}"
            f'<td class=number data-unit="series">{escape(_first(study, _SERIES_COUNT))}'
            f'<td class=number data-unit="instances">{escape(_first(study, _INSTANCE_COUNT))}'
            f'<td><span class="state {kind}">{escape(state)}</span>'
            f'<small><a href="{escape(address)}/metadata?accept=application/json">metadata</a> · '
            f'<a href="{escape(address)}/series?accept=application/json">series</a></small>'
        )

    def _state_of(self, study_uid: str, instances: str) -> tuple[str, str]:
        """How far the study is published: a class of the style sheet, and words."""
        try:
            record = orjson.loads((self._state.parent / layout.state_path(study_uid)).read_bytes())
        except FileNotFoundError:
            return "", "in preparation"
        if str(record.get("instances")) != instances:
            return "", f"{record.get('instances', 'some')} published"
        if warnings := record.get("warnings_count"):
            return "", f"published, {warnings} warning{'s' if warnings > 1 else ''}"
        return "published", "published"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: studies</title><style>{style}</style></head>
<body><header><h1>{title}<small>{note}</small></h1>
<form role="search">
<input name="q" value="{wanted}" placeholder="Patient name or ID" aria-label="Patient name or ID">
<button>Search</button></form></header>
<main>{body}</main>
<footer>dicomscp {version}</footer></body></html>
"""


def _wanted(request: Request) -> str:
    """What to search for; a backslash would separate values."""
    return request.query_params.get("q", "").replace("\\", "").strip()


def _nothing(wanted: str, ae_title: str) -> str:
    if wanted:
        return f"<p class=empty>No study has “{escape(wanted)}” in its patient's name or ID."
    return f"<p class=empty>No studies yet. Send some to the AE title {escape(ae_title)} and look again."


def _note(shown: int, wanted: str) -> str:
    if shown >= SHOWN:
        return f"{shown} studies; search for others"
    return f"{shown} {'study' if shown == 1 else 'studies'}{' found' if wanted else ''}"


def _newest(studies: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(studies, key=lambda study: (_first(study, _DATE), _first(study, _TIME)), reverse=True)


def _values(study: Mapping[str, Any], tag: str) -> list[Any]:
    values: list[Any] = study.get(tag, {}).get("Value", [])
    return [value for value in values if value is not None]


def _first(study: Mapping[str, Any], tag: str) -> str:
    values = _values(study, tag)
    return str(values[0]) if values else ""


def _name(study: Mapping[str, Any]) -> str:
    """The patient's name as people write it: its groups apart, family name first."""
    groups: dict[str, str] = next(iter(_values(study, _NAME)), {})
    written = (groups.get(group, "") for group in ("Alphabetic", "Ideographic", "Phonetic"))
    return " · ".join(", ".join(part for part in group.split("^") if part) for group in written if group)


def _date(value: str) -> str:
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if len(value) == len("YYYYMMDD") else value


def _time(value: str) -> str:
    return f"{value[:2]}:{value[2:4]}" if len(value) >= len("HHMM") else value


def _after(separator: str, text: str) -> str:
    return separator + escape(text) if text else ""
