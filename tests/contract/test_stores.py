"""Every store against the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from buquet.clock import Clock
from buquet.store.memory import MemoryStore
from buquet.store.open import open_store
from buquet.store.sqlite import SqliteStore
from buquet.testing.contract import StoreContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from servers import S3Server

    from buquet.store.base import Store


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore(Clock())


class TestSqlite(StoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Store]:
        store = SqliteStore(tmp_path / "bucket.db", Clock())
        yield store
        await store.close()


class TestSeaweed(StoreContract):
    @pytest.fixture
    async def store(self, seaweed: S3Server) -> AsyncIterator[Store]:
        store = open_store(seaweed.url("contract"), Clock())
        yield store
        await store.close()


class TestSeaweedUnversioned(StoreContract):
    versioned = False
    racers = 4  # each that loses waits for about half a second; the full race is run above

    @pytest.fixture
    async def store(self, seaweed: S3Server) -> AsyncIterator[Store]:
        store = open_store(seaweed.url("contract", versioned=False), Clock())
        yield store
        await store.close()


class TestMoto(StoreContract):
    @pytest.fixture
    async def store(self, moto_server: S3Server) -> AsyncIterator[Store]:
        store = open_store(moto_server.url("contract"), Clock())
        yield store
        await store.close()
