"""Where no store is, a look says so and creates none: no folder, no file, no object."""

import socket
import sys

import pytest
import typer

from buquet import App, ScheduleNotFound, StoreUnavailable, TaskNotFound, WorkerNotFound, keys
from buquet.cli import apps
from buquet.cli import main as command
from buquet.insights.tail import Tail
from buquet.store.memory import MemoryStore

ID = "0" * 32
LOOKS = {
    "ls": [],
    "get": [ID],
    "history": [ID],
    "stats": [],
    "workers": [],
    "errors": [],
    "fsck": [],
    "prune": ["--older-than", "1d"],
    "cancel": [ID],
    "redrive": [ID],
    "pause": ["mail"],
    "resume": ["mail"],
    "drain": [f"{'0' * 8}.{'0' * 16}"],
    "ui": ["--port", "0"],
    "run get": [ID],
    "run ls": [],
    "run signal": [ID, "go"],
    "run cancel": [ID],
    "run pause": [ID],
    "run resume": [ID],
    "run retry": [ID],
    "run graph": [ID],
    "schedule ls": [],
    "schedule trigger": ["nightly"],
    "schedule pause": ["nightly"],
    "schedule resume": ["nightly"],
}
CREATE = {"init", "doctor", "bench", "submit", "worker", "dev", "demo", "run start"}
WAITS = {"tail"}


def test_a_server_that_says_nothing_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(apps, "PATIENCE", 0.3)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "x")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"s3://bucket/prefix?endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:\d+ did not answer within 0.3 s"):
            command.cli(["stats", "--url", url], standalone_mode=False)


def commands(group, prefix=""):
    for name, found in group.commands.items():
        yield from commands(found, f"{name} ") if hasattr(found, "commands") else [prefix + name]


def test_every_command_is_known_to_create_a_store_or_not_to():
    assert set(commands(typer.main.get_command(command.cli))) == set(LOOKS) | CREATE | WAITS


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", LOOKS)
def test_a_command_says_that_there_is_no_store_and_creates_none(name, as_json, tmp_path, monkeypatch, capfd):
    path = tmp_path / "deep" / "down" / "x.db"
    words = ["buquet", *name.split(), *LOOKS[name], *["--json"] * as_json, "--url", f"sqlite:{path}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert f"there is no store at sqlite:{path}" in said
    assert "buquet init" in said
    assert list(tmp_path.iterdir()) == []


def test_what_a_program_looks_at_creates_no_file(tmp_path):
    with App(f"sqlite:{tmp_path / 'deep' / 'x.db'}") as app:
        for look in (app.get(ID).status, app.get(ID).history, lambda: app.cancel(ID), lambda: app.redrive(ID)):
            with pytest.raises(TaskNotFound):
                look()
        with pytest.raises(ScheduleNotFound):
            app.pause_schedule("nightly")
        with pytest.raises(WorkerNotFound):
            app.drain_worker(f"{'0' * 8}.{'0' * 16}")
        assert app.schedules() == []
        assert list(tmp_path.iterdir()) == []

        @app.task
        def noop() -> None: ...

        handle = noop.submit()
        assert handle.status() == "pending"
        assert (tmp_path / "deep" / "x.db").exists()


async def test_a_file_that_another_process_creates_is_met_by_one_that_looked_before(tmp_path):
    url = f"sqlite:{tmp_path / 'deep' / 'x.db'}"
    async with App(url) as looks, App(url) as works:
        tail = Tail(looks.client)
        assert await tail.poll() == []

        @works.task
        def noop() -> None: ...

        handle = await noop.asubmit()
        await works.client.ringer.flush()
        assert await looks.get(handle.id).astatus() == "pending"
        assert [each.event for each in await tail.poll()] == ["submitted"]


async def test_a_look_at_a_bucket_writes_nothing():
    store = MemoryStore(App("memory:").clock)
    app = App(store=store)
    with pytest.raises(TaskNotFound):
        await app.get(ID).astatus()
    with pytest.raises(WorkerNotFound):
        await app.adrain_worker(f"{'0' * 8}.{'0' * 16}")
    assert await store.get(keys.LAYOUT) is None
