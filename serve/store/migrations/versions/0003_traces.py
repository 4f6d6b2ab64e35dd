"""Where a job's trace goes on, whichever process takes it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; jobs from before have no trace."""
    op.add_column("jobs", sa.Column("traceparent", sa.String(64)))
