"""Counts the requests of an idle worker to its S3 server, and converts them to an hour."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import common

SECONDS = float(common.setting("idle", "120"))
"""Long enough for several of the rare looks (every 30 s here); what comes once an hour is seldom in it."""
REST = 45.0
"""Seconds until a worker that found nothing is at rest; by then the one before it is forgotten, too."""


def requests_an_hour(worker: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
    """Start one worker on an empty queue, let it come to rest, and count. Nothing without a counting server or for `idle` 0."""
    if SECONDS <= 0 or not common.requests():
        return {}
    with worker():
        time.sleep(REST)
        before, begin = common.requests(), time.monotonic()
        time.sleep(SECONDS)
        after = common.requests()
        took = time.monotonic() - begin
    return {op: round((n - before[op]) * 3600 / took, 1) for op, n in sorted(after.items()) if n > before[op]}
