"""From a request's inputs to given latents, and from latents to frames."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pusa_dist.checkpoint.vae import build_vae
from pusa_dist.config import load_model_config
from pusa_dist.errors import RequestError
from pusa_dist.media.clips import fit_clip_frame, iter_frames
from pusa_dist.media.frames import to_model_range
from pusa_dist.media.images import fit_image
from pusa_dist.media.mp4 import Mp4Writer
from pusa_dist.media.probe import probe
from pusa_dist.model.vae import encode
from pusa_dist.request import ConditioningParams, RequestParams, resolve_request
from pusa_dist.video_codec import VideoCodec

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def model():
    return load_model_config("debug")


@pytest.fixture(scope="module")
def codec(model):
    return VideoCodec(model, "cpu")


@pytest.fixture(scope="module")
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 100, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rows, columns = np.mgrid[0:64, 0:96]
    frames = [np.stack([(columns + 9 * t) % 256, rows * 3, np.full_like(rows, 12 * t)], -1) for t in range(20)]
    with Mp4Writer(path, 96, 64, 8) as writer:
        writer.write(np.stack(frames).astype(np.uint8))
    return path.read_bytes()


def request_for(model, inputs, *entries):
    params = RequestParams(
        prompt="x",
        seed=0,
        width=WIDTH,
        height=HEIGHT,
        num_frames=17,
        conditioning=[ConditioningParams(**entry) for entry in entries],
    )
    return resolve_request(params, [probe(data) for data in inputs], model)


def fitted(clip: bytes, start: int, stop: int | None) -> np.ndarray:
    """Frames start..stop of a clip as the codec must bring them to the video's size."""
    return np.stack([fit_clip_frame(frame, WIDTH, HEIGHT, "crop") for frame in list(iter_frames(clip))[start:stop]])


def latents_of(codec, frames) -> torch.Tensor:
    return encode(codec._vae, torch.from_numpy(to_model_range(frames))[None])[0]


def test_without_conditioning_nothing_is_given(codec, model):
    assert codec.encode_inputs(request_for(model, []), []) is None


def test_an_image_is_encoded_alone_as_a_video_of_one_frame(codec, model, picture):
    request = request_for(model, [picture], {"position": "end"}, {"position": 1, "input": 0, "fit": "letterbox"})
    given = codec.encode_inputs(request, [picture])
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert given.shape == (16, 2, 6, 8)
    for place, fit in enumerate(["stretch", "letterbox"]):
        alone = latents_of(codec, fit_image(pixels, WIDTH, HEIGHT, fit)[None])
        assert torch.equal(given[:, place : place + 1], alone)


def test_latents_come_in_the_order_of_the_request(codec, model, picture, clip):
    entries = [{"input": 1, "position": 3}, {"input": 0, "position": 0}, {"input": 1, "position": 2, "source": 0}]
    given = codec.encode_inputs(request_for(model, [picture, clip], *entries), [picture, clip])
    for place, entry in enumerate(entries):
        used = [data if entry["input"] == index else None for index, data in enumerate([picture, clip])]
        entry = {**entry, "input": 0}
        data = [item for item in used if item is not None]
        alone = codec.encode_inputs(request_for(model, data, entry), data)
        assert torch.equal(given[:, place], alone[:, 0])


def test_a_clip_is_encoded_from_its_start_and_the_source_picks_the_latent(codec, model, clip):
    whole = latents_of(codec, fitted(clip, 0, 17))
    request = request_for(model, [clip], {"position": 2}, {"position": 0}, {"position": 3, "source": 1})
    given = codec.encode_inputs(request, [clip])
    assert torch.equal(given, whole[:, [2, 0, 1]])


def test_negative_sources_are_the_clips_last_frames_encoded_as_a_clip_of_their_own(codec, model, clip):
    # The clip has 20 frames: its tail of 3 latents is frames 11..19, and latent -3 is frame 11 alone.
    tail = latents_of(codec, fitted(clip, -9, None))
    request = request_for(
        model,
        [clip],
        {"position": 0, "source": -3},
        {"position": 1, "source": -2},
        {"position": 2, "source": -1},
        {"position": 4, "source": 4},
    )
    given = codec.encode_inputs(request, [clip])
    assert torch.equal(given[:, :3], tail)
    first = latents_of(codec, fitted(clip, 11, 12))
    assert torch.equal(given[:, :1], first)
    head = latents_of(codec, fitted(clip, 0, 17))
    assert torch.equal(given[:, 3], head[:, 4])


def test_the_last_latent_alone_is_the_clips_last_frame(codec, model, clip):
    given = codec.encode_inputs(request_for(model, [clip], {"position": 0, "source": -1}), [clip])
    last = fitted(clip, 19, 20)
    assert torch.equal(given, latents_of(codec, last))


def test_a_clip_that_is_shorter_than_was_probed_is_refused(codec, model, clip, tmp_path):
    request = request_for(model, [clip], {"position": 4})
    with Mp4Writer(tmp_path / "short.mp4", 96, 64, 8) as writer:
        writer.write(np.stack(list(iter_frames(clip))[:9]))
    with pytest.raises(RequestError) as caught:
        codec.encode_inputs(request, [(tmp_path / "short.mp4").read_bytes()])
    assert caught.value.code == "clip_too_short"


def test_decoding_gives_uint8_frames_as_each_latent_is_decoded(codec):
    latents = torch.randn(16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    chunks = codec.decode(latents)
    shapes = [chunk.shape for chunk in chunks]
    assert shapes == [(1, 48, 64, 3), (4, 48, 64, 3), (4, 48, 64, 3)]
    frames = np.concatenate(list(codec.decode(latents)))
    assert frames.dtype == np.uint8
    assert frames.flags["C_CONTIGUOUS"]
    assert frames.std() > 20


def test_brightness_is_cut_off_to_whole_levels_not_rounded(codec, monkeypatch):
    values = torch.tensor([-1.0, -1.0 + 1.99 / 127.5, 0.0, 1.0]).view(1, 1, 1, 1, 4).expand(1, 3, 1, 1, 4)
    monkeypatch.setattr("pusa_dist.video_codec.decode_chunks", lambda *_: iter([values]))
    assert next(codec.decode(torch.zeros(16, 1, 1, 1)))[0, 0, :, 0].tolist() == [0, 1, 127, 255]


@torch.no_grad()
def test_decoding_latent_by_latent_takes_little_more_than_diffusers_decoding_at_once(model):
    codec, vae = VideoCodec(model, "cpu"), build_vae(model, device="cpu", precision="fp32")
    latents = torch.randn(16, 5, 12, 16)
    ways = {
        "ours": lambda: sum(len(chunk) for chunk in codec.decode(latents)),
        "theirs": lambda: vae.decode(latents[None]).sample.shape[2],
    }
    spent = {name: [] for name in ways}
    for _ in range(3):
        for name, decode in ways.items():
            start = time.process_time()
            assert decode() == 17
            spent[name].append(time.process_time() - start)
    assert min(spent["ours"]) < 1.5 * min(spent["theirs"])  # 1.0 when written
