"""Metrics: what a worker counts, what is read from it at a scrape, and how the command serves them."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from buquet import App, Fail, UsageError
from buquet.operate import metrics as metrics_module
from buquet.operate.bench import CountingStore
from buquet.operate.metrics import Metrics, serve
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual


def scrape(metrics):
    """Return every sample by its name and labels."""
    found = {}
    for line in generate_latest(metrics.registry).decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def rig(clock):
    store = CountingStore(MemoryStore(clock, can_wait=False))
    app = App(store=store, clock=clock)
    app.background = Background(clock.loop)
    return app, store


def watched(app, store, **options):
    worker = app.worker(heartbeat_thread=False, **options)
    metrics = Metrics(worker, store)
    worker.observers.watchers.append(metrics)
    return worker, metrics


def events(samples, name, queue="default"):
    pattern = re.compile(rf'buquet_tasks_total\{{event="(\w+)",name="{name}",queue="{queue}"\}}')
    return {found[1]: value for key, value in samples.items() if (found := pattern.fullmatch(key))}


def test_each_event_of_a_task_is_counted_once_with_its_times():
    async def main(clock):
        app, store = rig(clock)

        @app.task
        async def good() -> None:
            await clock.sleep(2)

        @app.task(max_attempts=2)
        async def flaky() -> None:
            raise ValueError

        @app.task(queue="mail")
        async def bad() -> None:
            raise Fail("no")

        await good.options(delay=30).asubmit()
        await good.asubmit()
        await flaky.asubmit()
        await bad.asubmit()
        late = await good.options(expires=1, delay=20).asubmit()
        worker, metrics = watched(app, store, drain=True)
        await worker.arun()
        assert await late.astatus() == "expired"
        found = scrape(metrics)
        assert events(found, "good") == {"started": 2, "completed": 2, "expired": 1}
        assert events(found, "flaky") == {"started": 2, "retried": 1, "failed": 1}
        assert events(found, "bad", "mail") == {"started": 1, "failed": 1}
        labels = '{name="good",queue="default"}'
        assert found[f"buquet_task_duration_seconds_count{labels}"] == 2
        assert 4 <= found[f"buquet_task_duration_seconds_sum{labels}"] < 4.3
        assert found[f"buquet_task_delay_seconds_count{labels}"] == 2
        assert found[f"buquet_task_delay_seconds_sum{labels}"] < 3  # from when it was due, not from its submit

    run_virtual(main)


def test_what_a_dead_worker_ran_is_lost_and_its_last_loss_is_a_failure_too():
    async def main(clock):
        import asyncio

        app, store = rig(clock)

        @app.task(max_losses=2)
        async def long() -> None:
            await clock.sleep(10_000)

        await long.asubmit()
        for _ in range(2):
            work = asyncio.create_task(app.worker(heartbeat_thread=False).arun())
            await clock.sleep(20)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            worker, metrics = watched(app, store, max_time=60, grace=0)
            await worker.arun()
            first = events(scrape(metrics), "long")
            if first.get("failed"):
                break
            assert first["lost"] == 1
        assert first == {"lost": 1, "failed": 1}

    run_virtual(main)


def test_a_scrape_shows_slots_heartbeat_and_requests():
    async def main(clock):
        import asyncio

        app, store = rig(clock)

        @app.task
        async def long() -> None:
            await clock.sleep(60)

        await long.asubmit()
        worker, metrics = watched(app, store, concurrency=3)
        work = asyncio.create_task(worker.arun())
        await clock.sleep(12)
        found = scrape(metrics)
        assert (found["buquet_slots"], found["buquet_free_slots"], found["buquet_running_tasks"]) == (3, 2, 1)
        assert 0 <= found["buquet_heartbeat_age_seconds"] <= 5.5
        assert found['buquet_store_requests_total{operation="PUT",outcome="ok"}'] >= 5
        assert found['buquet_store_requests_total{operation="GET",outcome="unchanged"}'] >= 1
        assert found["buquet_claims_lost_total"] == 0
        assert store.total("PUT") == sum(
            value for key, value in found.items() if key.startswith('buquet_store_requests_total{operation="PUT"')
        )
        worker.stop()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    run_virtual(main)


def test_foreign_names_do_not_make_labels():
    async def main(clock):
        app, store = rig(clock)

        @app.task
        async def known() -> None: ...

        _, metrics = watched(app, store)
        prepared = known.prepare((), {}).task
        from msgspec.structs import replace

        from buquet.queue import transitions

        for number in range(100):
            task = transitions.submit(replace(prepared, name=f"n{number}", queue=f"q{number}"), 1)
            metrics.moved(transitions.cancel(task, 2))
        assert events(scrape(metrics), "other", "other") == {"cancelled": 100}
        metrics.moved(replace(transitions.cancel(transitions.submit(prepared, 1), 2), name="buquet.signal"))
        assert events(scrape(metrics), "buquet.signal") == {"cancelled": 1}
        assert not any('"n' in name for name in scrape(metrics))

    run_virtual(main)


def test_a_task_taken_over_is_lost_and_started():
    async def main(clock):
        from buquet.queue import transitions

        app, store = rig(clock)

        @app.task
        async def noop() -> None: ...

        _, metrics = watched(app, store)
        running = transitions.claim(transitions.submit(noop.prepare((), {}).task, 1), "dead", "token", 2)
        metrics.started(transitions.take_over(running, "me", "other", 3))
        found = scrape(metrics)
        assert events(found, "noop") == {"started": 1, "lost": 1}
        assert not any("delay_seconds_count" in name for name in found)

    run_virtual(main)


def free_ports():
    """Two ports side by side that are free now."""
    for _ in range(50):
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise AssertionError("no two free ports")


def test_a_port_in_use_is_an_error_that_names_the_option():
    async def main(clock):
        app, store = rig(clock)

        @app.task
        async def noop() -> None: ...

        return watched(app, store)[1]

    metrics = run_virtual(main)
    port = free_ports()
    stop = serve(metrics, "127.0.0.1", port)
    body = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read()
    assert b"buquet_slots 16.0" in body
    with pytest.raises(UsageError, match="--metrics-port"):
        serve(metrics, "127.0.0.1", port)
    stop()


@pytest.mark.slow
def test_two_processes_serve_at_two_ports_and_log_in_json(tmp_path):
    (tmp_path / "jobs.py").write_text(
        "import logging\n"
        "from buquet import App, current\n"
        "app = App('sqlite:b.db')\n"
        "@app.task\n"
        "def noop() -> None:\n"
        "    current().logger.warning('mine')\n"
        "    logging.getLogger('theirs').warning('of a library')\n"
    )
    port = free_ports()
    command = [sys.executable, "-m", "buquet", "worker", "jobs:app", "--processes", "2", "--metrics-port", str(port), "--json"]
    worker = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        for each in (port, port + 1):
            assert b"buquet_slots 16.0" in patiently(f"http://127.0.0.1:{each}/metrics")
        submit = [sys.executable, "-m", "buquet", "submit", "jobs:app", "noop", "--wait"]
        subprocess.run(submit, cwd=tmp_path, check=True, capture_output=True)
    finally:
        worker.terminate()
        out, _ = worker.communicate(timeout=60)
    import json

    lines = [json.loads(line) for line in out.splitlines()]
    mine = next(line for line in lines if "mine" in line.get("message", ""))
    theirs = next(line for line in lines if line.get("message") == "of a library")
    assert len(mine["task"]) == 32
    assert {name: mine[name] for name in ("task", "task_name", "attempt")} == {
        name: theirs[name] for name in ("task", "task_name", "attempt")
    }


def test_half_sent_requests_take_no_thread_each_and_keep_no_scrape_waiting(monkeypatch):
    monkeypatch.setattr(metrics_module, "SECONDS", 0.5)
    before = threading.active_count()
    app = App("memory:")

    @app.task
    def noop() -> None: ...

    counted = Metrics(app.worker(), CountingStore(app.client.store))
    port = free_ports()
    stop = serve(counted, "127.0.0.1", port)
    try:
        assert b"buquet_slots" in patiently(f"http://127.0.0.1:{port}/metrics")
        half = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(20)]
        for each in half:
            each.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert b"buquet_slots" in patiently(f"http://127.0.0.1:{port}/metrics")
        assert threading.active_count() == before + 1
        for each in half:
            assert closed(each)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as wrong:
            wrong.sendall(b"GET /secrets HTTP/1.1\r\n\r\n")
            assert wrong.recv(100).startswith(b"HTTP/1.1 404")
    finally:
        stop()
    assert threading.active_count() == before


def test_who_does_not_take_the_answer_holds_no_connection_open(monkeypatch):
    monkeypatch.setattr(metrics_module, "SECONDS", 0.3)
    registry = CollectorRegistry()
    Gauge("large", "x" * 30_000, registry=registry)

    async def main():
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with theirs:
            theirs.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            await metrics_module._Scrapes(registry).serve(*await asyncio.open_connection(sock=ours))
            await asyncio.sleep(0)  # what was aborted is closed
            assert ours.fileno() == -1

    asyncio.run(main())


def closed(connection):
    """Tell whether the other side closes a connection without an answer."""
    with connection:
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True


def patiently(url):
    for _ in range(300):
        try:
            return urllib.request.urlopen(url, timeout=10).read()  # noqa: S310
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


def test_without_its_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "buquet.operate.metrics")
    with pytest.raises(UsageError, match=r"pip install 'buquet\[metrics\]>=0"):
        __import__("buquet.operate.metrics")
