"""The verdict on a run of ``make chaos``, and the pure parts around it: no service, no Ray."""

import io
import threading
import zipfile
from dataclasses import replace

import httpx
import numpy as np
import pytest

from cluster.chaos.__main__ import num_hit
from cluster.chaos.faults import FAULTS, Fault, NoJobsLeftError, TimedOutError, wait_for, wait_for_moment
from cluster.chaos.patience import GaveUpError, PatientTransport
from cluster.chaos.records import JobRecord
from cluster.chaos.sameness import SHARED_FORWARDS, levels
from cluster.chaos.service import CONFIG, settings_of
from cluster.chaos.verdict import (
    Outcome,
    Remains,
    Struck,
    Traces,
    figures_of_faults,
    figures_of_jobs,
    figures_of_leaks,
    forwards_shared,
)
from cluster.chaos.workload import NUM_JOBS, TENANTS, orders
from cluster.orders import png
from cluster.processes import role_of
from cluster.verdicts import table
from serve.config import ServeConfig

K = 4
CALM = [
    Outcome(
        number=n,
        status="completed",
        attempt=1,
        num_steps=50,
        steps_run=50,
        results={"video": f"v{n}".encode(), "frames": f"f{n}".encode()},
    )
    for n in range(3)
]
HIT = [replace(CALM[0], attempt=3, steps_run=50 + 2 * K), replace(CALM[1], attempt=2, steps_run=51), CALM[2]]
IDLE = Traces(
    processes={"Rank": 4, "Vae": 1},
    placement_groups=2,
    actors=9,
    stray_files=[],
    memory_mib={"Rank": 400.0, "Vae": 300.0},
)
NOTHING = Remains(processes=[], temporary_files=[])


def missed(figures):
    return [one.what for one in figures if not one.is_met]


def judged(disturbed, reference=CALM, num_completions=6):
    return missed(figures_of_jobs(reference, disturbed, 3, num_completions, K))


def test_jobs_that_lost_at_most_k_steps_to_every_fault_that_hit_them_are_well():
    assert judged(HIT) == []


@pytest.mark.parametrize(
    ("change", "misses"),
    [
        ({"status": "failed", "results": {}}, ["jobs completed", "video bit-equal", "frames bit-equal"]),
        ({"results": {"video": b"v0", "frames": b"other"}}, ["frames bit-equal"]),
        ({"results": {"frames": b"f0"}}, ["video bit-equal"]),
        ({"steps_run": 50 + 2 * K + 1}, ["steps made again"]),
        ({"attempt": 1, "steps_run": 51}, ["steps made again"]),
        ({"attempt": 20, "steps_run": 100}, ["jobs that ran to the end twice"]),
        ({"steps_run": 49}, ["jobs completed without all their steps"]),
    ],
)
def test_what_one_job_may_not_do_is_found(change, misses):
    found = judged([replace(HIT[0], **change), *HIT[1:]])
    assert len(found) == len(misses)
    assert all(what.startswith(start) for what, start in zip(found, misses, strict=True))


def test_a_job_that_is_missing_or_made_twice_or_published_twice_is_found():
    assert "jobs completed" in judged(HIT[:2])
    assert judged([*HIT, replace(CALM[2], number=-1, status="queued", results={})]) == ["jobs in the store"]
    assert judged(HIT, num_completions=7) == ["results published, reference and chaos"]


def test_a_reference_that_was_disturbed_itself_proves_nothing():
    assert judged(HIT, [replace(CALM[0], attempt=2), *CALM[1:]]) == ["jobs of the reference that were not undisturbed"]


def test_faults_must_be_made_and_hit():
    struck = [
        Struck(name="SIGKILL Rank", num_hit=1, must_hit=True, whole_after_s=9.0),
        Struck(name="SIGKILL Proxy", num_hit=0, must_hit=False, whole_after_s=2.0),
    ]
    assert missed(figures_of_faults(struck, 2)) == []
    assert missed(figures_of_faults(struck, 3)) == ["faults made while jobs ran"]
    in_vain = [replace(struck[0], num_hit=0), struck[1]]
    assert missed(figures_of_faults(in_vain, 2)) == ["faults that should have hit a job and did not"]


@pytest.mark.parametrize(
    ("change", "misses"),
    [
        ({}, []),
        ({"memory_mib": {"Rank": 439.0, "Vae": 100.0}}, []),
        ({"memory_mib": {"Rank": 441.0, "Vae": 100.0}}, ["resident memory of the role that grew most, Rank"]),
        ({"actors": 8, "placement_groups": 2}, []),
        ({"actors": 10}, ["actors"]),
        ({"placement_groups": 3}, ["placement groups"]),
        ({"processes": {"Rank": 6, "Vae": 1}}, ["processes of the idle service"]),
        ({"processes": {"Rank": 4}}, ["processes of the idle service"]),
        ({"stray_files": ["jobs/a/checkpoints/1-4"]}, ["stray files in the state folder"]),
    ],
)
def test_leaks_are_found_and_less_than_before_is_none(change, misses):
    assert missed(figures_of_leaks(IDLE, replace(IDLE, **change), NOTHING)) == misses


def test_what_is_left_after_the_stop_is_found():
    remains = Remains(processes=["raylet"], temporary_files=["vae-1"])
    found = missed(figures_of_leaks(IDLE, IDLE, remains))
    assert found == ["processes left after the stop", "temporary files left after the stop"]


def test_the_table_says_which_figure_was_missed():
    lines = list(figures_of_jobs(CALM, HIT[:2], 3, 6, K))
    assert "| jobs completed | 2 | 3 | MISSED |" in table(lines)
    assert "| steps made again per fault that hit the job, at most | 4 | <= k = 4 | ok |" in table(lines)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::Rank.step", ""], "Rank"),
        (["ray::Coordinator", ""], "Coordinator"),
        (["ray::ServeReplica:pusa:Vae", ""], "Vae"),
        (["ray::ServeReplica:pusa:TextEncoder.handle_request", ""], "TextEncoder"),
        (["ray::SERVE_REPLICA::pusa#Vae#x:ServeReplica:pusa:Vae.__init__", ""], None),
        (["ray::ServeController.listen_for_change", ""], "Controller"),
        (["ray::ProxyActor", ""], "Proxy"),
        (["ray::IDLE", ""], None),
        (["/lib/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=x"], "raylet"),
        (["python", "-m", "serve"], None),
        ([], None),
        ([""], None),
    ],
)
def test_a_process_is_known_by_its_title(command, role):
    assert role_of(command) == role


def test_the_jobs_are_the_same_every_time_and_of_every_task():
    one, again = orders(), orders()
    assert one == again
    assert len(one) == NUM_JOBS
    assert len({order.size for order in one.values()}) == 4
    assert {(len(order.uploads), order.extends) for order in one.values()} == {
        (0, False),
        (1, False),
        (1, True),
        (2, False),
    }
    assert len(TENANTS) == 3


def test_every_role_of_the_service_dies_and_k_is_the_configuration_s():
    roles = {"Rank", "Coordinator", "Denoiser", "Dispatcher", "Gateway", "Vae", "TextEncoder", "Proxy", "Controller"}
    assert {fault.role for fault in FAULTS} == roles | {"service"}
    denoiser = settings_of(CONFIG, share_forwards=False)["denoiser"]
    assert denoiser["checkpoint_every"] == K
    assert "shared_forward_max_tokens" not in denoiser


def test_forwards_are_shared_by_jobs_that_are_alike_where_that_is_asked_for():
    settings = ServeConfig(**settings_of(CONFIG, share_forwards=True))
    jobs = orders(are_alike=True)
    assert {(one.size, *(one.settings[name] for name in ("num_frames", "guidance_scale", "lora_alpha")))
            for one in jobs.values()} == {("352x240", 33, 5.0, 1.4)}  # fmt: skip
    assert settings.denoiser.shared_forward_max_tokens >= 2 * (33 // 4 + 1) * (352 // 16) * (240 // 16)
    assert settings.denoiser.max_resident == 2
    assert [forwards_shared(count, 100).is_met for count in (49, 50, 75, 76, 100)] == [False, True, True, False, False]


def test_frames_of_jobs_that_shared_forwards_may_differ_by_a_level():
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    ours = zipped(frames)
    is_same = SHARED_FORWARDS.by_variant["frames"]
    assert [is_same(ours, zipped(frames + more)) for more in (0, 1, 2)] == [True, True, False]
    assert levels(zipped(frames - 1), ours) == 1
    assert not is_same(ours, zipped(frames[:1]))
    assert list(SHARED_FORWARDS.by_variant) == ["frames"]


def zipped(frames):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as pictures:
        for number, frame in enumerate(frames):
            pictures.writestr(f"{number:05d}.png", png("", frame).data)
    return buffer.getvalue()


def record(key, **values):
    defaults = {"status": "in_progress", "stage": "denoise", "step": 5, "num_steps": 50, "steps_run": 5, "attempt": 1}
    rest = {"gang_deaths": 0, "lease_until": None}
    return JobRecord(idempotency_key=key, id=key, **{**defaults, **rest, **values})


def test_a_gang_is_not_killed_under_a_job_that_was_on_one_that_died(monkeypatch):
    monkeypatch.setattr("cluster.chaos.faults.MOMENT_S", 0.0)
    fault = Fault(role="Rank", is_gang_death=True)
    with pytest.raises(TimedOutError, match="no job on a gang that was on one that died"):
        wait_for_moment(fault, lambda: {"a": record("a", gang_deaths=1), "b": record("b")})
    with pytest.raises(TimedOutError, match="two jobs that make steps"):
        wait_for_moment(fault, lambda: {"a": record("a", gang_deaths=1, stage="decode"), "b": record("b")})
    with pytest.raises(TimedOutError, match="two jobs that make steps"):
        wait_for_moment(fault, lambda: {"a": record("a", gang_deaths=1, status="queued"), "b": record("b")})
    with pytest.raises(NoJobsLeftError):
        wait_for_moment(fault, lambda: {"a": record("a", gang_deaths=1, status="completed")})


def test_the_moment_of_a_fault_is_when_two_jobs_move():
    steps = iter(range(1000))

    def jobs():
        step = next(steps)
        return {"a": record("a", step=step), "b": record("b", step=max(0, step - 4))}

    wait_for_moment(Fault(role="Rank", is_gang_death=True), jobs)
    assert next(steps) >= 6


def test_a_fault_has_hit_the_jobs_in_hand_whose_attempt_it_ended():
    before = {
        "went on": record("went on"),
        "again": record("again", attempt=2),
        "waits": record("waits"),
        "done": record("done"),
        "claimed": record("claimed", status="queued", attempt=0),
    }
    after = {
        "went on": record("went on", step=9),
        "again": record("again", attempt=3),
        "waits": record("waits", status="queued"),
        "done": record("done", status="completed"),
        "claimed": record("claimed"),
    }
    assert num_hit(before, after) == 2


def test_a_wait_ends_and_says_what_was_awaited():
    with pytest.raises(TimedOutError, match="the moon: not within 0"):
        wait_for("the moon", lambda: False, 0.01, pause_s=0.001)


def patient(answers, stop=None):
    """A client whose requests are answered by these, in this order."""
    transport = PatientTransport(stop or threading.Event(), patience_s=5.0)
    replies = iter(answers)

    def reply(_request):
        answer = next(replies)
        if isinstance(answer, Exception):
            raise answer
        return answer

    transport._transport = httpx.MockTransport(reply)
    return httpx.Client(base_url="http://service", transport=transport)


def test_a_client_asks_again_until_the_service_itself_answers(monkeypatch):
    monkeypatch.setattr("cluster.chaos.patience.PAUSE_S", 0.0)
    away = [httpx.ConnectError("refused"), httpx.Response(503, text="no"), httpx.Response(404, text="no route")]
    assert patient([*away, httpx.Response(200, json={"id": "a"})]).post("/v1/videos", json={}).json() == {"id": "a"}
    assert patient([*away, httpx.Response(404, json={"error": {}})]).get("/v1/videos/x").status_code == 404


def test_a_client_that_is_told_to_stop_stops():
    stop = threading.Event()
    stop.set()
    with pytest.raises(GaveUpError):
        patient([], stop).get("/health")
