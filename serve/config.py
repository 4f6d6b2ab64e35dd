"""What an operator sets: one validated value for the whole application.

It is what ``args`` of the Serve config file holds, what ``configs/serve/*.yaml`` hold, and what
``python -m serve`` builds from a file and a few overrides. Unknown keys are refused.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pusa_dist.config import ModelConfig, ParallelConfig, load_model_config
from pusa_dist.errors import ConfigError
from serve.logs import LogFormat
from serve.watched import STUCK_AFTER_S

HOLD_S = 1.0
"""Between two renewals of what a dispatcher has put on a gang."""
ANSWER_S = 3.0
"""A gang that has not answered a renewal within this has missed it."""
MAX_MISSED = 2
"""A gang that has missed so many renewals in a row is given up."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_STREAMS = 800
"""Event streams of a gateway, of all tenants; each is a request that goes on until its job ends."""


class Settings(BaseModel):
    """Base of every part: frozen, and closed against misspelt keys; ``python -m serve config`` prints docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RoleConfig(Settings):
    """Where a role runs and how many replicas of it there are."""

    num_replicas: int = Field(1, ge=1)
    """Replicas; with max_replicas, the least of them."""
    max_replicas: int | None = Field(None, ge=1)
    """Above num_replicas: the role autoscales between the two (``cluster.autoscaling``)."""
    num_cpus: float = Field(0.1, ge=0)
    """CPU cores that Ray sets aside for each replica; for each rank of a denoiser."""
    num_gpus: float = Field(0, ge=0)
    """GPUs for each replica, or each rank of a denoiser; 0: it computes on the CPU."""
    resources: dict[str, float] = {}
    """Custom Ray resources a node must offer."""
    label_selector: dict[str, str] = {}
    """Ray node labels a node must carry, such as ``{role: vae}``."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below num_replicas={self.num_replicas}")
        if self.max_replicas is None and self.num_replicas == 0:
            raise ValueError("num_replicas=0 needs max_replicas: a role without replicas has to autoscale")
        return self

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where this role computes: it has a GPU exactly if it asks for one."""
        return "cuda" if self.num_gpus else "cpu"


class StageConfig(RoleConfig):
    """A role that may go while there is nothing to do."""

    num_replicas: int = Field(1, ge=0)
    """0: scales to zero, with ``max_replicas`` and an ``autoscaling_policy`` of the application."""


class WorkConfig(StageConfig):
    """A stage beside the gangs."""

    stuck_after_s: float = Field(STUCK_AFTER_S, gt=0)
    """Work that does not move on for this long (a prompt, four frames, a file) hangs, and its replica is replaced;
    the first of a process is given three times as long."""


class DenoiserConfig(StageConfig):
    """One replica is a gang of ``cfg * ring * ulysses`` ranks; num_cpus, num_gpus are per rank."""

    cfg_degree: int = Field(1, ge=1)
    """Ranks for the two guidance branches: 1 or 2."""
    ring_degree: int = Field(1, ge=1)
    """Ranks that pass keys and values round a ring."""
    ulysses_degree: int = Field(2, ge=1)
    """Ranks that share the attention heads; it must divide their number."""
    attention: Literal["ours", "xfuser"] = "ours"
    """Implementation of the attention over several ranks; xfuser needs CUDA and the extra ``cuda``."""
    threads_per_rank: int | None = Field(1, ge=1)
    """CPU threads of a rank; None leaves it to torch."""
    spread: bool = False
    """Put the ranks on several nodes (multi-host gangs) instead of all on one."""
    ranks_per_node: int = Field(1, ge=1)
    """Neighbouring ranks that share a node when they are spread: the ulysses axis first, then ring, then cfg."""
    max_resident: int = Field(2, ge=1)
    """Jobs a gang holds at once."""
    step_deadline_floor_s: float = Field(10.0, gt=0)
    """A step is hung after ``max(floor, 5 x predicted)`` seconds."""
    first_step_allowance_s: float = Field(20.0, ge=0)
    """Added to the deadline of a job shape's first step (compilation, allocation)."""
    ping_timeout_s: float = Field(8.0, gt=0)
    """A rank that does not answer within this is dead, idle or busy."""
    checkpoint_every: int = Field(10, ge=1)
    """Steps that a job runs at most beyond its last published checkpoint: what a fault may cost it."""
    resident_lease_s: float = Field(8.0, gt=0)
    """A job whose dispatcher was silent this long is dropped; as long as a dispatcher takes to give a gang up."""
    shared_forward_max_tokens: int = Field(0, ge=0)
    """Jobs of one shape share forwards of up to this many tokens in all; 0: never. Small shapes gain by it,
    and end within rounding of what they would be alone."""
    handover_timeout_s: float = Field(120.0, gt=0)
    """Longest time a gang that is replaced or scaled down is given to finish its step and hand over its jobs."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Rendezvous and loading of weights."""

    @model_validator(mode="after")
    def _nodes_are_whole(self) -> Self:
        world_size = self.parallel.world_size
        if self.ranks_per_node > 1 and (not self.spread or world_size % self.ranks_per_node):
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} needs spread: true and must divide the {world_size} ranks"
            )
        return self

    @model_validator(mode="after")
    def _renewals_keep_the_lease(self) -> Self:
        least_s = MAX_MISSED * (HOLD_S + ANSWER_S)
        if self.resident_lease_s < least_s:
            raise ValueError(
                f"resident_lease_s={self.resident_lease_s:g} would run out between two renewals of a dispatcher that "
                f"has missed no more of them than it may; set {least_s:g} or more"
            )
        return self

    def bundle_of(self, rank: int) -> int:
        """Index of the placement group's bundle that a rank is in: with its neighbours on a node, or of its own."""
        return rank // self.ranks_per_node

    @property
    def parallel(self) -> ParallelConfig:
        """The gang's mesh."""
        return ParallelConfig(
            cfg_degree=self.cfg_degree, ring_degree=self.ring_degree, ulysses_degree=self.ulysses_degree
        )


class UploadLimits(Settings):
    """What the gateway accepts before anything is stored."""

    max_body_bytes: int = Field(64 * 2**20, ge=1)
    """Largest body of a request; media that are fetched for it count, too."""
    max_inputs: int = Field(32, ge=1)
    """Images and clips of a request."""
    decoders: int = Field(2, ge=1)
    """Files that a gateway decodes at the same time, in processes of their own."""
    decode_timeout_s: float = Field(30.0, gt=0)
    """Longest time to decode one file, in seconds of waiting and of processor time."""
    decode_memory_mib: int = Field(1536, ge=512)
    """Address space of a decoder in MiB, of which its libraries take about 400."""
    media_by_url: bool = False
    """Fetch media that are given as https URLs of public addresses."""
    media_by_url_timeout_s: float = Field(20.0, gt=0)
    """Longest time to fetch all the URLs of a request together."""


class ServeConfig(Settings):
    """The application."""

    model: str = "tiny"
    """Name of a shipped model, or a path to its YAML."""
    weights_root: str | None = None
    """Overrides ``weights.root`` of the model."""
    state_dir: str = "state"
    """Folder of the default database and artifacts (one node only)."""
    database_url: str | None = None
    """SQLAlchemy URL; default SQLite under state_dir."""
    artifacts_url: str | None = None
    """fsspec URL; default a folder under state_dir."""
    require_keys: bool = False
    """Ask every request for an API key (``python -m serve keys``). False: all requests are those of the tenant
    ``local``, and the service listens on loopback only."""
    moderation: str | None = None
    """``package.module:function`` that is asked before a job is accepted and before a result is published."""
    moderation_timeout_s: float = Field(30.0, gt=0)
    """It has to answer within this; what it has not judged by then does not pass."""
    max_event_streams: int = Field(50, ge=1)
    """Event streams of a tenant that a gateway keeps open at once."""
    job_deadline_s: float = Field(3600.0, gt=0)
    """A job not finished this long after it was created is failed. Services that share a database need the same:
    each ends overdue jobs of any model, so that those of one that is served no more do not wait for ever."""
    result_ttl_s: float = Field(7 * 86400.0, gt=0)
    """How long results are promised to be kept (``expires_at``)."""
    leftovers_age_s: float = Field(600.0, gt=0)
    """Files of dead attempts are removed this long after their job has ended; a stale attempt may write until then."""
    poll_after_ms: int = Field(500, ge=50)
    """What clients are told to wait between polls."""
    logs: LogFormat = "text"
    """Lines for people, or one JSON object each with role, job, tenant, gang and rank."""
    otlp_endpoint: str | None = None
    """Collector of traces by OTLP over HTTP, such as ``http://collector:4318``; by default what the environment
    variable OTEL_EXPORTER_OTLP_ENDPOINT says, and none without it."""
    uploads: UploadLimits = UploadLimits()
    """What the gateway accepts before anything is stored."""
    gateway: RoleConfig = RoleConfig()
    """The HTTP interface."""
    dispatcher: RoleConfig = RoleConfig()
    """Who drives the jobs; there is exactly one."""
    text_encoder: WorkConfig = WorkConfig()
    """Prompts to embeddings."""
    vae: WorkConfig = WorkConfig()
    """Given pictures to latents, and latents to the files of a result."""
    denoiser: DenoiserConfig = DenoiserConfig()
    """The gangs: a replica is ``cfg * ring * ulysses`` ranks, and num_cpus and num_gpus are those of each rank."""

    @property
    def resolved_database_url(self) -> str:
        """Where jobs are kept."""
        return self.database_url or f"sqlite:///{Path(self.state_dir).absolute() / 'jobs.sqlite'}"

    @property
    def resolved_artifacts_url(self) -> str:
        """Where inputs and results are kept."""
        return self.artifacts_url or f"file://{Path(self.state_dir).absolute() / 'artifacts'}"

    def load_model(self) -> ModelConfig:
        """The model's configuration, checked against the gang's degrees."""
        model = load_model_config(self.model, self.weights_root)
        self.denoiser.parallel.check(model)
        if self.dispatcher.num_replicas != 1 or self.dispatcher.max_replicas is not None:
            raise ConfigError("dispatcher: exactly one replica per cluster; set num_replicas to 1 and no max_replicas")
        return model


def require_shared_stores(config: ServeConfig, num_nodes: int) -> None:
    """Refuse stores that only one node can see when there are several nodes.

    Raises:
        ConfigError: SQLite or a local artifact folder on a cluster of more than one node.
    """
    if num_nodes <= 1:
        return
    if config.resolved_database_url.startswith("sqlite"):
        raise ConfigError(
            f"database_url={config.resolved_database_url} is SQLite, but the cluster has {num_nodes} nodes; "
            "set database_url to a server all of them reach, such as postgresql+psycopg://user@host/name"
        )
    if config.resolved_artifacts_url.startswith("file:"):
        raise ConfigError(
            f"artifacts_url={config.resolved_artifacts_url} is a local folder, but the cluster has {num_nodes} "
            "nodes; set artifacts_url to a bucket, such as s3://bucket/prefix"
        )


def require_loopback(config: ServeConfig, host: str | None) -> None:
    """Refuse to serve the network when nobody needs a key.

    Args:
        config: of the application.
        host: where Ray Serve listens; None: nowhere.

    Raises:
        ConfigError: it can be reached from the network and asks for no keys.
    """
    if not config.require_keys and host is not None and host not in _LOOPBACK:
        raise ConfigError(
            f"http host {host} is reachable from the network, but no keys are asked for; set require_keys: true "
            "(--require-keys) and make keys with 'python -m serve keys create', or serve on 127.0.0.1"
        )
