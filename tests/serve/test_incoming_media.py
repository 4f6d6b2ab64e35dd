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
    room = Room(10, places=4, per_tenant=1)
    with room.held("a", 12), room.held("a", 8), room.held("b", 20):
        for tenant in ("a", "c"):
            with pytest.raises(ServeError) as caught, room.held(tenant, 1):
                pass
            assert (caught.value.status, caught.value.code) == (503, "uploads_busy")
            assert caught.value.retry_after_s
    with pytest.raises(KeyError), room.held("a", 20):
        raise KeyError
    with room.held("a", 20), room.held("c", 20):
        assert not (set(room._bytes_of) - {"a", "c"})


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
