"""The schema's history, for alembic: one file a change, never edited once it has run anywhere."""
