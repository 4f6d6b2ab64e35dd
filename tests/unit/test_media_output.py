"""What is written: the MP4, the thumbnail, the contact sheet and the lossless frames."""

import io
import os
import subprocess
import sys
import threading
import zipfile

import av
import numpy as np
import pytest
from PIL import Image

from pusa_dist.media import stills
from pusa_dist.media.clips import iter_frames
from pusa_dist.media.mp4 import Mp4Writer
from pusa_dist.media.probe import probe
from pusa_dist.media.stills import FramesZip, SpriteSheet, thumbnail


def moving(num_frames: int, width: int = 64, height: int = 48) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    frames = [np.stack([columns * 3 % 256, rows * 4 % 256, np.full_like(rows, 9 * t)], -1) for t in range(num_frames)]
    return np.stack(frames).astype(np.uint8)


def written(path, frames, fps: int = 8, chunk: int = 4) -> bytes:
    with Mp4Writer(path, frames.shape[2], frames.shape[1], fps) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])
    return path.read_bytes()


def test_an_mp4_plays_in_a_browser_and_shows_the_frames(tmp_path):
    frames = moving(17)
    data = written(tmp_path / "out.mp4", frames, fps=24)
    info = probe(data)
    assert (info.kind, info.width, info.height, info.num_frames) == ("clip", 64, 48, 17)
    assert data.index(b"moov") < data.index(b"mdat")  # it starts playing before it is loaded
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 24
        assert float(stream.duration * stream.time_base) == pytest.approx(17 / 24, abs=1e-3)
    difference = np.abs(np.stack(list(iter_frames(data))).astype(int) - frames)
    assert difference.mean() < 5  # chroma is stored at half the size
    assert difference.mean(axis=(0, 1, 2)).max() < 8  # no channel is shifted


def test_an_mp4_has_the_same_bytes_for_the_same_frames_however_they_are_handed_over(tmp_path):
    frames = moving(9)
    first = written(tmp_path / "a.mp4", frames)
    assert written(tmp_path / "b.mp4", frames, chunk=1) == first
    assert written(tmp_path / "c.mp4", frames[::-1]) != first


WRITE_ONE = """
import sys, numpy as np
from pusa_dist.media.mp4 import Mp4Writer
t, y, x = np.ogrid[:4, :480, :832]
frames = np.stack([(x * 7 + t * 9) % 256 + 0 * y, (y * 5 + t * 3) % 256 + 0 * x, (x * y + t) % 256], -1) // 2
frames += np.random.default_rng(0).integers(0, 128, frames.shape)
with Mp4Writer(sys.argv[1], 832, 480, 8) as writer:
    writer.write(frames.astype(np.uint8))
"""


def test_what_was_in_memory_before_does_not_reach_the_bytes(tmp_path):
    written = []
    for fill in ("0", "1", "85"):
        path = tmp_path / f"{fill}.mp4"
        env = {**os.environ, "MALLOC_PERTURB_": fill, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", WRITE_ONE, str(path)], env=env, check=True)
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


def test_a_single_frame_makes_an_mp4(tmp_path):
    assert probe(written(tmp_path / "one.mp4", moving(1))).num_frames == 1


def test_a_writer_left_by_an_error_leaves_no_half_a_file(tmp_path):
    def fail_half_way():
        with Mp4Writer(tmp_path / "half.mp4", 64, 48, 8) as writer:
            writer.write(moving(100))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "expected"), [((832, 480), (320, 185)), ((480, 832), (185, 320)), ((64, 48), (64, 48))]
)
def test_a_thumbnail_is_small_and_keeps_its_aspect(size, expected):
    frame = moving(1, *size)[0]
    image = Image.open(io.BytesIO(thumbnail(frame)))
    assert image.format == "WEBP"
    assert image.size == expected
    assert thumbnail(frame) == thumbnail(frame)


@pytest.mark.parametrize(("num_frames", "grid"), [(1, (1, 1)), (2, (2, 1)), (5, (3, 2)), (17, (4, 4)), (81, (4, 4))])
def test_a_spritesheet_shows_evenly_spaced_frames_in_order(num_frames, grid):
    frames = np.stack(
        [np.full((48, 64, 3), round(255 * i / max(num_frames - 1, 1)), np.uint8) for i in range(num_frames)]
    )
    sheet = SpriteSheet(num_frames)
    sheet.write(frames)
    image = Image.open(io.BytesIO(sheet.to_jpeg()))
    assert image.format == "JPEG"
    assert image.size == (grid[0] * 64, grid[1] * 48)
    cells = [
        np.asarray(image)[48 * row + 24, 64 * column + 32, 0] for row in range(grid[1]) for column in range(grid[0])
    ]
    shown = [int(value) for value in cells[: min(num_frames, 16)]]
    assert shown == sorted(shown)
    assert len(set(shown)) == len(shown)
    if num_frames > 1:
        assert shown[0] < 4
        assert shown[-1] > 251


def test_a_spritesheet_of_a_large_video_is_bounded_and_repeats():
    frames = moving(5, 1280, 720)
    sheets = []
    for _ in range(2):
        sheet = SpriteSheet(5)
        sheet.write(frames[:1])
        sheet.write(frames[1:])
        sheets.append(sheet.to_jpeg())
    assert sheets[0] == sheets[1]
    assert max(Image.open(io.BytesIO(sheets[0])).size) <= 1280


def test_a_frames_zip_holds_every_frame_without_loss_and_repeats(tmp_path):
    frames = moving(6)
    paths = [tmp_path / "a.zip", tmp_path / "b.zip"]
    for path in paths:
        with FramesZip(path) as out:
            out.write(frames[:1])
            out.write(frames[1:])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with zipfile.ZipFile(paths[0]) as archive:
        assert archive.namelist() == [f"{index:05d}.png" for index in range(6)]
        for name, expected in zip(archive.namelist(), frames, strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(archive.read(name)))), expected)


def test_whoever_writes_lossless_frames_does_not_wait_for_their_compression(tmp_path, monkeypatch):
    go_on, compress = threading.Event(), stills._png

    def compress_later(frame):
        assert go_on.wait(10)
        return compress(frame)

    monkeypatch.setattr(stills, "_png", compress_later)
    frames = moving(4)
    with FramesZip(tmp_path / "a.zip") as out:
        out.write(frames)
        go_on.set()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert [archive.read(name) for name in archive.namelist()] == [compress(frame) for frame in frames]


def test_a_frame_that_cannot_be_compressed_fails_the_zip(tmp_path):
    out = FramesZip(tmp_path / "a.zip")
    out.write(np.zeros((1, 4, 4, 7), np.uint8))
    with pytest.raises(TypeError):
        out.close()
