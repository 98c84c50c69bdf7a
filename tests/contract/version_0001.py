"""The index of revision 0001, as the program of then has it: its tables, and how it writes and reads.

Frozen: nothing here follows what the program does now.  Revision 0001 is what a file of SQLite of version 2
has, which was made before there were migrations.
"""

import re

from sqlalchemy import text

_TABLES = """
CREATE TABLE journal_position (writer TEXT NOT NULL, number BIGINT NOT NULL, "offset" BIGINT NOT NULL,
    PRIMARY KEY (writer));
CREATE TABLE publication (study_uid TEXT NOT NULL, number BIGINT NOT NULL, revision TEXT NOT NULL,
    series INTEGER NOT NULL, instances INTEGER NOT NULL, published_at BIGINT NOT NULL,
    PRIMARY KEY (study_uid), UNIQUE (number));
CREATE INDEX publication_withdrawn ON publication (number) WHERE revision = '';
CREATE TABLE setting (name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (name));
CREATE TABLE study (id SERIAL NOT NULL, study_uid TEXT NOT NULL, instances INTEGER NOT NULL,
    series INTEGER NOT NULL, variants INTEGER NOT NULL, bytes BIGINT NOT NULL, changes BIGINT NOT NULL,
    published BIGINT NOT NULL, recency BIGINT NOT NULL, irregular BOOLEAN NOT NULL, patient_key TEXT NOT NULL,
    patient_id TEXT, patient_name TEXT, patient_birth_date TEXT, accession_number TEXT, study_date TEXT,
    study_time TEXT, study_id TEXT, study_description TEXT, referring_physician_name TEXT,
    modalities TEXT NOT NULL, attributes BLOB NOT NULL, PRIMARY KEY (id), UNIQUE (study_uid));
CREATE INDEX study_accession_number ON study (accession_number);
CREATE INDEX study_due ON study (study_uid) WHERE changes != published;
CREATE INDEX study_irregular ON study (irregular);
CREATE UNIQUE INDEX study_order ON study (recency, study_uid);
CREATE INDEX study_patient_id ON study (patient_id);
CREATE INDEX study_patient_key ON study (patient_key, recency, study_uid);
CREATE TABLE series (id SERIAL NOT NULL, study_id KEY NOT NULL, series_uid TEXT NOT NULL,
    instances INTEGER NOT NULL, ordinal BIGINT NOT NULL, irregular BOOLEAN NOT NULL, modality TEXT,
    series_description TEXT, performed_procedure_step_start_date TEXT, attributes BLOB NOT NULL,
    PRIMARY KEY (id), UNIQUE (study_id, series_uid), FOREIGN KEY(study_id) REFERENCES study (id));
CREATE UNIQUE INDEX series_order ON series (study_id, ordinal, series_uid);
CREATE INDEX series_uid ON series (series_uid);
CREATE TABLE statement (id SERIAL NOT NULL, series_id KEY NOT NULL, digest BLOB NOT NULL,
    instances INTEGER NOT NULL, first_ordinal BIGINT NOT NULL, first_sop_uid TEXT NOT NULL,
    attributes BLOB NOT NULL, PRIMARY KEY (id), UNIQUE (series_id, digest),
    FOREIGN KEY(series_id) REFERENCES series (id));
CREATE TABLE instance (id SERIAL NOT NULL, series_id KEY NOT NULL, statement_id KEY NOT NULL,
    sop_uid TEXT NOT NULL, digest BLOB NOT NULL, ordinal BIGINT NOT NULL, irregular BOOLEAN NOT NULL,
    published BOOLEAN NOT NULL, received_at BIGINT NOT NULL, receipts INTEGER NOT NULL, leaving BIGINT,
    size BIGINT NOT NULL, sop_class_uid TEXT NOT NULL, transfer_syntax_uid TEXT NOT NULL,
    calling_ae TEXT NOT NULL, path TEXT, attributes BLOB NOT NULL, PRIMARY KEY (id),
    UNIQUE (sop_uid, digest, series_id), FOREIGN KEY(series_id) REFERENCES series (id),
    FOREIGN KEY(statement_id) REFERENCES statement (id));
CREATE INDEX instance_leaving ON instance (leaving) WHERE leaving IS NOT NULL;
CREATE INDEX instance_order ON instance (series_id, ordinal, sop_uid);
"""
_SQLITE = {"SERIAL": "INTEGER", "KEY": "INTEGER"}
_POSTGRESQL = {"SERIAL": "BIGSERIAL", "KEY": "BIGINT", "BLOB": "BYTEA", "TEXT": 'TEXT COLLATE "C"'}
_REFERENCE = re.compile(r",\s+FOREIGN KEY\(\w+\) REFERENCES \w+ \(id\)")

UID, CLASS, SYNTAX = "1.2.3", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"


def make(connection, *, root="root"):
    """The tables, empty."""
    is_sqlite = connection.dialect.name == "sqlite"
    tables = _TABLES if is_sqlite else _REFERENCE.sub("", _TABLES)
    for word, written in (_SQLITE if is_sqlite else _POSTGRESQL).items():
        tables = re.sub(rf"(?<!PRIMARY )(?<!FOREIGN )\b{word}\b", written, tables)
    for statement in tables.strip().split(";\n"):
        connection.exec_driver_sql(statement.rstrip(";"))
    if is_sqlite:
        connection.exec_driver_sql("PRAGMA user_version = 2")
    else:
        connection.exec_driver_sql("CREATE TABLE dicomscp_revision (version_num VARCHAR(32) PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO dicomscp_revision VALUES ('0001')")
        connection.execute(
            text("INSERT INTO setting VALUES ('compatible', '0001'), ('root', :root)"), {"root": root}
        )
    connection.exec_driver_sql("INSERT INTO setting VALUES ('index', 'abc'), ('feed_from', '0')")
    connection.exec_driver_sql("INSERT INTO setting VALUES ('duplicates', 'first')")


def begin_study(connection):
    """A study with one series and no instance yet."""
    blob = {"attributes": b'{"00100020":{"vr":"LO","Value":["A"]}}', "digest": b"d" * 32}
    connection.execute(
        text(
            "INSERT INTO study (study_uid, instances, series, variants, bytes, changes, published, recency,"
            " irregular, patient_key, patient_id, modalities, attributes)"
            f" VALUES ('{UID}', 0, 0, 0, 0, 0, 0, 0, false, 'A\\\\', 'A', '\\CT\\', :attributes)"
        ),
        blob,
    )
    connection.execute(
        text(
            "INSERT INTO series (study_id, series_uid, instances, ordinal, irregular, modality, attributes)"
            f" SELECT id, '{UID}.1', 0, 1, false, 'CT', :attributes FROM study"
        ),
        {"attributes": b'{"00080060":{"vr":"CS","Value":["CT"]}}'},
    )
    connection.execute(
        text(
            "INSERT INTO statement (series_id, digest, instances, first_ordinal, first_sop_uid, attributes)"
            " SELECT id, :digest, 0, 1, '1', :attributes FROM series"
        ),
        blob,
    )


def take_in(connection, number):
    """Index an instance of that *number*, and count it."""
    connection.execute(
        text(
            "INSERT INTO instance (series_id, statement_id, sop_uid, digest, ordinal, irregular, published,"
            " received_at, receipts, size, sop_class_uid, transfer_syntax_uid, calling_ae, attributes)"
            " SELECT series_id, id, :sop_uid, :digest, :number, false, true, 5, 1, 100,"
            f" '{CLASS}', '{SYNTAX}', 'CT1', :attributes FROM statement WHERE digest = :statement"
        ),
        {
            "sop_uid": str(number),
            "digest": bytes([number]) * 32,
            "number": number,
            "attributes": b'{"00200013":{"vr":"IS","Value":[%d]}}' % number,
            "statement": b"d" * 32,
        },
    )
    connection.exec_driver_sql("UPDATE statement SET instances = instances + 1")
    connection.exec_driver_sql("UPDATE series SET instances = instances + 1")
    connection.exec_driver_sql(
        "UPDATE study SET variants = variants + 1, bytes = bytes + 100, changes = changes + 1,"
        " instances = instances + 1, series = 1"
    )


def instances(connection):
    """What it finds by its own question: SOP Instance UID, patient's ID, modality and number of each."""
    rows = connection.exec_driver_sql(
        "SELECT instance.sop_uid, study.patient_id, study.modalities, instance.ordinal, study.attributes,"
        " series.attributes, instance.attributes, instance.path, instance.receipts, instance.leaving"
        " FROM instance JOIN series ON series.id = instance.series_id"
        " JOIN study ON study.id = series.study_id WHERE instance.published ORDER BY study.recency,"
        " study.study_uid, series.ordinal, series.series_uid, instance.ordinal, instance.sop_uid"
    )
    return [tuple(row[:4]) for row in rows if b"00100020" in bytes(row[4]) and b"00200013" in bytes(row[6])]
