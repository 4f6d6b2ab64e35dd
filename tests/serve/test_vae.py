"""The VAE's deployment around a stand-in for the codec: what a stopped attempt leaves behind."""

import asyncio
import errno
import io
import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pusa_dist.config import load_model_config
from pusa_dist.media.child import DecoderLostError
from pusa_dist.media.mp4 import Mp4Writer
from pusa_dist.preview import LatentColours
from pusa_dist.request import GenerationRequest
from serve.stages import ReplicaLostError, TensorRef
from serve.store.artifacts import StorageError
from serve.vae import Vae
from serve.watched import StuckError
from tests.serve.dispatcher_support import run

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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, av.error.OSError], ids=["python", "ffmpeg"])
def test_a_scratch_disk_without_room_is_waited_for_and_not_named(vae, monkeypatch, world, kind, number):
    write, fulls = Mp4Writer.write, [kind(number, os.strerror(number), "/scratch/5ecret/video.mp4")] * 2

    def write_when_there_is_room(*arguments):
        if fulls:
            raise fulls.pop()
        write(*arguments)

    monkeypatch.setattr(Mp4Writer, "write", write_when_there_is_room)
    with pytest.raises(StorageError) as full:
        asyncio.run(vae.decode("j", 1, REQUEST, TensorRef(latents())))
    assert (full.value.errno, "5ecret" in str(full.value)) == (number, False)
    world.stages.decode = lambda job, _: vae.decode(job.id, job.attempt, REQUEST, TensorRef(latents()))
    world.add("j")

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt, fulls) == ("completed", 1, [])


def test_another_failure_of_the_disk_is_none_that_room_would_mend(vae, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Mp4Writer, "write", fail)
    with pytest.raises(OSError, match="Input/output error") as failed:
        asyncio.run(vae.decode("j", 1, REQUEST, TensorRef(latents())))
    assert not isinstance(failed.value, StorageError)


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
        await asyncio.to_thread(vae._decodes.shutdown)

    monkeypatch.setattr(vae._artifacts, "put_file", put_file_slowly)
    asyncio.run(scenario())
    assert (len(calls), written(tmp_path)) == (nth, set())


def test_a_decode_stopped_before_its_turn_removes_nothing_and_one_stopped_in_it_not_on_the_loop(vae, monkeypatch):
    go_on, removed = threading.Event(), []
    monkeypatch.setattr(vae._artifacts, "delete", lambda key: removed.append((key, threading.current_thread())))
    monkeypatch.setattr(vae._codec, "decode", lambda _: iter([go_on.wait(10)][:0]))

    async def scenario():
        decoding, queued = (
            asyncio.create_task(vae.decode(name, 1, REQUEST, TensorRef(latents()))) for name in ("running", "queued")
        )
        await asyncio.sleep(0.1)
        for one in (queued, decoding):
            one.cancel()
            with pytest.raises(asyncio.CancelledError):
                await one
        assert removed == []  # nor has the loop waited for the bucket
        go_on.set()
        await asyncio.to_thread(vae._decodes.shutdown)

    asyncio.run(scenario())
    ((key, thread),) = removed
    assert key == "jobs/running/attempts/1"
    assert thread is not threading.main_thread()


def test_files_that_a_stopped_decode_cannot_remove_are_told_of(vae, monkeypatch, caplog):
    def fail(_):
        raise StorageError(errno.EIO, "away")

    monkeypatch.setattr(vae._artifacts, "delete", fail)
    vae._remove("jobs/j/attempts/1")
    assert "files of a stopped attempt stay behind" in caplog.text


def test_every_input_that_is_read_and_every_part_that_is_written_says_that_work_moves_on(held, monkeypatch):
    said, moves_on = [], held._decodes.moves_on

    def put_file(_, path, moves_on):
        before = len(said)
        moves_on()
        assert len(said) == before + 1

    for thread in (held._encodes, held._decodes):
        monkeypatch.setattr(thread, "moves_on", lambda: said.append(moves_on()))
    monkeypatch.setattr(held._artifacts, "read", lambda key: len(said))
    seen = []
    monkeypatch.setattr(held._codec, "encode_inputs", lambda request, inputs: seen.extend(inputs))
    asyncio.run(held.encode(REQUEST, ["a", "b", "c"]))
    assert [after - seen[0] for after in seen] == [0, 1, 2]
    held._codec.chunks.release(2)
    monkeypatch.setattr(held._artifacts, "put_file", put_file)
    asyncio.run(held.decode("j", 1, REQUEST, TensorRef(latents())))


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
    for thread in (vae._encodes, vae._decodes):
        thread.submit(go_on.wait, 10)
    values = np.zeros((3, 2, 8, 8), np.float32)
    asyncio.run(asyncio.wait_for(vae.preview("j", 1, 1, REQUEST, TensorRef(latents(values))), 5))
    go_on.set()


def test_decoders_that_do_not_work_are_the_replicas_trouble_not_the_requests(vae):
    with pytest.raises(ReplicaLostError):
        asyncio.run(vae.encode(REQUEST, []))


def test_frames_are_decoded_while_those_before_them_are_written(vae, monkeypatch):
    is_decoding, write, waited = threading.Event(), Mp4Writer.write, []

    def decode(latents):
        yield np.zeros((1, 64, 64, 3), np.uint8)
        is_decoding.set()
        yield np.zeros((4, 64, 64, 3), np.uint8)

    def write_late(writer, frames):
        waited.append(is_decoding.wait(10))
        write(writer, frames)

    monkeypatch.setattr(vae._codec, "decode", decode)
    monkeypatch.setattr(Mp4Writer, "write", write_late)
    asyncio.run(vae.decode("j", 1, REQUEST, TensorRef(latents())))
    assert waited == [True, True]


def test_an_error_of_the_decoder_is_the_decodes(vae, monkeypatch):
    def decode(latents):
        yield np.zeros((1, 64, 64, 3), np.uint8)
        raise ZeroDivisionError

    monkeypatch.setattr(vae._codec, "decode", decode)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(vae.decode("j", 1, REQUEST, TensorRef(latents())))


class HeldCodec(FakeCodec):
    """Holds every chunk until it is let go; counts how many decode at once."""

    def __init__(self, *_, source, **__):
        super().__init__()
        self.source, self.holds, self.chunks = source, threading.Semaphore(0), threading.Semaphore(0)
        self.num_now = self.num_most = 0

    def decode(self, latents):
        self.num_now += 1
        self.num_most = max(self.num_most, self.num_now)
        for chunk in super().decode(latents):
            self.holds.release()
            assert self.chunks.acquire(timeout=20)
            yield chunk
        self.num_now -= 1

    def encode_inputs(self, request, inputs):
        return "latents"


@pytest.fixture
def held(tmp_path, monkeypatch):
    monkeypatch.setattr("pusa_dist.video_codec.VideoCodec", HeldCodec)
    vae = Vae(load_model_config("debug"), "cpu", f"file://{tmp_path}", stuck_after_s=10.0)
    vae._lent.lend = lambda value: value
    return vae


def test_decodes_take_turns_and_an_encode_need_not_wait_for_them(held):
    async def scenario():
        decodes = [asyncio.create_task(held.decode(f"j{n}", 1, REQUEST, TensorRef(latents()))) for n in range(3)]
        await asyncio.sleep(0.2)
        assert await asyncio.wait_for(held.encode(REQUEST, []), 5) == "latents"
        held._codec.chunks.release(6)
        await asyncio.gather(*decodes)

    asyncio.run(scenario())
    assert held._codec.num_most == 1


def test_a_decode_that_hangs_is_noticed_even_when_nobody_waits_for_it_and_a_long_one_is_well(held):
    now, codec = [0.0], held._codec
    held._decodes._clock = lambda: now[0]

    async def scenario():
        decoding = asyncio.create_task(held.decode("j", 1, REQUEST, TensorRef(latents())))
        for _ in range(2):  # each chunk takes as long as it may
            assert await asyncio.to_thread(codec.holds.acquire, timeout=20)
            now[0] += 30.0
            await held.check_health()
            codec.chunks.release()
        await decoding
        await held.check_health()
        decoding = asyncio.create_task(held.decode("j", 2, REQUEST, TensorRef(latents())))
        assert await asyncio.to_thread(codec.holds.acquire, timeout=20)
        decoding.cancel()
        await asyncio.gather(decoding, return_exceptions=True)
        now[0] += 11.0
        with pytest.raises(StuckError, match="decode"):
            await held.check_health()
        codec.chunks.release(2)

    asyncio.run(scenario())


def test_an_encode_moves_on_with_every_frame_that_it_reads(held, monkeypatch):
    said = []
    monkeypatch.setattr(held._codec.source, "_moves_on", lambda: said.append(True))
    monkeypatch.setattr(held._codec.source, "_source", Stills())
    assert list(held._codec.source.clip(b"", 0, 3, 8, 8, "cover")) == [0, 1, 2]
    assert len(said) == 3
    assert held._codec.source.image(b"", 8, 8, "cover") == 0
    assert len(said) == 4


class Stills:
    def image(self, *_):
        return 0

    def clip(self, *_):
        yield from range(3)
