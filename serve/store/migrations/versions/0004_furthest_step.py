"""How far any attempt at a job has come, so that a step is charged once."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; jobs from before have come at most as far as steps of them ran."""
    op.add_column("jobs", sa.Column("furthest_step", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET furthest_step = CASE WHEN steps_run < num_steps THEN steps_run ELSE num_steps END")
