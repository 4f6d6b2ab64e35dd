"""The quality table: a perfect model reaches all of it, and every fault is seen by the task it spoils."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cluster.orders import Order, clip, make, png
from cluster.quality import __main__ as command
from cluster.quality.intervals import Estimate, difference, mean, proportion
from cluster.quality.run import adaptation_cost, answers
from cluster.quality.table import Requirement, markdown, rows, shown
from cluster.quality.tasks import (
    TASKS,
    Pair,
    held_out_pairs,
    judge_extension,
    judge_image,
    judge_reconstruction,
    judge_start_end,
    judge_text,
    questions,
)
from pusa_dist.media.clips import iter_frames
from pusa_dist.media.images import read_image
from pusa_dist.world.render import render
from pusa_dist.world.scene import BACKGROUNDS, COLOURS, SHAPES, held_out, scene
from serve.__main__ import _parser
from serve.commands.options import read_config
from tests.cluster.world_service import painting_service, true_frames

PAIRS = held_out_pairs(12, 500)


def test_pairs_are_held_out_and_the_same_every_time():
    assert held_out_pairs(12, 500) == PAIRS
    for pair in PAIRS:
        one = pair.scene
        assert held_out((one.shape, one.colour, one.size, one.direction, one.speed, one.background))


def test_a_perfect_model_is_right_in_every_task_through_the_api(tmp_path):
    with painting_service(tmp_path) as service:
        outcomes, pictures = answers(service.client, questions(PAIRS[:2], PAIRS[:3]), in_flight=3)
        assert service.store.page("local", None, 10, "desc")[0] == []  # every job was removed again
    assert set(outcomes) == {task.name for task in TASKS} == set(pictures)
    for task, answered in outcomes.items():
        assert len(answered) == (3 if "text" in task else 2)
        assert all(one.get("right", True) and one.get("near", True) for one in answered), task
    table = rows(outcomes, outcomes, adaptation_cost=0.1)
    missed = [str(one) for row in table for one in row.requirements if one.verdict == "not reached"]
    assert [text.partition(" +0.0")[0] for text in missed] == ["over base"]  # the model is no better than itself


def test_what_is_sent_gives_the_frames_that_are_meant(tmp_path):
    sent = {}
    with painting_service(
        tmp_path, lambda request: sent.setdefault(len(sent), request) and true_frames(request)
    ) as one:
        for task in TASKS:
            make(one.client, task.order(PAIRS[0]))
    given = {
        task.name: [(entry.position, entry.source, entry.noise_multiplier) for entry in sent[index].conditioning]
        for index, task in enumerate(TASKS)
    }
    assert given == {
        "reconstruction": [(n, n, 0.0) for n in range(5)],
        "still": [(0, None, 0.0)],
        "text-10": [],
        "text-50": [],
        "image-0": [(0, None, 0.0)],
        "image": [(0, None, 0.2)],
        "start-end": [(0, None, 0.2), (4, None, 0.5)],
        "extension": [(0, -3, 0.0), (1, -2, 0.3), (2, -1, 0.4)],
    }
    assert [sent[n].num_inference_steps for n in range(len(TASKS))] == [1, 1, 10, 50, 10, 10, 10, 10]
    assert {(one.seed, one.width, one.height) for one in sent.values()} == {(500, 64, 64)}
    assert {one.num_frames for n, one in sent.items() if TASKS[n].name != "still"} == {17}


def another(word, words):
    return next(one for one in words if one != word)


def wrong_colour(one):
    return render(replace(one, colour=another(one.colour, COLOURS)))


def wrong_shape(one):
    return render(replace(one, shape=another(one.shape, SHAPES)))


def backwards(one):
    return render(one)[::-1]


def standing_still(one):
    return np.repeat(render(one, 1), 17, axis=0)


def other_pace(one):
    """Half as fast as told."""
    return np.stack([render(replace(one, start=one.centre(frame / 2)), 1)[0] for frame in range(17)])


def nothing(one):
    return np.full((17, 64, 64, 3), BACKGROUNDS[one.background], np.uint8)


def gone_at_last(one):
    frames = render(one)
    frames[16] = BACKGROUNDS[one.background]
    return frames


def other_shape_at_last(one):
    return np.concatenate([render(one, 16), wrong_shape(one)[16:]])


def gone_in_frame_3(one):
    frames = render(one)
    frames[3] = BACKGROUNDS[one.background]
    return frames


def shifted(one):
    """Three and a half pixels beside the way."""
    dx, dy = one.velocity
    return render(replace(one, start=(one.start[0] + 3.5 * np.sign(dy), one.start[1] + 3.5 * np.sign(dx))))


def short_of_the_end(one):
    """Comes to rest a quarter before the end."""
    return render(one)[np.minimum(np.arange(17), 12)]


def back_and_forth(one):
    return render(one)[[0, 1, 2, 3, 4, 5, 6, 5, 4, 5, 6, 8, 10, 12, 14, 15, 16]]


def swapped(one):
    return render(one)[[0] * 9 + [16] * 8]


def appears_elsewhere(one):
    """After frame 2 another object like it goes on 7 px beside the way."""
    dx, dy = one.velocity
    away = 7 if (one.start[1] if dx else one.start[0]) < 31.5 else -7
    moved = replace(one, start=(one.start[0] + away * bool(dy), one.start[1] + away * bool(dx)))
    return np.concatenate([render(one, 3), render(moved)[3:]])


FAULTS = {
    judge_text: (wrong_colour, wrong_shape, backwards, standing_still, nothing),
    judge_image: (
        wrong_colour, wrong_shape, backwards, standing_still, other_pace, nothing, gone_at_last, other_shape_at_last,
        appears_elsewhere,
    ),
    judge_start_end: (
        wrong_colour, backwards, standing_still, nothing, gone_at_last, shifted, short_of_the_end, back_and_forth,
        swapped,
    ),
    judge_extension: (wrong_colour, backwards, standing_still, other_pace, nothing, short_of_the_end),
}  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "spoil"),
    [(judge, spoil) for judge, faults in FAULTS.items() for spoil in faults],
    ids=lambda function: function.__name__,
)
def test_every_fault_is_seen(judge, spoil):
    for pair in PAIRS:
        assert judge(pair, render(pair.scene))["right"] is True
        assert judge(pair, spoil(pair.scene))["right"] is False


@pytest.mark.parametrize(
    "spoil", [wrong_colour, wrong_shape, backwards, gone_in_frame_3, shifted], ids=lambda function: function.__name__
)
def test_the_first_frames_must_be_where_the_prompt_takes_them(spoil):
    for pair in PAIRS:
        assert judge_image(pair, render(pair.scene))["near"] is True
        assert judge_image(pair, spoil(pair.scene))["near"] is False


def test_noise_is_wrong_everywhere_and_breaks_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), np.uint8)
    for judge in FAULTS:
        outcome = judge(PAIRS[0], noise)
        assert outcome["right"] is False
        json.dumps(outcome, allow_nan=False)
    assert judge_reconstruction(PAIRS[0], noise)["psnr"] < 12


def test_a_frame_that_is_off_by_one_level_is_not_bit_equal():
    pair = PAIRS[0]
    frames = render(pair.scene)
    changed = frames.copy()
    changed[0, 5, 5, 0] ^= 1
    assert judge_image(pair, frames)["first_frame"] != judge_image(pair, changed)["first_frame"]


def test_proportions_have_wilsons_interval():
    one = proportion([True] * 8 + [False] * 2)
    assert (one.value, one.low, one.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert proportion([True] * 5).high == 1.0
    assert proportion([False] * 5).low == pytest.approx(0)


def test_differences_are_of_pairs_and_never_certain():
    hard = [True] * 200 + [False] * 56
    same = difference(hard, hard)
    assert same.value == 0
    assert -0.02 < same.low < 0 < same.high < 0.02
    better = difference([True] * 256, hard)
    assert better.value == pytest.approx(56 / 256)
    assert better.low == pytest.approx(0.17, abs=0.01)
    assert difference(hard, [True] * 256).high == pytest.approx(-better.low)


def test_means_have_a_repeatable_interval():
    values = np.random.default_rng(1).normal(30, 2, 256)
    one = mean(values)
    assert one == mean(values)
    assert (one.low, one.high) == pytest.approx((one.value - 0.245, one.value + 0.245), abs=0.05)


@pytest.mark.parametrize(
    ("estimate", "verdict"),
    [
        (Estimate(value=0.9, low=0.86, high=0.93), "reached"),
        (Estimate(value=0.86, low=0.81, high=0.9), "open"),
        (Estimate(value=0.84, low=0.8, high=0.88), "not reached"),
        (None, "not reached"),
    ],
)
def test_a_requirement_is_judged_by_its_interval(estimate, verdict):
    assert Requirement(name="x", estimate=estimate, target=0.85, unit="%").verdict == verdict


@pytest.mark.parametrize(("cost", "verdict"), [(0.05, "reached"), (0.1, "reached"), (0.11, "not reached")])
def test_the_adaptation_may_cost_a_tenth(cost, verdict):
    estimate = Estimate(value=cost, low=cost, high=cost)
    assert Requirement(name="cost", estimate=estimate, target=0.1, unit="%", is_ceiling=True).verdict == verdict


def test_values_are_shown_with_their_intervals():
    assert shown(Estimate(value=0.934, low=0.897, high=0.958), "%") == "93.4 % [89.7, 95.8]"
    assert shown(Estimate(value=-0.02, low=-0.05, high=0.01), "points") == "-2.0 points [-5.0, 1.0]"
    assert shown(Estimate(value=28.5, low=28.5, high=28.5), "dB") == "28.5 dB"


def test_the_table_has_a_line_a_measure():
    right = {"right": True, "near": True, "first_frame": "0", "psnr": 30.0, "fingerprint": "0"}
    wrong = {**right, "right": False, "near": False}
    many = {task.name: [right] * 256 for task in TASKS}
    few = {task.name: [wrong if "image" in task.name else right] * 256 for task in TASKS}
    table = rows(few, many, adaptation_cost=0.08)
    assert {row.verdict for row in table} == {"reached", None}
    assert markdown(table).count("\n") == 2 + len(table) == 11
    no_better = rows(many, many, adaptation_cost=None)
    assert [row.verdict for row in no_better].count("not reached") == 2


def test_one_task_alone_gives_its_row_and_no_other():
    outcomes = {"image": [{"right": True}] * 256}
    (row, cost) = rows({"image": [{"right": False}] * 256}, outcomes, adaptation_cost=0.08)
    assert row.measure.startswith("image-to-video: right object kept")
    assert (row.verdict, cost.verdict) == ("reached", "reached")


def test_the_command_asks_only_for_the_tasks_that_are_named(tmp_path, monkeypatch, capsys):
    with painting_service(tmp_path / "state") as service:
        monkeypatch.setattr(command, "_service", lambda *_: _entered(service.client))
        command.main(["--pairs", "1", "--task", "image", "--task", "extension", "--out", str(tmp_path / "out")])
    kept = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert kept["outcomes"]["base"].keys() == {"image", "extension"}
    assert len(kept["rows"]) == 3
    with pytest.raises(SystemExit):
        command.main(["--task", "picture"])
    assert "image" in capsys.readouterr().err


def test_the_command_measures_given_services_and_says_so_by_its_exit_code(tmp_path, monkeypatch, capsys):
    with painting_service(tmp_path / "state") as service:
        monkeypatch.setattr(command, "_service", lambda *_: _entered(service.client))
        code = command.main(["--pairs", "1", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert code == 1
    assert "Fewer than 256 pairs" in printed
    assert (tmp_path / "out" / "quality.md").read_text().strip() == printed.strip()
    kept = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert (kept["pairs"], kept["first_seed"], len(kept["rows"])) == (1, 20_000, 9)
    assert len(list((tmp_path / "out" / "debug").glob("*.png"))) == len(TASKS)


def test_the_services_configuration_is_shipped():
    arguments = ["--model", "debug", "--config", command.SERVICE_CONFIG]
    assert read_config(_parser(arguments).parse_args(arguments)).denoiser.num_replicas == 2


class _entered:
    def __init__(self, client):
        self.client = client

    def __enter__(self):
        return self.client

    def __exit__(self, *_):
        return None


def test_uploads_are_lossless():
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    assert np.array_equal(np.stack(list(iter_frames(clip("clip.mp4", frames).data))), frames)
    assert np.array_equal(read_image(png("picture.png", frames[0]).data), frames[0])


def test_an_order_that_is_refused_says_why(tmp_path):
    with painting_service(tmp_path) as service, pytest.raises(RuntimeError, match="num_frames"):
        make(service.client, Order(prompt="x", seed=0, settings={"num_frames": 6}))


def test_a_model_without_a_record_of_its_training_has_no_known_cost():
    assert adaptation_cost("debug") is None


def test_a_pairs_prompt_is_its_scenes_caption():
    assert Pair(seed=1, scene=scene(1)).prompt.startswith("a ")
