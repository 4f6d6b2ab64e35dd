"""Arrivals are decided before the first, and the same seed decides the same."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.loadtest.keys import read_keys
from cluster.loadtest.orders import forms, number_of, prompt
from cluster.loadtest.schedule import mean_rate, read_trace, schedule, write_schedule
from cluster.loadtest.settings import SettingsError
from cluster.loadtest.slo import read_slo
from cluster.loadtest.workload import read_workload

CONFIGS = Path(__file__).parents[2] / "configs/loadtest"


def workload(**changes):
    return read_workload(CONFIGS / "debug.yaml", changes)


def test_the_same_seed_makes_the_same_schedule_and_another_seed_another():
    one = schedule(workload(seed=3), 1.0, 100)
    assert one == schedule(workload(seed=3), 1.0, 100)
    assert one != schedule(workload(seed=4), 1.0, 100)


def test_a_higher_rate_asks_for_the_same_jobs_faster():
    slow, fast = schedule(workload(), 1.0, 50), schedule(workload(), 4.0, 50)
    assert [(one.tenant, one.job_class, one.seed) for one in slow] == [
        (one.tenant, one.job_class, one.seed) for one in fast
    ]
    assert [one.at for one in fast] == pytest.approx([one.at / 4 for one in slow])


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_the_mean_rate_is_what_was_asked_for(rate):
    assert mean_rate(schedule(workload(), rate, 20_000)) == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_burstiness_is_the_shape_of_the_gaps(burstiness, spread):
    arrivals = schedule(workload(arrivals={"burstiness": burstiness}), 1.0, 20_000)
    gaps = [after.at - before.at for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean == pytest.approx(spread, rel=0.05)


def test_bursts_come_at_once_and_keep_the_mean_rate():
    arrivals = schedule(workload(arrivals={"process": "bursts", "burst_size": 5}), 2.0, 10_000)
    assert len({one.at for one in arrivals}) == 2000
    assert mean_rate(arrivals) == pytest.approx(2.0, rel=0.1)


def test_tenants_and_classes_come_by_their_shares():
    arrivals = schedule(workload(), 1.0, 20_000)
    by_tenant = [one for one in arrivals if one.tenant == "amber"]
    assert len(by_tenant) / len(arrivals) == pytest.approx(0.5, abs=0.02)
    assert {one.job_class for one in arrivals if one.tenant == "cedar"} == {"draft", "extend"}


def test_a_written_schedule_is_a_trace_that_replays_it(tmp_path):
    written = schedule(workload(), 2.0, 40)
    write_schedule(tmp_path / "schedule.jsonl", written)
    replayed = schedule(
        workload_of_trace(tmp_path), mean_rate(written), 40, read_trace(tmp_path / "schedule.jsonl", workload())
    )
    assert [(one.number, one.tenant, one.job_class, one.seed) for one in replayed] == [
        (one.number, one.tenant, one.job_class, one.seed) for one in written
    ]
    assert [one.at for one in replayed] == pytest.approx([one.at - written[0].at for one in written])


def workload_of_trace(folder):
    (folder / "w.yaml").write_text((CONFIGS / "debug.yaml").read_text())
    return read_workload(folder / "w.yaml", {"arrivals": {"process": "trace", "trace": "schedule.jsonl"}})


@pytest.mark.parametrize(
    "line", ["{", "{}", json.dumps({"at": 0, "tenant": "nobody", "job_class": "draft"}), json.dumps([1])]
)
def test_a_trace_that_is_not_of_the_workload_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(SettingsError, match="line 1"):
        read_trace(tmp_path / "t.jsonl", workload())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rate": 1}, "unknown rate"),
        ({"request_rate": 0}, "request_rate=0"),
        ({"tenants": {"a": {"share": -1}}}, "share=-1"),
        ({"tenants": {"a": {"classes": {"none": 1}}}}, "none"),
        ({"classes": {"a": {"task": "dream", "size": "1x1", "num_frames": 5, "num_inference_steps": 1}}}, "dream"),
        ({"classes": {"a": {"task": "extension"}}}, "must be given"),
        ({"arrivals": {"process": "trace"}}, "trace names a file"),
        ({"arrivals": {"process": "trace", "trace": "none.jsonl"}}, "no file"),
    ],
)
def test_a_workload_that_cannot_be_meant_says_why(changes, says):
    with pytest.raises(SettingsError, match=says):
        workload(**changes)


def test_every_task_is_a_request_with_a_prompt_of_its_own():
    one = workload()
    arrivals = schedule(one, 1.0, 60)
    made = forms(one, arrivals, "run")
    assert {one.job_class for one in arrivals} == set(one.classes)
    assert len({form.fields["prompt"] for form in made}) == 60
    for arrival, form in zip(arrivals, made, strict=True):
        task = one.classes[arrival.job_class].task
        assert len(form.files) == {"text_to_video": 0, "image_to_video": 1, "start_end": 2, "extension": 1}[task]
        assert form.route == ("/v1/videos/extensions" if task == "extension" else "/v1/videos")


@pytest.mark.parametrize(
    ("found", "number"), [(prompt("a-run", 12), 12), (prompt("a", 12), None), ("a-run x: y", None), (None, None)]
)
def test_a_prompt_tells_which_of_the_runs_jobs_it_is_of(found, number):
    assert number_of("a-run", found) == number


def test_shipped_objectives_are_of_the_shipped_classes():
    assert read_slo(CONFIGS / "debug-slo.yaml", workload().classes).classes.keys() == workload().classes.keys()


def test_an_objective_of_a_class_that_the_workload_lacks_is_refused(tmp_path):
    (tmp_path / "slo.yaml").write_text("classes: {drafts: {latency_s: 1}}")
    with pytest.raises(SettingsError, match="drafts are not in the workload; it has draft, text"):
        read_slo(tmp_path / "slo.yaml", workload().classes)


def test_keys_come_from_the_environment_or_a_file_and_none_is_left_out(tmp_path):
    assert read_keys(["a b", "c"], None, {"PUSA_KEY_A_B": "x", "PUSA_KEY_C": "y"}) == {"a b": "x", "c": "y"}
    assert read_keys(["a", "c"], None, {}) == {"a": None, "c": None}
    with pytest.raises(SettingsError, match="PUSA_KEY_C"):
        read_keys(["a", "c"], None, {"PUSA_KEY_A": "x"})
    (tmp_path / "keys.yaml").write_text("a: x\n")
    with pytest.raises(SettingsError, match="no key for c"):
        read_keys(["a", "c"], tmp_path / "keys.yaml", {})
