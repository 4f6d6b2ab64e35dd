"""What the measuring commands conclude from what they saw."""

import os

import pytest

from cluster.memory import Process, growth, main, medians, processes, program
from cluster.storm import Storm, latency_figures, storm_figures
from cluster.verdicts import Figure, percentile, table


def process(pid, role, resident):
    return Process(pid=pid, role=role, resident_mib=resident)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/a/b/some_server --session", "some_server"),
        ("/a/python3 -m serve --model debug", "python -m serve"),
        ("/a/python3 -u /a/log_monitor.py --x", "log_monitor.py"),
    ],
)
def test_a_command_line_spells_a_program(command, name):
    assert program(command.split()) == name


def test_this_process_is_found_with_its_memory():
    mine = next(one for one in processes(os.getpid()) if one.pid == os.getpid())
    assert mine.resident_mib > 1


def test_growth_is_judged_by_role_over_the_processes_that_stayed():
    before = [process(1, "Rank", 100), process(2, "Rank", 100), process(3, "Vae", 100), process(4, "gone", 50)]
    after = [process(1, "Rank", 104), process(2, "Rank", 105), process(3, "Vae", 106), process(5, "new", 50)]
    found = {one.scenario: (one.value, one.is_met) for one in growth(before, after)}
    assert found == {"Rank": ("+4.5% (200 to 209 MiB)", True), "Vae": ("+6.0% (100 to 106 MiB)", False)}


def test_a_process_holds_the_median_of_its_readings():
    readings = [[process(1, "Vae", 100)], [process(1, "Vae", 150)], [process(1, "Vae", 104), process(2, "Rank", 9)]]
    assert medians(readings) == [process(1, "Vae", 104), process(2, "Rank", 9)]


@pytest.mark.parametrize("counts", [["--early", "1"], ["--early", "20", "--jobs", "20"]])
def test_growth_needs_jobs_at_either_end(counts, capsys):
    with pytest.raises(SystemExit):
        main(counts)
    assert "at least 2 early jobs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ids", "statuses", "num_jobs", "met"),
    [
        (["a", "b"], {200: 3}, 2, True),
        (["a", "a"], {200: 3}, 2, False),
        (["a", "b"], {200: 3}, 3, False),
        (["a", "b"], {200: 3, 503: 1}, 2, False),
    ],
)
def test_a_storm_must_make_every_job_once_and_nothing_refused(ids, statuses, num_jobs, met):
    storm = Storm(ids=ids, num_broken=1)
    storm.statuses.update(statuses)
    assert all(one.is_met for one in storm_figures(storm, 2, num_jobs)) is met


def test_latency_is_judged_at_its_99th_percentile():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert all(one.is_met for one in latency_figures([0.1] * 99 + [9.0], 0, 20.0))
    assert not all(one.is_met for one in latency_figures([0.1] * 98 + [9.0] * 2, 0, 20.0))
    assert not all(one.is_met for one in latency_figures([0.1], 1, 20.0))


def test_a_table_says_what_is_missed_and_judges_nothing_without_a_limit():
    lines = [Figure("s", "a", 1.0, "< 1", False), Figure("s", "b", 2, "-", True)]
    assert table(lines).splitlines()[2:] == ["| s | a | 1.000 | < 1 | MISSED |", "| s | b | 2 | - | - |"]
