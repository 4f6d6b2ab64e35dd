"""The simulation against a run of the load test: here a made-up one, by a few lines that know nothing of it."""

import json
import random
import statistics

import pytest

from cluster.loadtest.rows import Row, write_rows
from cluster.loadtest.workload import JobClass, Tenant, Workload, write_workload
from cluster.simulation.__main__ import main
from cluster.simulation.replay import read_replay

WORKLOAD = Workload(
    tenants={"a": Tenant(), "b": Tenant(weight=2.0)},
    classes={
        "small": JobClass(task="text_to_video", size="64x64", num_frames=5, num_inference_steps=4),
        "large": JobClass(task="image_to_video", size="96x64", num_frames=9, num_inference_steps=6),
    },
    request_rate=1.0,
    num_jobs=300,
)
STAGES = {
    "small": {"text": 0.1, "denoise": 0.4, "decode": 0.2},
    "large": {"text": 0.1, "encode": 0.1, "denoise": 0.8, "decode": 1.0},
}
REST_S = 0.2


def row(number, job_class, at, ended, stages):
    return Row(
        number=number, tenant="ab"[number % 2], job_class=job_class, task=WORKLOAD.classes[job_class].task,
        intended_s=at, sent_s=at, accepted_s=at, ended_s=ended, outcome="completed", attempt=1, stage_seconds=stages,
    )  # fmt: skip


def single(longer=1.0):
    """Jobs of every class that waited for nobody."""
    rows = []
    for number, name in enumerate(["small", "large"] * 4):
        stages = {stage: longer * seconds for stage, seconds in STAGES[name].items()}
        rows.append(row(number, name, 0.0, sum(stages.values()) + REST_S, stages | {"wait": 0.0}))
    return rows


def run(*, slowness=1.0, rate=0.7, outage=(1e9, 1e9)):
    """One gang and one VAE, first come, first served; nothing starts on the gang in an outage."""
    dice, at, gang_free, vae_free, rows = random.Random(3), 0.0, 0.0, 0.0, []
    for number in range(WORKLOAD.num_jobs):
        at += dice.expovariate(rate)
        name = dice.choice(list(STAGES))
        stages = {stage: slowness * seconds for stage, seconds in STAGES[name].items()}
        ready = at + stages["text"] + stages.get("encode", 0.0)
        began = max(ready, gang_free)
        if began + stages["denoise"] > outage[0] and began < outage[1]:
            began = outage[1]
        denoised = gang_free = began + stages["denoise"]
        decoded = vae_free = max(denoised, vae_free) + stages["decode"]
        told = {"wait": began - ready, "denoise": denoised - ready, "decode": decoded - denoised}
        rows.append(row(number, name, at, decoded + REST_S, stages | told))
    return rows


@pytest.fixture
def folder(tmp_path):
    def write(rows, *, together=1.0, faults=()):
        write_workload(tmp_path / "workload.yaml", WORKLOAD)
        (tmp_path / "schedule.jsonl").touch()
        write_rows(tmp_path / "jobs.jsonl", rows)
        write_rows(tmp_path / "jobs-alone.jsonl", single())
        write_rows(tmp_path / "jobs-together.jsonl", single(together))
        (tmp_path / "report.json").write_text(json.dumps({"faults": list(faults)}))
        return tmp_path

    return write


@pytest.mark.parametrize("rate", [0.3, 0.7, 0.9])
def test_a_run_is_told_from_single_jobs_at_any_load(folder, capsys, rate):
    assert main(["--against", str(folder(run(rate=rate)))]) == 0
    assert "| p95 latency | simulated by real |" in capsys.readouterr().out


def test_a_run_that_is_slower_than_its_single_jobs_is_not(folder, capsys):
    assert main(["--against", str(folder(run(slowness=1.5)))]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_what_company_costs_is_measured_by_two_jobs_at_a_time(folder):
    path = folder(run(slowness=1.2, rate=0.9), together=1.2)
    assert read_replay(path).crowded == pytest.approx(1.2)
    assert main(["--against", str(path)]) == 0


def test_a_gang_that_was_killed_is_gone_for_as_long_in_the_simulation(folder):
    rows = run(outage=(100.0, 130.0))
    assert statistics.fmean(one.latency_s for one in rows) > 1.5 * statistics.fmean(one.latency_s for one in run())
    faults = [{"what": "Rank killed", "at_s": 100.0, "whole_after_s": 20.0}]
    assert main(["--against", str(folder(rows, faults=faults))]) == 0
    assert main(["--against", str(folder(rows))]) == 1


def test_the_rows_of_a_sweep_are_a_run_without_faults(folder):
    path = folder(run(), faults=[{"what": "Rank killed", "at_s": 100.0, "whole_after_s": 20.0}])
    write_rows(path / "jobs-rate-0.3.jsonl", run(rate=0.3))
    assert main(["--against", str(path / "jobs-rate-0.3.jsonl")]) == 0


def test_a_run_without_single_jobs_is_refused(folder, capsys):
    path = folder(run())
    (path / "jobs-alone.jsonl").unlink()
    assert main(["--against", str(path)]) == 2
    assert "jobs-alone.jsonl; run the load test with --alone" in capsys.readouterr().err
