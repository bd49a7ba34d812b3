"""An S3 server of our own for tests: moto's, on a free port, with one bucket.

A process of its own: moto brings Flask, and vLLM's start looks at every loaded module's
attributes, which Flask's context-bound proxies answer with an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import boto3

BUCKET = "runs"
SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
while True:
    time.sleep(3600)
"""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start the server; yields the environment variables that point any S3 client to it."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    before = dict(os.environ)
    try:
        assert server.stdout is not None
        started = time.monotonic()
        port = server.stdout.readline().strip()
        assert port.isdigit(), f"no S3 server after {time.monotonic() - started:.0f} s"
        settings = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # Spares the proxy that a machine may have set.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        os.environ.update(settings)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield settings
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.kill()
        server.wait(30)
