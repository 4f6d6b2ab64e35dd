"""Replacing, scaling down and leaving: jobs are handed over where they stand, and nothing of them runs twice."""

import asyncio
import logging
import os
import signal
import time

import pytest
import ray
from ray import serve as ray_serve

from serve.app import build_app
from serve.config import DenoiserConfig, ServeConfig
from serve.node import hand_over
from tests.e2e.client import completed, create, frames_of, until
from tests.e2e.local_app import QUIET
from tests.ray_cluster import replica_processes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

logger = logging.getLogger(__name__)

STEPS = 50
REQUEST = {"num_inference_steps": STEPS, "num_frames": 49, "seed": 7}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ServeConfig(
        model="debug", state_dir=str(tmp_path_factory.mktemp("handover")), denoiser=DenoiserConfig(checkpoint_every=20)
    )


@pytest.fixture(scope="module")
def undisturbed(client):
    return frames_of(client, completed(client, create(client, **REQUEST), 300)["id"])


def running(client):
    job_id = create(client, **REQUEST)
    until(client, job_id, lambda video: video["pusa"]["step"] >= 11, 120)
    return job_id


def assert_as_undisturbed(client, job_of, job_id, undisturbed):
    completed(client, job_id, 240)
    job = job_of(job_id)
    assert (job.steps_run, job.gang_deaths) == (STEPS, 0)
    assert frames_of(client, job_id) == undisturbed


def test_a_gang_that_is_told_to_leave_hands_over_within_a_step(client, job_of, undisturbed):
    job_id = running(client)
    before = set(replica_processes()["Rank"])
    began, step = time.monotonic(), job_of(job_id).step
    assert asyncio.run(hand_over(ray.get_runtime_context().get_node_id(), 30.0)) == 1
    handed_over = time.monotonic() - began
    job = job_of(job_id)
    # The step under way, and what was made before the store and the gang were told.
    assert step <= job.checkpoint_step == job.step <= step + 3
    logger.info("handed over at step %d after %.2f s", job.step, handed_over)
    assert handed_over < 5.0
    # What was told to leave takes no more: the next gang goes on with the job.
    for pid in replica_processes()["Denoiser"]:
        os.kill(pid, signal.SIGKILL)
    assert_as_undisturbed(client, job_of, job_id, undisturbed)
    assert not before & set(replica_processes()["Rank"])


def test_a_rolling_update_hands_over_what_runs(client, config, job_of, undisturbed):
    job_id = running(client)
    queued = create(client, num_inference_steps=2, num_frames=5)
    began = time.monotonic()
    ray_serve.run(build_app(config), name="pusa", logging_config=QUIET)
    logger.info("every replica was replaced in %.1f s", time.monotonic() - began)
    assert_as_undisturbed(client, job_of, job_id, undisturbed)
    completed(client, queued, 120)
