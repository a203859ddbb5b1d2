"""Holds any S3 server against the shipped contract: BUQUET_CONTRACT_URL names it, and credentials are in the environment.

    BUQUET_CONTRACT_URL='s3://bucket?endpoint=http://localhost:9000' python -m pytest tests/stores/probe.py

Each test takes a prefix of its own. BUQUET_CONTRACT_VERSIONED=0 for a bucket that keeps no versions.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

import pytest

from buquet.clock import Clock
from buquet.store.open import open_store
from buquet.testing.contract import StoreContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from buquet.store.base import Store

URL = os.environ.get("BUQUET_CONTRACT_URL", "")


@pytest.mark.skipif(not URL, reason="BUQUET_CONTRACT_URL names no store")
class TestStore(StoreContract):
    versioned = os.environ.get("BUQUET_CONTRACT_VERSIONED", "1") == "1"

    @pytest.fixture
    async def store(self) -> AsyncIterator[Store]:
        place, question, query = URL.partition("?")
        store = open_store(f"{place.rstrip('/')}/contract-{uuid.uuid4().hex[:10]}{question}{query}", Clock())
        yield store
        await store.close()
