"""What went wrong, told over HTTP: application/problem+json (RFC 9457) with a sentence to act on."""

from collections.abc import Mapping
from http import HTTPStatus

import orjson
from starlette.responses import Response

from dicomscp.errors import (
    BusyError,
    ConfigError,
    DamagedError,
    DicomscpError,
    RefusedError,
    RemovedError,
    UnreachableError,
)

PROBLEM_TYPE = "application/problem+json"
RETRY_SECONDS = 2
"""What a client is told to wait before it asks again for something that is not ready."""

# The first family that fits decides.
_STATUS = (
    (RemovedError, 404),
    (RefusedError, 400),  # asking again will not help
    (BusyError, 503),  # asking again may help
    (UnreachableError, 503),
    (DamagedError, 500),  # a person must look
    (ConfigError, 500),
)


class Problem(Exception):  # noqa: N818 -- RFC 9457 calls it that, and it is an answer rather than a failure
    """Raised by a resource to answer with *status* and a sentence."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        """*detail* goes to whoever asked: it holds nothing that they did not send or may not see."""
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def problem_of(error: DicomscpError) -> Problem:
    """The answer to a request that ended with *error*."""
    status = next((status for family, status in _STATUS if isinstance(error, family)), 500)
    headers = {"retry-after": str(RETRY_SECONDS)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return Problem(status, str(error), headers)


def response_of(problem: Problem) -> Response:
    """*problem* as a response, never to be stored by caches."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
    }
    headers = {"cache-control": "no-store", **problem.headers}
    return Response(orjson.dumps(body), problem.status, headers, PROBLEM_TYPE)
