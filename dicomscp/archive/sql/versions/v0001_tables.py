"""The tables as they were when migrations began: version 2 of the file of SQLite.

A file of that version, made before there were migrations, is taken for this revision as it is.
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0001"
down_revision = None
compatible = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Make them all; nothing is in them yet."""
    _make_studies()
    _make_series()
    _make_instances()
    _make_the_rest()
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
        sa.Column("recency", sa.BigInteger, nullable=False),
        sa.Column("irregular", sa.Boolean, nullable=False),
        sa.Column("patient_key", _TEXT, nullable=False),
        sa.Column("patient_id", _TEXT),
        sa.Column("patient_name", _TEXT),
        sa.Column("patient_birth_date", _TEXT),
        sa.Column("accession_number", _TEXT),
        sa.Column("study_date", _TEXT),
        sa.Column("study_time", _TEXT),
        sa.Column("study_id", _TEXT),
        sa.Column("study_description", _TEXT),
        sa.Column("referring_physician_name", _TEXT),
        sa.Column("modalities", _TEXT, nullable=False),
        sa.Column("attributes", sa.LargeBinary, nullable=False),
    )
    op.create_index("study_order", "study", ["recency", "study_uid"], unique=True)
    op.create_index("study_patient_key", "study", ["patient_key", "recency", "study_uid"])
    op.create_index("study_patient_id", "study", ["patient_id"])
    op.create_index("study_accession_number", "study", ["accession_number"])
    op.create_index("study_irregular", "study", ["irregular"])
    _create_partial_index("study_due", "study", "study_uid", "changes != published")


def _make_series() -> None:
    op.create_table(
        "series",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("study_id", _ID, nullable=False),
        sa.Column("series_uid", _TEXT, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("ordinal", sa.BigInteger, nullable=False),
        sa.Column("irregular", sa.Boolean, nullable=False),
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
        sa.Column("irregular", sa.Boolean, nullable=False),
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
    _create_partial_index("instance_leaving", "instance", "leaving", "leaving IS NOT NULL")


def _make_the_rest() -> None:
    op.create_table(
        "journal_position",
        sa.Column("writer", _TEXT, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "setting",
        sa.Column("name", _TEXT, primary_key=True),
        sa.Column("value", _TEXT, nullable=False),
    )
    op.create_table(
        "publication",
        sa.Column("study_uid", _TEXT, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False, unique=True),
        sa.Column("revision", _TEXT, nullable=False),
        sa.Column("series", sa.Integer, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("published_at", sa.BigInteger, nullable=False),
    )
    _create_partial_index("publication_withdrawn", "publication", "number", "revision = ''")


def _create_partial_index(name: str, table: str, column: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, [column], sqlite_where=where, postgresql_where=where)
