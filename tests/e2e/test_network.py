"""Nodes with addresses of their own: one is lost, one is cut off for a while, one for so long that Ray gives it up.

The head with every other role, and two gangs, are each on a host of ``tests.e2e.network``; database and
bucket are on the bridge. The test itself is on the head's host.
"""

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import boto3
import httpx
import pytest
import ray
from ray import serve as ray_serve

from serve.app import build_app
from serve.config import DenoiserConfig, ServeConfig
from serve.gang_replica import NAMESPACE
from serve.store.jobs import JobStore
from tests.e2e.client import completed, create, frames_of, until
from tests.e2e.local_app import QUIET
from tests.e2e.network import network
from tests.e2e.shared_stores import WARNINGS_OF_THE_STORES, own_bucket
from tests.ray_cluster import ENVIRONMENT
from tests.serve.postgres import own_postgres

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), *WARNINGS_OF_THE_STORES]

logger = logging.getLogger(__name__)

K, STEPS = 4, 50
REQUEST = {"num_inference_steps": STEPS, "num_frames": 49, "seed": 7}
ROOT = Path(__file__).parents[2]
PORT = 8000
HEAD = {"RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "4"}
"""As recommended: a node that is cut off is given up after half a minute instead of a whole one."""


class Service:
    """The whole service on three hosts, and what a test asks of it."""

    def __init__(self, stack, folder):
        self._folder, self._nodes = folder, []
        address, (self.head, *workers) = stack.enter_context(network("head", "left", "right"))
        self.workers = {host.address: host for host in workers}
        database_url = stack.enter_context(own_postgres(address))
        bucket = stack.enter_context(own_bucket(address))
        stack.callback(self._end_nodes)
        self._start_ray(
            self.head, "--head", "--port=6379", "--num-cpus=4", "--labels=role=rest", "--include-dashboard=0"
        )
        for host in workers:
            self.add_node(host)

        stack.enter_context(self.head.entered())
        eventually(self._is_up, 120, "the head did not start")
        ray.init(address=f"{self.head.address}:6379", log_to_driver=False)
        stack.callback(ray.shutdown)
        eventually(lambda: num_alive() == 3, 120, "the nodes did not join")
        self._store = JobStore(database_url)
        stack.callback(self._store.close)
        rest = {role: {"label_selector": {"role": "rest"}} for role in ("gateway", "dispatcher", "text_encoder", "vae")}
        gangs = DenoiserConfig(num_replicas=2, checkpoint_every=K, num_cpus=1, label_selector={"role": "denoiser"})
        config = ServeConfig(
            model="debug",
            state_dir=str(folder / "state"),
            database_url=database_url,
            artifacts_url=bucket,
            denoiser=gangs,
            **rest,
        )
        ray_serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT}, logging_config=QUIET
        )
        stack.callback(ray_serve.shutdown)
        ray_serve.run(build_app(config), name="pusa", logging_config=QUIET)
        self.client = stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60, follow_redirects=True)
        )

    def add_node(self, host):
        """Start a node with room for one gang."""
        self._start_ray(host, f"--address={self.head.address}:6379", "--num-cpus=2", "--labels=role=denoiser")

    def _start_ray(self, host, *arguments):
        folder = self._folder / str(len(self._nodes))
        folder.mkdir()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host.address}"]
        command += [f"--temp-dir={folder}", "--object-store-memory=150000000", *arguments]
        with host.entered(), (folder / "output").open("w") as output:
            self._nodes.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))

    def _end_nodes(self):
        for host in (*self.workers.values(), self.head):
            host.kill()
        for process in self._nodes:
            process.wait(10)

    def _is_up(self):
        assert self._nodes[0].poll() is None, (self._folder / "0/output").read_text()[-2000:]
        with socket.socket() as probe:
            return probe.connect_ex((self.head.address, 6379)) == 0

    def job(self, job_id):
        return self._store.get("local", job_id)

    def files_of(self, job_id):
        """Keys of all that the bucket has of a job."""
        listed = boto3.client("s3").list_objects_v2(Bucket="videos", Prefix=f"test/jobs/{job_id}/")
        return [one["Key"] for one in listed["Contents"]]

    def log(self, job_id):
        """What the processes of all nodes have logged of a job."""
        logs = (file.read_text(errors="replace") for file in self._folder.glob("*/session_*/logs/worker-*.err"))
        return "\n".join(line for log in logs for line in log.splitlines() if job_id in line)

    def is_ready(self):
        return self.client.get("/health").json().get("status") == "ready"


def eventually(condition, timeout_s, message):
    """Wait until it holds; returns after how many seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, message
        time.sleep(0.1)
    return time.monotonic() - began


def num_alive():
    return sum(node["Alive"] for node in ray.nodes())


def gangs():
    """The jobs on every gang that answers, by the address of its node."""
    found = {}
    for one in ray.util.list_named_actors(all_namespaces=True):
        if one["namespace"] != NAMESPACE:
            continue
        try:
            seen = ray.get_actor(one["name"], NAMESPACE).__ray_call__.remote(
                lambda gang: (ray.util.get_node_ip_address(), {job.job_id for job in gang._residents})
            )
            address, jobs = ray.get(seen, timeout=5)
        except (ray.exceptions.RayError, ValueError):
            continue
        found[address] = jobs
    return found


@pytest.fixture(scope="module")
def service():
    os.environ.update(ENVIRONMENT, **HEAD, PYTHONPATH=str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: sockets are in it
    try:
        with ExitStack() as stack:
            yield Service(stack, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(service):
    return frames_of(service.client, completed(service.client, create(service.client, **REQUEST), 240)["id"])


def denoising(service):
    """A job that is at step 12 or later, and the host whose gang has it."""
    job_id = create(service.client, **REQUEST)
    until(service.client, job_id, lambda video: video["pusa"]["step"] >= 12, 120)
    (address,) = [address for address, jobs in gangs().items() if job_id in jobs]
    return job_id, service.workers[address]


def goes_on(service, job_id, began):
    """Wait until another attempt has made a step; returns the seconds since then."""
    begun = until(service.client, job_id, lambda video: video["pusa"]["attempt"] == 2, 120)
    until(service.client, job_id, lambda video: video["pusa"]["step"] > begun["pusa"]["step"], 120)
    return time.monotonic() - began


def completed_once(service, job_id, undisturbed):
    """Wait for the job's end, and see that its second attempt alone has made the result; returns the job."""
    completed(service.client, job_id, 240)
    job = service.job(job_id)
    assert job.attempt == 2, service.log(job_id)
    assert STEPS <= job.steps_run <= STEPS + K
    assert all(f"jobs/{job_id}/attempts/2/" in file.key for file in job.results.values())
    assert frames_of(service.client, job_id) == undisturbed
    return job


def is_whole_again(service, timeout_s=120):
    """Wait until both gangs are there, and see that both work; returns the seconds until they were."""
    seconds = eventually(lambda: service.is_ready() and set(gangs()) == set(service.workers), timeout_s,
                         "the gangs did not come back")  # fmt: skip
    further = [create(service.client, **{**REQUEST, "seed": seed}) for seed in (8, 9)]
    eventually(lambda: all(gangs().values()), 60, "two jobs did not take both gangs")
    for job_id in further:
        assert completed(service.client, job_id, 240)["pusa"]["attempt"] == 1
    return seconds


def nothing_is_left(service, job, undisturbed):
    """Of an attempt that came to nothing, on the gangs, in the cluster or in the bucket."""
    assert service.job(job.id) == job
    assert frames_of(service.client, job.id) == undisturbed
    assert gangs() == {address: set() for address in service.workers}
    groups = ray.util.placement_group_table().values()
    assert [one["state"] for one in groups if one["state"] != "REMOVED"] == ["CREATED"] * 2
    eventually(
        lambda: all("/attempts/2/" in key for key in service.files_of(job.id)), 60, "files of a stale attempt are left"
    )


def test_the_job_of_a_node_that_is_lost_goes_on_on_another(service, undisturbed):
    job_id, lost = denoising(service)
    began = time.monotonic()
    lost.kill()
    logger.info("node lost: the job ran again after %.1f s", goes_on(service, job_id, began))
    job = completed_once(service, job_id, undisturbed)
    service.add_node(lost)
    logger.info("a new node: whole again after %.1f s", is_whole_again(service))
    nothing_is_left(service, job, undisturbed)


def test_a_node_that_is_cut_off_for_a_while_publishes_nothing_and_is_used_again(service, undisturbed):
    job_id, away = denoising(service)
    began = time.monotonic()
    away.cut()
    logger.info("cut off: the job ran again after %.1f s", goes_on(service, job_id, began))
    assert f"job {job_id}: attempt 1 dropped: its owner was silent" in service.log(job_id)
    away.mend()
    job = completed_once(service, job_id, undisturbed)
    logger.info("whole again after another %.1f s", is_whole_again(service))
    nothing_is_left(service, job, undisturbed)


def test_a_node_that_was_given_up_while_it_was_cut_off_ends_and_another_takes_its_place(service, undisturbed):
    job_id, away = denoising(service)
    began = time.monotonic()
    away.cut()
    logger.info("cut off: the job ran again after %.1f s", goes_on(service, job_id, began))
    assert f"job {job_id}: attempt 1 dropped: its owner was silent" in service.log(job_id)
    job = completed_once(service, job_id, undisturbed)
    eventually(lambda: num_alive() == 2, 60, "Ray did not give the node up")
    logger.info("Ray gave the node up after %.1f s", time.monotonic() - began)
    away.mend()
    seconds = eventually(lambda: not away.processes(), 90, "what was given up does not end")
    logger.info("its processes had ended %.1f s after it was there again", seconds)
    service.add_node(away)
    logger.info("a new node: whole again after %.1f s", is_whole_again(service))
    nothing_is_left(service, job, undisturbed)
