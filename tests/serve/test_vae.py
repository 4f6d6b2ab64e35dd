"""The VAE's deployment around a stand-in for the codec: what a stopped attempt leaves behind."""

import asyncio
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pusa_dist.config import load_model_config
from pusa_dist.media.child import DecoderLostError
from pusa_dist.preview import LatentColours
from pusa_dist.request import GenerationRequest
from serve.stages import ReplicaLostError, TensorRef
from serve.vae import NUM_THREADS, Vae

REQUEST = GenerationRequest(
    model="debug", prompt="a", negative_prompt="b", width=64, height=64, num_frames=5, fps=8,
    num_inference_steps=3, guidance_scale=5.0, shift=5.0, seed=0, lora_alpha={},
)  # fmt: skip
FILES = {"video.mp4", "thumbnail.webp", "spritesheet.jpg", "frames.zip"}


class FakeCodec:
    def __init__(self, *_, **__):
        self.num_fits = 0

    def encode_inputs(self, request, inputs):
        raise DecoderLostError("killed")

    def fit_colours(self):
        self.num_fits += 1
        return LatentColours(np.concatenate([np.eye(3), np.full((1, 3), 100)]).astype(np.float32))

    def decode(self, latents):
        yield np.zeros((1, 64, 64, 3), np.uint8)
        yield np.zeros((4, 64, 64, 3), np.uint8)


@pytest.fixture
def vae(tmp_path, monkeypatch):
    monkeypatch.setattr("pusa_dist.video_codec.VideoCodec", FakeCodec)
    return Vae(load_model_config("debug"), "cpu", f"file://{tmp_path}")


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


async def latents(values=None):
    return values


def test_a_result_has_every_file(vae, tmp_path):
    files = asyncio.run(vae.decode("j", 1, REQUEST, TensorRef(latents())))
    assert {artifact.key for artifact in files.values()} == {f"jobs/j/attempts/1/{name}" for name in FILES}
    assert written(tmp_path) == FILES


@pytest.mark.parametrize("nth", [1, len(FILES)])
def test_an_attempt_stopped_while_its_files_are_written_leaves_none(vae, tmp_path, monkeypatch, nth):
    put_file, is_writing, go_on, calls = vae._artifacts.put_file, threading.Event(), threading.Event(), []

    def put_file_slowly(*arguments):
        calls.append(arguments)
        if len(calls) == nth:
            is_writing.set()
            go_on.wait(10)
        put_file(*arguments)

    async def scenario():
        decoding = asyncio.create_task(vae.decode("j", 1, REQUEST, TensorRef(latents())))
        await asyncio.to_thread(is_writing.wait, 10)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        vae._artifacts.delete("jobs/j/attempts/1")  # as the dispatcher does, too early for the last file
        go_on.set()
        await asyncio.to_thread(vae._threads.shutdown)

    monkeypatch.setattr(vae._artifacts, "put_file", put_file_slowly)
    asyncio.run(scenario())
    assert (len(calls), written(tmp_path)) == (nth, set())


def test_previews_are_small_pictures_under_the_attempts_keys_and_the_map_is_fitted_once(vae, tmp_path):
    values = np.zeros((3, 2, 8, 8), np.float32)
    values[0, 0], values[0, 1] = 55.0, -50.0
    keys = [asyncio.run(vae.preview("j", 2, step, REQUEST, TensorRef(latents(values)))) for step in (1, 2)]
    assert keys == ["jobs/j/attempts/2/preview-1.webp", "jobs/j/attempts/2/preview-2.webp"]
    assert vae._codec.num_fits == 1
    data = (tmp_path / keys[0]).read_bytes()
    assert len(data) < 2000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, image.n_frames) == ("WEBP", (64, 64), 2)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - (155, 100, 100)).max() < 6


def test_a_preview_does_not_wait_for_decodes(vae):
    go_on = threading.Event()
    for _ in range(NUM_THREADS):
        vae._threads.submit(go_on.wait, 10)
    values = np.zeros((3, 2, 8, 8), np.float32)
    asyncio.run(asyncio.wait_for(vae.preview("j", 1, 1, REQUEST, TensorRef(latents(values))), 5))
    go_on.set()


def test_decoders_that_do_not_work_are_the_replicas_trouble_not_the_requests(vae):
    with pytest.raises(ReplicaLostError):
        asyncio.run(vae.encode(REQUEST, []))
