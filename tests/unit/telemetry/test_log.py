"""Logs: one JSON object a line, standard library included, no values that may be a patient's."""

import json
import subprocess
import sys

import pytest

BEGIN = "import logging, warnings, structlog; from dicomscp.telemetry import log; "


def logged(script, *, level="info", shape="auto"):
    run = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}log.configure({level!r}, {shape!r}, part='web')\n{script}"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=30,
    )
    return run.stderr.splitlines()


def test_away_from_a_terminal_each_event_is_one_json_object():
    (line,) = logged(
        "structlog.get_logger().info('study_published', study_uid='1.2', seconds=0.5, data=b'x')"
    )

    assert list(json.loads(line))[:4] == ["time", "level", "part", "event"]
    event = json.loads(line)
    assert event.pop("time").endswith("Z")
    assert event == {
        "event": "study_published",
        "level": "info",
        "part": "web",
        "study_uid": "1.2",
        "seconds": 0.5,
        "data": "b'x'",
    }


def test_the_console_format_is_for_people():
    (line,) = logged("structlog.get_logger().info('study_published', study_uid='1.2')", shape="console")

    assert "study_published" in line
    assert "study_uid=1.2" in line
    assert not line.startswith("{")


@pytest.mark.parametrize(
    ("level", "seen"), [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")]
)
def test_what_is_below_the_level_is_not_written(level, seen):
    lines = logged(
        "l = structlog.get_logger(); l.debug('d'); l.info('i'); l.warning('w'); l.error('e')", level=level
    )

    assert [json.loads(line)["event"] for line in lines] == list(seen)


def test_what_libraries_log_goes_the_same_way_from_warnings_on():
    lines = logged(
        """
for name in ("granian", "_granian", "watchdog.observers", "sqlalchemy.engine.Engine", "pynetdicom.acse"):
    logging.getLogger(name).info("chatter of %s", name)
logging.getLogger("sqlalchemy.engine.Engine").warning("slow %d", 3)
""",
        level="debug",
    )

    (event,) = map(json.loads, lines)
    assert (event["event"], event["logger"], event["level"], event["part"]) == (
        "slow 3",
        "sqlalchemy.engine.Engine",
        "warning",
        "web",
    )


def test_warnings_of_python_may_quote_values_and_are_left_out():
    assert logged("warnings.warn('Invalid value for VR PN: DOE^JANE')") == []


@pytest.mark.parametrize("shape", ["json", "console"])
def test_a_traceback_shows_no_variables(shape):
    lines = logged(
        """
def f(patient):
    raise ValueError("bad")
try:
    f("DOE" + "^JANE")
except ValueError:
    structlog.get_logger().exception("failed")
""",
        shape=shape,
    )

    text = "\n".join(lines)
    assert "ValueError: bad" in text
    assert "DOE^JANE" not in text


def test_what_ends_a_thread_or_the_process_is_one_line():
    lines = logged(
        """
import threading
t = threading.Thread(target=lambda: 1 / 0, name="reader"); t.start(); t.join()
raise RuntimeError("end")
"""
    )

    first, second = map(json.loads, lines)
    assert (first["event"], first["level"], first["thread"]) == ("crashed", "critical", "reader")
    assert "ZeroDivisionError" in first["exception"]
    assert second["thread"] == "main"
    assert "RuntimeError: end" in second["exception"]


def test_a_surrogate_in_a_name_does_not_lose_the_line():
    (line,) = logged("structlog.get_logger().info('x', name='a\\udcff')")

    assert json.loads(line)["event"] == "'x'"
