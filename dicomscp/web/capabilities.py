"""What can be asked here, for programs: the Retrieve Capabilities Transaction (PS3.18 section 8.9).

    OPTIONS {base}/

The answer is the tree of resources with their methods, parameters and media types, as a WADL document (annex
H), or as the same tree in JSON: of names and values objects are made, of what repeats arrays.  It is made of
what the resources themselves go by, so it cannot say what is not done.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from html import escape
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
from anyio import to_thread
from pydicom.datadict import keyword_for_tag
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomscp.dicom.matching import Level, Model
from dicomscp.dicom.multipart import IMAGE_TYPES, OCTET_STREAM, VIDEO_TYPES
from dicomscp.web import render, search, store
from dicomscp.web.exchange import INSTANCE, SERIES, STUDY, headers_of, is_known, negotiate, service_url
from dicomscp.web.media import DICOM, DOCUMENT_TYPES, JSON, Offer
from dicomscp.web.studies import METADATA

WADL = "application/vnd.sun.wadl+xml"
OFFERS = (Offer(WADL), Offer(JSON))
_NAMESPACE = "http://wadl.dev.java.net/2009/02"
_FRAMES = INSTANCE + "/frames/{frames}"
_FOUND = {Level.STUDY: "Studies", Level.SERIES: "Series", Level.IMAGE: "Instances"}


class Method(NamedTuple):
    """One method of the resource at *path*, which is relative to the base URL.

    *takes* are the media types of a body, *gives* those of an answer, the default first.
    """

    path: str
    verb: str
    transaction: str
    id: str
    parameters: tuple[str, ...]
    gives: tuple[str, ...]
    takes: tuple[str, ...] = ()


def methods(model: Model, *, stores: bool) -> list[Method]:
    """Every method of every resource of the Studies Service; without *stores* nothing is stored."""
    return [*_searches(model), *_retrievals(), *(_stores() if stores else ())]


def _searches(model: Model) -> Iterator[Method]:
    for path, level in search.RESOURCES.items():
        matched = tuple(sorted(filter(None, map(keyword_for_tag, model.supported(level)))))
        parameters = (*search.PARAMETERS, *matched)
        named = "Studies" if level is Level.STUDY else f"{_scope(path)}{_FOUND[level]}"
        yield Method(path, "GET", "Search", f"SearchFor{named}", parameters, _types(search.OFFERS))


def _scope(path: str) -> str:
    return ("Study" if "{study}" in path else "") + ("Series" if "{series}" in path else "")


def _retrievals() -> Iterator[Method]:
    for path, name in ((STUDY, "Study"), (SERIES, "Series"), (INSTANCE, "Instance")):
        single = (DICOM,) if path == INSTANCE else ()
        yield _retrieval(path, name, (_in_parts(DICOM), *single))
        yield _retrieval(f"{path}/metadata", f"{name}Metadata", _types(METADATA))
    frames = (OCTET_STREAM, *IMAGE_TYPES)
    yield _retrieval(_FRAMES, "Frames", (*map(_in_parts, frames), *frames))
    values = (OCTET_STREAM, *IMAGE_TYPES, *VIDEO_TYPES, *sorted(DOCUMENT_TYPES))
    yield _retrieval("/{bulkdata}", "Bulkdata", (*values, *map(_in_parts, values)))
    parts, images = tuple(map(_in_parts, render.PARTS)), render.IMAGES
    for path, name in ((STUDY, "Study"), (SERIES, "Series")):
        yield _rendered(path, name, "rendered", parts)
    documents = (*VIDEO_TYPES, *sorted(DOCUMENT_TYPES))
    yield _rendered(INSTANCE, "Instance", "rendered", (*images, *parts, *documents))
    yield _rendered(_FRAMES, "Frames", "rendered", (*images, *parts))
    for path, name in ((STUDY, "Study"), (SERIES, "Series"), (INSTANCE, "Instance"), (_FRAMES, "Frame")):
        yield _rendered(path, name, "thumbnail", images)


def _retrieval(path: str, name: str, gives: tuple[str, ...]) -> Method:
    return Method(path, "GET", "Retrieve", f"Retrieve{name}", ("accept",), gives)


def _rendered(path: str, name: str, kind: str, gives: tuple[str, ...]) -> Method:
    called = f"RetrieveRendered{name}" if kind == "rendered" else f"Retrieve{name}Thumbnail"
    return Method(f"{path}/{kind}", "GET", "Retrieve", called, render.PARAMETERS[kind], gives)


def _stores() -> Iterator[Method]:
    takes = (*map(_in_parts, store.PAYLOADS), *store.PAYLOADS)
    for path, name in (("/studies", "Instances"), (STUDY, "StudyInstances")):
        yield Method(path, "POST", "Store", f"Store{name}", ("accept",), _types(store.OFFERS), takes)


def _types(offers: Iterable[Offer]) -> tuple[str, ...]:
    return tuple(_in_parts(one.media_type) if one.multipart else one.media_type for one in offers)


def _in_parts(media_type: str) -> str:
    return f'multipart/related; type="{media_type}"'


class Capabilities:
    """The one resource that tells of all."""

    def __init__(self, model: Callable[[], Model], *, base_url: str, stores: bool) -> None:
        """*base_url* begins every address; *model*, called in a thread, is what can be matched now."""
        self._model, self._base_url, self._stores = model, base_url.rstrip("/"), stores

    def routes(self) -> list[Route]:
        """The base URL, with a slash behind it and without."""
        base = urlsplit(self._base_url).path
        return [Route(path, self.describe, methods=["OPTIONS"]) for path in (f"{base}/", base) if path]

    async def describe(self, request: Request) -> Response:
        """The description, as WADL or in JSON."""
        offer = negotiate(request, OFFERS)
        model = await to_thread.run_sync(self._model)
        found = methods(model, stores=self._stores)
        tree = described(found, f"{service_url(request, self._base_url)}/")
        body = orjson.dumps({"application": tree}) if offer.media_type == JSON else _document(tree)
        headers = headers_of(offer, hashlib.sha256(body).hexdigest()[:40])
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)


def described(methods: Iterable[Method], base: str) -> dict[str, Any]:
    """The tree of resources under *base*, a level for each part of their paths."""
    resources: dict[str, Any] = {"base": base, "resource": []}
    for method in methods:
        place = resources
        for part in method.path.strip("/").split("/"):
            below = place.setdefault("resource", [])
            found = next((one for one in below if one["path"] == part), None)
            if found is None:
                found = {"path": part}
                below.append(found)
            place = found
        place.setdefault("method", []).append(_method(method))
    return {"xmlns": _NAMESPACE, "resources": [resources]}


def _method(method: Method) -> dict[str, Any]:
    asked: dict[str, Any] = {"param": [{"name": name, "style": "query"} for name in method.parameters]}
    if method.takes:
        asked["representation"] = [{"mediaType": one} for one in method.takes]
    given = {"status": "200", "representation": [{"mediaType": one} for one in method.gives]}
    return {"name": method.verb, "id": method.id, "request": [asked], "response": [given]}


def _document(tree: Mapping[str, Any]) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>{_element("application", tree)}'.encode()


def _element(name: str, node: Mapping[str, Any]) -> str:
    attributes = "".join(f' {key}="{escape(value)}"' for key, value in node.items() if isinstance(value, str))
    inside = "".join(
        _element(key, one) for key, value in node.items() if not isinstance(value, str) for one in value
    )
    return f"<{name}{attributes}>{inside}</{name}>" if inside else f"<{name}{attributes}/>"
