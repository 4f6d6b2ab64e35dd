import pytest

from pusa_dist import GenerationRequest, MediaInfo, RequestError, RequestParams, load_model_config, resolve_request
from pusa_dist.request import MAX_PROMPT_BYTES, ConditioningParams, resolve_position

MODEL = load_model_config("debug")
TWO_EXPERT = load_model_config("debug-two-expert")
IMAGE = MediaInfo(kind="image", width=640, height=480, num_frames=1)
CLIP = MediaInfo(kind="clip", width=640, height=480, num_frames=17)
SHORT_CLIP = MediaInfo(kind="clip", width=640, height=480, num_frames=4)


def resolve(inputs=(), model=MODEL, **params):
    return resolve_request(RequestParams(**{"prompt": "a cat", "seed": 3, **params}), inputs, model)


def entry(**values):
    return ConditioningParams(**values)


def test_defaults_come_from_the_model():
    request = resolve()
    d = MODEL.defaults
    assert (request.width, request.height, request.num_frames, request.fps) == (d.width, d.height, d.num_frames, d.fps)
    assert request.lora_alpha == {"main": 1.4}
    assert request.num_inference_steps == 10
    assert request.conditioning == ()


def test_a_request_survives_json():
    request = resolve([CLIP, IMAGE], conditioning=[entry(input=0, position=1), entry(input=1, position="end")])
    assert GenerationRequest.from_dict(request.to_dict()) == request


def test_one_image_alone_is_the_start():
    (given,) = resolve([IMAGE]).conditioning
    assert (given.input, given.position, given.noise_multiplier, given.source, given.fit) == (
        0,
        0,
        0.2,
        None,
        "stretch",
    )


def test_images_feed_one_entry_each_and_one_clip_feeds_all():
    images = resolve([IMAGE, IMAGE], conditioning=[entry(position="start"), entry(position="end")]).conditioning
    assert [one.input for one in images] == [0, 1]
    clip = resolve([CLIP], conditioning=[entry(position=0), entry(position=3, source=-1)]).conditioning
    assert [(one.input, one.source, one.fit) for one in clip] == [(0, 0, "crop"), (0, -1, "crop")]


@pytest.mark.parametrize(
    ("position", "latent"),
    [("start", 0), ("end", 4), (2, 2), ({"frame": 0}, 0), ({"frame": 1}, 1), ({"frame": 4}, 1), ({"frame": 5}, 2)],
)
def test_positions_resolve_to_latent_frames(position, latent):
    assert resolve_position(position, 5, "p") == latent


@pytest.mark.parametrize(("seconds", "frames"), [(1.0, 5), (2.0, 13), (2.125, 17), (0.2, 1)])
def test_seconds_become_the_largest_4k_plus_1_frames_within_them(seconds, frames):
    assert resolve(seconds=seconds).num_frames == frames


def test_lora_strength_is_a_number_for_all_experts_or_one_each():
    assert resolve(model=TWO_EXPERT, lora_alpha=2.0).lora_alpha == {"high": 2.0, "low": 2.0}
    assert resolve(model=TWO_EXPERT, lora_alpha={"high": 2.0}).lora_alpha == {"high": 2.0, "low": 1.4}


BAD = [
    ({"prompt": "  "}, (), "prompt", "empty_prompt"),
    ({"prompt": "x" * (MAX_PROMPT_BYTES + 1)}, (), "prompt", "prompt_too_long"),
    ({"width": 100}, (), "size", "invalid_size"),
    ({"width": 0, "height": 0}, (), "size", "invalid_size"),
    ({"width": 4096}, (), "size", "size_too_large"),
    ({"width": 640, "height": 640, "num_frames": 161}, (), "size", "too_many_tokens"),
    ({"num_frames": 16}, (), "pusa.num_frames", "invalid_num_frames"),
    ({"num_frames": 0}, (), "pusa.num_frames", "out_of_range"),
    ({"num_frames": 17, "seconds": 2.0}, (), "seconds", "conflict"),
    ({"seconds": 0.0}, (), "seconds", "out_of_range"),
    ({"num_inference_steps": 0}, (), "pusa.num_inference_steps", "out_of_range"),
    ({"num_inference_steps": 51}, (), "pusa.num_inference_steps", "out_of_range"),
    ({"guidance_scale": float("nan")}, (), "pusa.guidance_scale", "out_of_range"),
    ({"fps": 0}, (), "pusa.fps", "out_of_range"),
    ({"seed": -1}, (), "pusa.seed", "out_of_range"),
    ({"lora_alpha": 9.0}, (), "pusa.lora_alpha", "out_of_range"),
    ({"lora_alpha": {"high": 1.0}}, (), "pusa.lora_alpha", "unknown_expert"),
    ({"conditioning": [entry(position=5)]}, (IMAGE,), "pusa.conditioning[0].position", "position_out_of_range"),
    ({"conditioning": [entry(position=-1)]}, (IMAGE,), "pusa.conditioning[0].position", "position_out_of_range"),
    ({"conditioning": [entry(position="middle")]}, (IMAGE,), "pusa.conditioning[0].position", "invalid_position"),
    (
        {"conditioning": [entry(position={"frame": 17})]},
        (IMAGE,),
        "pusa.conditioning[0].position",
        "position_out_of_range",
    ),
    ({"conditioning": [entry(position={"frames": 1})]}, (IMAGE,), "pusa.conditioning[0].position", "invalid_position"),
    ({"conditioning": [entry()]}, (IMAGE,), "pusa.conditioning[0].position", "missing_position"),
    (
        {"conditioning": [entry(position=0), entry(position="start", input=0)]},
        (IMAGE,),
        "pusa.conditioning[1].position",
        "duplicate_position",
    ),
    (
        {"conditioning": [entry(position=0, noise_multiplier=1.1)]},
        (IMAGE,),
        "pusa.conditioning[0].noise_multiplier",
        "out_of_range",
    ),
    (
        {"conditioning": [entry(position=0), entry(position=1)]},
        (IMAGE,),
        "pusa.conditioning[1].input",
        "input_out_of_range",
    ),
    ({"conditioning": [entry(position=0, source=0)]}, (IMAGE,), "pusa.conditioning[0].source", "not_supported"),
    ({"conditioning": [entry(position=3)]}, (SHORT_CLIP,), "pusa.conditioning[0].source", "clip_too_short"),
    ({"conditioning": [entry(position=0, source=-2)]}, (SHORT_CLIP,), "pusa.conditioning[0].source", "clip_too_short"),
    ({"conditioning": [entry(position=0)]}, (IMAGE, IMAGE), "pusa.conditioning", "unused_input"),
    ({}, (CLIP,), "pusa.conditioning", "missing_conditioning"),
]


@pytest.mark.parametrize(("params", "inputs", "param", "code"), BAD)
def test_what_cannot_be_honoured_is_refused_by_name(params, inputs, param, code):
    with pytest.raises(RequestError) as caught:
        resolve(inputs, **params)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "bounds"),
    [
        ("seconds", 0.0, "0.04167 to 6.708"),
        ("seconds", 7.0, "0.04167 to 6.708"),
        ("lora_alpha", 9.0, "0.1 to 5"),
        ("guidance_scale", 0.5, "1 to 30"),
    ],
)
def test_the_bounds_that_a_refusal_names_are_short_and_accepted(name, wrong, bounds):
    with pytest.raises(RequestError, match=f"use {bounds}$"):
        resolve(fps=24, **{name: wrong})
    for bound in bounds.split(" to "):
        assert resolve(fps=24, **{name: float(bound)})


def test_a_model_without_a_lora_refuses_a_strength():
    from dataclasses import replace

    with pytest.raises(RequestError, match="has no LoRA"):
        resolve(model=replace(MODEL, lora=None), lora_alpha=1.0)
