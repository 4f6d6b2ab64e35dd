"""What a service counted is read when its processes have reported it, which they do seconds later."""

import httpx
import pytest

from cluster import prometheus
from cluster.prometheus import JOBS, STEPS, scrape_settled

URL = "http://127.0.0.1:8080/metrics"


@pytest.fixture
def show(monkeypatch):
    """Makes the metrics port show one exposition after the other, and the last of them from then on."""

    def shown(*expositions):
        left = list(expositions)

        def get(url, **_):
            body = left[0] if len(left) == 1 else left.pop(0)
            return httpx.Response(200 if body else 503, text=body, request=httpx.Request("GET", url))

        monkeypatch.setattr(prometheus.httpx, "get", get)

    return shown


def exposition(jobs, steps):
    return f'{JOBS}{{outcome="completed"}} {jobs}\n{STEPS}_count{{stage="denoise"}} {steps}\n'


def test_jobs_and_steps_that_are_reported_late_are_waited_for(show):
    show(exposition(300, 3000), exposition(311, 3000), exposition(311, 3090), exposition(311, 3090))
    settled = scrape_settled(URL, pause_s=0.01)
    assert (settled.of(JOBS), settled.of(f"{STEPS}_count")) == (311, 3090)


def test_a_service_that_has_counted_nothing_is_settled(show):
    show("# nothing yet\n")
    assert scrape_settled(URL, pause_s=0.01).of(JOBS) is None


def test_a_service_that_others_use_is_read_all_the_same(show):
    show(*(exposition(number, number) for number in range(100)))
    assert 2 <= scrape_settled(URL, pause_s=0.01).of(JOBS) < 20


def test_metrics_that_cannot_be_read_are_an_error(show):
    show("")
    with pytest.raises(httpx.HTTPStatusError):
        scrape_settled(URL, pause_s=0.01)
