"""Holds any store against the shipped contract, and kills workers on it: BUQUET_CONTRACT_URL names it.

    BUQUET_CONTRACT_URL='s3://bucket?endpoint=http://localhost:9000' python -m pytest tests/stores/probe.py

Credentials are in the environment, and the bucket is there. Each test takes a prefix of its own. BUQUET_CONTRACT_VERSIONED=0 is
for a bucket that keeps no versions. Not collected by a plain run of the tests; docs/stores.md says what came of which store.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from buquet.clock import Clock
from buquet.store.open import open_store
from buquet.testing.contract import StoreContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from buquet.store.base import Store

URL = os.environ.get("BUQUET_CONTRACT_URL", "")


def fresh(what: str) -> str:
    place, question, query = URL.partition("?")
    return f"{place.rstrip('/')}/{what}-{uuid.uuid4().hex[:10]}{question}{query}"


@pytest.mark.skipif(not URL, reason="BUQUET_CONTRACT_URL names no store")
class TestStore(StoreContract):
    versioned = os.environ.get("BUQUET_CONTRACT_VERSIONED", "1") == "1"

    @pytest.fixture
    async def store(self) -> AsyncIterator[Store]:
        store = open_store(fresh("contract"), Clock())
        yield store
        await store.close()


@pytest.mark.skipif(not URL, reason="BUQUET_CONTRACT_URL names no store")
@pytest.mark.timeout(600)
def test_workers_killed_at_random_lose_nothing(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "acceptance"))
    import test_chaos

    test_chaos.run("probed store", fresh("chaos"), tmp_path)
