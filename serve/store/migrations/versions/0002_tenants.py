"""Tenants, keys, usage, checkpoints, previews, webhooks, the audit log."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns and tables; nothing of a job is lost."""
    _add_to_jobs()
    _create_tables()
    op.get_bind().execute(sa.text("INSERT INTO identity (id) VALUES (:id)"), {"id": secrets.token_hex(16)})


def _add_to_jobs() -> None:
    for column in (
        sa.Column("cost", sa.Double, nullable=False, server_default="0"),
        sa.Column("checkpoint_key", sa.String(255)),
        sa.Column("checkpoint_step", sa.Integer),
        sa.Column("steps_run", sa.Integer, nullable=False, server_default="0"),
        sa.Column("webhook_url", sa.Text),
        sa.Column("preview_every", sa.Integer, nullable=False, server_default="0"),
        sa.Column("preview_key", sa.String(255)),
        sa.Column("preview_step", sa.Integer),
        sa.Column("is_retry", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("is_swept", sa.Boolean, nullable=False, server_default=sa.false()),
    ):
        op.add_column("jobs", column)
    op.create_index("jobs_by_queue", "jobs", ["status", "tenant", "model", "priority", "created_at"])
    op.create_index("jobs_by_expiry", "jobs", ["expires_at"])


def _create_tables() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("max_queued", sa.Integer),
        sa.Column("max_running", sa.Integer),
        sa.Column("cost_per_day", sa.Double),
        sa.Column("max_tokens", sa.Integer),
        sa.Column("webhook_secret", sa.String(128), nullable=False),
        sa.Column("virtual_time", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("erased_at", sa.Double),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("label", sa.String(255), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
    )
    op.create_index("keys_by_digest", "keys", ["digest"], unique=True)
    op.create_index("keys_by_tenant", "keys", ["tenant"])
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("requests", sa.Integer, nullable=False),
        sa.Column("completed", sa.Integer, nullable=False),
        sa.Column("cost", sa.Double, nullable=False),
        sa.Column("video_seconds", sa.Double, nullable=False),
    )
    op.create_table(
        "request_counts",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("minute", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("requests", sa.Integer, nullable=False),
    )
    op.create_table(
        "step_seconds",
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("num_tokens", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("uses_guidance", sa.Boolean, primary_key=True),
        sa.Column("seconds", sa.Double, nullable=False),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Double, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.Column("last_error", sa.Text),
    )
    op.create_index("deliveries_by_due", "deliveries", ["state", "next_at"])
    op.create_index("deliveries_by_tenant", "deliveries", ["tenant"])
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(128)),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_table("identity", sa.Column("id", sa.String(64), primary_key=True))
