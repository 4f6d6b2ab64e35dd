"""Extending a clip is ordinary conditioning: its last latent frames become the first of a new video.

The number of given latents and their multipliers are those of Pusa's own extension example: the nearer
a frame is to the new ones, the more freedom it gets, so that the seam does not show.
"""

from dataclasses import replace

from pusa_dist.config import ModelConfig
from pusa_dist.errors import RequestError
from pusa_dist.geometry import num_latent_frames
from pusa_dist.request import ConditioningParams, MediaInfo, RequestParams, resolve_request

NOISE_MULTIPLIERS = (0.0, 0.3, 0.4, 0.5)


def extend_clip(params: RequestParams, clip: MediaInfo, model: ModelConfig) -> RequestParams:
    """Give the new video the clip's last latent frames as its first.

    Raises:
        RequestError: what is to be extended is an image, the positions are already given, or the new
            video has no frame besides the given ones.
    """
    if clip.kind != "clip":
        raise RequestError(
            "video is an image; use POST /v1/videos with it as input_reference to start a video from it",
            "video",
            "not_a_clip",
        )
    if params.conditioning:
        raise RequestError(
            "an extension sets pusa.conditioning itself; leave it out, or use POST /v1/videos to place frames yourself",
            "pusa.conditioning",
            "conflict",
        )
    num_latents = resolve_request(params, (), model).num_latent_frames
    num_given = min(len(NOISE_MULTIPLIERS), num_latents - 1, num_latent_frames(clip.num_frames))
    if num_given == 0:
        raise RequestError(
            "an extension needs a new video of more than one latent frame; ask for at least 5 frames",
            "seconds",
            "too_short",
        )
    given = tuple(
        ConditioningParams(input=0, position=index, source=index - num_given, noise_multiplier=NOISE_MULTIPLIERS[index])
        for index in range(num_given)
    )
    return replace(params, conditioning=given)
