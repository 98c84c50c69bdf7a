"""Logs: one line an event, to stderr: JSON, or for people on a terminal.

What libraries log by the standard module goes the same way.  Theirs is kept to warnings, and Python's own
warnings are left out: both may quote values of a dataset, and no patient attribute belongs into a log.
For the same reason a traceback is written without the values of its variables.
"""

import contextlib
import logging
import sys
import threading
from types import TracebackType
from typing import Literal, TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

_FIRST = ("time", "level", "part", "event")
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_configured: list[tuple[Level, Format]] = []


def configure(level: Level, format: Format, stream: TextIO = sys.stderr, *, part: str = "") -> None:  # noqa: A002 - the setting's name
    """Write what is logged from now on, at *level* and above, to *stream*.

    *part* names the process in each line.  What ends a thread or the process unforeseen is logged too.
    Called once, before the first line: loggers that have written keep to what they knew then.
    """
    console = format == "console" or (format == "auto" and stream.isatty())
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _Part(part),
    ]
    after = _console(stream) if console else _json()
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _Forgiving(stream))),
        cache_logger_on_first_use=True,
    )
    _route_standard_library(stream, before, after)
    sys.excepthook = _crashed
    threading.excepthook = _thread_crashed
    _configured[:] = [(level, format)]


def settings() -> tuple[Level, Format] | None:
    """The level and format that this process was configured with, for a process that it starts."""
    return _configured[0] if _configured else None


class _Forgiving:
    """A stream whose failures, as when its disk is full, cost its lines and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Part:
    """Adds the part's name, if it has one."""

    def __init__(self, part: str) -> None:
        self._part = part

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        if self._part:
            event.setdefault("part", self._part)
        return event


def _console(stream: TextIO) -> list[Processor]:
    plain = structlog.dev.plain_traceback
    return [
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain, timestamp_key="time")
    ]


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_serialized)]


def _serialized(event: dict[str, object], **_options: object) -> str:
    event = {name: event[name] for name in _FIRST if name in event} | event  # for who reads it raw
    # What JSON has no form for (bytes, paths, lone surrogates) is shown as Python shows it.
    try:
        return orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        return orjson.dumps({str(key): repr(value) for key, value in event.items()}).decode()


def _route_standard_library(stream: TextIO, before: list[Processor], after: list[Processor]) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *before],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *after],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)


def _crashed(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None, thread: str = "main"
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger().critical("crashed", thread=thread, exc_info=(kind, error, trace))


def _thread_crashed(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        _crashed(args.exc_type, args.exc_value, args.exc_traceback, name)
