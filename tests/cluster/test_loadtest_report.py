"""What a load test concludes from its rows."""

import json
import random
import re
from pathlib import Path

import pytest

from cluster.loadtest.agreement import readings
from cluster.loadtest.audit import Listed, audit
from cluster.loadtest.faults import Struck
from cluster.loadtest.knee import Point, knee
from cluster.loadtest.plots import draw
from cluster.loadtest.report import Report, as_json, headlines, markdown
from cluster.loadtest.rows import Row, read_rows, write_rows
from cluster.loadtest.saturation import Round, overall_ratio
from cluster.loadtest.slo import NO_OBJECTIVES, Objective, Slo
from cluster.loadtest.statistics import mean_estimate, part_estimate, percentile_estimate
from cluster.loadtest.summary import peak_in_flight, point, summarise
from cluster.loadtest.verdict import verdict
from cluster.prometheus import JOBS, LATENCY, REQUEUED, STAGE, Scrape, parse

SLO = Slo(classes={"draft": Objective(latency_s=2.0, attainment=0.9)}, min_jain=0.9, max_reject_rate=0.1)


def row(number, at=None, latency=1.0, **changes):
    at = float(number) if at is None else at
    given = {
        "number": number,
        "tenant": "ab"[number % 2],
        "job_class": "draft",
        "task": "text_to_video",
        "intended_s": at,
        "sent_s": at + 0.01,
        "accepted_s": at + 0.05,
        "ended_s": at + latency,
        "outcome": "completed",
        "job_id": f"job-{number}",
        "attempt": 1,
        "stage_seconds": {"text": 0.1, "wait": 0.2, "denoise": 0.6, "decode": 0.1},
    }
    return Row(**(given | changes))


def listed(number, state="completed", **changes):
    return Listed(**({"job_id": f"job-{number}", "number": number, "state": state, "has_video": True} | changes))


def test_rows_are_kept_as_they_were(tmp_path):
    rows = [row(1), row(2, outcome="rejected", accepted_s=None, job_id=None, http_status=429)]
    write_rows(tmp_path / "jobs.jsonl", rows)
    assert read_rows(tmp_path / "jobs.jsonl") == rows


def test_latency_counts_from_the_intended_arrival_and_is_wait_service_and_rest():
    late = row(1, sent_s=1.5)
    assert late.latency_s == pytest.approx(1.0)
    assert late.lag_s == pytest.approx(0.5)
    assert (late.wait_s, late.service_s, late.rest_s) == pytest.approx((0.2, 0.6, 0.2))


def test_an_interval_of_a_percentile_holds_the_true_one_as_often_as_it_says():
    dice = random.Random(1)
    held = 0
    for _ in range(400):
        found = percentile_estimate([dice.expovariate(1) for _ in range(60)], 0.5)
        held += found.low <= 0.6931 <= found.high
    assert 0.93 <= held / 400 <= 1.0


@pytest.mark.parametrize(("n", "part", "has_low", "has_high"), [(5, 0.5, False, False), (300, 0.99, True, False)])
def test_an_interval_has_no_end_that_its_n_is_too_small_for(n, part, has_low, has_high):
    found = percentile_estimate(list(range(n)), part)
    assert (found.low is not None, found.high is not None) == (has_low, has_high)


def test_a_long_sample_has_both_ends_around_its_99th_percentile():
    found = percentile_estimate(list(range(2000)), 0.99)
    assert found.low < found.value == 1979 < found.high


def test_means_and_parts_have_intervals_too():
    mean = mean_estimate([1.0, 2.0, 3.0] * 30)
    assert mean.low < mean.value == pytest.approx(2.0)
    assert mean.value < mean.high
    part = part_estimate(90, 100)
    assert (part.low, part.high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert part_estimate(0, 10).low == 0.0


def test_a_summary_tells_rejects_apart_from_errors_and_goodput_from_throughput():
    rows = [row(n, latency=1.0 if n < 6 else 3.0) for n in range(8)]
    rows += [row(8, outcome="rejected"), row(9, outcome="failed", code="internal_error")]
    found = summarise(rows, SLO, gang_seconds=16.0, ranks_per_gang=2)
    assert found.duration_s == pytest.approx(10.0)
    assert found.offered_rate == pytest.approx(1.0)
    assert (found.request_throughput, found.request_goodput) == pytest.approx((0.8, 0.6))
    assert (found.total.completed, found.total.rejected, found.total.errors) == (8, 1, 1)
    assert (found.gang_seconds_per_video, found.rank_seconds_per_video) == (2.0, 4.0)
    assert found.total.attainment.value == pytest.approx(0.6)
    assert found.total.latency.percentiles["p50"].value == pytest.approx(1.0)


def test_no_more_is_achieved_than_was_offered_however_the_ends_bunch():
    found = summarise([row(n, latency=10.0 - n + n / 100) for n in range(10)], None)
    assert found.achieved_rate == pytest.approx(found.offered_rate)


def test_serving_one_tenant_only_is_seen_in_the_jain_index():
    rows = [row(n, outcome="completed" if n % 2 else "timeout") for n in range(20)]
    assert summarise(rows, None).jain_index == pytest.approx(0.5)
    assert summarise([row(n) for n in range(20)], None).jain_index == pytest.approx(1.0)


def test_waiting_longer_for_the_same_is_seen_in_the_jain_index_of_speed():
    rows = [row(n, latency=1.0 if n % 2 else 9.0) for n in range(20)]
    assert summarise(rows, None).jain_index == pytest.approx(1.0)
    assert summarise(rows, None).jain_of_speed < 0.7


def test_a_run_in_which_nothing_completes_is_summed_up_too():
    found = summarise([row(n, outcome="error") for n in range(3)], SLO)
    assert (found.request_throughput, found.total.latency, point(found)) == (0.0, None, None)


def test_jobs_in_flight_are_counted_from_when_they_are_due():
    assert peak_in_flight([row(0, at=0.0, latency=5.0), row(1, at=1.0, latency=1.0), row(2, at=3.0)]) == 2


@pytest.mark.parametrize(
    ("service", "billed", "lost", "doubled"),
    [
        ([listed(0), listed(1)], 2, [], []),
        ([listed(0)], 1, [1], []),
        ([listed(0), listed(1, "in_progress")], 1, [1], []),
        ([listed(0), listed(1, has_video=False)], 2, [1], []),
        ([listed(0), listed(1), listed(1, job_id="another")], 3, [], [1]),
        ([listed(0), listed(1)], 3, [], [-1]),
    ],
)
def test_a_job_is_there_once_or_it_is_told(service, billed, lost, doubled):
    found = audit([row(0), row(1)], service, billed)
    assert (found.lost, found.doubled) == (lost, doubled)


def test_a_job_that_was_refused_is_not_lost():
    assert audit([row(0, outcome="rejected", job_id=None)], [], 0).lost == []


def missed(rows, found=None, slo=SLO, ratio=None):
    found = audit(rows, [listed(one.number) for one in rows], None) if found is None else found
    return [one.what for one in verdict(summarise(rows, slo), found, slo, ratio) if not one.is_met]


def test_a_good_run_meets_everything():
    assert missed([row(n) for n in range(20)], ratio=0.95) == []


def test_every_objective_can_be_missed():
    good = [row(n) for n in range(20)]
    assert missed(
        [*good[1:], row(0, latency=9.0)] * 1, slo=Slo(classes={"draft": Objective(latency_s=2, attainment=1)})
    )
    assert missed([row(n, outcome="failed") if n == 3 else row(n) for n in range(20)]) == ["errors, part of all"]
    assert missed([row(n, outcome="rejected") if n < 4 else row(n) for n in range(20)]) == [
        "rejects, part of all",
        "within 2 s, part of all",
    ]
    assert missed([row(n, sent_s=n + 2.0) for n in range(20)]) == ["p99 lag, seconds"]
    assert missed(good, audit(good, [], None)) == ["lost"]
    assert missed(good, ratio=0.89) == ["throughput by a plain loop's"]


def test_a_class_that_no_job_was_due_of_is_told():
    rows = [row(n) for n in range(20)]
    slo = Slo(classes={"draft": Objective(latency_s=2), "text": Objective(latency_s=3)})
    told = verdict(summarise(rows, slo), audit(rows, [listed(n) for n in range(20)], None), slo)[-1]
    assert (told.scenario, told.value, told.must_be) == ("class text", "no job was due", "-")


def at_rate(offered, achieved, mean):
    return Point(
        offered=offered, achieved=achieved, goodput=achieved, mean_s=mean, p50_s=mean, p95_s=mean, p95_low_s=None,
        p95_high_s=None, n=40,
    )  # fmt: skip


def test_the_knee_of_a_single_server_is_at_half_its_rate():
    rates = [0.1, 0.3, 0.5, 0.7, 0.9]
    found = knee([at_rate(rate, rate, 1 / (1 - rate)) for rate in reversed(rates)])
    assert (found.offered, found.is_bracketed) == (0.5, True)


def test_a_knee_at_the_sweeps_end_says_so_and_two_rates_have_none():
    assert not knee([at_rate(rate, rate, 1.0) for rate in (1.0, 2.0, 3.0)]).is_bracketed
    assert knee([at_rate(1.0, 1.0, 1.0), at_rate(2.0, 2.0, 1.0)]) is None


def test_throughput_at_saturation_is_of_all_rounds():
    assert overall_ratio([Round(num_jobs=2, plain_s=9, service_s=10), Round(num_jobs=2, plain_s=9, service_s=8)]) == 1.0


def exposition(jobs=20, below=20, total=20.0, again=0):
    """As Ray exports it: with labels of the process, one line for each."""
    lines = []
    for worker, part in (("w1", 0.5), ("w2", 0.5)):
        lines += [
            f'{JOBS}{{WorkerId="{worker}",outcome="completed"}} {jobs * part}',
            f'{REQUEUED}{{WorkerId="{worker}",reason="gang"}} {again * part}',
        ]
        for name, label in ((LATENCY, 'outcome="completed"'), *((STAGE, f'stage="{one}"') for one in STAGES)):
            lines += [
                f'{name}_bucket{{WorkerId="{worker}",{label},le="1.0"}} {below * part}',
                f'{name}_bucket{{WorkerId="{worker}",{label},le="+Inf"}} {jobs * part}',
                f'{name}_sum{{WorkerId="{worker}",{label}}} {total * part * SECONDS[label]}',
            ]
    return "\n".join([*sorted(lines), 'another_metric{a="b"} 1', ""])


STAGES = ("text", "denoise", "decode")
SECONDS = {'outcome="completed"': 0.95, 'stage="text"': 0.1, 'stage="denoise"': 0.6, 'stage="decode"': 0.1}


def disagreeing(**changes):
    return [one.what for one in readings([row(n) for n in range(20)], parse(exposition(**changes))) if not one.agrees]


def test_a_service_that_counts_as_its_clients_do_agrees():
    assert disagreeing() == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"jobs": 22}, "jobs ended: completed"),
        ({"below": 10}, "seconds from create to end: largest shift of the distribution"),
        ({"total": 40.0}, "seconds in denoise, mean"),
        ({"again": 2}, "attempts given up"),
    ],
)
def test_what_a_service_counts_otherwise_is_named(changes, what):
    assert what in disagreeing(**changes)


def test_a_service_that_exports_nothing_disagrees_about_what_happened():
    assert [one.what for one in readings([row(0)], Scrape({})) if one.agrees] == ["attempts given up"]


def test_only_what_was_counted_since_counts():
    before, after = parse(exposition(jobs=20)), parse(exposition(jobs=50))
    assert after.since(before).of(JOBS) == 30
    assert before.of("none") is None


def test_every_metric_that_is_read_is_one_of_the_services():
    declared = (Path(__file__).parents[2] / "serve/metrics.py").read_text()
    for name in (JOBS, REQUEUED, LATENCY, STAGE):
        assert re.search(rf'"{name.removeprefix("ray_").removesuffix("_total")}"', declared)


def test_a_report_has_every_part_and_its_pictures(tmp_path):
    rows = [row(n, latency=1.0 + n % 3) for n in range(30)]
    summary, found = summarise(rows, SLO, 30.0, 2), audit(rows, [listed(n) for n in range(30)], 30)
    points = [at_rate(rate, rate, 1 / (1 - rate)) for rate in (0.2, 0.5, 0.8)]
    faults = [Struck(what="SIGKILL Rank", at_s=10.0, whole_after_s=None)]
    report = Report(
        facts={"run": "a-run"}, summary=summary, audit=found, faults=faults, points=points, knee=knee(points),
        rounds=[Round(num_jobs=2, plain_s=9.0, service_s=9.5)],
        readings=readings(rows, Scrape({})), figures=verdict(summary, found, SLO, 0.95),
    )  # fmt: skip
    pictures = draw(tmp_path, rows, summary, SLO, faults, points, report.knee)
    assert {one.name for one in pictures} == {
        f"{one}.png" for one in ("latency", "timeline", "stages", "tenants", "knee")
    }
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in pictures)
    text = markdown(report, [one.name for one in pictures])
    for part in ("Verdict: MISSED", "offered rate", "[95 % interval]", "Waits against", "Faults", "Knee", "saturation"):
        assert part in text
    assert "DISAGREES" in text
    assert "disagree" in headlines(report)
    assert json.loads(json.dumps(as_json(report), allow_nan=False))["summary"]["total"]["num_jobs"] == 30


@pytest.mark.parametrize(
    ("service", "is_met", "says"),
    [
        ([listed(0), listed(1)], True, "| all jobs | lost | 0 | 0 | ok |"),
        ([listed(0)], False, "| all jobs | lost | 1 [1] | 0 | MISSED |"),
        ([listed(0), listed(1), listed(1, job_id="another")], False, "| all jobs | doubled | 1 [1] | 0 | MISSED |"),
    ],
)
def test_a_run_without_objectives_is_judged_by_lost_and_doubled_jobs_alone(tmp_path, service, is_met, says):
    rows = [row(0), row(1, latency=900.0, outcome="failed", sent_s=100.0)]
    summary, found = summarise(rows, None), audit(rows, service, None)
    report = Report(
        facts={"run": "a-run"}, summary=summary, audit=found, faults=[], points=[], knee=None, rounds=[], readings=None,
        figures=verdict(summary, found, NO_OBJECTIVES, 0.1),
    )  # fmt: skip
    assert report.is_met == is_met
    assert says in markdown(report, [])
    assert len(draw(tmp_path, rows, summary, None, [], [], None)) == 4
