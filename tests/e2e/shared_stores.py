"""Stores that several nodes reach: a PostgreSQL of our own, and S3 as moto plays it."""

from contextlib import contextmanager

import pytest

WARNINGS_OF_THE_STORES = (
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*XDG_RUNTIME_DIR"),
)
"""Marks for tests that use them: what moto, botocore and pgserver warn of is none of our errors."""


@contextmanager
def own_bucket(address="127.0.0.1"):
    """An S3 server in this process and a bucket in it; processes started meanwhile find both."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in credentials.items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket="videos")
            yield "s3://videos/test"
    finally:
        server.stop()
