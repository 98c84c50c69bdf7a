"""Alembic's environment: migrates the connection that it is handed, in the caller's transaction."""

from alembic import context

from dicomscp.archive.sql import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], version_table=VERSION_TABLE, transactional_ddl=True
)
context.run_migrations()
