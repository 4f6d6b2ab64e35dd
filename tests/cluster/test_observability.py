"""Rules and dashboards: made by code, judged by promtool, and about metrics that exist."""

import json
import shutil
import subprocess

import pytest
import yaml

from cluster.observability.__main__ import files
from cluster.observability.names import RAY_METRICS, known_names, used_names
from cluster.observability.panels import DASHBOARDS
from cluster.observability.rules import ALERTS, RECORDINGS, rule_file
from serve.metrics import FAULTS, METRICS, GangMetrics, JobMetrics, outcome_of, tenant_class
from serve.policy.cost import Backlog
from tests.cluster.alert_scenarios import FIRING, HEALTHY, STARTING

PANELS = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
EXPRESSIONS = {
    **{f"record {one.record}": one.expr for one in RECORDINGS},
    **{f"alert {one.name}": one.expr for one in ALERTS},
    **{f"panel {one.title}, {legend}": query for one in PANELS for legend, query in one.queries.items()},
}


@pytest.fixture(scope="module")
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: prometheus), so the rules are not run")

    def run(*arguments):
        done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def series(*sources):
    return [{"series": name, "values": values} for source in sources for name, values in source.items()]


def write_rules(folder):
    rules = rule_file()
    for group in rules["groups"]:
        group["interval"] = "1m"  # the rules of a night are evaluated in a few seconds
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))


def silent(*at):
    return [{"eval_time": time, "alertname": one.name, "exp_alerts": []} for time in at for one in ALERTS]


def fires(alert, scenario):
    annotations = {"summary": scenario.summary or alert.summary, "runbook": alert.runbook}
    labels = {"severity": alert.severity, **(scenario.labels or {})}
    expected = [{"exp_labels": labels, "exp_annotations": annotations}]
    return [{"eval_time": scenario.at, "alertname": alert.name, "exp_alerts": expected}]


def test_what_is_checked_in_is_what_the_code_makes():
    stale = [path.name for path, text in files() if not path.exists() or path.read_text() != text]
    assert stale == [], "run python -m cluster.observability"


def test_every_alert_fires_where_it_should_and_none_on_a_healthy_service(promtool, tmp_path):
    assert set(FIRING) == {alert.name for alert in ALERTS}
    write_rules(tmp_path)
    tests = [
        {
            "interval": "1m",
            "input_series": series(HEALTHY),
            "alert_rule_test": silent("10m", "35m", "50m", "2h30m", "7h"),
        },
        {"interval": "1m", "input_series": series(STARTING), "alert_rule_test": silent("5m", "10m")},
    ]
    for alert in ALERTS:
        scenario = FIRING[alert.name]
        changed = {**HEALTHY, **scenario.changes}
        tests.append(
            {"interval": "1m", "input_series": series(changed), "alert_rule_test": fires(alert, scenario)}
        )  # fmt: skip
    test_file = tmp_path / "test.yaml"
    test_file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", test_file)


def test_no_dispatcher_at_all_is_an_alert(promtool, tmp_path):
    write_rules(tmp_path)
    (alert,) = (one for one in ALERTS if one.name == "PusaDispatcherSilent")
    check = fires(alert, FIRING[alert.name])[0] | {"eval_time": "10m"}
    tests = [{"interval": "1m", "input_series": series({"up": "1+0x60"}), "alert_rule_test": [check]}]
    test_file = tmp_path / "test.yaml"
    test_file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", test_file)


def test_every_query_is_promql(promtool, tmp_path):
    rules = [{"record": f"check:{number}", "expr": query} for number, query in enumerate(EXPRESSIONS.values())]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_query_is_about_metrics_that_exist(where):
    recorded = {one.record for one in RECORDINGS}
    used = used_names(EXPRESSIONS[where])
    assert used <= known_names() | recorded
    assert used or EXPRESSIONS[where].startswith("vector(")


def test_no_query_is_about_the_sum_of_a_histogram_which_ray_makes_up():
    sums = {name for metric in METRICS for name in metric.series if name.endswith("_sum")}
    assert [where for where, query in EXPRESSIONS.items() if used_names(query) & sums] == []


def test_every_metric_of_ours_is_shown_and_every_name_of_rays_is_used():
    used = {name for query in EXPRESSIONS.values() for name in used_names(query)}
    assert [metric.name for metric in METRICS if not used & set(metric.series)] == []
    assert set(RAY_METRICS) <= used


def test_alerts_say_what_to_do():
    for alert in ALERTS:
        assert len(alert.runbook) > 40, alert.name
        assert "|" not in alert.summary + alert.runbook, f"{alert.name}: a table's column ends there"


def test_dashboards_have_no_two_panels_in_one_place():
    boards = [json.loads(text) for path, text in files() if path.suffix == ".json"]
    assert [len(board["panels"]) for board in boards] == [len(one.panels) for one in DASHBOARDS]
    for board in boards:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places)


def test_no_metric_is_about_a_job_or_a_tenant():
    labels = {label for metric in METRICS for label in metric.labels}
    assert not labels & {"job", "job_id", "tenant", "request", "prompt", "key"}
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    classes = {tenant_class(2**power) for power in range(-20, 20)}
    assert classes == {"0.25", "0.5", "1", "2", "4", "8", "16"}
    assert tenant_class(3.0) == "4"


def test_only_what_the_service_did_wrong_is_a_failure():
    codes = [*FAULTS, "completed", "cancelled", "moderation_refused"]
    assert [outcome_of(code) for code in codes] == ["failed"] * len(FAULTS) + ["completed", "cancelled", "refused"]


class Instrument:
    def __init__(self):
        self.values = {}

    def set(self, value, tags=None):
        self.values[tuple((tags or {}).values())] = value

    def inc(self, value, tags=None):
        key = tuple((tags or {}).values())
        self.values[key] = self.values.get(key, 0) + value

    def observe(self, value, tags=None):
        self.values.setdefault(tuple((tags or {}).values()), []).append(value)


def test_the_seconds_of_steps_are_counted_as_they_were(monkeypatch):
    made = {}
    monkeypatch.setattr("serve.metrics.Metric.instrument", lambda self: made.setdefault(self.name, Instrument()))
    metrics = GangMetrics()
    metrics.step(20_000, 0.31)
    metrics.step(20_000, 2.62)
    assert made["video_step_seconds"].values == {("32768",): [0.31, 2.62]}
    assert made["video_step_seconds_spent"].values == {("32768",): pytest.approx(2.93)}


def test_a_backlog_is_told_by_class_and_forgotten_when_it_is_gone(monkeypatch):
    made = {}
    monkeypatch.setattr("serve.metrics.Metric.instrument", lambda self: made.setdefault(self.name, Instrument()))
    metrics = JobMetrics()
    backlog = [
        Backlog(tenant=tenant, status=status, priority="interactive", num=2, cost=5.0, whole=9.0, oldest_s=age)
        for tenant, status, age in (("a", "queued", 3.0), ("b", "queued", 7.0), ("a", "in_progress", 90.0))
    ]
    metrics.round(backlog, {"a": 1.0, "b": 4.0}.__getitem__)
    assert made["video_backlog_cost_seconds"].values == {
        ("queued", "interactive", "1"): 5.0,
        ("queued", "interactive", "4"): 5.0,
        ("in_progress", "interactive", "1"): 5.0,
    }
    assert made["video_tenants_waiting"].values == {("1",): 1, ("4",): 1}
    assert made["video_oldest_queued_seconds"].values == {("interactive",): 7.0, ("batch",): 0.0}
    metrics.round([], {}.__getitem__)
    assert set(made["video_backlog_cost_seconds"].values.values()) == {0.0}
    assert set(made["video_tenants_waiting"].values.values()) == {0}
    assert set(made["video_queue_depth"].values.values()) == {0}
