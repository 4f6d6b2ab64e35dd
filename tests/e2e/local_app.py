"""The application on a Ray of this machine, over HTTP, for the length of a ``with`` block."""

from contextlib import contextmanager

import httpx
from ray import serve as ray_serve

from cluster.local_service import free_port
from serve.app import build_app
from tests.ray_cluster import local_ray

QUIET = {"log_level": "WARNING", "enable_access_log": False}


@contextmanager
def local_app(config, build=build_app):
    """Start the application; yields a client of it."""
    port = free_port()
    with local_ray():
        ray_serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET
        )
        ray_serve.run(build(config), name="pusa", logging_config=QUIET)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield http
        ray_serve.shutdown()
