"""The SQL schema as the code of today reads it; ``migrations`` is how a database gets there.

Columns that a later version added to an older table have server defaults: during a rolling upgrade
processes of the version before still insert rows that lack them.
"""

from sqlalchemy import JSON, Boolean, Column, Double, Index, Integer, MetaData, String, Table, Text, false

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("model", String(128), nullable=False),
    Column("revision", String(128), nullable=False),
    Column("precision", String(8)),
    Column("status", String(16), nullable=False),
    Column("request", JSON, nullable=False),
    Column("inputs", JSON, nullable=False),
    Column("priority", String(16), nullable=False),
    Column("stage", String(16)),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("expires_at", Double),
    Column("attempt", Integer, nullable=False),
    Column("gang_deaths", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("results", JSON, nullable=False),
    Column("seconds", JSON, nullable=False),
    Column("fingerprint", String(64)),
    Column("idempotency_key", String(255)),
    # Who runs the attempt, and until when without renewing: the dispatcher's alone, not part of Job.
    Column("owner", String(128)),
    Column("lease_until", Double),
    Column("cost", Double, nullable=False, server_default="0"),
    Column("checkpoint_key", String(255)),
    Column("checkpoint_step", Integer),
    Column("steps_run", Integer, nullable=False, server_default="0"),
    Column("furthest_step", Integer, nullable=False, server_default="0"),
    Column("webhook_url", Text),
    Column("preview_every", Integer, nullable=False, server_default="0"),
    Column("preview_key", String(255)),
    Column("preview_step", Integer),
    Column("traceparent", String(64)),
    Column("is_retry", Boolean, nullable=False, server_default=false()),
    # The files that its dead attempts left behind are gone: the sweeper's alone, not part of Job.
    Column("is_swept", Boolean, nullable=False, default=False, server_default=false()),
    Index("jobs_by_tenant", "tenant", "id"),
    Index("jobs_by_fingerprint", "tenant", "fingerprint"),
    Index("jobs_by_idempotency_key", "tenant", "idempotency_key", unique=True),
    Index("jobs_by_status", "status", "created_at"),
    Index("jobs_by_queue", "status", "tenant", "model", "priority", "created_at"),
    Index("jobs_by_expiry", "expires_at"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("weight", Double, nullable=False),
    # Quotas: NULL is no limit.
    Column("requests_per_minute", Integer),
    Column("max_queued", Integer),
    Column("max_running", Integer),
    Column("cost_per_day", Double),
    Column("max_tokens", Integer),
    Column("webhook_secret", String(128), nullable=False),
    Column("virtual_time", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    # A name that was erased makes no jobs until somebody sets it up again.
    Column("erased_at", Double),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("label", String(255), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    Index("keys_by_digest", "digest", unique=True),
    Index("keys_by_tenant", "tenant"),
)

usage = Table(
    "usage",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("requests", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("cost", Double, nullable=False),
    Column("video_seconds", Double, nullable=False),
)

request_counts = Table(
    "request_counts",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("minute", Integer, primary_key=True, autoincrement=False),
    Column("requests", Integer, nullable=False),
)

step_seconds = Table(
    "step_seconds",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("num_tokens", Integer, primary_key=True, autoincrement=False),
    Column("uses_guidance", Boolean, primary_key=True),
    Column("seconds", Double, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("url", Text, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", Double, nullable=False),
    Column("state", String(16), nullable=False),
    Column("ended_at", Double),
    Column("last_error", Text),
    Index("deliveries_by_due", "state", "next_at"),
    Index("deliveries_by_tenant", "tenant"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Double, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("action", String(64), nullable=False),
    Column("tenant", String(128)),
    Column("detail", JSON, nullable=False),
)

identity = Table("identity", metadata, Column("id", String(64), primary_key=True))
"""One row that names this database for ever, so that nobody sweeps the artifacts of another."""
