"""A real Prometheus with our rules beside a running service: every panel has data, and no alert is raised."""

import logging
import shutil
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
import ray
import yaml

from cluster.local_service import free_port
from cluster.observability.panels import DASHBOARDS
from cluster.observability.rules import rule_file
from serve.config import DenoiserConfig, ServeConfig
from tests.e2e.client import completed, create
from tests.e2e.local_app import local_app

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

logger = logging.getLogger(__name__)

PATIENCE_S = 120.0
OF_THIS_MACHINE = {"PusaNodeMemoryHigh", "PusaNodeDiskFull"}


@contextmanager
def prometheus(folder, target):
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("prometheus is not installed (Debian: prometheus), so no panel is drawn")
    rules = rule_file()
    for group in rules["groups"]:
        group["interval"] = "2s"
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    scrape = {"job_name": "ray", "static_configs": [{"targets": [target]}]}
    config = {"global": {"scrape_interval": "2s"}, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    arguments = [
        f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([found, *arguments], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1") as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def has_data(client, query):
    try:
        answer = client.get("/query", params={"query": query})
    except httpx.ConnectError:
        return False
    return answer.status_code == 200 and bool(answer.json()["data"]["result"])


def test_every_panel_has_data_or_says_why_not_and_no_alert_is_raised(tmp_path):
    config = ServeConfig(model="debug", state_dir=str(tmp_path / "state"), denoiser=DenoiserConfig(checkpoint_every=2))
    empty = {
        (panel.title, legend): query
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for legend, query in panel.queries.items()
    }
    excused = {
        (panel.title, legend)
        for board in DASHBOARDS
        for panel in board.panels
        for legend in panel.queries
        if panel.why_empty
    }
    with local_app(config) as service:
        target = f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"
        with prometheus(tmp_path, target) as client:
            deadline = time.monotonic() + PATIENCE_S
            while empty.keys() - excused and time.monotonic() < deadline:
                completed(service, create(service, num_inference_steps=6, num_frames=5))
                service.post("/v1/videos", json={"prompt": "refused", "size": "13x13"})
                empty = {name: query for name, query in empty.items() if not has_data(client, query)}
                time.sleep(1.0)
            alerts = client.get("/alerts").json()["data"]["alerts"]
            firing = {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}
    logger.info("no data, as their panels say: %s", sorted(title for title, _ in empty))
    assert empty.keys() - excused == set()
    assert ("Refused requests by code", "{{status}} {{code}}") not in empty
    assert ("Checkpoints a minute", "published") not in empty
    assert firing <= OF_THIS_MACHINE
