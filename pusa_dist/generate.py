"""One generation without a service: prompt, images and clips from disk in, an MP4 out.

One process by default; the same call under ``torchrun`` runs one rank per process. Rank 0 encodes
the text and the pictures and writes the video; all ranks denoise.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

from torch import Tensor
from tqdm import tqdm

from pusa_dist.config import ModelConfig, ParallelConfig
from pusa_dist.errors import RequestError
from pusa_dist.media.mp4 import Mp4Writer
from pusa_dist.parallel.mesh import check_device, free_port
from pusa_dist.prompt_encoder import PromptEncoder
from pusa_dist.request import GenerationRequest
from pusa_dist.video_codec import VideoCodec
from pusa_dist.worker import Worker, WorkerOptions

T = TypeVar("T")
_Encodings: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""Embedding of the prompt, of the negative prompt, and latents of the given frames."""

JOB = "generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which rank this process is and where the ranks meet."""

    rank: int
    world_size: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> "Place":
        """What torchrun says, or a gang of one."""
        if "RANK" not in os.environ:
            return cls(rank=0, world_size=1, address="127.0.0.1", port=free_port())
        env = os.environ
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            address=env["MASTER_ADDR"],
            port=int(env["MASTER_PORT"]),
        )


class Generator:
    """A loaded model on this rank (and, on rank 0, the text encoder and the VAE).

    Making one is collective over the gang.

    Raises:
        ConfigError: degrees that do not fit the model or the ranks, no such device, or weights that are not there.
    """

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, options: WorkerOptions, place: Place) -> None:
        self.is_first = place.rank == 0
        check_device(options.device)  # the text encoder is loaded before the gang meets
        self._worker = Worker(model, parallel, options)
        if self.is_first:
            self._text = PromptEncoder(model, options.device)
            self._codec = VideoCodec(model, options.device)
        self._worker.join(place.rank, place.world_size, place.address, place.port)

    def generate(self, request: GenerationRequest, inputs: Sequence[bytes], out: Path) -> dict[str, float]:
        """Run one request and write ``out`` on rank 0. Collective over the gang.

        Returns:
            Seconds of each stage.

        Raises:
            RequestError: on every rank: the prompt is too long, or an input cannot be used.
        """
        start = time.perf_counter()
        encodings = self._worker.share(self._encode(request, inputs) if self.is_first else None)
        if isinstance(encodings, RequestError):
            raise encodings
        encoded = time.perf_counter()
        self._worker.admit(JOB, request, *cast(_Encodings, encodings))
        bar = tqdm(total=request.num_inference_steps, desc="denoise", unit="step") if self.is_first else nullcontext()
        with bar as progress:
            for _ in range(request.num_inference_steps):
                self._worker.step([JOB])
                if progress is not None:
                    progress.update()
        latents = self._worker.finish(JOB)
        denoised = time.perf_counter()
        if self.is_first:
            out.parent.mkdir(parents=True, exist_ok=True)
            with Mp4Writer(out, request.width, request.height, request.fps) as writer:
                for frames in self._codec.decode(latents):
                    writer.write(frames)
        done = time.perf_counter()
        return {
            "encode": encoded - start,
            "denoise": denoised - encoded,
            "decode": done - denoised,
            "total": done - start,
        }

    def _encode(self, request: GenerationRequest, inputs: Sequence[bytes]) -> _Encodings | RequestError:
        try:
            negative = self._text.encode(request.negative_prompt) if request.uses_guidance else None
            return self._text.encode(request.prompt), negative, self._codec.encode_inputs(request, inputs)
        except RequestError as error:
            return error  # the other ranks wait for an answer

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank. Collective over the gang."""
        return self._worker.share(value)

    def close(self) -> None:
        """Leave the gang."""
        self._worker.leave()
