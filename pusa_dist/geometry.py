"""Pixels, latents and tokens: the integers that relate them (no torch).

Wan's VAE is causal in time: pixel frame 0 becomes latent frame 0 alone, every four further frames
become one more latent frame. In space it divides by eight, and the transformer's patches divide by
two again.
"""

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4
PATCH = 2
PIXEL_MULTIPLE = SPATIAL_STRIDE * PATCH


def num_latent_frames(num_frames: int) -> int:
    """Latent frames F of a clip: 81 -> 21. A trailing partial group of frames is not counted."""
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def num_pixel_frames(num_latents: int) -> int:
    """Pixel frames that F latent frames decode to: 21 -> 81."""
    return (num_latents - 1) * TEMPORAL_STRIDE + 1


def latent_frame_of(pixel_frame: int) -> int:
    """Latent frame that holds a pixel frame: ceil(n / 4)."""
    return -(-pixel_frame // TEMPORAL_STRIDE)


def latent_shape(channels: int, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, F, H, W) of the latents of a clip of ``num_frames`` frames of height x width pixels."""
    return channels, num_latent_frames(num_frames), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def tokens_per_frame(height: int, width: int) -> int:
    """Tokens of one latent frame: 480x832 -> 30 * 52 = 1560."""
    return (height // PIXEL_MULTIPLE) * (width // PIXEL_MULTIPLE)


def shard_sizes(num_tokens: int, degree: int) -> tuple[int, ...]:
    """Split one frame's tokens over ``degree`` ranks as evenly as whole tokens allow, no padding."""
    base, extra = divmod(num_tokens, degree)
    return tuple(base + (rank < extra) for rank in range(degree))


def num_frames_within(seconds: float, fps: int) -> int:
    """Largest 4k+1 frame count that lasts at most ``seconds`` at ``fps`` (at least 1)."""
    frames = int(seconds * fps + 1e-9)
    return max(frames - (frames - 1) % TEMPORAL_STRIDE, 1)
