"""A trace begins with the request and goes on through every stage, whoever takes the job."""

import asyncio
import http.server
import threading
from contextlib import contextmanager

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pusa_dist.errors import ConfigError, RequestError
from serve.http.gateway import Gateway
from serve.traces import Traces
from tests.serve import api_support
from tests.serve.api_support import open_service

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SECRET = "prompt-5ecret"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Traces(provider)


def named(exporter):
    return {span.name: span for span in exporter.get_finished_spans()}


def trace_of(span):
    return f"{span.context.trace_id:032x}"


def run_job(world, traces, **values):
    async def scenario():
        async with world.dispatcher(traces=traces):
            await world.ended("j")

    world.add("j", **values)
    asyncio.run(scenario())


def test_a_request_goes_on_with_its_clients_trace_and_its_job_keeps_it(tmp_path, exporter, traces, monkeypatch):
    monkeypatch.setattr(api_support, "Gateway", lambda *arguments: Gateway(*arguments, traces=traces))
    with open_service(tmp_path) as service:
        answer = service.client.post("/v1/videos", json={"prompt": SECRET}, headers={"traceparent": PARENT})
        job = service.job(answer.json()["id"])
        service.client.get("/v1/videos")
        service.client.post("/v1/videos", json={"prompt": [SECRET]})
    first, second = exporter.get_finished_spans()
    assert (first.name, trace_of(first)) == ("POST /v1/videos", TRACE)
    assert job.traceparent == f"00-{TRACE}-{first.context.span_id:016x}-01"
    assert (first.attributes["http.response.status_code"], second.attributes["http.response.status_code"]) == (200, 400)
    assert trace_of(second) != TRACE
    assert SECRET not in first.to_json() + second.to_json()


def test_every_stage_of_a_job_is_a_span_of_its_trace(world, exporter, traces):
    run_job(world, traces, traceparent=PARENT)
    spans = named(exporter)
    assert set(spans) == {"queued", "attempt", "text", "denoise", "decode"}
    assert {trace_of(span) for span in spans.values()} == {TRACE}
    attempt = spans["attempt"]
    assert f"{attempt.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(attempt.attributes) == {"job": "j", "tenant": "local", "number": 1}
    assert {spans[stage].parent.span_id for stage in ("text", "denoise", "decode")} == {attempt.context.span_id}
    assert spans["queued"].end_time >= spans["queued"].start_time


def test_another_dispatcher_goes_on_with_the_trace(world, exporter, traces):
    assert world.store.claim is not None
    world.add("j", traceparent=PARENT)
    claimed = world.store.claim("j", "the dead one", lease_s=0.0)
    assert claimed.traceparent == PARENT

    async def scenario():
        async with world.dispatcher(traces=traces):
            await world.ended("j")

    asyncio.run(scenario())
    attempt = named(exporter)["attempt"]
    assert (trace_of(attempt), attempt.attributes["number"]) == (TRACE, 2)


def test_a_failure_is_seen_and_its_words_are_not(world, exporter, traces):
    world.stages.failures = {}

    async def broken(prompt):
        raise RequestError(SECRET, "prompt", "broken")

    world.stages.embed = broken
    run_job(world, traces, traceparent=PARENT)
    spans = named(exporter)
    assert spans["text"].status.description == spans["attempt"].status.description == "RequestError"
    assert not any(SECRET in span.to_json() for span in spans.values())


def test_nothing_is_kept_when_nobody_collects(tmp_path, world):
    with open_service(tmp_path / "api") as service:
        answer = service.client.post("/v1/videos", json={"prompt": "a"}, headers={"traceparent": PARENT})
        assert service.job(answer.json()["id"]).traceparent is None
    run_job(world, Traces.to(None, "Dispatcher"))
    assert world.job("j").status == "completed"


@contextmanager
def collector():
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_spans_reach_a_collector():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra 'traces' is not installed")
    with collector() as (url, received):
        traces = Traces.to(url, "Gateway")
        with traces.span("POST", job="video_1"):
            assert traces.traceparent() is not None
        traces.close()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"video_1" in body


def test_an_endpoint_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match="install the extra 'traces'"):
        Traces.to("http://collector:4318", "Gateway")
