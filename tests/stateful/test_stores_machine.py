"""Each store against a dict: whatever is asked of it, in any order, it answers as a dict with ETags would."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from buquet.clock import Clock
from buquet.errors import AlreadyExists, Changed
from buquet.store.base import NOT_MODIFIED, Stored
from buquet.store.memory import MemoryStore
from buquet.store.open import open_store

KEYS = st.sampled_from(["a/1", "a/2", "a/10", "b/1", "b/~", "b/%2F", "tasks/1", "tasks/2"])
BODIES = st.binary(max_size=4)


class StoreMachine(RuleBasedStateMachine):
    """Drives a store and a dict of (body, etag) side by side."""

    make = None

    @initialize()
    def begin(self):
        self.loop = asyncio.new_event_loop()
        self.store, self.root = type(self).make()
        self.there = {}
        self.stale = {}
        self.versions = []
        """Key, version and body of every write under tasks/, whose versions are kept."""

    def teardown(self):
        if hasattr(self, "store"):
            self.do(self.store.close())
            self.loop.close()

    def do(self, work):
        return self.loop.run_until_complete(work)

    def keep(self, key, body, receipt):
        if key in self.there:
            self.stale[key] = self.there[key][1]
        self.there[key] = (body, receipt.etag)
        if key.startswith("tasks/"):
            assert receipt.version
            self.versions.append((key, receipt.version, body))

    @rule(key=KEYS, body=BODIES)
    def put(self, key, body):
        self.keep(key, body, self.do(self.store.put(self.root + key, body)))

    @rule(key=KEYS, body=BODIES)
    def create(self, key, body):
        if key in self.there:
            with pytest.raises(AlreadyExists):
                self.do(self.store.create(self.root + key, body))
        else:
            self.keep(key, body, self.do(self.store.create(self.root + key, body)))

    @rule(key=KEYS, body=BODIES, old=st.booleans())
    def update(self, key, body, old):
        now = self.there[key][1] if key in self.there else None
        etag = self.stale.get(key) if old else now
        if etag is None:
            return
        if etag == now:
            self.keep(key, body, self.do(self.store.update(self.root + key, body, etag)))
        else:
            with pytest.raises(Changed):
                self.do(self.store.update(self.root + key, body, etag))

    @rule(key=KEYS)
    def get(self, key):
        answer = self.do(self.store.get(self.root + key))
        if key not in self.there:
            assert answer is None
            return
        assert isinstance(answer, Stored)
        assert (answer.body, answer.etag) == self.there[key]
        assert self.do(self.store.get(self.root + key, unless=answer.etag)) is NOT_MODIFIED

    @rule(key=KEYS)
    def delete(self, key):
        self.do(self.store.delete(self.root + key))
        if key in self.there:
            self.stale[key] = self.there.pop(key)[1]

    @precondition(lambda self: self.versions)
    @rule(which=st.integers(0, 99))
    def get_version(self, which):
        key, version, body = self.versions[which % len(self.versions)]
        answer = self.do(self.store.get(self.root + key, version=version))
        assert isinstance(answer, Stored)
        assert answer.body == body

    @rule(folder=st.sampled_from(["a/", "b/", "c/", "tasks/"]), after=KEYS, limit=st.sampled_from([1, 2, 1000]))
    def list(self, folder, after, limit):
        keys = sorted(key for key in self.there if key.startswith(folder) and (key > after or not after.startswith(folder)))
        start = self.root + after if after.startswith(folder) else ""
        page = self.do(self.store.list(self.root + folder, after=start, limit=limit))
        assert [each.key for each in page] == [self.root + key for key in keys[:limit]]
        assert [(each.etag, each.size) for each in page] == [
            (self.there[key][1], len(self.there[key][0])) for key in keys[:limit]
        ]


def check(make, examples, steps=30):
    class Machine(StoreMachine):
        pass

    Machine.make = staticmethod(make)
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None, database=None),
    )


def test_memory():
    check(lambda: (MemoryStore(Clock(1)), ""), examples=60)


def test_sqlite():
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(10_000))
        check(lambda: (open_store(f"sqlite:{Path(folder) / f'{next(count)}.db'}", Clock(1)), ""), examples=15, steps=20)


def test_seaweedfs(seaweed):
    count = iter(range(10_000))
    check(lambda: (open_store(seaweed.url(f"machine{next(count)}"), Clock(1)), ""), examples=4, steps=15)
