"""Media of a body made ready for use: fetched where they came as URLs, and looked into by a decoder.

Both may take seconds of a gateway's thread, so a request with media waits for a place first, on the event
loop: threads for everything else are always left, and every tenant has only so many of the places. What
waits holds its body, so how many bytes all of them hold is bounded, too, as they come in.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from pusa_dist.errors import RequestError
from pusa_dist.media.child import DecoderLostError
from pusa_dist.media.decoders import DecodeLimits, Decoders, DecodersBusyError
from pusa_dist.request import MediaInfo
from serve.config import UploadLimits
from serve.http.errors import ServeError, uploads_busy
from serve.http.fetch import FetchError, PublicClient
from serve.http.uploads import MediaUrl, Upload

PLACES, PLACES_PER_TENANT = 24, 8
"""Of the 40 threads on which a gateway answers."""


class Room:
    """Places for requests with media, and memory for the bodies of all.

    Args:
        max_body_bytes: of one request.
        places: for requests with media.
        per_tenant: of them.
    """

    def __init__(self, max_body_bytes: int, places: int = PLACES, per_tenant: int = PLACES_PER_TENANT) -> None:
        self._places = asyncio.Semaphore(places)
        self._per_tenant = per_tenant
        self._tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        # As much as the largest bodies in every place take, so of usual ones many may wait.
        self._max_bytes = places * max_body_bytes
        self._max_bytes_of_tenant = per_tenant * max_body_bytes
        self._bytes_of: Counter[str] = Counter()

    @contextmanager
    def held(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """Have memory for a body inside: as much as what this gives is called for, as bytes come in.

        What is only announced takes none. What this gives raises ``ServeError`` 503 when there is none left, or
        the tenant has as much as one may have.
        """
        num_held = 0

        def take(num_bytes: int) -> None:
            nonlocal num_held
            is_full = self._bytes_of.total() + num_bytes > self._max_bytes
            if is_full or self._bytes_of[tenant] + num_bytes > self._max_bytes_of_tenant:
                raise uploads_busy()
            self._bytes_of[tenant] += num_bytes
            num_held += num_bytes

        try:
            yield take
        finally:
            self._bytes_of -= Counter({tenant: num_held})  # drops the tenant when nothing is left

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a place, in order of arrival, and have it inside."""
        own = self._tenants.setdefault(tenant, asyncio.Semaphore(self._per_tenant))
        async with own, self._places:
            yield


class IncomingMedia:
    """What a gateway does with media before it keeps them; every method blocks.

    Attributes:
        room: where a request with media waits until it may come in.

    Args:
        limits: of uploads.
        client: fetches; by default, one with the configured time, if fetching is on at all.
        decoders: look into files; by default, as many as configured.
        on_decoder_failure: called when they do not work.
    """

    def __init__(
        self,
        limits: UploadLimits,
        client: PublicClient | None = None,
        decoders: Decoders | None = None,
        on_decoder_failure: Callable[[], None] | None = None,
    ) -> None:
        self._limits = limits
        self._on_decoder_failure = on_decoder_failure
        if client is None and limits.media_by_url:
            client = PublicClient(timeout_s=limits.media_by_url_timeout_s)
        self._client = client
        self.room = Room(limits.max_body_bytes)
        self._decoders = decoders or Decoders(
            limits.decoders,
            DecodeLimits(
                num_bytes=limits.max_body_bytes,
                wall_s=limits.decode_timeout_s,
                cpu_s=max(1, round(limits.decode_timeout_s)),
                memory_bytes=limits.decode_memory_mib * 2**20,
            ),
            max_per_owner=max(1, limits.decoders - 1),
            max_waiting=PLACES,
        )

    def close(self) -> None:
        """End the decoders."""
        self._decoders.close()
        if self._client is not None:
            self._client.close()

    def fetched(self, media: Sequence[Upload | MediaUrl]) -> list[Upload]:
        """The same media, all of them here.

        Raises:
            RequestError: a URL could not be fetched. Codes: ``media_by_url_disabled`` and ``media_url_`` with
                one of ``serve.http.fetch.FetchErrorCode``.
        """
        urls = [one for one in media if isinstance(one, MediaUrl)]
        if not urls:
            return [one for one in media if isinstance(one, Upload)]
        if self._client is None:
            raise RequestError(
                f"{urls[0].param}: media by URL is off; upload the file itself or send a data URL",
                urls[0].param,
                "media_by_url_disabled",
            )
        return asyncio.run(self._fetch(self._client, media))

    def probe(self, upload: Upload, tenant: str) -> MediaInfo:
        """Recognise, check and fully decode a file, in a process that can be killed.

        Raises:
            RequestError: it cannot be used; see ``Decoders.probe``.
            ServeError: 503, too many files of the tenant wait, or the decoders do not work.
        """
        try:
            return self._decoders.probe(upload.data, upload.param, tenant)
        except DecodersBusyError as error:
            raise ServeError(503, "decoding_busy", str(error), upload.param, retry_after_s=5) from error
        except DecoderLostError as error:
            if self._on_decoder_failure is not None:
                self._on_decoder_failure()
            message = f"{upload.param}: it could not be looked into at the moment; try again later"
            raise ServeError(503, "decoding_unavailable", message, upload.param, retry_after_s=5) from error

    async def _fetch(self, client: PublicClient, media: Sequence[Upload | MediaUrl]) -> list[Upload]:
        left = self._limits.max_body_bytes - sum(len(one.data) for one in media if isinstance(one, Upload))
        uploads = []
        param = None
        try:
            async with asyncio.timeout(self._limits.media_by_url_timeout_s):
                for one in media:
                    param = one.param
                    if isinstance(one, MediaUrl):
                        one = Upload(one.param, await client.get(one.url, left))
                        left -= len(one.data)
                    uploads.append(one)
        except TimeoutError as error:
            raise _refusal(param, FetchError("too_slow", "it took too long to arrive")) from error
        except FetchError as error:
            raise _refusal(param, error) from error
        return uploads


def _refusal(param: str | None, error: FetchError) -> RequestError:
    return RequestError(
        f"{param}: {error}; upload the file itself or send a data URL", param, f"media_url_{error.code}"
    )
