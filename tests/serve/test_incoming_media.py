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
from serve.http.media import MAX_FETCHING, MAX_FETCHING_PER_TENANT, IncomingMedia
from serve.http.uploads import MediaUrl, Upload

SECRET = "https://media.test/?token=s3cret"
LIMITS = UploadLimits(max_body_bytes=1000, media_by_url=True, media_by_url_timeout_s=1.0)
INFO = MediaInfo(kind="image", width=64, height=48, num_frames=1)


class FakeClient:
    def __init__(self, answer=b"bytes", seconds=0.0):
        self.answer, self.seconds, self.asked = answer, seconds, []
        self.gate = threading.Event()
        self.gate.set()

    async def get(self, url, max_bytes):
        self.asked.append((url, max_bytes))
        await asyncio.sleep(self.seconds)
        await asyncio.to_thread(self.gate.wait)
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


def test_files_stay_as_they_are_and_urls_become_files_in_place():
    client = FakeClient()
    files = media(client).fetched(
        [Upload("a", b"x" * 100, "image/png"), MediaUrl("b", SECRET), MediaUrl("c", SECRET)], "t"
    )
    assert [(file.param, file.data) for file in files] == [("a", b"x" * 100), ("b", b"bytes"), ("c", b"bytes")]
    # What is left of the body's size, for each in turn.
    assert client.asked == [(SECRET, 900), (SECRET, 895)]


def test_urls_are_refused_unless_fetching_is_on():
    off = IncomingMedia(UploadLimits(), None, FakeDecoders())
    with pytest.raises(RequestError) as caught:
        off.fetched([MediaUrl("input_reference.image_url", SECRET)], "t")
    assert (caught.value.code, caught.value.param) == ("media_by_url_disabled", "input_reference.image_url")
    assert off.fetched([Upload("a", b"x", "")], "t") == [Upload("a", b"x", "")]


@pytest.mark.parametrize("code", ["unreachable", "too_large", "invalid_url", "unexpected_status"])
def test_what_cannot_be_fetched_is_the_requests_fault_and_its_url_is_told_to_nobody(code, caplog):
    with pytest.raises(RequestError) as caught:
        media(FakeClient(FetchError(code, "why"))).fetched([MediaUrl("b", SECRET)], "t")
    assert (caught.value.code, caught.value.param) == (f"media_url_{code}", "b")
    assert "upload the file itself" in str(caught.value)
    assert "s3cret" not in f"{caught.value} {MediaUrl('b', SECRET)!r} {caplog.text}"


def test_all_urls_of_a_request_share_their_time():
    client = FakeClient(seconds=0.4)
    with pytest.raises(RequestError) as caught:
        media(client).fetched([MediaUrl("b", SECRET)] * 10, "t")
    assert caught.value.code == "media_url_too_slow"
    assert len(client.asked) <= 3


@pytest.mark.parametrize(
    ("tenants", "most"), [(["a"] * 20, MAX_FETCHING_PER_TENANT), ([f"{n}" for n in range(20)], MAX_FETCHING)]
)
def test_only_so_many_requests_are_fetching(tenants, most):
    client, refused = FakeClient(), []
    client.gate.clear()
    shared = media(client, limits=LIMITS.model_copy(update={"media_by_url_timeout_s": 100.0}))

    def fetch(tenant):
        try:
            shared.fetched([MediaUrl("b", SECRET)], tenant)
        except ServeError as error:
            refused.append((error.status, error.code))

    threads = [threading.Thread(target=fetch, args=(tenant,)) for tenant in tenants]
    for thread in threads:
        thread.start()
    while len(client.asked) + len(refused) < 20:
        time.sleep(0.001)
    client.gate.set()
    for thread in threads:
        thread.join()
    assert len(client.asked) == most
    assert refused == [(503, "fetching_busy")] * (20 - most)
    assert shared.fetched([MediaUrl("b", SECRET)], "a")[0].data == b"bytes"


def test_files_are_looked_into_on_behalf_of_their_tenant():
    decoders = FakeDecoders()
    assert media(decoders=decoders).probe(Upload("a", b"x", ""), "tenant") == INFO
    assert decoders.owners == ["tenant"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(DecodersBusyError("busy"), "decoding_busy"), (DecoderLostError("pid 7"), "decoding_unavailable")],
)
def test_what_is_not_the_files_fault_is_a_503(error, code):
    with pytest.raises(ServeError) as caught:
        media(decoders=FakeDecoders(error)).probe(Upload("a", b"x", ""), "t")
    assert (caught.value.status, caught.value.code, caught.value.param) == (503, code, "a")
    assert "pid" not in str(caught.value)


def test_a_refused_file_stays_refused():
    refused = RequestError("a: the image is damaged", "a", "invalid_image")
    with pytest.raises(RequestError) as caught:
        media(decoders=FakeDecoders(refused)).probe(Upload("a", b"x", ""), "t")
    assert caught.value is refused
