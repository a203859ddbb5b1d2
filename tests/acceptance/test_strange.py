"""Uses that nobody had in mind: each is refused where it is said, or works; none leaves a task that never ends."""

import asyncio
import functools
import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest

from buquet import App, Backoff, SubmitInterrupted, TaskNotFound, UsageError, current
from buquet.cli.output import print_table
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.fixture import run_until_idle
from buquet.testing.virtual import run_virtual
from buquet.worker.logs import JsonLines


@pytest.fixture
def app(tmp_path):
    with App(f"sqlite:{tmp_path}/app.db") as app:
        yield app


# ---------------------------------------------------------------------- what a record could not hold


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("priority", True),
        ("priority", 1.5),
        ("priority", "5"),
        ("priority", 11),
        ("delay", "5"),
        ("delay", timedelta(seconds=-5)),
        ("delay", float("nan")),
        ("expires", "5"),
        ("expires", True),
        ("run_at", "2026-01-01"),
        ("run_at", datetime(2026, 1, 1)),  # noqa: DTZ001 - that is what is wrong with it
        ("run_at", datetime(9999, 1, 1, tzinfo=UTC)),
        ("key", 5),
        ("key", b"k"),
        ("key", "\ud800"),
        ("key", "k" * 1025),
        ("tags", ["a"]),
        ("tags", {"a": "\ud800"}),
        ("tags", {"a": "x" * 17_000}),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_option_that_no_record_can_hold_is_refused_and_nothing_is_stored(app, option, value):
    @app.task
    def takes() -> None: ...

    with pytest.raises(UsageError, match=option):
        takes.options(**{option: value}).submit()
    assert asyncio.run(app.client.store.list("tasks/")) == []


@pytest.mark.parametrize(
    "declared",
    [
        {"max_attempts": 2.5},
        {"max_attempts": True},
        {"max_attempts": "3"},
        {"max_losses": 0},
        {"max_attempts": 2**40},
        {"timeout": "3"},
        {"timeout": float("nan")},
        {"backoff": 3},
        {"name": 5},
        {"name": ""},
        {"name": "x" * 200},
        {"queue": 5},
        {"queue": "\ud800"},
    ],
    ids=repr,
)
def test_a_declaration_that_no_record_can_hold_is_refused(app, declared):
    with pytest.raises(UsageError):
        app.task(**declared)(lambda: None)


def test_what_is_no_function_of_a_task_is_refused_with_a_hint(app):
    def yields():
        yield 1

    async def yields_too():
        yield 1

    for function in (yields, yields_too):
        with pytest.raises(UsageError, match="Return a list"):
            app.task(function)
    for wrong in ("name", 5):
        with pytest.raises(UsageError, match=r"@app.task\(name"):
            app.task(wrong)
    with pytest.raises(UsageError, match="is no function: wrap it in one of yours"):
        app.task(functools.partial(print, "a"))
    with pytest.raises(UsageError, match="declared parameters"):
        app.task(int)
    with pytest.raises(UsageError, match="a string such as"):
        App(Path("a.db"))
    with pytest.raises(UsageError, match=r"\['default'\]"):
        app.worker("default")
    for wrong in (
        {"concurrency": 1.5},
        {"concurrency": "4"},
        {"ttl": float("nan")},
        {"grace": "5"},
        {"max_time": float("nan")},
        {"concurrency": True},
    ):
        with pytest.raises(UsageError, match="whole number"):
            app.worker(**wrong)
    with pytest.raises(UsageError, match="retention"):
        App("memory:", retention="7d")


def test_the_least_deadline_is_one_and_the_earliest_time_is_now(app):
    @app.task
    def takes() -> None: ...

    soon = takes.options(expires=0.0004).submit()
    assert soon.record().expires_ms == 1, "none at all would be the opposite of what was asked for"
    long_ago = takes.options(run_at=datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))).submit()
    run_until_idle(app)
    assert (soon.status(), long_ago.status()) == ("expired", "completed")


@pytest.mark.parametrize("name", ["naïve ü", "a/b/c", "../..", ".", "~", "%2F", "\n", "\0", "日本", "-x", "x" * 100])
def test_any_name_of_a_task_and_its_queue_works(app, name):
    @app.task(name=name, queue=name)
    def takes(n: int) -> int:
        return n

    handle = takes.options(key=name).submit(5)
    run_until_idle(app)
    assert handle.result() == 5
    assert handle.record().name == name


def test_calls_that_are_none_are_told_and_what_came_before_is_stored(app):
    @app.task
    def takes(text: str) -> str:
        return text

    for wrong in ("ab", 5, None):
        with pytest.raises(SubmitInterrupted, match="a tuple or a dict of arguments") as caught:
            takes.submit_many([("a",), wrong, ("b",)])
        assert len(caught.value.ids) == 1
    run_until_idle(app)
    assert takes.get(caught.value.ids[0]).result() == "a"


@pytest.mark.parametrize("wrong", [5, None, "../x", "0" * 31, "A" * 32], ids=repr)
def test_what_is_no_id_is_no_task(app, wrong):
    with pytest.raises(TaskNotFound, match="0-9 and a-f"):
        app.get(wrong).status()


# ---------------------------------------------------------------------- handlers


class Odd(BaseException):
    """Neither an Exception nor one of Python's own."""


def rig(clock):
    store = MemoryStore(clock)
    app = App(store=store, clock=clock)
    app.background = Background(clock.loop)
    return app


@pytest.mark.parametrize("error", [Odd, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_a_base_exception_fails_its_task_and_ends_no_worker(error):
    async def main(clock):
        app = rig(clock)

        @app.task(max_attempts=2, backoff=Backoff(initial=1))
        async def raises() -> None:
            raise error("no Exception at all")

        @app.task(max_attempts=2, backoff=Backoff(initial=1))
        def raises_in_a_thread() -> None:
            raise error("no Exception at all")

        handles = [await raises.asubmit(), await raises_in_a_thread.asubmit()]
        await app.worker(drain=True, heartbeat_thread=False).arun()
        for handle in handles:
            record = await handle.arecord()
            assert (record.state, record.failures, record.losses) == ("failed", 2, 0)
            assert f"{error.__name__}: no Exception at all" in record.error.message

    run_virtual(main)


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_base_exception_of_an_item_fails_that_item_only(kind):
    def run(app):
        def raises(n: int) -> int:
            if n == 1:
                raise Odd("no Exception at all")
            return n

        async def raises_too(n: int) -> int:
            return raises(n)

        task = app.task(max_attempts=1, name="raises")(raises_too if kind == "async" else raises)
        batch = task.batch([0, 1, 2])
        run_until_idle(app)
        (failed,) = batch.failed()
        assert (failed.index, "Odd: no Exception at all" in failed.error) == (1, True)

    with App("memory:") as app:
        run(app)


@pytest.mark.parametrize("progress", [(0.5, "\ud800"), (Decimal(1) / 2, "half"), (True, "all"), (0.5, 7)], ids=repr)
def test_progress_of_any_kind_keeps_the_heartbeat_going(progress):
    async def main(clock):
        app = rig(clock)

        @app.task
        async def works() -> str:
            try:
                current().progress(*progress)
            except UsageError:
                assert isinstance(progress[0], Decimal)
            await clock.sleep(60)
            return "done"

        worker = app.worker(heartbeat_thread=False)
        working = asyncio.create_task(worker.arun())
        handle = await works.asubmit()
        await clock.sleep(20)
        (session,) = await app.client.store.list("workers/")
        assert json.loads((await app.client.store.get(session.key)).body)["claims"][0]["task"] == handle.id
        assert await handle.aresult() == "done"
        assert ((await handle.arecord()).losses, worker.id in session.key) == (0, True)
        worker.stop()
        await working

    run_virtual(main)


def test_values_over_64_mib_are_refused_and_say_what_to_do(app):
    huge = "x" * (64 << 20)

    @app.task(max_attempts=1)
    def returns(what: str) -> str:
        if what == "checkpoint":
            current().checkpoint(huge)
        return huge

    with pytest.raises(UsageError, match=r"'what' of .*returns has 67,108,866 bytes as JSON; the most is 67,108,864"):
        returns.submit(huge)
    handles = [returns.submit(what) for what in ("result", "checkpoint")]
    run_until_idle(app)
    for handle, kind in zip(handles, ("InvalidResult", "InvalidArgument"), strict=True):
        error = handle.record().error
        assert error.type == f"buquet.errors.{kind}"
        assert "Store it in an object of yours" in error.message


def test_an_async_function_behind_a_plain_decorator_is_told(app):
    def plain(function):
        @functools.wraps(function)
        def wrapped(n):
            return function(n)

        return wrapped

    @app.task(max_attempts=1)
    @plain
    async def works(n: int) -> int:
        return n

    handle = works.submit(1)
    run_until_idle(app)
    assert "hidden by a decorator" in handle.record().error.message


# ---------------------------------------------------------------------- Apps and files


def test_a_closed_app_opens_again_on_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = App("sqlite:here/app.db")

    @app.task
    def takes(n: int) -> int:
        return n

    with app:
        handle = takes.submit(1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("BUQUET_URL", "sqlite:another.db")
    with app:
        assert handle.status() == "pending"
        with app:
            takes.submit(2)
        assert takes.submit(3).status() == "pending", "the inner with closed it, and this opened it"
    app.close()
    assert list(tmp_path.rglob("*.db")) == [tmp_path / "here" / "app.db"]
    run_until_idle(app)
    assert handle.result() == 1
    app.close()


def test_a_closed_app_in_memory_keeps_what_it_has():
    app = App("memory:")

    @app.task
    def takes(n: int) -> int:
        return n

    with app:
        handle = takes.submit(1)
    with app:
        run_until_idle(app)
        assert handle.result() == 1


@pytest.mark.parametrize("name", ["with space", "50%", "50%25off", "a%41b", "what?", "#1", "ü"])
def test_a_folder_of_any_name_can_hold_the_file_also_for_a_workers_children(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "tasks.py").write_text("from buquet import App\napp = App()\n@app.task\ndef noop() -> None: ...\n")
    env = {each: value for each, value in os.environ.items() if each != "BUQUET_URL"}

    def buquet(*words):
        command = [sys.executable, "-m", "buquet", *words]
        return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True, timeout=100).stdout

    buquet("submit", "tasks:app", "noop")
    if name == "50%25off":  # the children get the URL as a word of their command line
        buquet("worker", "tasks:app", "--drain", "--processes", "2")
        assert json.loads(buquet("ls", "--json"))[0]["state"] == "completed"
    assert [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("buquet.db")] == [(name, ".buquet")]
    shown = App(App(f"sqlite:{str(folder).replace('%', '%25').replace('?', '%3F')}/b.db").client.store.url)
    assert shown.client.store.path == folder / "b.db"


def test_a_handler_that_closes_its_app_closes_it_not_under_its_worker(app):
    @app.task
    def one(n: int) -> int:
        return n

    @app.task
    def submits(n: int) -> str:
        with app:
            return one.submit(n).id

    @app.task
    async def submits_too(n: int) -> str:
        async with app:
            return (await one.asubmit(n)).id

    handles = [submits.submit(1), submits_too.submit(2)]
    run_until_idle(app)
    assert [one.get(handle.result()).result() for handle in handles] == [1, 2]


def test_two_apps_of_one_process_do_not_meet(tmp_path):
    apps = [App(f"sqlite:{tmp_path}/{name}.db") for name in "ab"]

    def declare(app, name):
        @app.task(name="same")
        def same() -> str:
            return name

        return same

    handles = [declare(app, name).submit() for app, name in zip(apps, "ab", strict=True)]
    for app in apps:
        run_until_idle(app)
    assert [handle.result() for handle in handles] == ["a", "b"]
    with pytest.raises(TaskNotFound):
        apps[0].get(handles[1].id).status()
    for app in apps:
        app.close()


def test_a_handler_that_changes_the_folder_moves_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = App("sqlite:app.db")
    (tmp_path / "inner").mkdir()

    @app.task
    def moves() -> str:
        os.chdir("inner")
        return str(Path.cwd())

    handles = [moves.submit()]
    run_until_idle(app)
    assert handles[0].result() == str(tmp_path / "inner")
    app.close()
    assert app.get(handles[0].id).status() == "completed"
    assert list(tmp_path.rglob("*.db")) == [tmp_path / "app.db"]
    app.close()


# ---------------------------------------------------------------------- what is shown


def test_a_line_of_any_text_is_a_line_of_json():
    record = logging.LogRecord("mine", logging.INFO, "here", 1, "half a character: %s\nand more", ("\ud800",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "half a character: \\ud800\nand more"


def test_what_users_named_moves_no_cursor(capsys):
    print_table(("name", "error"), [("a\x1b[2Jb", "one\ntwo\u2028"), ("naïve 日本", "1.5 s")])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert "\x1b" not in out
    assert "a\\x1b[2Jb" in out
    assert "naïve 日本" in out
