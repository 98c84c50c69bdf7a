"""Studies are searched by narrow tables, and what their columns do not tell is noted attribute by attribute.

All that is derived from instances is made anew: what tells by bits what was told by a flag cannot be found in
the rows that are there.  No release had the tables of before, so nothing needs to live with these.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import context, op

revision = "0002"
down_revision = "0001"
compatible = "0002"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
# As questions have it, word by word: SQLite takes an index for what it knows to be the same.
_LISTED = sa.column("listed", sa.Boolean).is_(sa.true())


def upgrade() -> None:
    """Take the tables that instances fill away, and make those of now."""
    for table in ("instance", "statement", "series", "study"):
        op.drop_table(table)
    _make_studies()
    _make_searched()
    _make_series()
    _make_instances()
    context.config.attributes["incomplete"]()


def _keys(*names: str) -> list[sa.ForeignKeyConstraint]:
    """That these columns name a row of the table they are called after; PostgreSQL is spared looking."""
    if op.get_bind().dialect.name != "sqlite":
        return []
    return [sa.ForeignKeyConstraint([name], [f"{name.removesuffix('_id')}.id"]) for name in names]


def _make_studies() -> None:
    op.create_table(
        "study",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("study_uid", _TEXT, nullable=False, unique=True),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("series", sa.Integer, nullable=False),
        sa.Column("variants", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("changes", sa.BigInteger, nullable=False),
        sa.Column("published", sa.BigInteger, nullable=False),
        sa.Column("listed", sa.Boolean, nullable=False),
        sa.Column("irregular", sa.Integer, nullable=False),
        sa.Column("recency", sa.BigInteger, nullable=False),
        sa.Column("patient_key", _TEXT, nullable=False),
        sa.Column("patient_id", _TEXT),
        sa.Column("patient_name", _TEXT),
        sa.Column("patient_birth_date", _TEXT),
        sa.Column("accession_number", _TEXT),
        sa.Column("study_time", _TEXT),
        sa.Column("study_id", _TEXT),
        sa.Column("study_description", _TEXT),
        sa.Column("referring_physician_name", _TEXT),
        sa.Column("modalities", _TEXT, nullable=False),
    )
    _index("study_order", "recency", "study_uid", "listed", "irregular", unique=True, include=["id"])
    _index(
        "study_scan", "recency", "study_uid", "listed", "irregular", "modalities", "patient_name",
        "patient_id",
        "accession_number", "study_description", "study_time", "patient_birth_date", "study_id",
        "referring_physician_name",
        include=["id"],
    )  # fmt: skip
    _index("study_irregular", "recency", "study_uid", "irregular", where=sa.text("irregular != 0") & _LISTED)
    _index("study_patient_id", "patient_id", "recency", "study_uid")
    _index("study_accession_number", "accession_number", "recency", "study_uid")
    _index("study_patient_key", "patient_key", "recency", "study_uid")
    _index("study_due", "study_uid", where=sa.text("changes != published"))


def _make_searched() -> None:
    op.create_table(
        "study_object",
        sa.Column("study_id", _ID, primary_key=True, autoincrement=False),
        sa.Column("attributes", sa.LargeBinary, nullable=False),
        *_keys("study_id"),
    )
    op.create_table(
        "study_modality",
        sa.Column("modality", _TEXT, primary_key=True),
        sa.Column("recency", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("study_uid", _TEXT, primary_key=True),
        sa.Column("study_id", _ID, nullable=False),
        sa.Column("irregular", sa.Integer, nullable=False),
        *_keys("study_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "study_name",
        sa.Column("kind", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("value", _TEXT, primary_key=True),
        sa.Column("recency", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("study_uid", _TEXT, primary_key=True),
        sa.Column("study_id", _ID, nullable=False),
        sa.Column("irregular", sa.Integer, nullable=False),
        *_keys("study_id"),
        sqlite_with_rowid=False,
    )


def _make_series() -> None:
    op.create_table(
        "series",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("study_id", _ID, nullable=False),
        sa.Column("series_uid", _TEXT, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("ordinal", sa.BigInteger, nullable=False),
        sa.Column("irregular", sa.Integer, nullable=False),
        sa.Column("modality", _TEXT),
        sa.Column("series_description", _TEXT),
        sa.Column("performed_procedure_step_start_date", _TEXT),
        sa.Column("attributes", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("study_id", "series_uid"),
        *_keys("study_id"),
    )
    op.create_index("series_order", "series", ["study_id", "ordinal", "series_uid"], unique=True)
    op.create_index("series_uid", "series", ["series_uid"])
    op.create_table(
        "statement",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("series_id", _ID, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("first_ordinal", sa.BigInteger, nullable=False),
        sa.Column("first_sop_uid", _TEXT, nullable=False),
        sa.Column("attributes", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("series_id", "digest"),
        *_keys("series_id"),
    )


def _make_instances() -> None:
    op.create_table(
        "instance",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("series_id", _ID, nullable=False),
        sa.Column("statement_id", _ID, nullable=False),
        sa.Column("sop_uid", _TEXT, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("ordinal", sa.BigInteger, nullable=False),
        sa.Column("irregular", sa.Integer, nullable=False),
        sa.Column("published", sa.Boolean, nullable=False),
        sa.Column("received_at", sa.BigInteger, nullable=False),
        sa.Column("receipts", sa.Integer, nullable=False),
        sa.Column("leaving", sa.BigInteger),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sop_class_uid", _TEXT, nullable=False),
        sa.Column("transfer_syntax_uid", _TEXT, nullable=False),
        sa.Column("calling_ae", _TEXT, nullable=False),
        sa.Column("path", _TEXT),
        sa.Column("attributes", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("sop_uid", "digest", "series_id"),
        *_keys("series_id", "statement_id"),
    )
    op.create_index("instance_order", "instance", ["series_id", "ordinal", "sop_uid"])
    for table in ("series", "instance"):
        where = sa.text("irregular != 0")
        op.create_index(
            f"{table}_irregular", table, ["irregular"], sqlite_where=where, postgresql_where=where
        )
    where = sa.text("leaving IS NOT NULL")
    op.create_index("instance_leaving", "instance", ["leaving"], sqlite_where=where, postgresql_where=where)


def _index(
    name: str,
    *columns: str,
    unique: bool = False,
    where: sa.ColumnElement[bool] | sa.TextClause = _LISTED,
    include: Sequence[str] = (),
) -> None:
    op.create_index(
        name,
        "study",
        [*columns],
        unique=unique,
        sqlite_where=where,
        postgresql_where=where,
        postgresql_include=include,
    )
