"""What is asked of a model for a scene and a seed, and when the answer is right.

The truth of every answer is the scene: the caption is the prompt, its rendered frames are what is given, and
the object must be found by ``pusa_dist.world.measure`` where and as the scene has it. All generations have the
world's size and length and the model's own defaults, unless a task says otherwise.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from cluster.orders import Frames, Order, clip, png
from pusa_dist.world.caption import caption
from pusa_dist.world.measure import Sight, Track, psnr, track
from pusa_dist.world.render import render
from pusa_dist.world.scene import NUM_FRAMES, SIDE, SPEEDS, Scene, scene

Outcome: TypeAlias = dict[str, Any]
"""What was measured of one answer; plain JSON values."""

LAST = NUM_FRAMES - 1
NUM_LATENT_FRAMES = LAST // 4 + 1
CLIP_FRAMES = 9
"""Pixel frames of the clip that is extended: three of the video's five latent frames."""
START_MULTIPLIER, END_MULTIPLIER = 0.2, 0.5
"""Of the public code's start-and-end example."""

NEAR_START_PX = 2.0
NEAR_END_PX = 3.0
JUMP_PX = 2 * max(SPEEDS.values())
"""A step from one frame to the next that no object of this world takes: twice that of the quickest."""
BACKWARD_PX = 0.5
"""How far an object may seem to go back from one frame to the next: the error of two measured centres."""
MAX_VELOCITY_ERROR = 0.25
MAX_PSNR = 99.0
"""Stands for infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A held-out scene and the seed of its generation: the same for every model and task."""

    seed: int
    scene: Scene

    @property
    def prompt(self) -> str:
        """What is asked for."""
        return caption(self.scene)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question to a model."""

    name: str
    """As ``--task`` takes it: a number is that of the denoising steps, or an image's noise multiplier."""
    order: Callable[[Pair], Order]
    judge: Callable[[Pair, Frames], Outcome]


def held_out_pairs(count: int, first_seed: int) -> list[Pair]:
    """Pairs of consecutive seeds; their combinations of attributes never occur in training."""
    return [Pair(seed=seed, scene=scene(seed, "held-out")) for seed in range(first_seed, first_seed + count)]


def judge_text(pair: Pair, frames: Frames) -> Outcome:
    """Text-to-video: ``right`` if colour, shape and direction of the object are the prompt's.

    Colour and shape are those that most frames show, the direction that of the median slope of the centre;
    an object that is missing in half of the frames, or hardly moves, or moves aslant, is wrong.
    """
    seen = track(frames)
    right = (seen.colour, seen.shape, seen.direction) == (pair.scene.colour, pair.scene.shape, pair.scene.direction)
    return {"right": right, **_described(seen)}


def judge_image(pair: Pair, frames: Frames) -> Outcome:
    """Image-to-video, from the scene's frame 0.

    ``near``: in each of the frames 1 to 4 the object has the prompt's colour and shape, and its centre is at
    most 2 px from where the prompt's motion takes it.
    ``kept``: it is the same object to the end: of the right colour in every frame, of the right shape in most
    frames and in the last, and never more than 4 px from where it was a frame before. An object that dissolves
    while another like it appears elsewhere is not kept.
    ``moves``: its direction and the word for its speed are the prompt's.
    ``right``: kept and moves. ``first_frame`` is a fingerprint of frame 0.
    """
    seen, truth = track(frames), pair.scene
    offsets = [_offset(seen.sights[frame], truth, frame) for frame in range(1, 5)]
    near = all(_is_object(seen.sights[frame], truth) for frame in range(1, 5)) and max(offsets) <= NEAR_START_PX
    last, step = seen.sights[LAST], _largest_step(seen.sights)
    kept = _coloured(seen.sights, truth) and seen.shape == truth.shape and _is_object(last, truth) and step <= JUMP_PX
    moves = seen.direction == truth.direction and seen.pace == truth.speed
    return {
        "near": near,
        "kept": kept,
        "moves": moves,
        "right": kept and moves,
        "first_frame": fingerprint(frames[0]),
        "farthest_px": round(max(offsets), 2),
        "largest_step_px": round(step, 2),
        "last_px": round(_offset(last, truth, LAST), 2),
        **_described(seen),
    }


def judge_start_end(pair: Pair, frames: Frames) -> Outcome:
    """Start and end, from the scene's frames 0 and 16.

    ``right``: an object of the given colour is in every frame; in the last its centre is at most 3 px from that
    of the given end frame's object; and between, along the line from the given start to the given end, it never
    goes back from one frame to the next (by more than half a pixel, which is measuring error) and no single
    step takes it more than half of the way, so that it moves there and is not swapped.
    """
    seen, truth = track(frames), pair.scene
    last_px = _offset(seen.sights[LAST], truth, LAST)
    way = np.subtract(truth.centre(LAST), truth.centre(0))
    length = float(np.hypot(*way))
    along = [np.dot(one.centre, way) / length for one in seen.sights if one is not None]
    steps = np.diff(along)
    monotone = len(steps) > 0 and bool(steps.min() >= -BACKWARD_PX and steps.max() <= length / 2)
    right = _coloured(seen.sights, truth) and last_px <= NEAR_END_PX and monotone
    return {
        "right": right,
        "last_px": round(last_px, 2),
        "monotone": monotone,
        "farthest_back_px": round(float(-steps.min(initial=0.0)), 2),
        **_described(seen),
    }


def judge_extension(pair: Pair, frames: Frames) -> Outcome:
    """Extension of the scene's first nine frames: the clip's own frames come back, and eight new ones follow.

    ``right``: from the last given frame on the object has the clip's colour, and its velocity, the median slope
    of its centre, differs from the clip's by a vector of at most 25 % of the clip's speed. This is one bound
    for both: the speed is within 25 %, the direction within 14 degrees.
    """
    seen = track(frames[CLIP_FRAMES - 1 :])
    error = _relative_error(seen.velocity, pair.scene)
    return {
        "right": seen.colour == pair.scene.colour and error <= MAX_VELOCITY_ERROR,
        "velocity_error": round(error, 3),
        "last_px": round(_offset(seen.sights[-1], pair.scene, LAST), 2),
        **_described(seen),
    }


def judge_reconstruction(pair: Pair, frames: Frames) -> Outcome:
    """``psnr`` of a clip encoded and decoded by the service, over all 17 frames, in dB."""
    return {"psnr": min(psnr(frames, render(pair.scene)), MAX_PSNR), "fingerprint": fingerprint(frames)}


def judge_still(pair: Pair, frames: Frames) -> Outcome:
    """The VAE's own round trip of the scene's frame 0, as ``first_frame``."""
    return {"first_frame": fingerprint(frames[0])}


def fingerprint(pixels: Frames) -> str:
    """Equal for equal pixels."""
    return f"{zlib.crc32(np.ascontiguousarray(pixels).tobytes()):08x}"


def _order(pair: Pair, **changes: Any) -> Order:
    settings = {"num_frames": NUM_FRAMES, **changes.pop("settings", {})}
    return Order(prompt=pair.prompt, seed=pair.seed, size=f"{SIDE}x{SIDE}", settings=settings, **changes)


def _text(num_inference_steps: int) -> Callable[[Pair], Order]:
    return lambda pair: _order(pair, settings={"num_inference_steps": num_inference_steps})


def _image(noise_multiplier: float | None) -> Callable[[Pair], Order]:
    given = {"position": "start"} | ({} if noise_multiplier is None else {"noise_multiplier": noise_multiplier})
    return lambda pair: _order(pair, uploads=[png("start.png", render(pair.scene, 1)[0])], conditioning=[given])


def _start_end(pair: Pair) -> Order:
    frames = render(pair.scene)
    return _order(
        pair,
        uploads=[png("start.png", frames[0]), png("end.png", frames[LAST])],
        conditioning=[
            {"position": "start", "noise_multiplier": START_MULTIPLIER},
            {"position": "end", "noise_multiplier": END_MULTIPLIER},
        ],
    )


def _extension(pair: Pair) -> Order:
    return _order(pair, uploads=[clip("clip.mp4", render(pair.scene, CLIP_FRAMES))], extends=True)


def _reconstruction(pair: Pair) -> Order:
    """Every latent frame is given and kept exactly, so the service encodes and decodes the clip and no more."""
    given = [{"position": index, "noise_multiplier": 0.0} for index in range(NUM_LATENT_FRAMES)]
    uploads = [clip("clip.mp4", render(pair.scene))]
    return _order(pair, uploads=uploads, conditioning=given, settings=_NO_DENOISING)


def _still(pair: Pair) -> Order:
    """A video of one frame, which is given."""
    given = [{"position": 0, "noise_multiplier": 0.0}]
    uploads = [png("start.png", render(pair.scene, 1)[0])]
    return _order(pair, uploads=uploads, conditioning=given, settings={"num_frames": 1, **_NO_DENOISING})


_NO_DENOISING = {"num_inference_steps": 1, "guidance_scale": 1.0}

TASKS: Sequence[Task] = (
    Task(name="reconstruction", order=_reconstruction, judge=judge_reconstruction),
    Task(name="still", order=_still, judge=judge_still),
    Task(name="text-10", order=_text(10), judge=judge_text),
    Task(name="text-50", order=_text(50), judge=judge_text),
    Task(name="image-0", order=_image(0.0), judge=judge_image),
    Task(name="image", order=_image(None), judge=judge_image),
    Task(name="start-end", order=_start_end, judge=judge_start_end),
    Task(name="extension", order=_extension, judge=judge_extension),
)


def questions(
    pairs: Sequence[Pair], text_pairs: Sequence[Pair], tasks: Sequence[Task] = TASKS
) -> list[tuple[Task, Pair]]:
    """Every task for every pair; text-to-video, where small differences are judged, for pairs of its own."""
    return [(task, pair) for task in tasks for pair in (text_pairs if task.judge is judge_text else pairs)]


def _is_object(seen: Sight | None, truth: Scene) -> bool:
    return seen is not None and (seen.colour, seen.shape) == (truth.colour, truth.shape)


def _coloured(sights: Sequence[Sight | None], truth: Scene) -> bool:
    return all(one is not None and one.colour == truth.colour for one in sights)


def _largest_step(sights: Sequence[Sight | None]) -> float:
    """Pixels between two neighbouring frames; 0 when the object is never seen twice."""
    pairs = [(one, other) for one, other in pairwise(sights) if one is not None and other is not None]
    return max((float(np.hypot(*np.subtract(one.centre, other.centre))) for one, other in pairs), default=0.0)


def _offset(seen: Sight | None, truth: Scene, frame: int) -> float:
    """Pixels from where the scene has its object; a whole picture's side when there is none."""
    return float(SIDE) if seen is None else float(np.hypot(*np.subtract(seen.centre, truth.centre(frame))))


def _relative_error(found: tuple[float, float] | None, truth: Scene) -> float:
    """Of a velocity; that of an object that stands still when there is none."""
    return float(np.hypot(*np.subtract(found or (0.0, 0.0), truth.velocity)) / np.hypot(*truth.velocity))


def _described(seen: Track) -> Outcome:
    return {
        "colour": seen.colour,
        "shape": seen.shape,
        "direction": seen.direction,
        "speed": None if seen.speed is None else round(seen.speed, 3),
        "frames_without_object": sum(one is None for one in seen.sights),
    }
