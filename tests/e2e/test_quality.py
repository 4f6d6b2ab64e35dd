"""The shipped small model through the whole service: a few pairs of each task, far below what ``make quality`` asks.

Everything is seeded and a CPU repeats itself; the margins are for other processors, whose last bits differ.
"""

import socket

import httpx
import pytest
from ray import serve as ray_serve

from cluster.quality.intervals import mean
from cluster.quality.run import answers
from cluster.quality.tasks import held_out_pairs, questions
from serve.app import build_app
from serve.config import DenoiserConfig, ServeConfig
from tests.ray_cluster import local_ray

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PAIRS = held_out_pairs(6, 60_000)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("quality")
    denoiser = DenoiserConfig(num_replicas=2, ulysses_degree=1)
    config = ServeConfig(model="tiny", state_dir=str(folder), poll_after_ms=100, denoiser=denoiser)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    asked = [(task, pair) for task, pair in questions(PAIRS, PAIRS) if task.name != "text-50"]
    with local_ray():
        ray_serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet
        )
        ray_serve.run(build_app(config), name="pusa", logging_config=quiet)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            found, _ = answers(http, asked, in_flight=6)
        yield found
        ray_serve.shutdown()


def test_unseen_clips_come_back_through_the_vae(outcomes):
    assert mean([one["psnr"] for one in outcomes["reconstruction"]]).value > 28


def test_a_given_frame_comes_back_bit_equal_at_multiplier_zero(outcomes):
    stills = [one["first_frame"] for one in outcomes["still"]]
    assert stills == [one["first_frame"] for one in outcomes["image-0"]]
    assert stills != [one["first_frame"] for one in outcomes["image"]]


@pytest.mark.parametrize(
    ("task", "fact"),
    [
        ("text-10", "right"),
        ("image-0", "near"),
        ("image-0", "right"),
        ("image", "right"),
        ("start-end", "right"),
        ("extension", "right"),
    ],
)
def test_most_answers_are_right(outcomes, task, fact):
    assert sum(one[fact] for one in outcomes[task]) >= 4, outcomes[task]
