"""One Ray node per role on this machine, each with a folder of its own; PostgreSQL and an S3 bucket between them.

It proves placement, that bytes move by reference or through the artifact store, and who opens the
database. It does not prove networking: the nodes share this machine's loopback.
"""

import io
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import av
import httpx
import pytest
import ray
from PIL import Image
from ray import serve as ray_serve
from ray.cluster_utils import Cluster

from cluster.local_service import free_port
from pusa_dist.errors import ConfigError
from serve.app import build_app
from serve.config import ServeConfig
from tests.e2e.client import completed
from tests.e2e.local_app import QUIET
from tests.e2e.shared_stores import WARNINGS_OF_THE_STORES, own_bucket
from tests.ray_cluster import ENVIRONMENT, replica_processes
from tests.serve.postgres import own_postgres

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), *WARNINGS_OF_THE_STORES]

ROLES = ("gateway", "dispatcher", "text_encoder", "vae", "denoiser")
DEPLOYMENTS = dict(zip(("Gateway", "Dispatcher", "TextEncoder", "Vae", "Denoiser"), ROLES, strict=True))
PLACES = {**DEPLOYMENTS, "Coordinator": "denoiser", "Rank": "denoiser"}


@pytest.fixture(scope="module")
def database_url():
    with own_postgres() as url:
        yield url


@pytest.fixture(scope="module")
def bucket():
    with own_bucket() as url:
        yield url


@contextmanager
def nodes(folder):
    """A head without a role and one node per role, each with its own temporary folder."""
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=tempfile.mkdtemp(prefix="ray-"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for role in ROLES:
            (folder / role).mkdir()
            cluster.add_node(num_cpus=2, labels={"role": role}, env_vars={"TMPDIR": str(folder / role)}, wait=False)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)


@pytest.fixture(scope="module")
def several_nodes(tmp_path_factory, bucket, database_url):
    folder = tmp_path_factory.mktemp("nodes")
    with nodes(folder):
        yield folder


@pytest.fixture(scope="module")
def client(several_nodes, bucket, database_url):
    roles = {role: {"label_selector": {"role": role}} for role in ROLES}
    config = ServeConfig(
        model="debug", state_dir=str(several_nodes / "state"), database_url=database_url, artifacts_url=bucket, **roles
    )
    port = free_port()
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)
    ray_serve.run(build_app(config), name="pusa", logging_config=QUIET)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, follow_redirects=True) as http:
        yield http
    ray_serve.shutdown()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "database_url=.*6 nodes; set database_url to"),
        ({"database_url": "postgresql+psycopg://somewhere/db"}, "artifacts_url=.*6 nodes; set artifacts_url to"),
    ],
    ids=["sqlite", "local artifacts"],
)
def test_stores_that_only_one_node_sees_are_a_start_up_error(several_nodes, settings, what):
    with pytest.raises(ConfigError, match=what):
        build_app(ServeConfig(model="debug", state_dir=str(several_nodes / "state"), **settings))


def test_a_job_crosses_five_nodes_and_only_two_roles_open_the_database(client, several_nodes):
    picture = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(picture, "PNG")
    response = client.post(
        "/v1/videos", data={"prompt": "a boat"}, files={"input_reference": ("a.png", picture.getvalue(), "image/png")}
    )
    response.raise_for_status()
    video = completed(client, response.json()["id"], 120)
    content = client.get(f"/v1/videos/{video['id']}/content").raise_for_status().content
    with av.open(io.BytesIO(content)) as file:
        assert len(list(file.decode(video=0))) == 17

    processes = replica_processes()
    assert set(processes) == set(PLACES)
    assert len(processes["Rank"]) == 2
    places = {name: {environment(pid)["TMPDIR"] for pid in pids} for name, pids in processes.items()}
    expected = {name: {str(several_nodes / role)} for name, role in PLACES.items()}
    assert places == expected
    with_database = {name for name, pids in processes.items() if any(has_opened_postgres(pid) for pid in pids)}
    assert with_database == {"Gateway", "Dispatcher"}
    # Nothing was left in a node's folder, and nobody used a common one.
    assert not (several_nodes / "state").exists()
    assert not [path for role in ROLES for path in (several_nodes / role).rglob("*.mp4")]


def environment(pid):
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode().split("=", 1) for entry in entries if b"=" in entry)


def has_opened_postgres(pid):
    return "psycopg" in Path(f"/proc/{pid}/maps").read_text()
