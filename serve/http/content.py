"""Serving the files of a finished job: by a presigned link from a bucket, by ranges from a folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastapi.responses import RedirectResponse, Response, StreamingResponse

from serve.http.errors import ServeError
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import Artifact, Job

Variant = Literal["video", "thumbnail", "spritesheet", "frames"]

LINK_SECONDS = 3600
_CHUNK_BYTES = 1 << 18


def finished_artifact(job: Job, variant: Variant) -> Artifact:
    """The file of a variant.

    Raises:
        ServeError: 409, the job has not finished or did not end well; 404, it has no such file.
    """
    match job.status:
        case "completed":
            pass
        case "failed" | "cancelled":
            reason = job.error_message or "it was cancelled on request"
            raise ServeError(
                409,
                job.error_code or "cancelled",
                f"video {job.id} has no content, because the job {job.status}: {reason}; create it again",
                "video_id",
            )
        case unfinished:
            raise ServeError(
                409,
                "video_not_ready",
                f"video {job.id} is {unfinished}; poll GET /v1/videos/{job.id} until its status is completed",
                "video_id",
            )
    if variant not in job.results:
        raise ServeError(404, "variant_not_found", f"video {job.id} has no {variant}", "variant")
    return job.results[variant]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``start`` up to but not including ``stop``."""

    start: int
    stop: int


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """The single range a ``Range`` header asks for; None means the whole file.

    What is not one well-formed range of bytes is ignored, as HTTP allows.

    Raises:
        ServeError: 416, the range lies outside the file.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").replace(" ", ""), re.ASCII)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    else:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        raise ServeError(
            416,
            "range_not_satisfiable",
            f"Range {header!r} lies outside the {size} bytes",
            "Range",
            headers={"content-range": f"bytes */{size}"},
        )
    return ByteRange(start, stop)


def content_response(
    artifacts: ArtifactStore, artifact: Artifact, filename: str, range_header: str | None, if_range: str | None
) -> Response:
    """A redirect where the store can serve the file itself, else its bytes, or a range of them.

    Raises:
        ServeError: 404, the file is gone; 416, the range lies outside it.
    """
    link = artifacts.redirect_url(artifact.key, LINK_SECONDS, artifact.content_type)
    if link is not None:
        return RedirectResponse(link, 302)
    try:
        size = artifacts.size(artifact.key)
    except FileNotFoundError as error:
        raise ServeError(404, "content_expired", f"{filename} is no longer kept; create the video again") from error
    headers = _headers(artifact, filename)
    wanted = parse_range(range_header, size) if if_range in (None, headers["etag"]) else None
    start, stop = (0, size) if wanted is None else (wanted.start, wanted.stop)
    headers["content-length"] = str(stop - start)
    if wanted is not None:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    chunks = _read(artifacts, artifact.key, start, stop)
    return StreamingResponse(chunks, 200 if wanted is None else 206, headers, artifact.content_type)


def content_head(artifact: Artifact, filename: str) -> Response:
    """What a GET would answer, without the file: here even if it lies in a bucket, whose links are signed for GET."""
    headers = {**_headers(artifact, filename), "content-length": str(artifact.num_bytes)}
    return Response(None, 200, headers, artifact.content_type)


def _headers(artifact: Artifact, filename: str) -> dict[str, str]:
    return {
        "accept-ranges": "bytes",
        "content-disposition": f'inline; filename="{filename}"',
        # Keys are unique to the attempt and written once, so the key names the bytes.
        "etag": f'"{artifact.key.replace("/", "-")}"',
    }


def _read(artifacts: ArtifactStore, key: str, start: int, stop: int) -> Iterator[bytes]:
    with artifacts.open(key) as file:
        file.seek(start)
        while start < stop:
            chunk = file.read(min(_CHUNK_BYTES, stop - start))
            if not chunk:
                raise EOFError(f"{key} ends at byte {start}, expected {stop}")
            start += len(chunk)
            yield chunk
