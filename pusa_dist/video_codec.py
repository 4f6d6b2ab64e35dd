"""The VAE with everything around it: uploaded bytes to given latents, final latents to frames."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from pusa_dist.checkpoint.vae import build_vae
from pusa_dist.config import ModelConfig
from pusa_dist.geometry import TEMPORAL_STRIDE, num_pixel_frames
from pusa_dist.media.frames import Frame, to_model_range
from pusa_dist.media.source import FrameSource, InProcess
from pusa_dist.model.vae import decode_chunks, encode_chunks
from pusa_dist.preview import Array, LatentColours
from pusa_dist.request import Fit, GenerationRequest


class VideoCodec:
    """Encodes what a request gives and decodes what a generation ends with.

    Holds weights only: any number of decodes may be consumed in turns, with encodes in between.
    """

    def __init__(self, model: ModelConfig, device: str, source: FrameSource | None = None) -> None:
        """Load the VAE.

        Args:
            model: whose VAE.
            device: where it runs.
            source: decodes what is uploaded; None does it in this process.
        """
        precision = model.precision_on(torch.device(device).type)
        self._vae = build_vae(model, device=device, precision=precision)
        self._tiling = (model.vae.tile, model.vae.tile_stride)
        self._device = torch.device(device)
        self._source = source or InProcess()

    def encode_inputs(self, request: GenerationRequest, inputs: Sequence[bytes]) -> Tensor | None:
        """The latents that ``request.conditioning`` gives, in its order.

        An image is encoded alone, as a video of one frame. A clip is encoded once, from its first frame
        to the last one needed, and ``source`` picks the latent. Negative sources count from the clip's
        end: its last frames, just as many as the earliest of them needs, are encoded as a clip of their
        own. So what ``source=-3`` gives when -3 is the earliest used is the latent of a first frame, fit
        to start a video with, and -2 and -1 follow it as they do in a clip.

        Args:
            request: says which input goes where, and the size of the video.
            inputs: the uploaded images and clips, whole files.

        Returns:
            (C, K, H, W) on the CPU in the VAE's dtype, or None when nothing is given.

        Raises:
            RequestError: an input cannot be decoded or is too short.
        """
        if not request.conditioning:
            return None
        sources: dict[tuple[int, Fit], set[int | None]] = defaultdict(set)
        for entry in request.conditioning:
            sources[entry.input, entry.fit].add(entry.source)
        size = (request.width, request.height)
        encoded = {key: self._encode(inputs[key[0]], wanted, size, key[1]) for key, wanted in sources.items()}
        given = [encoded[entry.input, entry.fit][entry.source] for entry in request.conditioning]
        return torch.stack(given, dim=1)

    def decode(self, latents: Tensor) -> Iterator[Frame]:
        """Frames of final latents (C, F, H, W), as each latent frame is decoded.

        Yields:
            uint8 (1, H, W, 3) for the first latent frame, then (4, H, W, 3) each.
        """
        on_device = latents.to(self._device, self._vae.dtype)
        for chunk in decode_chunks(self._vae, on_device[None], *self._tiling):
            # As Pusa does: in float32, the fraction cut off.
            pixels = ((chunk[0].float() + 1.0) * 127.5).clamp_(0.0, 255.0).to(torch.uint8)
            yield np.ascontiguousarray(pixels.permute(1, 2, 3, 0).cpu().numpy())

    def encode_frames(self, frames: Iterator[Frame]) -> Iterator[Tensor]:
        """Latent frames of a clip, as soon as their pixel frames are given.

        Args:
            frames: uint8 (H, W, 3) each, of the size of the video. Frames past the last 4k+1 make no latent.

        Yields:
            (C, H / 8, W / 8) on the CPU in the VAE's dtype: the distribution's mean, normalised.
        """
        chunks = (
            torch.from_numpy(to_model_range(chunk)).to(self._device, self._vae.dtype)[None]
            for chunk in _causal_chunks(frames)
        )
        for latent in encode_chunks(self._vae, chunks, *self._tiling):
            yield latent[0, :, 0].cpu()

    def fit_colours(self) -> LatentColours:
        """A map from latents to colours, for previews; costs a few small encodes and decodes."""

        def encode(frames: Frame) -> Array:
            return torch.stack(list(self.encode_frames(iter(frames))), dim=1).float().numpy()

        return LatentColours.fit(encode, lambda latents: self.decode(torch.from_numpy(latents)))

    def _encode(
        self, data: bytes, sources: Collection[int | None], size: tuple[int, int], fit: Fit
    ) -> dict[int | None, Tensor]:
        if None in sources:
            return {None: next(self.encode_frames(iter([self._source.image(data, *size, fit)])))}
        from_start = [source for source in sources if source is not None and source >= 0]
        from_end = [-source for source in sources if source is not None and source < 0]
        latents: dict[int | None, Tensor] = {}
        if from_start:
            head = self._encode_part(data, 0, num_pixel_frames(max(from_start) + 1), size, fit)
            latents |= {source: head[source] for source in from_start}
        if from_end:
            tail = self._encode_part(data, -num_pixel_frames(max(from_end)), None, size, fit)
            latents |= {-distance: tail[-distance] for distance in from_end}
        return latents

    def _encode_part(self, data: bytes, start: int, stop: int | None, size: tuple[int, int], fit: Fit) -> list[Tensor]:
        with closing(self._source.clip(data, start, stop, *size, fit)) as frames:
            return list(self.encode_frames(frames))


def _causal_chunks(frames: Iterator[Frame]) -> Iterator[Frame]:
    """Frame 0 alone, then four at a time; a last partial group makes no latent and is left out."""
    length = 1
    chunk: list[Frame] = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == length:
            yield np.stack(chunk)
            chunk, length = [], TEMPORAL_STRIDE
