"""What a user who installs the wheel gets: everything, and nothing of the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pusa_dist

ROOT = Path(pusa_dist.__file__).parents[1]
DEMO = """
import json, sys, time
from pathlib import Path
import httpx
from cluster.local_service import local_service
from importlib.resources import files
import pusa_dist, serve
with local_service("debug", Path(sys.argv[1])) as url, httpx.Client(base_url=url, timeout=30) as client:
    job = client.post("/v1/videos", json={"prompt": "a boat", "pusa": {"num_inference_steps": 2}}).json()
    while job["status"] in ("queued", "in_progress"):
        time.sleep(0.1)
        job = client.get(f"/v1/videos/{job['id']}").json()
    video = client.get(f"/v1/videos/{job['id']}/content").content
print(json.dumps({
    "status": job["status"],
    "bytes": len(video),
    "from": [str(files("configs") / "model" / "debug.yaml"), pusa_dist.__file__, serve.__file__],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel, and nothing else, was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return wheel, folder / "site"


def test_the_wheel_holds_the_packages_and_their_configurations(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    for path in ("configs/model/debug.yaml", "configs/serve/debug.yaml", "serve/app.py", "pusa_dist/worker.py"):
        assert path in names
    assert not any(name.startswith("tests/") for name in names)


@pytest.mark.ray
def test_an_installed_wheel_serves(installed, tmp_path):
    site = installed[1]
    done = subprocess.run(
        [sys.executable, "-c", DEMO, str(tmp_path / "state")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == "completed"
    assert report["bytes"] > 1000
    assert all(path.startswith(str(site)) for path in report["from"])
