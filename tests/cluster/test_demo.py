"""The demo's jobs are ones the service takes, and its picture shows what was given and what came."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.contact_sheet import Picture, SheetRow, contact_sheet, shown_frames
from cluster.demo import NOISE_MULTIPLIERS, SCENE_SEED, run, sheet_row, tasks
from pusa_dist.world.caption import caption
from pusa_dist.world.render import render
from pusa_dist.world.scene import scene
from tests.cluster.world_service import painting_service

WORLD = scene(SCENE_SEED, "held-out")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Every task of the demo with its request and its video, from a model that paints the truth."""
    requests = []

    def paint(request):
        requests.append(request)
        return render(WORLD)

    folder = tmp_path_factory.mktemp("demo")
    with painting_service(folder / "state", paint) as service:
        videos = [run(task, caption(WORLD), service.client, folder) for task in tasks(WORLD, 4)]
    return list(zip(tasks(WORLD, 4), requests, videos, strict=True)), folder


def test_the_demo_runs_every_task_and_every_noise_multiplier(done):
    jobs, folder = done
    given = [[(one.position, one.noise_multiplier) for one in request.conditioning] for _, request, _ in jobs]
    assert given == [
        [],
        [(0, 0.2)],
        *([(0, multiplier)] for multiplier in NOISE_MULTIPLIERS),
        [(0, 0.2), (4, 0.5)],
        [(0, 0.0), (2, 0.3), (4, 0.3)],
        [(0, 0.0), (1, 0.3), (2, 0.4)],
        [(0, 0.2), (1, 0.4), (4, 0.4)],
        [(0, 0.2), (1, 0.4), (3, 0.4), (4, 0.4)],
    ]
    assert len(list(folder.glob("*.mp4"))) == len(jobs)
    for task, _, _ in jobs:
        assert all((folder / "given" / one.name).read_bytes() == one.data for one in task.uploads)


def test_what_the_sheet_marks_is_what_the_service_was_given(done):
    for task, request, video in done[0]:
        row = sheet_row(task, video)
        assert task.given_latents == {one.position for one in request.conditioning}
        assert {-(-frame // 4) for frame in row.given_frames} == task.given_latents
        assert row.notes[-3:-1] == [f"measured: {WORLD.colour} {WORLD.shape},", f"{WORLD.direction}, 2.0 px a frame"]


def test_every_row_of_the_sheet_is_drawn(done):
    rows = [sheet_row(task, video) for task, _, video in done[0]]
    sheet = np.asarray(contact_sheet("demo", rows))
    height = (sheet.shape[0] - 64) // len(rows)
    for number in range(len(rows)):
        band = sheet[64 + number * height : 64 + (number + 1) * height]
        assert (np.ptp(band.reshape(-1, 3), axis=0) > 100).any()


def test_frames_that_are_shown_run_from_the_first_to_the_last():
    assert shown_frames(17) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert shown_frames(81)[-1] == 80
    assert shown_frames(5) == [0, 1, 2, 3, 4]
    assert shown_frames(1) == [0]


def test_wide_and_tall_pictures_fit_a_cell():
    for shape in ((96, 128, 3), (128, 96, 3)):
        pixels = np.full(shape, 90, np.uint8)
        row = SheetRow(
            title="x", notes=[], given=[Picture(pixels=pixels, caption="y")], frames=pixels[None],
            given_frames=frozenset(),
        )  # fmt: skip
        assert contact_sheet("demo", [row, replace(row, given=[])]).size[1] > 200
