"""Names of earlier versions still work, and say what replaces them."""

import importlib

import pytest

from buquet import App
from buquet.clock import Clock
from buquet.errors import StoreFull
from buquet.insights.journal import Journal
from buquet.records import Finished
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.workflow.handle import StepInfo


def value(function):
    """Return what a deprecated name stands for; it must warn."""
    with pytest.warns(DeprecationWarning, match="is deprecated: use"):
        return function()


def test_a_step_keeps_the_words_state_and_depends():
    step = StepInfo(name="ship", status="failed", needs=("pack",))
    assert value(lambda: step.state) == "failed"
    assert value(lambda: step.depends) == ("pack",)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("insights.runview", "StepView", "StepInfo"),
        ("testing.faulty", "Rule", "Injection"),
        ("testing.faulty", "Pause", "Stop"),
        ("testing.auditor", "Bucket", "Snapshot"),
    ],
)
def test_a_renamed_class_keeps_its_name(module, old, new):
    room = importlib.import_module(f"buquet.{module}")
    assert value(lambda: getattr(room, old)) is getattr(room, new)
    with pytest.raises(AttributeError, match="nowhere"):
        room.nowhere  # noqa: B018 - the access is the test


async def test_a_journal_still_lists_failures_and_sums_up_each_task():
    journal = Journal(App("memory:").client)
    journal.lines = [
        Finished(id=f"{number:032x}", name=name, queue="default", status=status, at=number + 1, submitted=1)
        for number, (name, status) in enumerate([("a", "completed"), ("a", "failed"), ("b", "failed")])
    ]
    assert [line.name for line in value(journal.failed)] == ["b", "a"]
    assert [line.name for line in value(lambda: journal.failed(5, name="a"))] == ["a"]
    assert {name: summary.count for name, summary in value(journal.by_name).items()} == {"a": 2, "b": 1}


async def test_the_random_faults_of_a_store_may_be_chosen():
    store = FaultyStore(MemoryStore(Clock()), Clock(), rate=1, faults=["full"], seconds=0.5)
    assert await store.get("key") is None  # a read cannot find the store full
    with pytest.raises(StoreFull):
        await store.put("key", b"")


async def test_a_task_function_still_makes_a_record():
    @App("memory:").task
    def add(number: int) -> int:
        return number + 1

    record = value(lambda: add.options(priority=2).new_record("0" * 32, "key", pack=3, batch="b"))
    assert (record.name, record.key, record.priority, record.pack, record.batch) == ("add", "key", 2, 3, "b")


def test_a_worker_and_a_workflow_keep_their_verbs():
    app = App("memory:")

    @app.task
    def add(number: int) -> int:
        return number + 1

    @app.workflow
    def sums(number: int) -> int:
        return add(number)

    args = sums.signature.encode(sums.signature.bind((1,), {}))
    assert value(lambda: sums.retrace(args)) == sums.rebuild(args)
    worker = app.worker()
    value(lambda: worker.hold(paused=True))
    assert worker.keeper.paused
    assert value(lambda: worker.telling) is worker.observers
    value(worker.drain_out)
    assert worker.keeper.draining
