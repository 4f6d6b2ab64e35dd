"""What alembic runs for every command: migrate over the connection that ``serve.store.migrate`` holds."""

from alembic import context

from serve.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
