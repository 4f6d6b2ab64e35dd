"""``python -m serve`` as an operator runs it: starts, is killed or stopped, starts again, and loses nothing."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.local_service import free_port
from serve.store.jobs import JobStore
from tests.e2e.client import completed, create, retrieve, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
READY_S = 120
"""The promise is 60 s on an idle machine; tests may share theirs."""


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, "-m", "serve", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


@contextmanager
def service(state, elsewhere):
    """The service with this state folder, started from another folder; yields its process and a client."""
    port = free_port()
    with start("--model", "debug", "--port", str(port), "--state", str(state), cwd=elsewhere) as process:
        began = time.monotonic()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                while "ready:" not in (line := process.stdout.readline()):
                    assert line, "the service ended before it was ready"
                    assert time.monotonic() - began < READY_S
                assert f"http://127.0.0.1:{port}" in line
                yield process, client
        finally:
            process.kill()


def stop(process, number, timeout_s=60):
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait(timeout_s) == 0, output


def processes_of(folder):
    """Processes that were started, at whatever depth, with this working folder."""
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        try:
            if f"RESTART_TEST={folder}".encode() in (one / "environ").read_bytes().split(b"\0"):
                found.append((one.name, (one / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def test_a_restart_loses_nothing_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTART_TEST", str(tmp_path))
    state = tmp_path / "state"
    with service(state, tmp_path) as (process, client):
        finished = create(client, num_inference_steps=2, num_frames=5)
        completed(client, finished)
        before = client.get(f"/v1/videos/{finished}/content").content
        running = create(client, size="256x192", num_inference_steps=50, num_frames=49)
        queued = [create(client, f"queued {n}", num_inference_steps=2, num_frames=5) for n in range(4)]
        until(client, running, lambda video: video["pusa"]["step"] >= 2)
        stop(process, signal.SIGTERM)
    deadline = time.monotonic() + 15
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    store = JobStore(f"sqlite:///{state / 'jobs.sqlite'}")
    job = store.get("local", running)
    store.close()
    attempts = 1 if job.is_final else 2  # on a quick machine it may have ended before the service did

    with service(state, tmp_path) as (process, client):
        assert client.get(f"/v1/videos/{finished}/content").content == before
        for job_id in (running, *queued):
            completed(client, job_id, 120)
        assert retrieve(client, running)["pusa"]["attempt"] == attempts
        stop(process, signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nonsense"], "model 'nonsense' is unknown; use one of debug"),
        (["--host", "0.0.0.0"], "http host 0.0.0.0 is reachable from the network, but no keys are asked for"),
        (["--state", "list.yaml"], "state_dir=list.yaml cannot be made"),
        (["--config", "no-such-file.yaml"], "configuration no-such-file.yaml cannot be read"),
        (["--config", "misspelt.yaml"], "denoiser.ulyses_degree is unknown; did you mean 'ulysses_degree'?"),
        (["--config", "degree.yaml"], "ulysses_degree=3 does not divide num_attention_heads=4; use one of 1, 2, 4"),
        (["--config", "list.yaml"], "expected a mapping of settings, got list"),
    ],
)
def test_a_configuration_that_cannot_work_is_one_line_and_exit_code_2(tmp_path, arguments, says):
    (tmp_path / "misspelt.yaml").write_text("denoiser: {ulyses_degree: 2}\n")
    (tmp_path / "degree.yaml").write_text("model: debug\ndenoiser: {ulysses_degree: 3}\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with start(*arguments, cwd=tmp_path) as process:
        output = process.stdout.read()
    assert process.returncode == 2
    assert says in output
    assert len(output.strip().splitlines()) == 1
