"""A load test of the real API at a URL, with a dispatcher behind it that pretends."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise

import pytest
import uvicorn

from cluster.loadtest import __main__ as loadtest
from cluster.loadtest.drive import Run, Target, drive
from cluster.loadtest.orders import forms
from cluster.loadtest.rows import read_rows
from cluster.loadtest.schedule import Arrival, read_trace, schedule
from cluster.loadtest.summary import peak_in_flight
from cluster.loadtest.workload import read_workload
from serve.config import ServeConfig
from serve.http.api import create_api
from serve.http.gateway import Gateway
from serve.policy.quota import Quota
from serve.store.jobs import JobStore
from tests.serve.api_support import FakeDispatcher

WORKLOAD = """
request_rate: 1
num_jobs: 1
tenants: {amber: {}, birch: {}, cedar: {}}
classes:
  draft: {task: text_to_video, size: 64x64, num_frames: 5, num_inference_steps: 4, share: 9}
  text: {task: image_to_video, size: 64x64, num_frames: 5, num_inference_steps: 4}
"""
TENANTS = ("amber", "birch", "cedar")


@contextmanager
def served(folder, *, pretends=True):
    """URL, keys and store of an API on a port; nothing becomes of its jobs unless somebody pretends."""

    async def ready():
        return {"Gateway": True}

    config = ServeConfig(model="debug", state_dir=str(folder / "state"), require_keys=True, poll_after_ms=50)
    gateway, store = Gateway(config, ready), JobStore(config.resolved_database_url)
    keys = {name: store.create_key(name)[1] for name in TENANTS}
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_api(gateway), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    dispatcher = FakeDispatcher(config, b"0123456789")
    if pretends:
        dispatcher.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", keys, store
    finally:
        if pretends:
            dispatcher.stop()
        server.should_exit = True
        thread.join(30)
        listener.close()
        store.close()
        gateway.close()


@pytest.fixture
def environment(monkeypatch):
    def put(keys):
        for name, key in keys.items():
            monkeypatch.setenv(f"PUSA_KEY_{name.upper()}", key)

    return put


def in_order(path):
    return sorted(read_rows(path), key=lambda one: one.intended_s)


def run(url, folder, *arguments):
    return loadtest.main(["--url", url, "--out", str(folder / "out"), "--request-rate", "20", *arguments])


def test_a_run_against_a_url_is_reported_with_every_job_once(tmp_path, environment, capsys, monkeypatch):
    monkeypatch.setattr("cluster.loadtest.run.SETTLE_S", 0.0)
    with served(tmp_path) as (url, keys, _):
        environment(keys)
        slo = tmp_path / "slo.yaml"  # a busy machine is as good as an idle one for all that is judged here
        slo.write_text("{max_p99_lag_s: null, classes: {draft: {latency_s: 300}, text: {latency_s: 300}}}")
        workload = tmp_path / "workload.yaml"
        workload.write_text(WORKLOAD)
        code = run(
            url,
            tmp_path,
            "--num-jobs",
            "24",
            "--alone",
            "2",
            "--rates",
            "10,20,30",
            "--sweep-jobs",
            "3",
            "--slo",
            str(slo),
            "--workload",
            str(workload),
        )
    assert code == 0, capsys.readouterr()
    rows = read_rows(tmp_path / "out/jobs.jsonl")
    assert sorted(one.number for one in rows) == list(range(24))
    assert {one.tenant for one in rows} == set(TENANTS)
    assert all(one.outcome == "completed" and one.latency_s > 0 and one.lag_s >= 0 for one in rows)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["audit"] == {"lost": [], "doubled": []}
    assert len(report["points"]) == 3
    assert "met" in (tmp_path / "out/report.md").read_text()
    assert len((tmp_path / "out/schedule.jsonl").read_text().splitlines()) == 24
    assert (tmp_path / "out/knee.png").exists()
    alone, together = (in_order(tmp_path / f"out/jobs-{part}.jsonl") for part in ("alone", "together"))
    assert len(alone) == len(together) == 2 * len(read_workload(workload).classes)
    assert all(former.ended_s <= later.intended_s for former, later in pairwise(alone))
    assert peak_in_flight(together) == 2
    kept = tmp_path / "out/workload.yaml"
    again = read_workload(kept)
    trace = read_trace(kept.parent / again.arrivals.trace, again)
    assert [one.seed for one in schedule(again, again.request_rate, again.num_jobs, trace)] == [
        one.seed for one in trace
    ]


def test_what_is_refused_for_load_is_a_reject_and_no_error(tmp_path):
    workload, arrivals = drafts(6)
    with served(tmp_path, pretends=False) as (url, keys, store):
        store.set_tenant("amber", limits=asdict(Quota(max_queued=4)))
        rows = driven(url, keys, workload, arrivals, timeout_s=2.0)
    outcomes = [one.outcome for one in rows]
    assert (outcomes.count("timeout"), outcomes.count("rejected")) == (4, 2)
    assert {one.http_status for one in rows if one.outcome == "rejected"} == {429}


def test_a_closed_loop_gives_every_job_its_time_from_when_it_began(tmp_path):
    workload, arrivals = drafts(3)
    with served(tmp_path) as (url, keys, _):
        rows = driven(url, keys, workload, arrivals, timeout_s=30.0, began=time.monotonic() - 100.0, at_once=1)
    assert [one.outcome for one in rows] == ["completed"] * 3


def test_a_closed_loop_ends_with_the_first_job_that_does_not_complete(tmp_path):
    workload, arrivals = drafts(6)
    with served(tmp_path, pretends=False) as (url, keys, store):
        rows = driven(url, keys, workload, arrivals, timeout_s=0.5, at_once=1)
        assert [one.outcome for one in rows] == ["timeout"]
        assert sum(store.counts().values()) == 1


def test_a_measurement_alone_in_which_a_job_does_not_complete_is_unusable(tmp_path, environment, capsys, monkeypatch):
    monkeypatch.setattr("cluster.loadtest.run.ALONE", "please fail")  # part of its prompts
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    with served(tmp_path) as (url, keys, _):
        environment(keys)
        code = run(url, tmp_path, "--alone", "2", "--workload", str(tmp_path / "workload.yaml"))
    assert code == 2
    assert "measurement, a job of class draft: failed (gang_died)" in capsys.readouterr().err


def test_an_address_where_nobody_listens_is_named(tmp_path, capsys):
    assert run("http://127.0.0.1:1", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loadtest: http://127.0.0.1:1/")
    assert line.endswith("check --url")


def test_a_service_that_nobody_answers_for_is_errors_within_bounds():
    workload, arrivals = drafts(1)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    (row,) = driven(url, {"amber": "k"}, workload, arrivals)
    assert (row.outcome, row.code, row.tries) == ("error", "no_answer", 4)


def test_jobs_that_nobody_waits_for_any_more_are_cancelled(tmp_path):
    workload = read_workload(loadtest.CONFIGS / "loadtest/debug.yaml")
    with served(tmp_path, pretends=False) as (url, keys, store):

        async def interrupted():
            arrivals = schedule(workload, 50.0, 5)
            task = asyncio.create_task(drive(Target(url=url, keys=keys), a_run(workload, arrivals), time.monotonic()))
            await asyncio.sleep(1.5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(interrupted())
        assert {status: count for status, count in store.counts().items() if count} == {"cancelled": 5}


@pytest.mark.parametrize("flags", [["--kill-rank-at", "1"], ["--saturation", "1"]])
def test_faults_and_loops_need_a_service_of_our_own(tmp_path, flags, capsys):
    assert run("http://127.0.0.1:9", tmp_path, *flags) == 2
    assert "service of our own" in capsys.readouterr().err


def drafts(num):
    workload = read_workload(loadtest.CONFIGS / "loadtest/debug.yaml")
    return workload, [Arrival(number=n, at=0.0, tenant="amber", job_class="draft", seed=n) for n in range(num)]


def driven(url, keys, workload, arrivals, timeout_s=60.0, began=None, at_once=None):
    began = time.monotonic() if began is None else began
    return asyncio.run(drive(Target(url=url, keys=keys), a_run(workload, arrivals, timeout_s), began, at_once))


def a_run(workload, arrivals, timeout_s=60.0):
    return Run(
        name="run", arrivals=arrivals, forms=forms(workload, arrivals, "run"),
        tasks={name: one.task for name, one in workload.classes.items()}, job_timeout_s=timeout_s,
    )  # fmt: skip
