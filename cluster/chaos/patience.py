"""A client that outlives the service: whatever a proxy without a gateway answers is asked again."""

import threading
import time

import httpx

PAUSE_S = 0.5


class GaveUpError(RuntimeError):
    """The service did not answer for too long, or the run is over."""


class PatientTransport(httpx.BaseTransport):
    """Sends a request until the service itself has answered it.

    Requests that make something carry an ``Idempotency-Key``, so sending them again is safe.

    Args:
        stop: set when nobody waits for an answer any more.
        patience_s: for one request, in seconds.
    """

    def __init__(self, stop: threading.Event, patience_s: float) -> None:
        self._transport = httpx.HTTPTransport()
        self._stop = stop
        self._patience_s = patience_s

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See ``httpx``; the answer's body has been read.

        Raises:
            GaveUpError: no answer in time.
        """
        request.read()  # so that it can be sent again
        deadline = time.monotonic() + self._patience_s
        last = "nothing"
        while not self._stop.is_set():
            try:
                response = self._transport.handle_request(request)
                response.read()
            except httpx.TransportError as error:
                last = type(error).__name__
            else:
                if is_answer(response):
                    return response
                last = f"{response.status_code} {response.text[:200]}"
            if time.monotonic() > deadline:
                what = f"{request.method} {request.url.path}"
                raise GaveUpError(f"{what}: no answer within {self._patience_s:g} s; last: {last}")
            self._stop.wait(PAUSE_S)
        raise GaveUpError("the run is over")

    def close(self) -> None:
        """See ``httpx``."""
        self._transport.close()


def is_answer(response: httpx.Response) -> bool:
    """Whether the service spoke, and not a proxy that has lost it: every refusal of the service is JSON."""
    if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        return False
    return response.is_success or response.headers.get("content-type", "").startswith("application/json")
