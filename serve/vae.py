"""The VAE's deployment: stored inputs to latents, latents to the files of a result."""

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

from pusa_dist.config import ModelConfig
from pusa_dist.errors import Cancelled, PusaError
from pusa_dist.media.ahead import one_ahead
from pusa_dist.media.child import DecoderLostError
from pusa_dist.media.decoders import DecodeLimits, Decoders
from pusa_dist.media.frames import Frame
from pusa_dist.media.mp4 import Mp4Writer
from pusa_dist.media.source import Frames, FrameSource
from pusa_dist.media.stills import FramesZip, SpriteSheet, thumbnail
from pusa_dist.preview import LatentColours, to_webp
from pusa_dist.request import Fit, GenerationRequest
from serve import heap
from serve.lending import Lent
from serve.scratch import scratch_folder
from serve.stages import ReplicaLostError, TensorRef
from serve.store.artifacts import ArtifactStore, StorageError
from serve.store.jobs import Artifact
from serve.watched import STUCK_AFTER_S, WatchedThread

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_DECODES = 1
"""At once: two would both be late."""
NUM_OTHERS = 2
"""Calls that a replica takes beside all decodes: a short encode need not wait for them, nor a preview for either."""

_DECODE_LIMITS = DecodeLimits(num_bytes=2**40, wall_s=120.0, cpu_s=120, memory_bytes=2**32)
"""Generous: the gateway has judged every input, here a hang or a crash of a decoder must only not cost the GPU."""


class Vae:
    """Encodes, decodes and draws previews, on a thread each, so that the replica always answers Serve."""

    def __init__(
        self,
        model: ModelConfig,
        device: str,
        artifacts_url: str,
        on_decoder_failure: Callable[[], None] | None = None,
        stuck_after_s: float = STUCK_AFTER_S,
    ) -> None:
        with heap.importing():
            from pusa_dist.video_codec import VideoCodec  # torch stays out of the other roles

        self._encodes = WatchedThread("encode", stuck_after_s)
        self._decodes = WatchedThread("decode", stuck_after_s)
        self._ahead = ThreadPoolExecutor(NUM_DECODES, "ahead")
        """Watched by the decodes, which wait for it."""
        self._previews = WatchedThread("preview", stuck_after_s)
        source = _WatchedSource(Decoders(1, _DECODE_LIMITS), self._encodes.moves_on)
        self._codec = VideoCodec(model, device, source=source)
        self._artifacts = ArtifactStore(artifacts_url)
        self._on_decoder_failure = on_decoder_failure
        self._colours: LatentColours | None = None
        self._lent = Lent()

    async def check_health(self) -> None:
        """Raise if a piece of work hangs, so that Serve replaces the replica."""
        for thread in (self._encodes, self._decodes, self._previews):
            thread.check()

    async def encode(self, request: GenerationRequest, keys: Sequence[str]) -> TensorRef:
        """(C, K, H, W) latents of the stored inputs, in the order of ``request.conditioning``."""

        def work(check: Callable[[], None]) -> TensorRef:
            inputs = []
            for key in keys:
                check()
                inputs.append(self._artifacts.read(key))
            check()
            try:
                return self._lent.lend(self._codec.encode_inputs(request, inputs))
            except DecoderLostError as error:
                if self._on_decoder_failure is not None:
                    self._on_decoder_failure()
                raise ReplicaLostError(str(error)) from error

        return await _run(self._encodes, work)

    async def preview(
        self, job_id: str, attempt: int, step: int, request: GenerationRequest, latents: TensorRef
    ) -> str:
        """Draw what a video looks like after ``step`` steps, without decoding it; returns the picture's key.

        Args:
            job_id: of the job.
            attempt: at it.
            step: steps done.
            request: says how fast the video is.
            latents: where it is heading, (C, F, H, W) float32 in NumPy.
        """
        values = await latents.ref
        key = f"jobs/{job_id}/attempts/{attempt}/preview-{step}.webp"

        def work() -> str:
            if self._colours is None:
                self._colours = self._codec.fit_colours()
            self._artifacts.put(key, to_webp(self._colours.frames(values), request.fps))
            return key

        return await asyncio.get_running_loop().run_in_executor(self._previews, work)

    async def decode(
        self, job_id: str, attempt: int, request: GenerationRequest, latents: TensorRef
    ) -> dict[str, Artifact]:
        """Write the attempt's files to the artifact store; returns them by content variant.

        Raises:
            StorageError: there or on this machine's own disk, where they are made, is no room.
        """
        values = await latents.ref
        prefix = f"jobs/{job_id}/attempts/{attempt}"

        def work(check: Callable[[], None]) -> dict[str, Artifact]:
            frames = one_ahead(_checked(self._codec.decode(values), check), self._ahead)
            with _room(), scratch_folder("vae") as folder, closing(frames) as chunks:
                files = write_files(folder, request, chunks)
                published = {}
                for variant, (path, mime) in files.items():
                    check()
                    published[variant] = self._publish(f"{prefix}/{path.name}", path, mime, check)
            heap.trim()
            return published

        # Whoever stops an attempt removes its files, but the thread may write one more after that.
        return await _run(self._decodes, work, undo=lambda: self._remove(prefix))

    def _remove(self, prefix: str) -> None:
        try:
            self._artifacts.delete(prefix)
        except StorageError as error:
            logger.warning("files of a stopped attempt stay behind: %s", error)

    def _publish(self, key: str, path: Path, content_type: str, check: Callable[[], None]) -> Artifact:
        self._artifacts.put_file(key, path, check)
        return Artifact(key=key, content_type=content_type, num_bytes=path.stat().st_size)


def write_files(folder: Path, request: GenerationRequest, chunks: Iterator[Frame]) -> dict[str, tuple[Path, str]]:
    """Write a video's files as its frames come; memory does not grow with the video.

    Args:
        folder: where.
        request: size, length and rate of the video.
        chunks: (t, H, W, 3) frames.

    Returns:
        Path and content type by content variant.
    """
    files = {
        "video": (folder / "video.mp4", "video/mp4"),
        "thumbnail": (folder / "thumbnail.webp", "image/webp"),
        "spritesheet": (folder / "spritesheet.jpg", "image/jpeg"),
        "frames": (folder / "frames.zip", "application/zip"),
    }
    sheet, first = SpriteSheet(request.num_frames), None
    with ExitStack() as stack:
        video = stack.enter_context(closing(Mp4Writer(files["video"][0], request.width, request.height, request.fps)))
        lossless = stack.enter_context(closing(FramesZip(files["frames"][0])))
        for chunk in chunks:
            for writer in (video, lossless, sheet):
                writer.write(chunk)
            first = chunk[0] if first is None else first
    if first is None:
        raise PusaError("the VAE decoded no frames")
    files["thumbnail"][0].write_bytes(thumbnail(first))
    files["spritesheet"][0].write_bytes(sheet.to_jpeg())
    return files


@contextmanager
def _room() -> Iterator[None]:
    """A disk that is full here is what a full artifact store is: the job waits until there is room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, StorageError):
            raise
        # Not chained to what was raised, which names paths.
        raise StorageError(error.errno, f"the VAE's scratch disk: {os.strerror(error.errno)}") from None


def _checked(frames: Iterator[Frame], check: Callable[[], None]) -> Iterator[Frame]:
    for chunk in frames:
        check()
        yield chunk


async def _run(
    thread: WatchedThread, work: Callable[[Callable[[], None]], T], undo: Callable[[], None] | None = None
) -> T:
    stopped = threading.Event()

    def check() -> None:
        thread.moves_on()
        if stopped.is_set():
            raise Cancelled("the caller asked for the work to stop")

    working = thread.submit(work, check)
    try:
        return await asyncio.wrap_future(working)
    except asyncio.CancelledError:
        stopped.set()  # the thread goes on: it stops at its next check
        if undo is not None and not working.cancel():  # what had not begun has left nothing
            thread.submit(undo)
        raise


class _WatchedSource:
    """Frames of a source; the codec asks for more when it has encoded what it had."""

    def __init__(self, source: FrameSource, moves_on: Callable[[], None]) -> None:
        self._source = source
        self._moves_on = moves_on

    def image(self, data: bytes, width: int, height: int, fit: Fit) -> Frame:
        """See ``FrameSource.image``."""
        self._moves_on()
        return self._source.image(data, width, height, fit)

    def clip(self, data: bytes, start: int, stop: int | None, width: int, height: int, fit: Fit) -> Frames:
        """See ``FrameSource.clip``."""
        with closing(self._source.clip(data, start, stop, width, height, fit)) as frames:
            for frame in frames:
                self._moves_on()
                yield frame
