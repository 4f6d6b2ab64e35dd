"""What a service counted is read when its processes have reported it, which they do seconds later."""

import http.server
import threading
from contextlib import contextmanager

import httpx
import pytest

from cluster.prometheus import JOBS, STEPS, scrape_settled


@contextmanager
def served(expositions):
    """A metrics port that shows one exposition after the other, and the last of them from then on."""
    left = list(expositions)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = left[0] if len(left) == 1 else left.pop(0)
            self.send_response(200 if body else 503)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def exposition(jobs, steps):
    return f'{JOBS}{{outcome="completed"}} {jobs}\n{STEPS}_count{{stage="denoise"}} {steps}\n'


def test_jobs_and_steps_that_are_reported_late_are_waited_for():
    with served([exposition(300, 3000), exposition(311, 3000), exposition(311, 3090), exposition(311, 3090)]) as url:
        settled = scrape_settled(url, pause_s=0.01)
    assert (settled.of(JOBS), settled.of(f"{STEPS}_count")) == (311, 3090)


def test_a_service_that_has_counted_nothing_is_settled():
    with served(["# nothing yet\n"]) as url:
        assert scrape_settled(url, pause_s=0.01).of(JOBS) is None


def test_a_service_that_others_use_is_read_all_the_same():
    with served([exposition(number, number) for number in range(100)]) as url:
        assert 2 <= scrape_settled(url, pause_s=0.01).of(JOBS) < 20


def test_metrics_that_cannot_be_read_are_an_error():
    with served([""]) as url, pytest.raises(httpx.HTTPStatusError):
        scrape_settled(url, pause_s=0.01)
