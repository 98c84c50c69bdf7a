"""Index: what is held, in tables, for questions.  Derived: it can be made again from the instances.

    study ──< series ──< statement ──< instance

An *instance* row is one variant held; of all variants of a SOP Instance UID, wherever in the archive they
claim to belong, exactly one is published.  What an instance says of its study and series is kept apart,
once for all instances of the series that say the same: that is a *statement*.  The rows of study and
series are derived from the statements of published instances, in published order of their first instance:
of each attribute, the first value that is not empty.  So whatever came in whatever order and batches, the
rows are a function of the variants held, and an instance that says what others said changes only counts.

Published order is series by number, then UID, and instances by number, then UID; absent numbers last.

A variant that is removed first *leaves*: it is held no more and no question lists it, but its row says
what file is to go once no document names it.

What the columns are says `tables`; how they answer questions, `search`.
"""

import contextlib
import functools
import hashlib
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import orjson
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    insert,
    select,
    true,
    update,
)
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionError

from dicomscp.archive.journal import Position
from dicomscp.archive.questions import Lookup, Sql, ask, full_name
from dicomscp.archive.search import INSTANCES, Read, Search
from dicomscp.archive.tables import (
    INSTANCE_NUMBER,
    IS_DUE,
    IS_LEAVING,
    IS_LISTED,
    IS_WITHDRAWN,
    MODALITY,
    NO_NUMBER,
    UNLISTED,
    Attributes,
    Condition,
    Places,
    instance,
    instance_number,
    journal_position,
    metadata,
    modality_rows,
    name_rows,
    publication,
    series,
    series_attributes,
    series_row,
    setting,
    statement,
    strings,
    study,
    study_modality,
    study_name,
    study_object,
    study_row,
)
from dicomscp.dicom import matching
from dicomscp.dicom.identity import InstanceKey
from dicomscp.dicom.matching import (
    SOP_CLASS_UID,
    STANDARD,
    STUDY_UID,
    Key,
    Level,
    Model,
    Query,
    Single,
)
from dicomscp.errors import BusyError, DamagedError, RefusedError
from dicomscp.study import layout

_Row: TypeAlias = Any  # SQLAlchemy 2.0 and 2.1 type theirs differently


class Arrival(NamedTuple):
    """A variant that has come into custody; *attributes* are the fragments of the model's index tags."""

    key: InstanceKey
    sop_class_uid: str
    transfer_syntax_uid: str
    digest: bytes
    received_at: int
    calling_ae: str
    path: str
    size: int
    attributes: Mapping[int, bytes]


class Held(NamedTuple):
    """A variant that is held; *path* is relative to the root.

    It came *receipts* times, what is the same counted with it.  If it is *leaving*, it is held no more:
    its file goes once the study's documents show it as it was at that count of changes.
    """

    key: InstanceKey
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    digest: bytes
    received_at: int
    size: int
    receipts: int = 1
    leaving: int | None = None


class Named(NamedTuple):
    """A variant as a removal names it: as it was when the index was asked, and not as it may be since."""

    key: InstanceKey
    digest: bytes
    received_at: int
    receipts: int


class Counts(NamedTuple):
    """How much is held.  Variants and their bytes count all, the others what is published.

    What is leaving is counted by itself alone.
    """

    studies: int
    series: int
    instances: int
    variants: int
    bytes: int
    leaving: int = 0


class Snapshot(NamedTuple):
    """What a study is at one moment: its object, those of its series, and the published instances, in order.

    *study* is None if nothing of it is published; *changes* is how often it has changed by then.
    """

    study: Attributes | None
    series: list[Attributes]
    held: list[Held]
    changes: int


class Publication(NamedTuple):
    """What the documents of a study show; *published_at* in microseconds since 1970.

    *revision* is "" of a study whose documents were withdrawn.
    """

    study_uid: str
    revision: str
    series: int
    instances: int
    published_at: int


class Feed(NamedTuple):
    """Studies by when they were last published, each once.

    *token* stands for the place behind the last; *reset* says that it does not go on from what was asked
    for, but begins anew.
    """

    publications: list[Publication]
    token: str
    more: bool
    reset: bool


# ── the index ────────────────────────────────────────────────────────────────────────────────────

_CHUNK = 500  # values in one statement
_STUDIES_AT_ONCE = 50  # whose statements are in memory together
_PAGE = 500  # rows in one snapshot
_DUE_LOOKED_AT = 1000  # to find the newest of them; at other times few are due
_WITHDRAWN_KEPT = 100_000  # studies withdrawn that the feed still tells of: about 15 MB
_READY_TO_GO = and_(IS_LEAVING, study.c.published >= instance.c.leaving)  # no document names it
_UNSETTLED = 1_000_000  # publications: more than a loss of power can take back
_NAME, _FEED_FROM, _EXTRA = "index", "feed_from", "extra_keys"

_Touched: TypeAlias = set[int]  # ids of series


class _Variant(NamedTuple):
    """What decides which variant of a SOP Instance UID is published."""

    received_at: int
    digest: bytes
    study_uid: str
    series_uid: str
    sop_uid: str
    id: int
    series_id: int
    study_id: int
    published: bool
    receipts: int
    leaving: int | None

    @property
    def key(self) -> InstanceKey:
        return InstanceKey(self.study_uid, self.series_uid, self.sop_uid)

    @property
    def named(self) -> Named:
        return Named(self.key, self.digest, self.received_at, self.receipts)


class _StoppedError(Exception):
    """A search is not to go on."""


class Index:
    """The index in one database; safe to share between threads.

    One process at a time writes.  Methods that change something return, for each study whose published
    instances changed, how often they have changed by now: whoever publishes compares that count with what
    it published last.  Raises BusyError when the database does not take or answer it now, DamagedError
    when it cannot be read.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        duplicates: Literal["first", "last"] = "first",
        retrieve_url: str = "/dicomweb",
        model: Model = STANDARD,
    ) -> None:
        """*duplicates* says which variant is published: that received first, or last; ties go by digest.

        *retrieve_url* begins every RetrieveURL.  *model* says which attributes are kept for questions of what
        arrives; of what is held already, those that an earlier one had until all is made anew.  An index that
        was made with another choice of variants is changed to this one, unless the engine is read-only.
        """
        self._engine, self._writer = engine, engine.execution_options(writes=True)
        self._duplicates, self._retrieve_url = duplicates, retrieve_url
        self.model, self._places = model, Places(model)
        self._askable: Model | None = None
        self._feed_from: int | None = None
        if not engine.get_execution_options().get("read_only"):
            self._adopt()

    # What changes it

    def apply(
        self,
        arrivals: Sequence[Arrival],
        positions: Mapping[str, Position],
        again: Sequence[tuple[InstanceKey, bytes]] = (),
        repaired: Sequence[Arrival] = (),
    ) -> dict[str, int]:
        """Take in *arrivals* and how far each journal is read, in one transaction.

        A variant that is held already, under the same UIDs, changes nothing; one that is leaving is held
        anew.  *again* names variants by UIDs and digest, once for each time that the same came again.
        Those *repaired* are held with another receipt from now on, and their studies have changed.
        """
        with self._writing() as connection:
            changed = self._take_in(connection, arrivals) if arrivals else {}
            changed |= self._repair(connection, repaired) if repaired else {}
            _count_receipts(connection, again)
            _put_positions(connection, positions)
        return changed

    def leave(self, named: Sequence[Named], positions: Mapping[str, Position], asked: str) -> dict[str, int]:
        """Let the *named* variants leave, and note how far journals are read, in one transaction.

        Another variant may be published then.  One that is not as it was named stays: it was received
        again since.  All stay if the index that was *asked* is not this one.  Returns the changes of
        every study of which something named is leaving now, or left before.
        """
        with self._writing() as connection:
            _put_positions(connection, positions)
            if asked != _name_of(connection):
                return {}
            wanted = set(named)
            variants = self._variants(connection, {one.key.sop_uid for one in wanted})
            meant = [one for one in variants if one.named in wanted]
            going = [one for one in meant if one.leaving is None]
            self._withdraw(connection, going)
            for study_id in {one.study_id for one in going}:
                _note_leaving(connection, study_id, [one.id for one in going if one.study_id == study_id])
            return _changes_of(connection, {one.study_id for one in meant})

    def leaving_studies(self) -> dict[str, int]:
        """The studies of which something is leaving, and how many variants of each."""
        studies = select(study.c.study_uid, func.count()).join_from(instance, series).join(study)
        with self._reading() as connection:
            rows = connection.execute(studies.where(IS_LEAVING).group_by(study.c.study_uid)).all()
        return {row[0]: row[1] for row in rows}

    def leaving(self) -> list[Held]:
        """Every variant that left and whose file is not known to be gone."""
        with self._reading() as connection:
            return [_held(row) for row in connection.execute(_HELD.where(IS_LEAVING))]

    def left(self, limit: int) -> list[Held]:
        """At most *limit* variants that left and that no document names any more."""
        with self._reading() as connection:
            return [_held(row) for row in connection.execute(_HELD.where(_READY_TO_GO).limit(limit))]

    def forget_left(self, variants: Sequence[Held]) -> None:
        """The files of these variants, which left, are gone for good."""
        with self._writing() as connection:
            named = {(one.key, one.digest) for one in variants}
            gone = [
                one
                for one in self._variants(connection, {key.sop_uid for key, _ in named})
                if one.leaving is not None and (one.key, one.digest) in named
            ]
            for chunk in _chunks([one.id for one in gone]):
                connection.execute(delete(instance).where(instance.c.id.in_(chunk)))
            _sweep(connection, {one.series_id for one in gone}, {one.study_id for one in gone})

    def clear(self) -> None:
        """Forget everything, the positions and the index's name too."""
        with self._writing() as connection:
            for table in reversed(metadata.sorted_tables):
                if table is not setting:
                    connection.execute(delete(table))
            _begin_anew(connection)
            _put_extra(connection, self.model.extra)
        self._askable = None

    def make_durable(self) -> None:
        """Once this returns, what was committed survives loss of power, even if a sync failed before.

        The log of commits is written out into the tables, so nothing relies on it any more.
        """
        checkpoint = self._engine.get_execution_options().get("checkpoint")
        if checkpoint is None:  # each commit is durable when it returns
            return
        with self._reading() as connection:
            busy, *_ = connection.exec_driver_sql(checkpoint).one()
        if busy:
            raise BusyError("the index cannot be made durable while it is being read")

    def forget_position(self, writer: str) -> None:
        """The journal of *writer* is gone."""
        with self._writing() as connection:
            connection.execute(delete(journal_position).where(journal_position.c.writer == writer))

    def mark_published(self, changes: int, publication: Publication) -> None:
        """The documents of the study show it as it was at that count of *changes*.

        If they are not what they were, the study moves to the end of the feed.
        """
        study_uid = publication.study_uid
        with self._writing() as connection:
            this = study.c.study_uid == study_uid
            connection.execute(update(study).where(this).values(published=changes))
            _end_studies(connection, this)
            if self._feed_from is None:  # a number that was lost with the power may have been given out
                self._feed_from = _last_number(connection) + _UNSETTLED
            _announce(connection, publication, self._feed_from)

    def mark_unpublished(self) -> None:
        """No document stands: every study with a published instance is due."""
        with self._writing() as connection:
            connection.execute(update(study).values(published=0))

    def publish_as(self, made_by: str) -> None:
        """Documents are made so from now on: if they were made otherwise, every study is due."""
        with self._writing() as connection:
            name = setting.c.name == "documents"
            before = connection.execute(select(setting.c.value).where(name)).scalar()
            if before != made_by:
                connection.execute(update(study).values(published=0))
                _put(connection, setting, {"name": "documents"}, {"value": made_by})

    # What is asked of it

    def askable(self) -> Model:
        """What can be asked for: of the extra attributes those that are known of all that is held."""
        if self._askable is None:
            with self._reading() as connection:
                known = _extra(connection)
            self._askable = Model({level: tags & known[level] for level, tags in self.model.extra.items()})
        return self._askable

    def name(self) -> str:
        """A random name that this index got when it was made or last cleared."""
        with self._reading() as connection:
            return _name_of(connection)

    def positions(self) -> dict[str, Position]:
        """How far each journal was read when the last arrivals of it were applied."""
        with self._reading() as connection:
            rows = connection.execute(select(journal_position)).all()
        return {row.writer: Position(row.number, row.offset) for row in rows}

    def known(self, sop_uids: Iterable[str], *, leaving: bool = False) -> dict[str, list[Held]]:
        """Every variant held under those SOP Instance UIDs, in whatever study, earliest first.

        With *leaving*, those that left and whose file may still be there are among them.
        """
        found: dict[str, list[Held]] = {}
        with self._reading() as connection:
            for chunk in _chunks(set(sop_uids)):
                condition = and_(instance.c.sop_uid.in_(chunk), true() if leaving else ~IS_LEAVING)
                rows = connection.execute(
                    _HELD.where(condition).order_by(instance.c.received_at, instance.c.digest)
                )
                for row in rows:
                    found.setdefault(row.sop_uid, []).append(_held(row))
        return found

    def held(self, *uids: str | None, limit: int | None = None) -> list[Held]:
        """The published variant of every instance there, in published order, at most *limit*.

        *uids* are those of a study, of a series in it, of an instance in that, as far as they are said.
        """
        told = zip(_UID_COLUMNS, uids, strict=False)
        there = (Sql(f"{column} = ?", (uid,)) for column, uid in told if uid is not None)
        return [_held(row) for row in self._rows(_PUBLISHED.narrowed(*there).sql(limit))]

    def middles(self, study_uid: str, series_uid: str | None, each: int) -> Iterator[Held]:
        """The published instances nearest to the middle of a series, one series there after the other.

        Of each at most *each*, the nearest first; a series is read when it is come to, and no more of it.
        """
        there = (*_place(study_uid, series_uid, None), series.c.instances > 0)
        listed = select(series.c.id, series.c.instances).join(study).where(*there)
        with self._reading() as connection:
            found = connection.execute(listed.order_by(series.c.ordinal, series.c.series_uid)).all()
        for series_id, count in found:
            middle = count // 2
            first = max(0, middle - each // 2)
            page = (
                _HELD.where(instance.c.series_id == series_id, instance.c.published.is_(true()))
                .order_by(instance.c.ordinal, instance.c.sop_uid)
                .limit(each)
                .offset(first)
            )
            with self._reading() as connection:
                rows = connection.execute(page).all()
            nearest = sorted(enumerate(rows, first - middle), key=lambda numbered: abs(numbered[0]))
            yield from (_held(row) for _, row in nearest)

    def variants(
        self, study_uid: str, series_uid: str | None = None, sop_uid: str | None = None
    ) -> list[Held]:
        """Every variant that claims to be there, published or not, in published order."""
        order = (*_PUBLISHED_ORDER, instance.c.received_at, instance.c.digest)
        there = and_(*_place(study_uid, series_uid, sop_uid), ~IS_LEAVING)
        with self._reading() as connection:
            return [_held(row) for row in connection.execute(_HELD.where(there).order_by(*order))]

    def leaving_of(self, key: InstanceKey) -> list[Held]:
        """What is leaving of one instance; what its documents name, as far as can be told, comes first."""
        there = and_(*_place(*key), IS_LEAVING)
        with self._reading() as connection:
            found = [_held(row) for row in connection.execute(_HELD.where(there))]
        found.sort(key=lambda one: (one.received_at, one.digest), reverse=self._duplicates == "last")
        return found

    def snapshot(self, study_uid: str) -> Snapshot:
        """What the study is now, read at one moment."""
        one = (Key(STUDY_UID, "UI", Single(study_uid)),)
        with self._snapshot() as connection:
            this = study.c.study_uid == study_uid
            changes = connection.execute(select(study.c.changes).where(this)).scalar()
            studies, of_study = (
                list(Search(query, self._retrieve_url, self._places).find(functools.partial(ask, connection)))
                for query in (
                    Query(Level.STUDY, one, OF_STUDY, None),
                    Query(Level.SERIES, one, _OF_SERIES, None),
                )
            )
            rows = connection.execute(
                _HELD.where(this, instance.c.published.is_(true())).order_by(*_PUBLISHED_ORDER)
            )
            return Snapshot(next(iter(studies), None), of_study, [_held(row) for row in rows], changes or 0)

    def feed(self, since: str, limit: int) -> Feed:
        """The studies published behind the token *since*, at most *limit*; from the first if it is "".

        Raises RefusedError for what is no token.
        """
        name, _, digits = since.partition("-")
        if since and not (name.isalnum() and digits.isdecimal() and digits.isascii() and len(digits) < 19):
            raise RefusedError("since is not a token that was given out; leave it out to begin anew")
        with self._snapshot() as connection:
            settings = _settings(connection)
            first, last = int(settings.get(_FEED_FROM, "0")), _last_number(connection)
            goes_on = name == settings.get(_NAME) and first <= int(digits) <= last
            after = int(digits) if since and goes_on else 0
            rows = connection.execute(
                select(publication)
                .where(publication.c.number > after)
                .order_by(publication.c.number)
                .limit(limit + 1)
            ).all()
        given = rows[:limit]
        token = f"{settings.get(_NAME, '0')}-{given[-1].number if given else after}"
        found = [
            Publication(row.study_uid, row.revision, row.series, row.instances, row.published_at)
            for row in given
        ]
        return Feed(found, token, len(rows) > limit, reset=bool(since) and not goes_on)

    def announced(self, study_uids: Iterable[str]) -> set[str]:
        """Those of these studies that have documents."""
        with self._reading() as connection:
            return {
                uid
                for chunk in _chunks(study_uids)
                for uid in connection.execute(
                    select(publication.c.study_uid).where(publication.c.study_uid.in_(chunk), ~IS_WITHDRAWN)
                ).scalars()
            }

    def studies(self) -> Iterator[str]:
        """The UIDs of all studies of which a variant is held, in order."""
        yield from (row.study_uid for row in self._paged(study.c.variants > 0))

    def due(self) -> Iterator[tuple[str, int]]:
        """The studies whose documents do not show what is published of them, and their changes by now."""
        yield from ((row.study_uid, row.changes) for row in self._paged(IS_DUE))

    def count_due(self) -> int:
        """How many studies are due."""
        with self._reading() as connection:
            return int(connection.execute(select(func.count()).where(IS_DUE)).scalar() or 0)

    def newest(self, limit: int) -> list[str]:
        """The UIDs of the studies that changed last, at most *limit*, the latest first.

        Those whose documents do not show their last change come first, in the order in which they were met
        first; of very many such it gives some.
        """
        due = select(study.c.id, study.c.study_uid).where(IS_DUE, IS_LISTED).limit(_DUE_LOOKED_AT).subquery()
        met = select(due.c.study_uid).order_by(due.c.id.desc()).limit(limit)
        told = (
            select(publication.c.study_uid)
            .where(~IS_WITHDRAWN)
            .order_by(publication.c.number.desc())
            .limit(limit)
        )
        with self._reading() as connection:
            uids = [*connection.execute(met).scalars(), *connection.execute(told).scalars()]
        return list(dict.fromkeys(uids))[:limit]

    def due_instances(self) -> int:
        """How many published instances the studies have that are due."""
        with self._reading() as connection:
            return int(connection.execute(select(_sum(study.c.instances)).where(IS_DUE)).scalar() or 0)

    def counts(self) -> Counts:
        """How much is held."""
        held = study.c.instances > 0
        totals = (study.c.series, study.c.instances, study.c.variants, study.c.bytes)
        with self._reading() as connection:
            row: _Row = connection.execute(select(func.count().filter(held), *map(_sum, totals))).one()
            leaving = connection.execute(select(func.count()).where(IS_LEAVING)).scalar()
        return Counts(*row)._replace(leaving=leaving or 0)

    def find(self, query: Query, goes_on: Callable[[], bool] = lambda: True) -> Iterator[dict[str, Any]]:
        """The objects that match *query*, as DICOM JSON.

        Studies and patients come newest first (by date, time, then UID; those without a date last), what
        belongs to them in published order.  Rows are read in pages, each a snapshot of its own.  Before
        each, *goes_on* is asked; if it says no, nothing more is given.
        """
        with contextlib.suppress(_StoppedError):
            yield from Search(query, self._retrieve_url, self._places).find(self._reader(goes_on))

    def count(self, query: Query, bound: int, goes_on: Callable[[], bool] = lambda: True) -> int:
        """How many objects match *query*, whatever its limit and offset; never more than *bound*.

        Before each page of what must be looked at *goes_on* is asked; if it says no, 0 is the answer.
        """
        with contextlib.suppress(_StoppedError):
            return Search(query, self._retrieve_url, self._places).count(self._reader(goes_on), bound)
        return 0

    def _reader(self, goes_on: Callable[[], bool]) -> Read:
        def read(question: Sql) -> Sequence[_Row]:
            if not goes_on():
                raise _StoppedError
            return self._rows(question)

        return read

    # Transactions

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        with _translated(), self._writer.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _translated(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        """A connection on which all questions are answered as of one moment; to be given back soon."""
        with _translated(), self._engine.execution_options(snapshot=True).begin() as connection:
            yield connection

    def _rows(self, question: Sql) -> Sequence[_Row]:
        """All that answers the *question*, as of one moment."""
        with self._reading() as connection:
            return ask(connection, question)

    def _paged(self, condition: Condition) -> Iterator[_Row]:
        """Study UIDs and changes of the studies that meet *condition*, by UID."""
        after = ""
        while True:
            page = (
                select(study.c.study_uid, study.c.changes)
                .where(condition, study.c.study_uid > after)
                .order_by(study.c.study_uid)
                .limit(_PAGE)
            )
            with self._reading() as connection:
                rows = connection.execute(page).all()
            yield from rows
            if len(rows) < _PAGE:
                return
            after = rows[-1].study_uid

    # Taking in and forgetting

    def _take_in(self, connection: Connection, arrivals: Sequence[Arrival]) -> dict[str, int]:
        sop_uids = {arrival.key.sop_uid for arrival in arrivals}
        known = self._hold_anew(connection, arrivals, self._variants(connection, sop_uids))
        there = {(one.key, one.digest) for one in known}
        fresh: dict[tuple[InstanceKey, bytes], Arrival] = {}
        for arrival in arrivals:
            if (arrival.key, arrival.digest) not in there:
                fresh.setdefault((arrival.key, arrival.digest), arrival)
        if not fresh:
            return {}
        times = Counter(key.sop_uid for key, _ in fresh)
        contested = {one.sop_uid for one in known} & times.keys() | {uid for uid, n in times.items() if n > 1}
        intake = _Intake(connection, self._places, [key for key, _ in fresh])
        for arrival in fresh.values():
            intake.add(arrival, published=arrival.key.sop_uid not in contested)
        moved = intake.write()
        recounted, studies = self._choose(connection, contested)
        _derive(connection, moved | recounted, self._places)
        return _count_studies(connection, intake.gains, studies | intake.published_studies)

    def _repair(self, connection: Connection, repaired: Sequence[Arrival]) -> dict[str, int]:
        came = {(arrival.key, arrival.digest): arrival for arrival in repaired}
        sop_uids = {arrival.key.sop_uid for arrival in repaired}
        held = [one for one in self._variants(connection, sop_uids) if (one.key, one.digest) in came]
        gains: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for one in held:
            arrival = came[one.key, one.digest]
            this = instance.c.id == one.id
            size = connection.execute(select(instance.c.size).where(this)).scalar() or 0
            gains[one.study_id][1] += arrival.size - size
            receipt = {"received_at": arrival.received_at, "calling_ae": arrival.calling_ae}
            connection.execute(update(instance).where(this).values(size=arrival.size, **receipt))
        recounted, studies = self._choose(connection, sop_uids)
        _derive(connection, recounted, self._places)
        return _count_studies(connection, gains, studies | gains.keys())

    def _choose(self, connection: Connection, sop_uids: Iterable[str]) -> tuple[_Touched, set[int]]:
        """Publish the right variant of each; returns the series recounted and the studies changed."""
        by_sop: dict[str, list[_Variant]] = defaultdict(list)
        for one in self._variants(connection, sop_uids):
            if one.leaving is None:
                by_sop[one.sop_uid].append(one)
        choose = min if self._duplicates == "first" else max
        chosen = {choose(variants).id for variants in by_sop.values()}
        wrong = [
            one for variants in by_sop.values() for one in variants if one.published != (one.id in chosen)
        ]
        if wrong:
            connection.execute(
                update(instance)
                .where(instance.c.id == bindparam("b_id"))
                .values(published=bindparam("b_published")),
                [{"b_id": one.id, "b_published": not one.published} for one in wrong],
            )
        touched = {one.series_id for one in wrong}
        for series_id in touched:
            _recount(connection, series_id)
        return touched, {one.study_id for one in wrong}

    def _hold_anew(
        self, connection: Connection, arrivals: Sequence[Arrival], known: Sequence[_Variant]
    ) -> list[_Variant]:
        """What is leaving makes room for *arrivals* that are the same; returns which of *known* are held."""
        came = {(arrival.key, arrival.digest) for arrival in arrivals}
        leaving = [one for one in known if one.leaving is not None]
        for chunk in _chunks([one.id for one in leaving if (one.key, one.digest) in came]):
            connection.execute(delete(instance).where(instance.c.id.in_(chunk)))
        return [one for one in known if one.leaving is None]

    def _withdraw(self, connection: Connection, going: Sequence[_Variant]) -> dict[str, int]:
        """Neither publish nor count these any more; returns the changes of studies whose documents change."""
        losses: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for chunk in _chunks([one.id for one in going]):
            rows = connection.execute(
                select(series.c.study_id, instance.c.size)
                .join_from(instance, series)
                .where(instance.c.id.in_(chunk))
            )
            for study_id, size in rows:
                losses[study_id][0] -= 1
                losses[study_id][1] -= size
            # Any count will do until the study's is known: they are no candidates from here on.
            connection.execute(
                update(instance).where(instance.c.id.in_(chunk)).values(published=False, leaving=0)
            )
        touched = {one.series_id for one in going}
        for series_id in touched:
            _recount(connection, series_id)
        recounted, studies = self._choose(connection, {one.sop_uid for one in going})
        _derive(connection, touched | recounted, self._places)
        return _count_studies(connection, losses, studies | {one.study_id for one in going if one.published})

    def _variants(self, connection: Connection, sop_uids: Iterable[str]) -> list[_Variant]:
        """Those under these SOP Instance UIDs, leaving or not."""
        return [
            _Variant(*row)
            for chunk in _chunks(sop_uids)
            for row in connection.execute(_VARIANT.where(instance.c.sop_uid.in_(chunk)))
        ]

    def _adopt(self) -> None:
        """Make an index of the other choice of variants one of this; give a new one its name."""
        with self._writing() as connection:
            settings = _settings(connection)
            if _NAME not in settings:
                _begin_anew(connection)
            known, wanted = _extra(connection), self.model.extra
            is_empty = connection.execute(select(instance.c.id).limit(1)).first() is None
            left = wanted if is_empty else {level: known[level] & wanted[level] for level in Level}
            if left != known:
                _put_extra(connection, left)
            made_with = settings.get("duplicates")
            if made_with == self._duplicates:
                return
            several = select(instance.c.sop_uid).group_by(instance.c.sop_uid).having(func.count() > 1)
            recounted, studies = self._choose(connection, connection.execute(several).scalars().all())
            _derive(connection, recounted, self._places)
            _count_studies(connection, {}, studies)
            _put(connection, setting, {"name": "duplicates"}, {"value": self._duplicates})


# Of what documents say, whatever else is kept: the same instances give the same documents.
OF_STUDY = STANDARD.supported(Level.STUDY) - STANDARD.computed(Level.PATIENT)
"""What documents say of a study."""
_OF_SERIES = STANDARD.series_tags | {
    STUDY_UID,
    matching.INSTANCE_AVAILABILITY,
    matching.RETRIEVE_URL,
    matching.SERIES_RELATED_INSTANCES,
    matching.TIMEZONE,
}
_PUBLISHED_ORDER = (series.c.ordinal, series.c.series_uid, instance.c.ordinal, instance.c.sop_uid)

_OF_HELD = (
    study.c.study_uid,
    series.c.series_uid,
    instance.c.sop_uid,
    instance.c.sop_class_uid,
    instance.c.transfer_syntax_uid,
    instance.c.path,
    instance.c.digest,
    instance.c.received_at,
    instance.c.size,
    instance.c.receipts,
    instance.c.leaving,
)
_HELD = select(*_OF_HELD).join_from(instance, series).join(study)
_UID_COLUMNS = tuple(map(full_name, _OF_HELD[:3]))
# In text: viewers ask for each frame.
_PUBLISHED = Lookup(
    tuple(map(full_name, _OF_HELD)),
    Sql(INSTANCES),
    (Sql("instance.published IS TRUE"),),
    tuple(map(full_name, _PUBLISHED_ORDER)),
)

_VARIANT: Select[Any] = (
    select(
        instance.c.received_at,
        instance.c.digest,
        study.c.study_uid,
        series.c.series_uid,
        instance.c.sop_uid,
        instance.c.id,
        instance.c.series_id,
        series.c.study_id,
        instance.c.published,
        instance.c.receipts,
        instance.c.leaving,
    )
    .join_from(instance, series)
    .join(study)
)


def _held(row: _Row) -> Held:
    study_uid, series_uid, sop_uid, sop_class_uid, transfer_syntax_uid, path, *rest = row
    key = InstanceKey(study_uid, series_uid, sop_uid)
    return Held(key, sop_class_uid, transfer_syntax_uid, path or layout.instance_path(key), *rest)


_READ_ONLY = "25006"  # SQLSTATE; a server that stands by for another one says so


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """A database's errors as ours; what it says names no values."""
    try:
        yield
    except NoConnectionError as error:
        raise BusyError("the index has too many readers now") from error
    except DBAPIError as error:
        reason = first_line(error.orig)
        is_passing = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
        if is_passing or getattr(error.orig, "sqlstate", "") == _READ_ONLY:
            raise BusyError(f"the index cannot be used now: {reason}") from error
        raise DamagedError(f"the index is damaged, rebuild it: {reason}") from error


def first_line(error: object) -> str:
    """What a database says in its first line; behind it PostgreSQL quotes rows: patients' attributes."""
    return str(error).partition("\n")[0]


def _sum(column: Column[Any]) -> ColumnElement[int]:
    """The sum as an integer: PostgreSQL adds up large ones as decimals."""
    return cast(func.coalesce(func.sum(column), 0), BigInteger)


def _settings(connection: Connection) -> dict[str, str]:
    rows: list[_Row] = list(connection.execute(select(setting.c.name, setting.c.value)))
    return {row.name: row.value for row in rows}


def _begin_anew(connection: Connection) -> None:
    """Give the index another name: tokens and removals that name an earlier one say nothing from now on."""
    _put(connection, setting, {"name": _NAME}, {"value": secrets.token_hex(8)})
    _put(connection, setting, {"name": _FEED_FROM}, {"value": "0"})


def _extra(connection: Connection) -> dict[Level, frozenset[int]]:
    """The attributes beside the standard's keys that the index has of everything in it."""
    written = connection.execute(select(setting.c.value).where(setting.c.name == _EXTRA)).scalar() or "{}"
    return {level: frozenset(orjson.loads(written).get(level, ())) for level in Level}


def _put_extra(connection: Connection, known: Mapping[Level, frozenset[int]]) -> None:
    written = orjson.dumps({level.value: sorted(tags) for level, tags in known.items()}).decode()
    _put(connection, setting, {"name": _EXTRA}, {"value": written})


def _last_number(connection: Connection) -> int:
    return connection.execute(select(func.max(publication.c.number))).scalar() or 0


def _announce(connection: Connection, new: Publication, least: int) -> None:
    """Move a study that is not what it was to the end of the feed, with a number of at least *least*."""
    this = publication.c.study_uid == new.study_uid
    before = connection.execute(select(publication.c.revision).where(this)).scalar()
    if before == new.revision or (before is None and not new.revision):
        return
    number = max(_last_number(connection) + 1, least)
    _put(connection, publication, {"study_uid": new.study_uid}, {**new._asdict(), "number": number})
    if new.revision:
        return
    withdrawn = select(publication.c.number).where(IS_WITHDRAWN).order_by(publication.c.number.desc())
    oldest = connection.execute(withdrawn.offset(_WITHDRAWN_KEPT).limit(1)).scalar()
    if oldest is not None:
        connection.execute(delete(publication).where(IS_WITHDRAWN, publication.c.number <= oldest))
        _put(connection, setting, {"name": _FEED_FROM}, {"value": str(oldest)})


def _place(study_uid: str, series_uid: str | None, sop_uid: str | None) -> list[Condition]:
    """That an instance claims to be of the study, of the series, or to be that instance."""
    conditions = [study.c.study_uid == study_uid]
    if series_uid is not None:
        conditions.append(series.c.series_uid == series_uid)
    if sop_uid is not None:
        conditions.append(instance.c.sop_uid == sop_uid)
    return conditions


def _name_of(connection: Connection) -> str:
    """The index's own name; empty while it has none."""
    name = connection.execute(select(setting.c.value).where(setting.c.name == _NAME)).scalar()
    return str(name or "")


def _put_positions(connection: Connection, positions: Mapping[str, Position]) -> None:
    for writer, position in positions.items():
        _put(connection, journal_position, {"writer": writer}, position._asdict())


def _count_receipts(connection: Connection, again: Sequence[tuple[InstanceKey, bytes]]) -> None:
    """Note of each of these variants that it came again."""
    rows = [
        {
            "b_study_uid": key.study_uid,
            "b_series_uid": key.series_uid,
            "b_sop_uid": key.sop_uid,
            "b_digest": digest,
        }
        for key, digest in again
    ]
    if rows:
        connection.execute(_COUNT_RECEIPT, rows)


_COUNT_RECEIPT = (
    update(instance)
    .where(
        instance.c.sop_uid == bindparam("b_sop_uid"),
        instance.c.digest == bindparam("b_digest"),
        instance.c.series_id
        == select(series.c.id)
        .join(study)
        .where(
            study.c.study_uid == bindparam("b_study_uid"), series.c.series_uid == bindparam("b_series_uid")
        )
        .scalar_subquery(),
    )
    .values(receipts=instance.c.receipts + 1)
)


def _note_leaving(connection: Connection, study_id: int, ids: Sequence[int]) -> None:
    """Documents do not name these instances of the study once they show it as it is now."""
    now = select(study.c.changes).where(study.c.id == study_id).scalar_subquery()
    for chunk in _chunks(ids):
        connection.execute(update(instance).where(instance.c.id.in_(chunk)).values(leaving=now))


def _changes_of(connection: Connection, study_ids: Iterable[int]) -> dict[str, int]:
    return {
        row.study_uid: row.changes
        for chunk in _chunks(study_ids)
        for row in connection.execute(select(study.c.study_uid, study.c.changes).where(study.c.id.in_(chunk)))
    }


def _chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    all_values = list(values)
    for start in range(0, len(all_values), _CHUNK):
        yield all_values[start : start + _CHUNK]


def _put(connection: Connection, table: Table, key: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Set the row with that *key*, there or not."""
    condition = and_(*(table.c[name] == value for name, value in key.items()))
    if not connection.execute(update(table).where(condition).values(**row)).rowcount:
        connection.execute(insert(table).values(**{**key, **row}))


# ── taking in ────────────────────────────────────────────────────────────────────────────────────


class _Intake:
    """The new variants of one transaction on their way into the tables, under those *keys*."""

    def __init__(self, connection: Connection, tags: Places, keys: Iterable[InstanceKey]) -> None:
        self._connection, self._tags = connection, tags
        places = dict.fromkeys((key.study_uid, key.series_uid) for key in keys)
        self._study_ids = self._ids_of_studies(dict.fromkeys(study_uid for study_uid, _ in places))
        self._new_series: set[int] = set()
        self._series_ids = self._ids_of_series(places)
        self._statements: dict[tuple[int, bytes], int] = {}
        self._new_statements: list[dict[str, Any]] = []
        self._next_statement = _next_id(connection, statement)
        self._rows: list[dict[str, Any]] = []
        self._first: dict[int, tuple[int, str]] = {}  # published order of the first instance, by statement
        self._count: Counter[int] = Counter()  # published instances, by statement
        self._series_of: dict[int, int] = {}  # by statement
        self._before: dict[int, tuple[int, tuple[int, str]]] = {}  # count and first, by statement
        self.gains: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # variants and bytes, by study
        self.published_studies: set[int] = set()

    def add(self, arrival: Arrival, *, published: bool) -> None:
        """Prepare the row of one variant.  The hot path."""
        key, attributes = arrival.key, arrival.attributes
        series_id = self._series_ids[key.study_uid, key.series_uid]
        get = attributes.get
        said = b",".join(filter(None, map(get, self._tags.statement)))
        statement_id = self._statements.get((series_id, said)) or self._statement_id(series_id, said)
        number = get(INSTANCE_NUMBER)
        ordinal, irregular = instance_number(number) if number else (NO_NUMBER, 0)
        study_id = self._study_ids[key.study_uid]
        gain = self.gains[study_id]
        gain[0] += 1
        gain[1] += arrival.size
        if published:
            order = (ordinal, key.sop_uid)
            self._count[statement_id] += 1
            self._first[statement_id] = min(self._first.get(statement_id, order), order)
            self.published_studies.add(study_id)
        self._rows.append(
            {
                "series_id": series_id,
                "statement_id": statement_id,
                "sop_uid": key.sop_uid,
                "digest": arrival.digest,
                "ordinal": ordinal,
                "irregular": irregular,
                "published": published,
                "received_at": arrival.received_at,
                "size": arrival.size,
                "sop_class_uid": arrival.sop_class_uid,
                "transfer_syntax_uid": arrival.transfer_syntax_uid,
                "calling_ae": arrival.calling_ae,
                "path": None if arrival.path == layout.instance_path(key) else arrival.path,
                "attributes": b"{" + b",".join(filter(None, map(get, self._tags.instance))) + b"}",
            }
        )

    def write(self) -> _Touched:
        """Insert the rows and count them; returns the series whose derived attributes may have changed."""
        if self._new_statements:
            self._connection.execute(insert(statement), self._new_statements)
        self._connection.execute(insert(instance), self._rows)
        touched: _Touched = set()
        by_series: Counter[int] = Counter()
        counted = {}
        for statement_id, count in self._count.items():
            series_id = self._series_of[statement_id]
            by_series[series_id] += count
            before, first = self._before[statement_id]
            order = self._first[statement_id]
            if not before or (order < first and self._is_one_of_several(statement_id)):
                touched.add(series_id)
            counted[statement_id] = (before + count, min(order, first) if before else order)
        _count_statements(self._connection, counted)
        if by_series:
            rows = [{"b_id": series_id, "b_more": more} for series_id, more in by_series.items()]
            self._connection.execute(_COUNT_SERIES, rows)
        return touched

    def _is_one_of_several(self, statement_id: int) -> bool:
        others = exists().where(
            statement.c.series_id == self._series_of[statement_id],
            statement.c.id != statement_id,
            statement.c.instances > 0,
        )
        return bool(self._connection.execute(select(others)).scalar())

    def _ids_of_studies(self, study_uids: Iterable[str]) -> dict[str, int]:
        """The ids of these studies; those that are not there are made."""
        ids: dict[str, int] = {}
        for chunk in _chunks(study_uids):
            there = select(study.c.study_uid, study.c.id).where(study.c.study_uid.in_(chunk))
            ids.update((row.study_uid, row.id) for row in self._connection.execute(there))
        lacking = [study_uid for study_uid in study_uids if study_uid not in ids]
        if lacking:
            ids |= {uid: study_id for study_id, uid in enumerate(lacking, _next_id(self._connection, study))}
            before = _changes_before(self._connection)
            rows = [
                {"id": ids[study_uid], "study_uid": study_uid, "changes": before, "published": before}
                for study_uid in lacking
            ]
            self._connection.execute(insert(study), rows)
        return ids

    def _ids_of_series(self, places: Collection[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """The ids of the series in these studies; those that are not there are made."""
        wanted = {(self._study_ids[study_uid], uid): (study_uid, uid) for study_uid, uid in places}
        ids: dict[tuple[str, str], int] = {}
        for chunk in _chunks({series_uid for _, series_uid in places}):
            there = select(series.c.study_id, series.c.series_uid, series.c.id)
            for study_id, uid, series_id in self._connection.execute(
                there.where(series.c.series_uid.in_(chunk))
            ):
                if (study_id, uid) in wanted:
                    ids[wanted[study_id, uid]] = series_id
        lacking = [(place, where) for place, where in wanted.items() if where not in ids]
        if lacking:
            first = _next_id(self._connection, series)
            rows = [
                {"id": series_id, "study_id": study_id, "series_uid": uid}
                for series_id, ((study_id, uid), _) in enumerate(lacking, first)
            ]
            self._connection.execute(insert(series), rows)
            ids |= {where: series_id for series_id, (_, where) in enumerate(lacking, first)}
            self._new_series.update(range(first, first + len(lacking)))
        return ids

    def _statement_id(self, series_id: int, said: bytes) -> int:
        digest = hashlib.sha256(said).digest()
        row: _Row = None
        if series_id not in self._new_series:
            values = {"b_series_id": series_id, "b_digest": digest}
            row = self._connection.execute(_THAT_STATEMENT, values).one_or_none()
        if row is None:
            row = (self._next_statement, 0, NO_NUMBER, "")
            self._next_statement += 1
            said_there = {"series_id": series_id, "digest": digest, "attributes": b"{" + said + b"}"}
            self._new_statements.append({"id": row[0], **said_there})
        statement_id, before, *first = row
        self._before[statement_id] = (before, tuple(first))
        self._statements[series_id, said] = statement_id
        self._series_of[statement_id] = series_id
        return int(statement_id)


def _next_id(connection: Connection, table: Table) -> int:
    """An id behind all that rows have; one process writes, and adds to these tables in `apply` alone."""
    return int(connection.execute(select(func.max(table.c.id))).scalar() or 0) + 1


_THAT_STATEMENT: Select[Any] = select(
    statement.c.id, statement.c.instances, statement.c.first_ordinal, statement.c.first_sop_uid
).where(statement.c.series_id == bindparam("b_series_id"), statement.c.digest == bindparam("b_digest"))
_COUNT_SERIES = (
    update(series)
    .where(series.c.id == bindparam("b_id"))
    .values(instances=series.c.instances + bindparam("b_more"))
)
_COUNT_STATEMENT = (
    update(statement)
    .where(statement.c.id == bindparam("b_id"))
    .values(
        instances=bindparam("b_instances"),
        first_ordinal=bindparam("b_ordinal"),
        first_sop_uid=bindparam("b_sop_uid"),
    )
)


def _count_statements(connection: Connection, counted: Mapping[int, tuple[int, tuple[int, str]]]) -> None:
    """Note how many published instances make each statement, and which of them is first."""
    rows = [
        {"b_id": statement_id, "b_instances": instances, "b_ordinal": ordinal, "b_sop_uid": sop_uid}
        for statement_id, (instances, (ordinal, sop_uid)) in counted.items()
    ]
    if rows:
        connection.execute(_COUNT_STATEMENT, rows)


def _recount(connection: Connection, series_id: int) -> None:
    """Count the statements of a series, and find their first instances, from its rows."""
    counted: dict[int, tuple[int, tuple[int, str]]] = {}
    rows = connection.execute(
        select(instance.c.statement_id, instance.c.ordinal, instance.c.sop_uid)
        .where(instance.c.series_id == series_id, instance.c.published.is_(true()))
        .order_by(instance.c.ordinal, instance.c.sop_uid)
    )
    for statement_id, ordinal, sop_uid in rows:
        instances, first = counted.get(statement_id, (0, (ordinal, sop_uid)))
        counted[statement_id] = (instances + 1, first)
    connection.execute(update(statement).where(statement.c.series_id == series_id).values(instances=0))
    _count_statements(connection, counted)
    total = sum(instances for instances, _ in counted.values())
    connection.execute(update(series).where(series.c.id == series_id).values(instances=total))


def _derive(connection: Connection, series_ids: _Touched, places: Places) -> None:
    """Derive these series and their studies from the statements of what is published."""
    study_ids: set[int] = set()
    for chunk in _chunks(series_ids):
        of_chunk = select(series.c.study_id).where(series.c.id.in_(chunk)).distinct()
        study_ids.update(connection.execute(of_chunk).scalars())
    ordered = sorted(study_ids)
    for start in range(0, len(ordered), _STUDIES_AT_ONCE):
        _derive_studies(connection, ordered[start : start + _STUDIES_AT_ONCE], series_ids, places)


def _derive_studies(
    connection: Connection, study_ids: Sequence[int], series_ids: _Touched, places: Places
) -> None:
    rows = connection.execute(_SAID.where(series.c.study_id.in_(study_ids)))
    statements: dict[int, dict[tuple[int, str], list[Attributes]]] = {uid: {} for uid in study_ids}
    for study_id, series_id, series_uid, attributes in rows:
        said = statements[study_id].setdefault((series_id, series_uid), [])
        said.append(orjson.loads(attributes))
    changed_series: list[dict[str, Any]] = []
    derived: dict[int, tuple[dict[str, Any], bytes]] = {}
    for study_id, of_study in statements.items():
        ordered: list[tuple[int, str, list[Attributes]]] = []
        modalities: list[str] = []
        for (series_id, series_uid), said in of_study.items():
            own = series_attributes(said, places)
            row = series_row(own)
            if series_id in series_ids:
                changed_series.append({"b_id": series_id, **row})
            ordered.append((row["ordinal"], series_uid, said))
            modalities += strings(own, MODALITY)
        ordered.sort(key=lambda one: one[:2])
        in_order = [attributes for _, _, said in ordered for attributes in said]
        classes = [uid for attributes in in_order for uid in strings(attributes, SOP_CLASS_UID)]
        if in_order:
            row, whole = study_row(in_order, modalities, classes, places)
            derived[study_id] = ({"listed": True, **row}, whole)
        else:
            derived[study_id] = (UNLISTED, b"")
    _execute(connection, _SET_SERIES, changed_series)
    _put_studies(connection, derived)


_SAID: Select[Any] = (
    select(series.c.study_id, series.c.id, series.c.series_uid, statement.c.attributes)
    .join_from(series, statement)
    .where(statement.c.instances > 0)
    .order_by(series.c.study_id, series.c.id, statement.c.first_ordinal, statement.c.first_sop_uid)
)
_SET_SERIES = update(series).where(series.c.id == bindparam("b_id"))  # the columns that each row names


def _put_studies(connection: Connection, derived: Mapping[int, tuple[dict[str, Any], bytes]]) -> None:
    """Write what was *derived* of studies, by id, and what is looked up by it, where it is not there."""
    changes: dict[Any, list[dict[str, Any]]] = {
        statement: []
        for statement in (
            _SET_STUDY, _SET_OBJECT, insert(study_object),
            _DROP_MODALITY, _DROP_NAME, insert(study_modality), insert(study_name),
        )
    }  # fmt: skip
    set_study, set_object, add_object, drop_modality, drop_name, add_modality, add_name = changes.values()
    for row_before in connection.execute(_THOSE_STUDIES, {"b_ids": list(derived)}):
        old: Mapping[str, Any] = row_before._asdict()
        study_id, study_uid = old["id"], old["study_uid"]
        row, whole = derived[study_id]
        if any(old[name] != value for name, value in row.items()):
            set_study.append({"b_id": study_id, **row})
            before = modality_rows(old, study_id, study_uid) if old["listed"] else []
            after = modality_rows(row, study_id, study_uid) if row["listed"] else []
            drop_modality += [_bound(one) for one in before if one not in after]
            add_modality += [one for one in after if one not in before]
            before = name_rows(old, study_id, study_uid) if old["listed"] else []
            after = name_rows(row, study_id, study_uid) if row["listed"] else []
            drop_name += [_bound(one) for one in before if one not in after]
            add_name += [one for one in after if one not in before]
        if old["attributes"] is None:
            add_object.append({"study_id": study_id, "attributes": whole})
        elif old["attributes"] != whole:
            set_object.append({"b_id": study_id, "attributes": whole})
    for statement_, rows in changes.items():
        _execute(connection, statement_, rows)


def _bound(row: Mapping[str, Any]) -> dict[str, Any]:
    return {f"b_{name}": value for name, value in row.items()}


def _execute(connection: Connection, statement: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Execute *statement* with each of *rows*; none is no reason to."""
    if rows:
        connection.execute(statement, rows)


_THOSE_STUDIES: Select[Any] = (
    select(study.c.id, study.c.study_uid, *(study.c[name] for name in UNLISTED), study_object.c.attributes)
    .join_from(study, study_object, isouter=True)
    .where(study.c.id.in_(bindparam("b_ids", expanding=True)))
)
_SET_STUDY = update(study).where(study.c.id == bindparam("b_id"))
_SET_OBJECT = update(study_object).where(study_object.c.study_id == bindparam("b_id"))
_DROP_MODALITY = delete(study_modality).where(
    study_modality.c.modality == bindparam("b_modality"),
    study_modality.c.recency == bindparam("b_recency"),
    study_modality.c.study_uid == bindparam("b_study_uid"),
)
_DROP_NAME = delete(study_name).where(
    study_name.c.kind == bindparam("b_kind"),
    study_name.c.value == bindparam("b_value"),
    study_name.c.recency == bindparam("b_recency"),
    study_name.c.study_uid == bindparam("b_study_uid"),
)


_SERIES_OF_STUDY = series.c.study_id == study.c.id
# Nothing of it is held, no document stands, and nothing of it is leaving.
_IS_OVER = and_(study.c.variants == 0, ~IS_DUE, ~exists().where(_SERIES_OF_STUDY))


def _count_studies(
    connection: Connection, gains: Mapping[int, Sequence[int]], changed: set[int]
) -> dict[str, int]:
    """Bring the counts of studies up to date; returns the changes of those *changed*, by UID."""
    rows = [
        {
            "b_id": study_id,
            "b_variants": gains.get(study_id, (0, 0))[0],
            "b_bytes": gains.get(study_id, (0, 0))[1],
            "b_changes": int(study_id in changed),
        }
        for study_id in gains.keys() | changed
    ]
    if rows:
        connection.execute(_COUNT_STUDY, rows)
    return _changes_of(connection, changed)


_COUNT_STUDY = (
    update(study)
    .where(study.c.id == bindparam("b_id"))
    .values(
        variants=study.c.variants + bindparam("b_variants"),
        bytes=study.c.bytes + bindparam("b_bytes"),
        changes=study.c.changes + bindparam("b_changes"),
        instances=select(func.coalesce(func.sum(series.c.instances), 0))
        .where(_SERIES_OF_STUDY)
        .scalar_subquery(),
        series=select(func.count()).where(_SERIES_OF_STUDY, series.c.instances > 0).scalar_subquery(),
    )
)


def _sweep(connection: Connection, series_ids: set[int], study_ids: set[int]) -> None:
    """Take away what no variant needs any more; a study stays until its documents are withdrawn."""
    for series_id in series_ids:
        used = select(instance.c.statement_id).where(instance.c.series_id == series_id)
        connection.execute(
            delete(statement).where(statement.c.series_id == series_id, statement.c.id.not_in(used))
        )
        connection.execute(
            delete(series).where(series.c.id == series_id, ~exists().where(instance.c.series_id == series_id))
        )
    for chunk in _chunks(study_ids):
        _end_studies(connection, study.c.id.in_(chunk))


def _end_studies(connection: Connection, condition: Condition) -> None:
    """Take away the studies of which nothing is left.

    Should one come again, its changes are counted on from there: a publish of what it was, which somebody
    may still have in hand, must not pass for one of what it is.
    """
    over = and_(condition, _IS_OVER)
    last = connection.execute(select(func.max(study.c.changes)).where(over)).scalar()
    if last is not None:
        ended = select(study.c.id).where(over)
        connection.execute(delete(study_object).where(study_object.c.study_id.in_(ended)))
        connection.execute(delete(study).where(over))
        _put(connection, setting, {"name": "changes"}, {"value": str(max(last, _changes_before(connection)))})


def _changes_before(connection: Connection) -> int:
    """The most that changes of a study that is gone were counted to."""
    return int(connection.execute(select(setting.c.value).where(setting.c.name == "changes")).scalar() or 0)
