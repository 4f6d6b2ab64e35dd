"""A node is told to go, another is cut down: gangs live on nodes of their own, and their jobs go on elsewhere."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster

from cluster.local_service import free_port
from cluster.processes import descendants
from serve.app import build_app
from serve.config import DenoiserConfig, ServeConfig
from serve.store.jobs import JobStore
from tests.e2e.client import completed, create, frames_of, until
from tests.e2e.local_app import QUIET
from tests.e2e.shared_stores import WARNINGS_OF_THE_STORES, own_bucket
from tests.ray_cluster import ENVIRONMENT, replica_processes
from tests.serve.postgres import own_postgres

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), *WARNINGS_OF_THE_STORES]

logger = logging.getLogger(__name__)

K, STEPS = 8, 50
# So large that it still runs when the node that is told to go has found its cluster, which takes it seconds.
REQUEST = {"size": "352x240", "num_inference_steps": STEPS, "num_frames": 49, "seed": 7}
ROOT = Path(__file__).parents[2]


@contextmanager
def head():
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=tempfile.mkdtemp(prefix="ray-"), PYTHONPATH=str(ROOT))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False, "labels": {"role": "rest"}}
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)


@contextmanager
def gang_node(cluster):
    """``python -m serve node`` with room for one gang."""
    command = [sys.executable, "-m", "serve", "node", "--notice", "20", "--"]
    command += [f"--address={cluster.address}", "--num-cpus=2", "--labels=role=denoiser"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def stores():
    with own_postgres() as database_url, own_bucket() as bucket:
        yield database_url, bucket


@pytest.fixture(scope="module")
def cluster(stores):
    with head() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def job_of(stores):
    store = JobStore(stores[0])
    yield lambda job_id: store.get("local", job_id)
    store.close()


def test_a_node_that_is_told_to_go_hands_over_its_jobs_first(cluster, stores, job_of, tmp_path):
    rest = {role: {"label_selector": {"role": "rest"}} for role in ("gateway", "dispatcher", "text_encoder", "vae")}
    config = ServeConfig(
        model="debug", state_dir=str(tmp_path), database_url=stores[0], artifacts_url=stores[1], **rest,
        denoiser=DenoiserConfig(checkpoint_every=K, num_cpus=1, label_selector={"role": "denoiser"}),
    )  # fmt: skip
    port = free_port()
    with ExitStack() as stack:
        going = stack.enter_context(gang_node(cluster))
        cluster_has(2)
        ray_serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET
        )
        stack.callback(ray_serve.shutdown)
        ray_serve.run(build_app(config), name="pusa", logging_config=QUIET)
        client = stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, follow_redirects=True)
        )
        undisturbed = frames_of(client, completed(client, create(client, **REQUEST), 240)["id"])

        # The gang is on the first node already; this one has room for it.
        staying = stack.enter_context(gang_node(cluster))
        cluster_has(3)
        job_id = create(client, **REQUEST)
        until(client, job_id, lambda video: video["pusa"]["step"] >= 11, 120)
        before = set(replica_processes()["Rank"])
        began = time.monotonic()
        going.send_signal(signal.SIGTERM)
        going.wait(60)
        said = going.stdout.read()
        logger.info("the node was gone after %.1f s: %s", time.monotonic() - began, said[-300:])
        assert "jobs handed over: 1\n" in said
        assert staying.poll() is None
        completed(client, job_id, 240)
        job = job_of(job_id)
        assert (job.steps_run, job.gang_deaths) == (STEPS, 0)
        assert frames_of(client, job_id) == undisturbed
        assert not before & set(replica_processes()["Rank"])

        # One that is cut down says nothing: at most k steps are made again.
        job_id = create(client, **REQUEST)
        until(client, job_id, lambda video: video["pusa"]["step"] >= 11, 120)
        stack.enter_context(gang_node(cluster))
        began = time.monotonic()
        cut_down(staying)
        until(client, job_id, lambda video: video["pusa"]["attempt"] == 2 and video["pusa"]["step"] >= 1, 120)
        logger.info("the job of a node that was cut down went on after %.1f s", time.monotonic() - began)
        completed(client, job_id, 240)
        assert STEPS <= job_of(job_id).steps_run <= STEPS + K
        assert frames_of(client, job_id) == undisturbed


def cluster_has(num_nodes, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while sum(node["Alive"] for node in ray.nodes()) != num_nodes:
        assert time.monotonic() < deadline, ray.nodes()
        time.sleep(0.2)


def cut_down(process):
    """Kill every process below one, at once."""
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
