"""The command line: parse, call, print, exit.

    0 done        1 failed in part or whole        2 configuration or usage        130 interrupted

Results go to standard output, as JSON if asked; progress, refusals and errors to standard error.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
import orjson
from pydicom.datadict import keyword_for_tag
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from dicomscp import __version__, config, daemon, upkeep
from dicomscp.config import Config
from dicomscp.dicom.identity import is_filable
from dicomscp.dimse import client
from dicomscp.errors import ConfigError, DicomscpError, UnreachableError
from dicomscp.telemetry import log as telemetry_log
from dicomscp.telemetry.units import readable_size
from dicomscp.web import install, users
from dicomscp.web.access import SCOPES
from dicomscp.web.viewer import publish_site

FAILED, MISCONFIGURED, INTERRUPTED = 1, 2, 128 + signal.SIGINT

_LINE_SECONDS = 2.0  # between lines of progress away from a terminal; what is done by then shows none
_PACE_SECONDS, _PACE_STEP_SECONDS = 10.0, 0.25  # what a rate is taken over, and how finely

_SERVE_FLAGS = {
    "ae_title": "dimse.ae_title",
    "dimse_host": "dimse.host",
    "dimse_port": "dimse.port",
    "web_host": "web.host",
    "web_port": "web.port",
}

Progress = Callable[[int, int | None, str], None]
Command = Callable[..., Any]


class _Commands(click.Group):
    """Says our own errors as sentences and an exit status; lists commands as this module has them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            _fail(error, MISCONFIGURED)
        except DicomscpError as error:
            _fail(error, FAILED)
        except KeyboardInterrupt:
            click.echo("dicomscp: interrupted", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(self.commands)


def _fail(error: DicomscpError, status: int) -> NoReturn:
    for line in str(error).splitlines():
        click.echo(f"dicomscp: {line}", err=True)
    raise click.exceptions.Exit(status)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Nothing needs to be configured: 'dicomscp serve' keeps everything under ./dicomscp-data.",
)
@click.version_option(__version__, message="dicomscp %(version)s")
def cli() -> None:
    """A DICOM storage SCP that loses nothing and publishes every study as static DICOMweb."""


def main() -> None:
    """Run one command and exit."""
    cli(prog_name="dicomscp")


def _sources(command: Command) -> Command:
    """Give *command* the options --config and --root, as `file` and `root`."""
    file = click.option(
        "--config",
        "file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        envvar=config.CONFIG_VARIABLE,
        help="Settings, as in conf/dicomscp.toml.  [default: none are needed]",
    )
    root = click.option("--root", metavar="DIR", help="Where everything is kept.  [default: ./dicomscp-data]")
    return file(root(command))


def _settings(command: Command) -> Command:
    """The same, as the `settings` that they lead to.

    The log is quiet: these commands say themselves what was refused, it adds only what nobody expects.
    """

    @functools.wraps(command)
    def run(file: Path | None, root: str | None, **options: Any) -> Any:
        settings = _load(file, root)
        telemetry_log.configure("error", settings.log.format)
        return command(settings=settings, **options)

    return _sources(run)


_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_jobs = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that read files.  [default: one a core]",
)


def _load(file: Path | None, root: str | None, flags: dict[str, Any] | None = None) -> Config:
    given = {"root": root, **(flags or {})}
    return config.load(file, {key: value for key, value in given.items() if value is not None}, os.environ)


@cli.command(epilog="Example: dicomscp serve --root /data/gateway --dimse-host 0.0.0.0 --dimse-port 104")
@_sources
@click.option("--ae-title", metavar="TITLE", help="Our own AE title.  [default: DICOMSCP]")
@click.option("--dimse-host", metavar="HOST", help="Where associations are accepted.  [default: 127.0.0.1]")
@click.option("--dimse-port", type=int, metavar="PORT", help="0 takes a free one.  [default: 11112]")
@click.option("--web-host", metavar="HOST", help="Where HTTP is answered.  [default: 127.0.0.1]")
@click.option("--web-port", type=int, metavar="PORT", help="0 takes a free one.  [default: 8080]")
def serve(file: Path | None, root: str | None, **flags: str | int | None) -> None:
    """Run the gateway until SIGTERM or Ctrl-C.

    Instances come by C-STORE or are put into ROOT/inbox; studies are seen at http://HOST:PORT/ some seconds
    later.  The log goes to standard error; the event "ready" comes once both ports answer.
    """
    settings = _load(file, root, {key: flags[flag] for flag, key in _SERVE_FLAGS.items()})
    telemetry_log.configure(settings.log.level, settings.log.format)
    raise click.exceptions.Exit(daemon.serve(settings))


@cli.command("check-config", epilog="Example: dicomscp check-config --config /etc/dicomscp/dicomscp.toml")
@_sources
@_as_json
def check_config(file: Path | None, root: str | None, as_json: bool) -> None:
    """Say every error in the settings at once, each with its key; with --json, all settings in force."""
    settings = _load(file, root)
    if warning := daemon.check_web(settings):
        click.echo(f"dicomscp: {warning}", err=True)
    if as_json:
        _print_json(settings.model_dump(mode="json"))
    else:
        dimse, web = settings.dimse, settings.web
        click.echo(
            f"The configuration is good: AE {dimse.ae_title} on {dimse.host}:{dimse.port}, "
            f"web on {web.host}:{web.port}, root {settings.root}"
        )


@cli.command(epilog="Example: dicomscp password anna --scope read,write --config /etc/dicomscp/dicomscp.toml")
@_settings
@click.argument("name")
@click.option(
    "--scope", default="read", show_default=True, metavar="SCOPES", help="read, write or read,write."
)
@click.option("--remove", is_flag=True, help="Take the user out.")
def password(settings: Config, name: str, scope: str, remove: bool) -> None:
    """Let a user of the web server in with a new password, which is asked for or read from standard input.

    Users stand in the file that web.users_file names; a running serve reads it when it changes.
    """
    path = settings.web.users_file
    if path is None:
        raise ConfigError("web.users_file names no file for users")
    if remove:
        if not users.remove(path, name):
            raise DicomscpError(f"{path} has no user {name}")
        click.echo(f"{name} is taken out of {path}")
        return
    scopes = scope.split(",")
    if not set(scopes) <= set(SCOPES) or len(set(scopes)) < len(scopes):
        raise click.UsageError(f"{scope!r} is not read, write or read,write")
    known = users.set_password(path, name, scopes, _asked_password())
    click.echo(
        f"{name} has a new password and may {' and '.join(scopes)}" + ("" if known else "; a new user")
    )


def _asked_password() -> str:
    """From the terminal, twice and unseen; where there is none, the first line of standard input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().removesuffix("\n")
    typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    return typed


@cli.command("import", epilog="Example: dicomscp import /media/cdrom /tmp/one.dcm")
@_settings
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="PATH..."
)
@_jobs
@_as_json
def import_(settings: Config, paths: tuple[Path, ...], jobs: int | None, as_json: bool) -> None:
    """Take DICOM files, and those in folders, into custody; they stay where they are.

    The same checks as for C-STORE; works beside a running serve, too.  Exit status 1 if a file was refused,
    the disk took no more, or a study could not be published.
    After Ctrl-C what was taken is held; the same import may be begun again.
    """
    with _interruptible() as interrupted, _progress() as progress:
        report = upkeep.import_paths(settings, paths, progress, jobs=jobs, interrupted=interrupted)
    refused = [(_readable(path), reason) for path, reason in report.refused]
    stopped = _readable(report.stopped or ("interrupted" if report.interrupted else ""))
    _print_refusals(refused)
    if as_json:
        reasons = [{"path": path, "reason": reason} for path, reason in refused]
        _print_json({"admitted": report.admitted, "refused": reasons, "stopped": stopped})
    else:
        click.echo(f"{report.admitted} taken, {len(refused)} refused")
    if report.interrupted:
        click.echo("Interrupted; the next serve or import publishes what is not published yet", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
    if stopped:
        click.echo(f"Stopped at {stopped}", err=True)
    if report.unpublished:
        click.echo(f"{report.unpublished} studies could not be published; see the log", err=True)
    _exit(failed=bool(refused or stopped or report.unpublished))


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed.  The first lets what is under way end well, a second ends at once."""
    pressed = threading.Event()

    def press(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@cli.command(epilog="Example: dicomscp remove 1.2.840.1.7 1.2.840.1.8/1.2.840.1.8.3")
@_settings
@click.argument("places", nargs=-1, required=True, metavar="STUDY[/SERIES[/SOP]]...")
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal to ask on.")
@_as_json
def remove(settings: Config, places: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Remove studies, series or instances, named by their UIDs: from documents first, then from the disk.

    Works beside a running serve, too.  What is received again after it was asked for stays, and what is
    sent again later is taken again.  Exit status 1 if something was not held or is not gone.
    """
    wanted = [_place(place) for place in places]
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on; say --yes to remove without being asked")
    with _progress() as progress:
        found = upkeep.find_removable(settings, wanted, progress)
    for place in found.absent:
        click.echo(f"{place}: nothing is held there", err=True)
    agreed = bool(found.removable) and (yes or click.confirm(f"Remove {_amount(found)}?", err=True))
    report = upkeep.RemoveReport()
    if agreed:
        with _progress() as progress:
            report = upkeep.remove(settings, found, progress)
    if as_json:
        counts = {"removed": report.removed, "kept": report.kept, "leaving": report.leaving}
        _print_json(counts | {"absent": found.absent})
    else:
        click.echo(f"{report.removed} removed")
    if report.kept:
        click.echo(f"{report.kept} were sent again meanwhile and stay; ask again to remove them", err=True)
    if report.leaving:
        click.echo(f"{report.leaving} are not gone yet; see 'dicomscp status' for what is leaving", err=True)
    _exit(failed=bool(found.absent or report.kept or report.leaving) or not agreed)


def _place(text: str) -> list[str]:
    """The UIDs that *text* gives, one to three."""
    uids = text.split("/")
    if len(uids) > 3 or not all(map(is_filable, uids)):
        raise click.UsageError(f"{text!r} is not STUDY, STUDY/SERIES or STUDY/SERIES/SOP, by their UIDs")
    return uids


def _amount(found: upkeep.Found) -> str:
    """How much was found, in words."""
    keys = [one.key for one in found.variants]
    series, studies = {key[:2] for key in keys}, {key.study_uid for key in keys}
    size = readable_size(sum(one.size for one in found.variants))
    variants = f" in {len(keys)} variants" if len(keys) > len(set(keys)) else ""
    return f"{len(set(keys))} instances{variants} of {len(series)} series in {len(studies)} studies, {size}"


@cli.command()
@_settings
@_as_json
def status(settings: Config, as_json: bool) -> None:
    """What is held, queued and wrong, whether serve runs or not."""
    report = upkeep.status(settings)
    if as_json:
        _print_json(report)
    else:
        for name, value in _flat(report):
            click.echo(f"{name:<28}{value}")
        if report["set_aside"]:
            click.echo("A study set aside is tried again when something of it arrives, or by 'rebuild'.")
        if report.get("extra_keys_not_askable"):
            click.echo("Those extra keys are not known of what was held before them: 'rebuild --index'.")


@cli.command(epilog="Example: dicomscp verify && echo all is as it was received")
@_settings
@click.option(
    "--repair",
    is_flag=True,
    help="Make index and published tree anew where they differ; needs serve stopped.",
)
@_as_json
def verify(settings: Config, repair: bool, as_json: bool) -> None:
    """Compare what is held with its receipts, the index with both, and what is published with all.

    One line a finding.  Exit status 1 if there is one that was not repaired.
    """
    with _progress() as progress:
        report = upkeep.verify(settings, repair=repair, progress=progress)
    if as_json:
        _print_json({"checked": report.checked, "findings": report.findings})
    else:
        for finding in report.findings:
            click.echo(finding)
        click.echo(f"{report.checked} instances checked, {len(report.findings)} findings")
    _exit(failed=bool(report.findings))


@cli.command(epilog="Example: dicomscp rebuild --published")
@_settings
@click.option("--index", is_flag=True, help="Only the index.")
@click.option("--published", is_flag=True, help="Only the published tree.")
@_jobs
def rebuild(settings: Config, index: bool, published: bool, jobs: int | None) -> None:
    """Make index and published tree anew from the instances alone; needs serve stopped.

    Exit status 1 if an instance could not be read or a study not be published.
    """
    both = index == published
    with _progress() as progress:
        report = upkeep.rebuild(
            settings, index=index or both, published=published or both, progress=progress, jobs=jobs
        )
    for line in report.unreadable:
        click.echo(line, err=True)
    click.echo(f"{report.instances} instances indexed, {report.studies} studies published")
    if report.unpublished:
        click.echo(f"{report.unpublished} studies could not be published; see the log", err=True)
    _exit(failed=bool(report.unreadable or report.unpublished))


@cli.group()
def viewer() -> None:
    """OHIF, a viewer for browsers, served with the studies."""


@viewer.command("install", epilog="Example: dicomscp viewer install ohif-app-3.13.2.tgz")
@_settings
@click.argument(
    "source", required=False, type=click.Path(exists=True, path_type=Path), metavar="[FILE|FOLDER]"
)
@click.option("--version", default=install.VERSION, show_default=True, help="Which one is fetched.")
@click.option("--integrity", metavar="SHA512-...", help="What the package has to be.  [default: as pinned]")
def viewer_install(settings: Config, source: Path | None, version: str, integrity: str | None) -> None:
    """Install the viewer, or another version of it: fetched by npm, or from the package's FILE or a FOLDER.

    Works beside a running serve, too, which has it from then on under viewer.base_path.
    """
    told = daemon.viewer_settings(settings)
    with _progress() as progress:
        made = install.install(settings.root, source, progress, version=version, integrity=integrity)
    publish_site(told)
    click.echo(
        f"OHIF {made.version} is installed, {len(made.files)} files, {readable_size(made.size)}; "
        f"serve has it at {settings.viewer.base_path}/"
    )


@viewer.command("status")
@_settings
@_as_json
def viewer_status(settings: Config, as_json: bool) -> None:
    """Which viewer is installed, and where it is served.  Exit status 1 if there is none."""
    found = install.installed(settings.root)
    if as_json:
        facts = found and {name: getattr(found, name) for name in ("version", "integrity", "source", "size")}
        _print_json({"installed": facts, "base_path": settings.viewer.base_path})
    elif found:
        click.echo(f"OHIF {found.version} of {found.source}, {readable_size(found.size)}")
        click.echo(f"Serve has it at {settings.viewer.base_path}/")
    else:
        click.echo("No viewer is installed; to have one: dicomscp viewer install")
    _exit(failed=found is None)


@viewer.command("remove")
@_settings
def viewer_remove(settings: Config) -> None:
    """Take the viewer away.  Exit status 1 if there is none."""
    there = install.remove(settings.root)
    click.echo("The viewer is removed" if there else "No viewer is installed")
    _exit(failed=not there)


class _Scu(NamedTuple):
    """Whom we ask, and as whom."""

    peer: client.Peer
    calling_ae: str
    timeout_seconds: float


def _scu(command: Command) -> Command:
    """Give *command* a peer and how it is asked, as `scu`."""

    @functools.wraps(command)
    def run(settings: Config, peer: str, calling_ae: str | None, timeout: float, **options: Any) -> Any:
        title = calling_ae or settings.dimse.ae_title
        return command(scu=_Scu(client.parse_peer(peer), title, timeout), **options)

    peer = click.argument("peer", metavar="AE@HOST:PORT")
    calling_ae = click.option(
        "--calling-ae", metavar="TITLE", help="Our AE title.  [default: dimse.ae_title]"
    )
    timeout = click.option("--timeout", type=float, default=30, show_default=True, metavar="SECONDS")
    return _settings(peer(calling_ae(timeout(run))))


@cli.command(epilog="Example: dicomscp echo CT1@10.1.2.3:104")
@_scu
def echo(scu: _Scu) -> None:
    """Ask a peer whether it is there (C-ECHO); says what is wrong if it is not."""
    seconds = client.echo(scu.peer, calling_ae=scu.calling_ae, timeout_seconds=scu.timeout_seconds)
    click.echo(f"{scu.peer} answers in {seconds * 1000:.1f} ms")


@cli.command(epilog="Example: dicomscp send DICOMSCP@127.0.0.1:11112 /data/study one.dcm")
@_scu
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="PATH..."
)
@_as_json
def send(scu: _Scu, paths: tuple[Path, ...], as_json: bool) -> None:
    """Send DICOM files, and those in folders, as they are: each in its own transfer syntax (C-STORE).

    What is not taken is said with the peer's status and reason.  Exit status 1 if there is such a file.
    """
    files, outcomes, failure = list(_files(paths)), [], None
    began = time.monotonic()
    with _progress() as progress:
        sending = client.send(files, scu.peer, calling_ae=scu.calling_ae, timeout_seconds=scu.timeout_seconds)
        try:
            for outcome in sending:
                outcomes.append(outcome)
                progress(len(outcomes), len(files), "sending")
        except UnreachableError as error:  # those that were sent are counted all the same
            failure = error
    _print_sent(outcomes, time.monotonic() - began, as_json=as_json)
    if failure is not None:
        raise failure
    _exit(failed=not all(outcome.is_stored for outcome in outcomes))


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]


def _print_sent(outcomes: Sequence[client.Outcome], seconds: float, *, as_json: bool) -> None:
    stored = [outcome for outcome in outcomes if outcome.is_stored]
    refused = [(str(one.path), _refusal(one)) for one in outcomes if not one.is_stored]
    size = sum(outcome.size for outcome in stored)
    _print_refusals(refused)
    if as_json:
        reasons = [{"path": path, "reason": reason} for path, reason in refused]
        _print_json({"sent": len(stored), "bytes": size, "seconds": round(seconds, 3), "refused": reasons})
        return
    rate = f"{len(stored) / seconds:.0f}/s, {readable_size(size / seconds)}/s" if seconds else "-"
    click.echo(f"{len(stored)} sent, {readable_size(size)} in {seconds:.1f} s ({rate}); {len(refused)} not")


def _refusal(outcome: client.Outcome) -> str:
    return outcome.reason if outcome.status is None else f"{outcome.status:04X} {outcome.reason}".rstrip()


@cli.command(epilog="Example: dicomscp find PACS@10.1.2.3:104 'PatientName=DOE*' StudyDate=20260101-")
@_scu
@click.argument("keys", nargs=-1, metavar="[KEYWORD=VALUE]...")
@click.option(
    "--level",
    type=click.Choice(["PATIENT", "STUDY", "SERIES", "IMAGE"], case_sensitive=False),
    default="STUDY",
    show_default=True,
)
@_as_json
def find(scu: _Scu, keys: tuple[str, ...], level: str, as_json: bool) -> None:
    """Ask a peer what it holds (C-FIND).

    Keys are keywords of the standard, or eight hexadecimal digits; a key without a value is returned.
    With --json the answer is one array of DICOM JSON objects.
    """
    asked = {name: value for name, _, value in (key.partition("=") for key in keys)}
    answers = client.find(
        scu.peer, level.upper(), asked, calling_ae=scu.calling_ae, timeout_seconds=scu.timeout_seconds
    )
    matches = list(answers)
    if as_json:
        _print_json(matches)
        return
    for match in matches:
        for tag, element in match.items():
            click.echo(f"{keyword_for_tag(tag) or tag:<28}{_values(element)}")
        click.echo()
    click.echo(f"{len(matches)} found")


def _values(element: dict[str, Any]) -> str:
    values = element.get("Value", [])
    if element["vr"] == "PN":
        return "\\".join("=".join(one.values()) for one in values)
    return f"({len(values)} items)" if element["vr"] == "SQ" else "\\".join(map(str, values))


def _exit(*, failed: bool) -> None:
    if failed:
        raise click.exceptions.Exit(FAILED)


def _print_json(value: object) -> None:
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())


def _print_refusals(refused: Sequence[tuple[str, str]]) -> None:
    for path, reason in refused:
        click.echo(f"{path}: {reason}", err=True)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A nested report as lines for people."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(below, f"{name} {key}".strip().replace("_", " "))
    elif isinstance(value, list):
        yield name, str(len(value))
        for one in value:
            told = _flat(one) if isinstance(one, dict) else [("", str(one))]
            yield "", ", ".join(f"{key} {text}".strip() for key, text in told)
    elif name.endswith("bytes") and isinstance(value, int):
        yield "held in all" if name == "held bytes" else name.removesuffix(" bytes"), readable_size(value)
    else:
        text = "".join(character if character.isprintable() else "�" for character in str(value))
        yield name, {"None": "-", "True": "yes", "False": "no"}.get(text, text)


def _readable(path: str) -> str:
    """A path as text, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Shows what is done of how much, how fast, and the time left: a bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        tasks: dict[str, tuple[TaskID, _Pace]] = {}

        def show(done: int, total: int | None, message: str) -> None:
            if message not in tasks:
                tasks[message] = bar.add_task(message, total=total, pace=""), _Pace()
            task, pace = tasks[message]
            pace.reached(done, time.monotonic())
            bar.update(task, completed=done, total=total, pace=pace.text(total))

        yield show


class _Pace:
    """How fast something goes on, seen over its last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # times, and what was done by then

    def reached(self, done: int, now: float) -> None:
        """Note that *done* are done at the time *now*."""
        if len(self._seen) > 1 and now - self._seen[-2][0] < _PACE_STEP_SECONDS:
            self._seen.pop()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _PACE_SECONDS:
            self._seen.popleft()

    def text(self, total: int | None) -> str:
        """The rate, and the time that is left of *total* at that rate."""
        (began, before), (now, done) = self._seen[0], self._seen[-1]
        if done == before or now == began:
            return "total not known yet" if total is None else ""
        rate = (done - before) / (now - began)
        shown = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
        if total is None:
            return f"{shown}, total not known yet"
        return f"{shown}, {_duration(max(0, total - done) / rate)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Lines:
    """Progress as plain lines, one every few seconds after the first thing is done."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._next = math.inf
        self._paces: dict[str, _Pace] = {}

    def __call__(self, done: int, total: int | None, message: str) -> None:
        now = self._now()
        if not self._paces:
            self._next = now + _LINE_SECONDS
        pace = self._paces.setdefault(message, _Pace())
        pace.reached(done, now)
        if now >= self._next:
            self._next = now + _LINE_SECONDS
            count = f"{done}" if total is None else f"{done} of {total}"
            click.echo(f"{message}: " + ", ".join(filter(None, (count, pace.text(total)))), err=True)
