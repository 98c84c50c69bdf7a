"""`python -m tests.bench store|compile|publish|serve|find`: run one benchmark and show it.

Exit status: 0 done; 1 the benchmark failed, or --check was given and a target was missed; 2 usage;
130 interrupted.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dicomscp.errors import DicomscpError
from tests.bench.crew import CrewError
from tests.bench.instances import SIZES
from tests.bench.lean_sender import SenderError
from tests.bench.report import Report
from tests.processes import GoneError


def main() -> int:
    """Parse, run, show."""
    options = _parser().parse_args()
    # As at Ctrl-C: what was started is ended on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report(options.benchmark)
    failure: BaseException | None = None
    with tempfile.TemporaryDirectory(prefix="dicomscp-bench-", dir=options.directory) as directory:
        try:
            _run(options, Path(directory), report)
        except (KeyboardInterrupt, GoneError, CrewError, SenderError, DicomscpError) as error:
            failure = error  # what was measured before is shown all the same
        report.show(as_json=options.json)
    if isinstance(failure, KeyboardInterrupt):
        return 130
    if failure is not None:
        report.progress(f"failed: {failure}")
    return int(failure is not None or (options.check and report.missed))


def _run(options: argparse.Namespace, directory: Path, report: Report) -> None:
    # Each is imported when it is run: the peers can be measured without the gateway, and the compiler alone.
    if options.benchmark == "store":
        from tests.bench import store

        store.run(
            store.Options(
                directory=directory,
                rounds=options.rounds,
                instances=options.instances,
                sizes=tuple(options.sizes),
                associations=tuple(options.associations),
                only=tuple(options.only),
                receivers=tuple(options.receivers),
            ),
            report,
        )
    elif options.benchmark == "compile":
        from tests.bench import compile as compile_

        compile_.run(
            compile_.Options(directory, options.rounds, tuple(options.instances), tuple(options.sizes)),
            report,
        )
    elif options.benchmark == "publish":
        from tests.bench import publish

        publish.run(
            publish.Options(
                directory, options.rounds, options.series, options.live, options.long, options.largest
            ),
            report,
        )
    elif options.benchmark == "find":
        from tests.bench import find

        find.run(
            find.Options(
                directory=directory,
                index=options.index,
                database=options.database,
                studies=options.studies,
                rounds=options.rounds,
                questions=options.questions,
                instances=options.instances,
                beside=options.beside,
                only=tuple(options.only),
            ),
            report,
        )
    else:
        from tests.bench import serve

        serve.run(
            serve.Options(
                directory=directory,
                rounds=options.rounds,
                instances=options.instances,
                studies=options.studies,
                connections=options.connections,
                seconds=options.seconds,
                openings=options.openings,
                servers=tuple(options.servers),
                only=tuple(options.only),
            ),
            report,
        )


def _parser() -> argparse.ArgumentParser:
    from tests.bench import serve as serving
    from tests.bench.find import PARTS
    from tests.bench.store import RECEIVERS, STUDIES

    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measure the gateway beside its peers."
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)

    store = _command(commands, "store", "C-STORE throughput, freshness, memory, syncs", rounds=5)
    store.add_argument(
        "--instances", type=_count, default=300, help="a turn, of 15 KB; half as many of 0.5 MB"
    )
    store.add_argument("--associations", type=_counts, default=[1, 4], help="such as 1,4")
    _some_of(store, "--sizes", SIZES)
    _some_of(store, "--only", STUDIES)
    _some_of(store, "--receivers", RECEIVERS)

    compiling = _command(commands, "compile", "DICOM JSON of headers, from files", rounds=5)
    compiling.add_argument("--instances", type=_counts, default=[300, 1000], help="lengths of series")
    _some_of(compiling, "--sizes", SIZES)

    publishing = _command(commands, "publish", "documents of series, whole and as they arrive", rounds=3)
    publishing.add_argument("--series", type=_count, default=1000, help="instances published at once")
    publishing.add_argument("--live", type=_count, default=2000, help="that arrive over ten minutes")
    publishing.add_argument("--long", type=_count, default=5000, help="to which one more comes")
    publishing.add_argument("--largest", type=_count, default=20000, help="of which memory is measured")

    serve = _command(commands, "serve", "DICOMweb: requests a second, a series in OHIF", rounds=3)
    serve.add_argument("--instances", type=_count, default=300, help="of 0.5 MB in the series")
    serve.add_argument("--studies", type=_count, default=100, help="of one small instance beside it")
    serve.add_argument("--connections", type=_count, default=2, help="at once")
    serve.add_argument("--seconds", type=float, default=1.0, help="a turn")
    serve.add_argument("--openings", type=_count, default=5, help="of the series in OHIF, from each server")
    _some_of(serve, "--servers", serving.SERVERS)
    _some_of(serve, "--only", serving.PARTS)

    finding = _command(commands, "find", "C-FIND and QIDO-RS of a large archive", rounds=3)
    finding.add_argument(
        "--index", type=Path, help="the folder that keeps the archive; default: it is made anew"
    )
    finding.add_argument(
        "--database",
        default="",
        metavar="URL",
        help="PostgreSQL, empty or with that folder's archive, or the word temporary; default: SQLite",
    )
    finding.add_argument("--studies", type=_count, default=100_000, help="in the archive, of ten instances")
    finding.add_argument("--questions", type=_count, default=300, help="of each kind, a round")
    finding.add_argument("--instances", type=_count, default=1000, help="sent an association, a turn")
    finding.add_argument(
        "--beside", type=_count, default=1000, metavar="STUDIES", help="that Orthanc and dcmqrscp are given"
    )
    _some_of(finding, "--only", PARTS)
    return parser


def _command(commands: Any, name: str, told: str, *, rounds: int) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=told, description=told)
    command.add_argument("--rounds", type=_count, default=rounds)
    command.add_argument(
        "--directory", type=Path, default=Path(), help="on the disk that is measured; default: here"
    )
    command.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    command.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return command


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("is less than 1")
    return number


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _some_of(command: argparse.ArgumentParser, option: str, names: Iterable[str]) -> None:
    """An option whose value is some of *names*, with commas between them; all by default."""
    known = list(names)

    def chosen(text: str) -> list[str]:
        parts = [part.strip() for part in text.split(",")]
        if unknown := [part for part in parts if part not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(known)}")
        return parts

    command.add_argument(option, type=chosen, default=known, help="some of: " + ", ".join(known))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
