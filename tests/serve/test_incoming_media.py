"""Media before they are kept: URLs fetched within bounds, files looked into elsewhere."""

import asyncio
import threading
import time

import pytest

from pusa_dist.errors import RequestError
from pusa_dist.media.child import DecoderLostError
from pusa_dist.media.decoders import DecodersBusyError
from pusa_dist.request import MediaInfo
from serve.config import UploadLimits
from serve.http import arriving
from serve.http.arriving import paced
from serve.http.errors import ServeError
from serve.http.fetch import FetchError
from serve.http.media import PLACES_PER_TENANT, IncomingMedia, Room
from serve.http.uploads import MediaUrl, Upload
from tests.serve.api_support import open_service, png

SECRET = "https://media.test/?token=s3cret"
LIMITS = UploadLimits(max_body_bytes=1000, media_by_url=True, media_by_url_timeout_s=1.0)
INFO = MediaInfo(kind="image", width=64, height=48, num_frames=1)


class FakeClient:
    def __init__(self, answer=b"bytes", seconds=0.0):
        self.answer, self.seconds, self.asked = answer, seconds, []

    async def get(self, url, max_bytes):
        self.asked.append((url, max_bytes))
        await asyncio.sleep(self.seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self):
        pass


class FakeDecoders:
    def __init__(self, answer=INFO):
        self.answer, self.owners = answer, []

    def probe(self, data, param, owner):
        self.owners.append(owner)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self):
        pass


def media(client=None, decoders=None, limits=LIMITS):
    return IncomingMedia(limits, client or FakeClient(), decoders or FakeDecoders())


def test_a_decoder_that_does_not_work_is_counted():
    failures = []
    broken = IncomingMedia(
        LIMITS, FakeClient(), FakeDecoders(DecoderLostError("it died")), lambda: failures.append("failed")
    )
    with pytest.raises(ServeError, match="could not be looked into"):
        broken.probe(Upload("a", b"x"), "tenant")
    assert failures == ["failed"]


def test_files_stay_as_they_are_and_urls_become_files_in_place():
    client = FakeClient()
    files = media(client).fetched([Upload("a", b"x" * 100), MediaUrl("b", SECRET), MediaUrl("c", SECRET)])
    assert [(file.param, file.data) for file in files] == [("a", b"x" * 100), ("b", b"bytes"), ("c", b"bytes")]
    # What is left of the body's size, for each in turn.
    assert client.asked == [(SECRET, 900), (SECRET, 895)]


def test_urls_are_refused_unless_fetching_is_on():
    off = IncomingMedia(UploadLimits(), None, FakeDecoders())
    with pytest.raises(RequestError) as caught:
        off.fetched([MediaUrl("input_reference.image_url", SECRET)])
    assert (caught.value.code, caught.value.param) == ("media_by_url_disabled", "input_reference.image_url")
    assert off.fetched([Upload("a", b"x")]) == [Upload("a", b"x")]


@pytest.mark.parametrize("code", ["unreachable", "too_large", "invalid_url", "unexpected_status"])
def test_what_cannot_be_fetched_is_the_requests_fault_and_its_url_is_told_to_nobody(code, caplog):
    with pytest.raises(RequestError) as caught:
        media(FakeClient(FetchError(code, "why"))).fetched([MediaUrl("b", SECRET)])
    assert (caught.value.code, caught.value.param) == (f"media_url_{code}", "b")
    assert "upload the file itself" in str(caught.value)
    assert "s3cret" not in f"{caught.value} {MediaUrl('b', SECRET)!r} {caplog.text}"


def test_all_urls_of_a_request_share_their_time():
    client = FakeClient(seconds=0.4)
    with pytest.raises(RequestError) as caught:
        media(client).fetched([MediaUrl("b", SECRET)] * 10)
    assert caught.value.code == "media_url_too_slow"
    assert len(client.asked) <= 3


@pytest.mark.parametrize(
    ("tenants", "most"), [(["a"] * 20, 3), ([f"{n}" for n in range(20)], 5), (["a"] * 10 + ["b"] * 10, 5)]
)
def test_requests_with_media_wait_for_a_place_and_all_of_them_get_one(tenants, most):
    async def scenario():
        room, inside, seen, held = Room(1, 5, 3), [], [], []

        async def request(tenant):
            async with room.taken(tenant):
                inside.append(tenant)
                seen.append(max(inside.count(one) for one in inside))
                held.append(len(inside))
                await asyncio.sleep(0.001)
                inside.remove(tenant)

        await asyncio.gather(*(request(tenant) for tenant in tenants))
        return seen, held

    seen, held = asyncio.run(scenario())
    assert (len(held), max(held)) == (20, most)
    assert max(seen) <= 3


def test_bodies_take_bounded_memory_and_a_tenant_only_a_part_of_it():
    room = Room(10, places=3, per_tenant=1)
    with room.held("a") as take, room.held("a") as take_more, room.held("b") as take_rest, room.held("c") as take_last:
        take(6)
        take_more(4)
        take_rest(10)
        take_last(8)
        for tenant, num_bytes in (("a", 1), ("d", 3)):
            with room.held(tenant) as take_other, pytest.raises(ServeError) as caught:
                take_other(num_bytes)
            assert (caught.value.status, caught.value.code) == (503, "uploads_busy")
            assert caught.value.retry_after_s
        take_last(2)

    def broken_off():
        with room.held("a") as take:
            take(10)
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    with room.held("a") as take, room.held("c") as take_last:
        take(10)
        take_last(10)
        assert not (set(room._bytes_of) - {"a", "c"})


def test_a_tenant_has_at_most_a_third_of_the_room():
    room = Room(UploadLimits().max_body_bytes)
    assert room._max_bytes_of_tenant * 3 <= room._max_bytes


def chunks(*sizes, pause_s=0.0, then_vanish=False):
    """``receive`` of a client that sends these chunks, and no end where it vanishes."""
    left = list(sizes)

    async def receive():
        await asyncio.sleep(pause_s)
        if not left and then_vanish:
            await asyncio.Event().wait()
        size = left.pop(0)
        return {"type": "http.request", "body": b"x" * size, "more_body": bool(left) or then_vanish}

    return receive


async def received(receive):
    while (await receive()).get("more_body"):
        pass


@pytest.mark.parametrize(
    ("receive", "num_bytes"),
    [(chunks(5, then_vanish=True), 5), (chunks(then_vanish=True), 0), (chunks(*[1] * 1000, pause_s=0.05), None)],
    ids=["vanished on the way", "sent nothing", "dribbles"],
)
def test_a_body_that_stops_or_dribbles_is_given_up(monkeypatch, receive, num_bytes):
    monkeypatch.setattr(arriving, "SILENCE_S", 0.2)
    monkeypatch.setattr(arriving, "GRACE_S", 0.5)
    taken = []
    with pytest.raises(ServeError) as caught:
        asyncio.run(received(paced(receive, taken.append)))
    assert (caught.value.status, caught.value.code) == (408, "upload_too_slow")
    assert f"after {sum(taken)} bytes" in str(caught.value)
    assert num_bytes in (None, sum(taken))
    assert sum(taken) < 100


def test_a_body_that_keeps_coming_may_take_longer_and_what_we_do_meanwhile_does_not_count(monkeypatch):
    monkeypatch.setattr(arriving, "GRACE_S", 0.2)
    many = 2 * arriving.LEAST_BYTES_PER_S
    asyncio.run(received(paced(chunks(*[many] * 10, pause_s=0.05), lambda _: None)))
    asyncio.run(received(paced(chunks(*[1] * 5), lambda _: time.sleep(0.1))))


def order(key, length):
    headers = {"host": "x", "content-type": "application/json", "content-length": str(length), **key}
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/videos",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }


def test_clients_that_vanish_keep_nobody_out_and_are_answered_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(arriving, "SILENCE_S", 1.0)

    async def vanishing(app, key, answers):
        async def send(message):
            answers.append(message.get("status"))

        await app(order(key, 2_000_000), chunks(10, then_vanish=True), send)

    async def scenario(service, answers):
        keys = [service.key(tenant) for tenant in ("a", "b")]
        hanging = [asyncio.create_task(vanishing(service.client.app, keys[n % 2], answers)) for n in range(48)]
        await asyncio.sleep(0.2)
        assert answers == []
        for key in (keys[0], service.key("c")):
            fine = await asyncio.to_thread(service.client.post, "/v1/videos", json={"prompt": "a"}, headers=key)
            assert fine.status_code == 200
        await asyncio.wait_for(asyncio.gather(*hanging), 30)

    with open_service(tmp_path, require_keys=True) as service:
        answers = []
        asyncio.run(scenario(service, answers))
        assert [status for status in answers if status is not None] == [408] * 48
        assert not service.gateway.media.room._bytes_of


def test_a_tenant_that_left_its_place_by_an_error_has_it_back():
    async def scenario():
        room = Room(1, 1, 1)
        for _ in range(3):
            with pytest.raises(KeyError):
                async with room.taken("a"):
                    raise KeyError
        async with asyncio.timeout(1), room.taken("a"):
            return len(room._tenants)

    assert asyncio.run(scenario()) == 1


def test_files_are_looked_into_on_behalf_of_their_tenant():
    decoders = FakeDecoders()
    assert media(decoders=decoders).probe(Upload("a", b"x"), "tenant") == INFO
    assert decoders.owners == ["tenant"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(DecodersBusyError("busy"), "decoding_busy"), (DecoderLostError("pid 7"), "decoding_unavailable")],
)
def test_what_is_not_the_files_fault_is_a_503(error, code):
    with pytest.raises(ServeError) as caught:
        media(decoders=FakeDecoders(error)).probe(Upload("a", b"x"), "t")
    assert (caught.value.status, caught.value.code, caught.value.param) == (503, code, "a")
    assert "pid" not in str(caught.value)


def test_a_refused_file_stays_refused():
    refused = RequestError("a: the image is damaged", "a", "invalid_image")
    with pytest.raises(RequestError) as caught:
        media(decoders=FakeDecoders(refused)).probe(Upload("a", b"x"), "t")
    assert caught.value is refused


def test_uploads_that_hang_leave_threads_for_everything_else(tmp_path):
    entered, go_on = [], threading.Event()

    class HungDecoders(FakeDecoders):
        def probe(self, data, param, owner):
            entered.append(owner)
            go_on.wait(60)
            return INFO

    with open_service(tmp_path) as service:
        service.gateway.media._decoders = HungDecoders()
        files = {"input_reference": ("a.png", png())}
        answers = []

        def create():
            answers.append(service.client.post("/v1/videos", data={"prompt": "a"}, files=files).status_code)

        threads = [threading.Thread(target=create) for _ in range(50)]  # more than a gateway has threads
        for thread in threads:
            thread.start()
        while len(entered) < PLACES_PER_TENANT:
            time.sleep(0.01)
        assert service.client.get("/v1/videos").status_code == 200
        assert service.client.post("/v1/videos", json={"prompt": "no media"}).status_code == 200
        assert len(entered) == PLACES_PER_TENANT
        go_on.set()
        for thread in threads:
            thread.join()
        assert answers == [200] * 50
