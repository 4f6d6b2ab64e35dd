"""Gangs come with a burst of jobs, and go when it is worked off: a real Ray, deployed as ``serve run`` deploys it."""

import logging
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

import configs
from serve.store.jobs import JobStore
from tests.e2e.client import completed, create
from tests.e2e.local_app import QUIET, free_port
from tests.ray_cluster import local_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)

STEPS, NUM_JOBS, MOST = 30, 8, 2
POLICY = {"objective_s": 4, "cold_start_s": 1, "hold_s": 3, "idle_s": 6, "vae_s": 0.2}


def replicas():
    """Number of gangs by state."""
    return ray_serve.status().applications["pusa"].deployments["Denoiser"].replica_states


def wait_for(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.3)


class Watch:
    """Counts running gangs until closed.

    Attributes:
        seen: numbers of them, each once in a row.
    """

    def __init__(self):
        self.seen = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self):
        while not self._ended.wait(0.3):
            running = replicas().get("RUNNING", 0)
            if not self.seen or self.seen[-1] != running:
                self.seen.append(running)

    def close(self):
        self._ended.set()
        self._thread.join()


@pytest.fixture
def state_dir(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def client(state_dir):
    text = (Path(next(iter(configs.__path__))) / "serve" / "scale-to-zero.yaml").read_text()
    config = yaml.safe_load(text)
    (application,) = config["applications"]
    application["autoscaling_policy"]["policy_kwargs"] = POLICY
    application["args"] |= {"state_dir": str(state_dir)}
    application["args"]["denoiser"] |= {"max_replicas": MOST, "checkpoint_every": 10}
    config["http_options"]["port"] = free_port()
    with local_ray():
        ray_serve.start(proxy_location="HeadOnly", http_options=config["http_options"], logging_config=QUIET)
        serving = ray_serve.context._get_global_client()
        serving.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
        with httpx.Client(base_url=f"http://127.0.0.1:{config['http_options']['port']}", timeout=60) as http:
            yield http
        ray_serve.shutdown()


def test_gangs_go_from_none_to_many_to_none_and_no_job_is_hurt(client, state_dir):
    watch = Watch()
    try:
        time.sleep(2.0)
        assert watch.seen == [0]
        began = time.monotonic()
        names = [create(client, num_inference_steps=STEPS, num_frames=33) for _ in range(NUM_JOBS)]
        for name in names:
            completed(client, name, 300)
        logger.info("%d jobs in %.1f s", NUM_JOBS, time.monotonic() - began)
        wait_for(lambda: not replicas(), 60)  # one that stops still takes jobs for a moment
        # The first after all have gone.
        completed(client, create(client, num_inference_steps=2, num_frames=5), 200)
        wait_for(lambda: watch.seen[-1] == 1, 30)  # a gang registers, and works, before Serve says that it runs
    finally:
        watch.close()
    logger.info("gangs: %s", watch.seen)
    assert max(watch.seen) == MOST
    first_fall = watch.seen.index(0, 1)
    assert watch.seen[first_fall + 1 :][:1] == [1]
    # Scaling down hands over: nothing runs twice, nothing is lost.
    store = JobStore(f"sqlite:///{state_dir / 'jobs.sqlite'}")
    jobs = [store.get("local", name) for name in names]
    store.close()
    assert [(one.status, one.steps_run, one.gang_deaths) for one in jobs] == [("completed", STEPS, 0)] * NUM_JOBS
