"""The capacity simulation: against what is known in closed form, in size, and as it is called."""

import random
from functools import partial
from pathlib import Path

import pytest

import configs
from cluster.autoscaling import Settings
from cluster.simulation.__main__ import main
from cluster.simulation.answer import fewest
from cluster.simulation.check import QUEUES, TOLERANCE, erlang_c_latency, queue_ratio
from cluster.simulation.plan import JobClass, Plan, Pool, Stages, Tenant
from cluster.simulation.pool import serve
from cluster.virtual.cluster import VirtualCluster
from cluster.virtual.event_loop import EventLoop
from cluster.virtual.job import Ask, Times

EXAMPLE = Path(next(iter(configs.__path__))) / "simulation" / "example.yaml"


def plan(**changes):
    given = {
        "latency_s": 120.0, "part": 0.95, "hours": 2.0, "jobs_per_hour": 600.0,
        "tenants": (Tenant(name="a", share=0.7), Tenant(name="b", share=0.3, weight=2.0)),
        "classes": (JobClass(name="usual", share=1.0, shape="small", steps=10),), "pools": (),
        "stages": Stages(prepare_s=0.5, decode_s=1.0), "seed": 3,
    }  # fmt: skip
    return Plan(**given | changes)


def pool(**changes):
    return Pool(**{"name": "p", "gpus_per_gang": 4, "dollars_per_gpu_hour": 2.0, "forward_s": {"small": 3.0}} | changes)


@pytest.mark.parametrize(("servers", "load"), QUEUES)
def test_mean_latency_is_that_of_m_m_c(servers, load):
    assert queue_ratio(servers, load) == pytest.approx(1.0, rel=TOLERANCE)


def test_the_closed_form_of_one_server_is_the_textbook_one():
    assert erlang_c_latency(1, 0.5, 10.0) == pytest.approx(20.0)


def test_coarse_steps_give_the_latencies_of_single_ones():
    means = []
    for is_coarse in (False, True):
        rng, loop = random.Random(7), EventLoop()
        times = Times(prepare_s=0.5, decode_s=1.0, release_s=0.5)
        cluster = VirtualCluster(loop, {"t0": 2.0}, 6, times, window=8, is_coarse=is_coarse)
        at = 0.0
        for number in range(600):
            at += rng.expovariate(6 * 0.9 / 10.0)
            ask = Ask(
                id=f"{number:04d}", tenant=f"t{number % 4}", num_steps=10, step_s=rng.uniform(0.2, 1.8),
                priority="batch" if number % 5 == 0 else "interactive",
            )  # fmt: skip
            loop.at(at, partial(cluster.ask, ask))
        loop.run()
        records = cluster.records.values()
        assert all(one.steps_run == 10 for one in records)
        means.append(sum(one.ended_at - one.asked_at for one in records) / len(records))
    assert means[1] == pytest.approx(means[0], rel=0.02)


def test_fewest_gangs_are_enough_and_one_fewer_are_not():
    asked = plan()
    arrivals = list(asked.arrivals())
    gangs, served = fewest(asked, pool(), arrivals, most=100)
    assert served.within >= 0.95
    assert serve(asked, pool(), gangs - 1, arrivals=arrivals).within < 0.95
    assert 5 <= gangs <= 9  # 600 jobs an hour of 30 s are 5 gangs' work
    assert fewest(asked, pool(), arrivals, most=3) is None


def test_gangs_that_fail_lose_no_job_and_come_back():
    asked = plan()
    served = serve(asked, pool(gpu_hours_between_failures=4.0, cold_start_s=60.0), 10)
    assert served.num_failures > 5
    assert served.num_unfinished == 0
    assert served.within > 0.9


def test_autoscaling_serves_a_burst_from_nothing_and_pays_less_than_a_fixed_number():
    asked = plan(jobs_per_hour=30.0, hours=4.0, burst_every_h=2.0, burst_jobs=40, latency_s=240.0)
    scaling = Settings(objective_s=180.0, cold_start_s=60.0, hold_s=120.0, idle_s=240.0)
    one = pool(cold_start_s=60.0)
    scaled = serve(asked, one, 20, scaling)
    fixed = serve(asked, one, 20)
    assert scaled.num_unfinished == fixed.num_unfinished == 0
    assert scaled.within > 0.9
    assert scaled.most_gangs > 5
    assert scaled.most_vaes >= 1
    assert scaled.gang_hours < 0.5 * fixed.gang_hours


def test_steady_load_does_not_make_it_flap():
    asked = plan(hours=6.0, jobs_per_hour=1200.0)
    served = serve(asked, pool(cold_start_s=60.0), 60, Settings(objective_s=120.0, cold_start_s=60.0, hold_s=600.0))
    assert served.within > 0.9
    assert served.num_changes < 60
    assert served.load > 0.5


def test_arrivals_follow_the_day_and_are_the_same_every_time():
    asked = plan(hours=24.0, jobs_per_hour=200.0, swing=0.8, burst_every_h=12.0, burst_jobs=5)
    arrivals = list(asked.arrivals())
    assert arrivals == list(asked.arrivals())
    assert len(arrivals) == pytest.approx(4810, rel=0.05)
    night = sum(one.at < 4 * 3600 for one in arrivals)
    noon = sum(10 * 3600 <= one.at < 14 * 3600 for one in arrivals)
    assert noon > 3 * night


def test_the_shipped_example_is_answered(tmp_path, capsys):
    text = EXAMPLE.read_text().replace("hours: 24", "hours: 1").replace("jobs_per_hour: 400", "jobs_per_hour: 120")
    config = tmp_path / "plan.yaml"
    config.write_text(text)
    assert main(["--config", str(config), "--max-gpus", "64"]) == 0
    said = capsys.readouterr().out
    assert "| H200 x 8, fixed | 1 | 8 |" in said
    assert "95% within 180 s: cheapest with" in said


@pytest.mark.parametrize(
    "change",
    [
        ("shape: 832x480x81", "shape: other"),
        ("weight: 2", "wait: 2"),
        ("seed", "sead"),
        ("every_h: 6", "every: 6"),
        ("{latency_s: 180", "{latency: 180, latency_s: 180"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, capsys, change):
    config = tmp_path / "plan.yaml"
    config.write_text(EXAMPLE.read_text().replace(*change))
    assert main(["--config", str(config)]) == 2
    assert "simulation: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_check_prints_its_figures_8192_gpus_and_200_000_jobs_within_a_minute_among_them(capsys):
    assert main(["--check"]) == 0
    assert "| 8,192 GPUs | jobs that ended | 200000 | 200000 | ok |" in capsys.readouterr().out
