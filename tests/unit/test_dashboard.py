"""The dashboard without a browser: who comes in, what is refused, what every answer carries, and that all text is escaped."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from itsdangerous import TimestampSigner
from starlette.datastructures import URL
from starlette.testclient import TestClient
from typer.testing import CliRunner

from buquet import App, Backoff, keys
from buquet.cli.main import cli
from buquet.clock import Clock
from buquet.dashboard import guard, serve
from buquet.dashboard.app import GET, dashboard
from buquet.dashboard.sessions import CROWD, Logins, cookie_name
from buquet.errors import StoreRefused, StoreUnavailable, UsageError
from buquet.insights.feed import MOST_RECORDS
from buquet.operate.bench import CountingStore
from buquet.store.base import Stored
from buquet.store.memory import MemoryStore
from buquet.testing.fixture import run_until_idle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HERE = "http://127.0.0.1:8000"
COOKIE = cookie_name("memory:", URL(HERE))
HOSTILE = "<script>alert('1')</script>\"&'é\u202e"
PAGES = [path for path in GET if "{" not in path and path not in {"/events", "/login", "/run.css"}]


class Browser:
    """A client that behaves as a browser does: it keeps cookies, says where a form comes from, and follows redirects."""

    def __init__(self, app: App, at: str = HERE, **options: Any) -> None:
        self.client = TestClient(dashboard(app, **options), base_url=at, follow_redirects=True)

    def get(self, path: str, **headers: str) -> Any:
        return self.client.get(path, headers=headers)

    def token(self, path: str = "/") -> str:
        found = re.search(r'name="token" value="([0-9a-f]+)"', self.client.get(path).text)
        return found[1] if found else ""

    def post(self, path: str, form: dict[str, str], *, origin: str | None = HERE) -> Any:
        return self.client.post(path, data=form, headers={"origin": origin} if origin else {})


@pytest.fixture
def app() -> Iterator[App]:
    app = App("memory:")

    @app.task(name=HOSTILE, max_attempts=1)
    def hostile(value: str) -> str:
        raise RuntimeError(value)

    @app.task
    def good(value: str) -> str:
        return value

    with app:
        yield app


def waiting(app: App) -> str:
    return app.tasks["good"].options(delay=1000).submit("x").id


def with_form(app: App) -> tuple[str, str]:
    """A task and the page with its button."""
    task_id = waiting(app)
    return task_id, f"/tasks/{task_id}"


@pytest.mark.parametrize("path", [*PAGES, "/static/live.js", "/static/style.css", "/nowhere", "/tasks/nonsense", "/login"])
def test_every_answer_is_guarded(app: App, path: str) -> None:
    answer = Browser(app).get(path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert answer.headers["cache-control"] == ("max-age=3600" if "static" in path else "no-store")


@pytest.mark.parametrize("path", PAGES)
def test_no_page_has_a_script_or_style_of_its_own_which_the_policy_would_block(app: App, path: str) -> None:
    app.tasks[HOSTILE].submit(HOSTILE)
    run_until_idle(app)
    text = Browser(app).get(path).text
    assert not re.search(r"<script(?![^>]*\bsrc=)", text)
    assert not re.search(r"\son[a-z]+=|\sstyle=|<style|javascript:", text)
    assert not re.search(r"""(?:src|href)="(?:https?:)?//""", text), "nothing from elsewhere"


def test_what_comes_from_a_task_is_escaped_on_every_page(app: App) -> None:
    for state in ("failed", "pending"):
        task = app.tasks[HOSTILE].options(
            tags={HOSTILE[:50]: HOSTILE[:50]}, key=HOSTILE, delay=None if state == "failed" else 900
        )
        handle = task.submit(HOSTILE + state) if state == "failed" else task.options(key="later").submit(HOSTILE)
        if state == "failed":
            app.worker(["default"], max_time=1).run()
    browser = Browser(app)
    paths = [
        *PAGES,
        f"/tasks/{handle.id}",
        "/tasks?q=%3Cscript%3E",
        f"/tasks/{handle.id}/versions",
        "/tasks?q=" + "%22%3E%3Cscript%3E",
    ]
    shown = 0
    for path in paths:
        text = browser.get(path).text
        assert "<script>" not in text, path
        assert "alert('1')" not in text, path
        shown += "&lt;script&gt;" in text
    assert shown >= 6, "it is shown"


def test_a_pack_shows_its_failed_items_and_where_they_broke(app: App) -> None:
    batch = app.tasks[HOSTILE].batch([HOSTILE, "two"])
    run_until_idle(app)
    text = Browser(app).get(f"/tasks/{batch.task_ids[0]}").text
    assert "Failed: 2 of 2 items" in text
    assert "<summary>item 1: <bdi>RuntimeError: two</bdi></summary>" in text
    assert text.count("raise RuntimeError(value)") == 2
    assert "<script>alert" not in text
    assert "Checkpoint" not in text, "its ranges say less"


@pytest.mark.parametrize("at", [10**15, 10**400, -(10**17)], ids=["a little", "far", "before"])
def test_a_time_that_none_can_be_hides_no_page(app: App, at: int) -> None:
    task_id = waiting(app)
    key = keys.task(task_id)
    store, loop = app.client.store, app.background

    async def damage() -> None:
        stored = await store.get(key)
        assert isinstance(stored, Stored)
        event = {"at": at, "state": "running", "why": "claimed"}
        times = dict.fromkeys(("created", "due", "deadline", "started", "finished"), at)
        record = {**json.loads(stored.body), **times, "state": "failed", "events": [{**event, "at": 1}, event]}
        await store.put(key, json.dumps(record).encode())
        run = {"id": task_id, "workflow": "flow", "queue": "default", "created": at, "finished": 1, "graph": {"steps": {}}}
        steps = {name: {"state": "due", "due": moment, "until": at} for name, moment in (("one", at), ("two", 1))}
        graph = {"steps": {name: {"kind": "wait", "signal": "go"} for name in steps}}
        await store.put(keys.run(task_id), json.dumps({**run, "graph": graph, "steps": steps}).encode())
        await store.put(keys.open_run(task_id, 1), b"")

    loop.run(damage, "damage")
    browser = Browser(app)
    for path in ("/tasks?all=1", "/runs", "/runs?all=1", "/", "/workers"):
        assert browser.get(path).status_code == 200, path
    for path, record in ((f"/tasks/{task_id}", key), (f"/runs/{task_id}", keys.run(task_id))):
        answer = browser.get(path)
        assert answer.status_code == 409, path
        assert f"{record} is no" in answer.text, "the record is named, and what is wrong with it"


def test_a_session_that_serves_no_queue_hides_no_page(app: App) -> None:
    waiting(app)
    worker, store, now = "0123abcd.0123456789abcdef", app.client.store, app.clock.now_ms()
    session = {"id": worker, "host": "h", "pid": 1, "started": now, "beat": now, "ttl": 60, "concurrency": 1, "queues": []}

    async def damage() -> None:
        claims = [{"task": "ab" * 16, "token": "t", "name": "n"}]
        await store.put(keys.session(worker), json.dumps({**session, "claims": claims}).encode())

    app.background.run(damage, "damage")
    browser = Browser(app)
    for path in (*PAGES, "/tasks?all=1"):
        assert browser.get(path).status_code == 200, path


def test_a_queue_that_none_can_be_called_hides_no_page(app: App) -> None:
    waiting(app)
    store, now, queue = app.client.store, app.clock.now_ms(), "q" * 101
    line = {"v": 1, "id": "0" * 32, "name": "n" * 101, "queue": queue, "status": "completed", "at": now, "submitted": now}
    session = {"id": "x", "host": "h", "pid": 1, "started": now, "beat": now, "ttl": 60, "concurrency": 1, "names": ["n"]}

    async def damage() -> None:
        await store.put(keys.journal(now, "zz.zz", 1), json.dumps(line).encode())
        await store.put("workers/x/x.json", json.dumps({**session, "queues": [queue]}).encode())
        await store.put(f"bell/{queue}", b"{}")

    app.background.run(damage, "damage")
    browser = Browser(app)
    for path in (*PAGES, "/tasks?key=k", "/tasks?all=1&status=pending"):
        assert browser.get(path).status_code == 200, path
    assert queue not in browser.get("/queues").text, "nothing can be asked of it"


def test_a_worker_without_a_queue_hides_no_page(app: App) -> None:
    """A session is written by anybody who may write there: one of no queue, with a claim, made three pages fail for all."""
    store, now = app.client.store, app.clock.now_ms()
    worker = f"{'0' * 8}.{'0' * 16}"
    session = {"id": worker, "host": "h", "pid": 1, "started": now, "beat": now, "ttl": 60, "concurrency": 1, "names": ["n"]}
    claims = [{"task": "0" * 32, "token": "t", "name": "n", "since": now}]
    app.background.run(
        lambda: store.put(keys.session(worker), json.dumps({**session, "queues": [], "claims": claims}).encode()), "damage"
    )
    browser = Browser(app)
    for path in PAGES:
        assert browser.get(path).status_code == 200, path


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 10**15, -(10**17), 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([[], {}, [[]], [{}], "x" * 5000, "\x00\u202e</b>"]),
)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_every_page_survives_every_record(data: st.DataObject) -> None:
    with App("memory:") as app:
        now, task_id, worker = app.clock.now_ms(), app.clock.new_id(), f"{'0' * 8}.{'0' * 16}"
        entry = keys.entry("default", 5, now, 0, task_id, 0, "n")
        error = {"type": "E", "message": "m", "traceback": "t"}
        event = {"at": now, "state": "pending", "why": "submitted"}
        task = {"id": task_id, "queue": "default", "name": "n", "state": "pending", "created": now, "entry": entry, "args": {}}
        task |= {"error": error, "events": [event], "failures": 1, "attempt": 1, "tags": {"a": "b"}, "pack": 0, "due": now}
        claim = {"task": task_id, "token": "t", "name": "n", "since": now, "progress": {"fraction": 0.5}}
        session = {"id": worker, "host": "h", "pid": 1, "started": now, "beat": now, "ttl": 60, "concurrency": 1, "names": ["n"]}
        session |= {"queues": ["default"], "claims": [claim], "rss": 1, "schedules": ["s"], "version": "1"}
        line = {"id": task_id, "name": "n", "queue": "default", "status": "failed", "at": now, "submitted": now, "error": error}
        line |= {"kind": "task", "started": now, "ready": now, "ran": 1, "run": task_id, "pack": 1, "due": now, "group": "abc"}
        schedule = {"name": "s", "cron": "* * * * *", "tz": "UTC", "template": task, "last": now, "handled": now, "dropped": 1}
        run = {"id": task_id, "workflow": "w", "queue": "default", "created": now, "started": now, "graph": {"steps": {}}}
        run |= {"graph": {"steps": {"one": {"kind": "wait", "signal": "go"}}}, "steps": {"one": {"state": "due", "due": now}}}
        paused = {"paused": True, "since": now, "by": "me"}
        places = (
            (keys.task(task_id), task),
            (keys.session(worker), session),
            (keys.journal(now, worker, 1), line),
            (keys.schedule("s"), schedule),
            (keys.run(task_id), run),
            (keys.queue_settings("default"), paused),
        )
        objects = {key: damaged(data, record) for key, record in places}

        async def write() -> None:
            for key, body in objects.items():
                await app.client.store.put(key, body)
            for key in (entry, keys.open_run(task_id, 1), keys.bell("default")):
                await app.client.store.put(key, b"")

        app.background.run(write, "damage")
        browser = Browser(app)
        for path in (*PAGES, "/tasks?all=1", "/runs?all=1", "/tasks?tag=a", "/tasks?key=k", "/?window=24h"):
            assert browser.get(path).status_code == 200, path
        for path in (f"/tasks/{task_id}", f"/tasks/{task_id}/versions", f"/runs/{task_id}"):
            answer = browser.get(path)
            assert answer.status_code in {200, 404, 409}, path
            assert 'aria-label="Pages"' in answer.text, path


def damaged(data: st.DataObject, record: dict[str, Any]) -> bytes:
    """A record with one or two fields that are odd, anywhere in it; or left as it is."""
    record = json.loads(json.dumps(record))
    for _ in range(data.draw(st.integers(0, 2))):
        at: Any = record
        while True:
            place = data.draw(st.sampled_from([*at] if isinstance(at, dict) else range(len(at))))
            if not (isinstance(at[place], dict | list) and at[place] and data.draw(st.booleans())):
                break
            at = at[place]
        at[place] = data.draw(ODD_VALUES)
    return json.dumps(record).encode()


def test_a_page_that_fails_keeps_navigation_and_headers() -> None:
    class Odd(MemoryStore):
        async def get(self, key: str, **options: Any) -> Any:
            if key.startswith(keys.TASKS):
                raise ZeroDivisionError("a defect <b>")
            return await super().get(key, **options)

        async def list(self, prefix: str, **options: Any) -> Any:
            if prefix == keys.WORKERS:
                raise ZeroDivisionError("another defect")
            return await super().list(prefix, **options)

    app = App("memory:")
    with app.on_store(Odd(app.clock)):
        browser = Browser(app)
        answer = browser.get(f"/tasks/{'0' * 32}")
        assert answer.status_code == 500
        assert 'aria-label="Pages"' in answer.text
        assert "a defect &lt;b&gt;" in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        answer = browser.get("/queues")
        assert answer.status_code == 200, "what can be read is shown"
        assert "another defect" in answer.text


def test_a_page_says_of_when_it_is(app: App) -> None:
    shown = Browser(app).get("/").text
    found = re.search(
        r'<span class="live on" id="live" data-as-of="(\d+)" data-now="(\d+)"[^>]*>as of <time[^>]*>[0-9:]{8} UTC</time>', shown
    )
    assert found
    assert 0 <= int(found[2]) - int(found[1]) < 10_000


def test_a_store_that_hangs_holds_up_no_page() -> None:
    class Silent(MemoryStore):
        async def get(self, *_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

        list = get

    app = App("memory:")
    with app.on_store(Silent(app.clock)):
        browser = Browser(app)
        for path in ("/", "/tasks?all=1", f"/tasks/{'0' * 32}", f"/runs/{'0' * 32}"):
            answer = browser.get(path)
            assert answer.status_code == (200 if path == "/" else 503), path
            assert 'aria-label="Pages"' in answer.text
            assert "answer" in answer.text
            assert ('id="live"' in answer.text) == (path == "/"), "a page without figures has no age"
        assert "not read yet" in browser.get("/").text
        begun = app.clock.monotonic()
        assert browser.get(f"/tasks?q={'0' * 32}").status_code == 200
        assert app.clock.monotonic() - begun < 3.5, "the store was waited for once"


def test_a_store_that_refuses_is_named_as_that() -> None:
    class Closed(MemoryStore):
        async def get(self, *_: Any, **__: Any) -> Any:
            msg = "GET runs/: 403 AccessDenied"
            raise StoreRefused(msg)

        list = get

    app = App("memory:")
    with app.on_store(Closed(app.clock)):
        browser = Browser(app)
        page = browser.get(f"/runs/{'0' * 32}").text
        assert "The store refused the request" in page
        assert "does not answer" not in page
        for path in ("/", "/tasks", "/errors", "/workers", "/queues", "/runs", "/schedules"):
            assert "403 AccessDenied" in browser.get(path).text, path


def test_a_queue_leads_to_all_that_waits_in_it(app: App) -> None:
    @app.task(backoff=Backoff(initial=1000))
    def tried() -> None:
        raise RuntimeError

    task_id = tried.submit().id
    app.worker(["default"], max_time=1).run()
    browser = Browser(app)
    (link,) = re.findall(r'<th scope="row"><a href="(/tasks[^"]*name=tried[^"]*)"', browser.get("/queues?window=6h").text)
    page = browser.get(link.replace("&amp;", "&")).text
    assert task_id in page
    assert 'value="6h"' in page


def test_a_refused_worker_says_so_on_its_page(app: App) -> None:
    worker, now = f"{'0' * 8}.{'0' * 16}", app.clock.now_ms()
    session = {
        "id": worker,
        "host": "h",
        "pid": 1,
        "started": now,
        "beat": now,
        "ttl": 60,
        "concurrency": 1,
        "queues": ["default"],
    }
    session |= {"names": ["n"], "refused": "PUT payloads/0 in the store: 403 AccessDenied", "refused_at": now}
    app.background.run(lambda: app.client.store.put(keys.session(worker), json.dumps(session).encode()), "a session")
    page = Browser(app).get("/workers").text
    assert "403 AccessDenied" in page
    assert "The store refused a request of this worker" in page


@pytest.mark.parametrize("path", ["/", "/errors", "/queues", "/tasks", "/runs"])
def test_the_reader_chooses_one_window_for_a_page(app: App, path: str) -> None:
    app.tasks[HOSTILE].submit(HOSTILE)
    run_until_idle(app)
    browser = Browser(app)
    for window in ("1h", "6h", "24h"):
        text = browser.get(f"{path}?window={window}&q=").text
        chosen = re.findall(r'<a href="[^"]*window=([0-9a-z]+)" aria-current="true">', text)
        assert chosen == [window]
        assert {"1 h", "6 h", "24 h"} & set(re.findall(r"(?:the last|in|[·,]|<i>) ?(\d+ h)\b", text)) <= {
            window.replace("h", " h")
        }


def test_a_list_of_tasks_leaves_out_what_carries_a_runs_events_and_names_the_run(app: App) -> None:
    good = app.tasks["good"]

    @app.workflow
    def flow(value: str) -> None:
        good(value)

    run = flow.start("x")
    run_until_idle(app)
    browser = Browser(app)
    text = browser.get("/tasks").text
    assert ">buquet.start<" not in text
    assert f'href="/runs/{run.id}"' in text
    assert ">buquet.start<" in browser.get("/tasks?name=buquet.start").text


def test_a_confirmation_names_what_it_is_about(app: App) -> None:
    task_id, page = with_form(app)
    app.tasks[HOSTILE].submit(HOSTILE)
    app.worker(["default"], max_time=1).run()
    browser = Browser(app)
    assert f'data-confirm="Cancel task good {task_id} in queue default?"' in browser.get(page).text
    assert 'data-confirm="Pause queue default?' in browser.get("/queues").text
    for text in (browser.get(path).text for path in (*PAGES, page)):
        for asked in re.findall(r'data-confirm="([^"]*)"', text):
            assert not re.search(r"\b(this|these)\b", asked), asked


def test_run_all_again_runs_what_its_question_has_counted(app: App) -> None:
    failing = app.tasks[HOSTILE]
    failing.submit("first")
    app.worker(["default"], max_time=1).run()
    browser = Browser(app)
    page = browser.get("/errors").text
    form = dict(re.findall(r'name="(token|action|target|back|since|until)" value="([^"]*)"', page))
    assert form["action"] == "redrive-group"
    assert "again?" in page
    later = failing.submit("later")  # of the same kind, after the page was made
    app.worker(["default"], max_time=1).run()
    fresh = Browser(app)
    form["token"] = fresh.token("/errors")
    said = fresh.post("/act", form).text
    assert "1 task waits again" in said
    assert later.status() == "failed"


def test_a_page_here_can_do_what_its_button_says(app: App) -> None:
    task_id, page = with_form(app)
    browser = Browser(app)
    answer = browser.post("/act", {"action": "cancel-task", "target": task_id, "token": browser.token(page), "back": page})
    assert answer.url.path == page
    assert "The task is cancelled." in answer.text
    assert app.get(task_id).status() == "cancelled"
    assert "The task is cancelled." not in browser.get(page).text, "told once"
    browser.post("/act", {"action": "redrive-task", "target": task_id, "token": browser.token(page), "back": page})
    assert app.get(task_id).status() == "pending"


def test_what_a_button_cannot_do_is_told_and_does_no_harm(app: App) -> None:
    task_id, page = with_form(app)
    browser = Browser(app)
    form = {"token": browser.token(page), "target": task_id, "back": page}
    assert "Not done: " in browser.post("/act", form | {"action": "redrive-task"}).text
    assert "cannot &#39;explode&#39;" in browser.post("/act", form | {"action": "explode"}).text
    assert "Not done: " in browser.post("/act", form | {"action": "cancel-task", "target": "../x"}).text
    away = browser.client.post(
        "/act", data=form | {"action": "x", "back": "https://evil.example/"}, headers={"origin": HERE}, follow_redirects=False
    )
    assert away.headers["location"] == "/"
    assert app.get(task_id).status() == "pending"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", None, "http://127.0.0.1:8001", "http://127.0.0.1"])
def test_a_form_from_elsewhere_is_refused_even_with_the_right_token(app: App, origin: str | None) -> None:
    task_id, page = with_form(app)
    browser = Browser(app)
    form = {"action": "cancel-task", "target": task_id, "token": browser.token(page)}
    assert browser.post("/act", form, origin=origin).status_code == 403
    assert app.get(task_id).status() == "pending"


@pytest.mark.parametrize("token", ["", "0" * 64, "another's"])
def test_a_form_without_its_sessions_token_is_refused(app: App, token: str) -> None:
    task_id, page = with_form(app)
    browser, other = Browser(app), Browser(app)
    token = other.token(page) if token == "another's" else token
    browser.get(page)
    assert browser.post("/act", {"action": "cancel-task", "target": task_id, "token": token}).status_code == 403
    assert app.get(task_id).status() == "pending"


def test_actions_are_posts_only(app: App) -> None:
    task_id, _ = with_form(app)
    assert Browser(app).get(f"/act?action=cancel-task&target={task_id}").status_code == 405
    assert app.get(task_id).status() == "pending"


def test_a_form_that_is_too_large_or_odd_is_refused(app: App) -> None:
    browser = Browser(app)
    headers = {"origin": HERE}
    assert browser.client.post("/act", content=b"a" * (1 << 21), headers=headers).status_code == 413
    assert browser.client.post("/act", content=b"a=1&" * 200, headers=headers).status_code == 400
    assert browser.client.post("/act", content=b"\xff\xfe=%ff", headers=headers).status_code == 403


def test_cookies_cannot_be_read_by_scripts_or_sent_from_elsewhere(app: App) -> None:
    _, *attributes = Browser(app).get("/").headers["set-cookie"].split("; ")
    assert attributes == ["path=/", "httponly", "samesite=strict"]
    _, *attributes = TestClient(dashboard(app), base_url="https://127.0.0.1").get("/").headers["set-cookie"].split("; ")
    assert attributes == ["path=/", "httponly", "samesite=strict", "secure"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:9", 200), ("evil.example", 421), ("", 421), ("[", 421)],
)
def test_on_this_machine_only_its_own_names_are_served(app: App, host: str, status: int) -> None:
    assert Browser(app).get("/", host=host).status_code == status


def test_read_only_has_no_buttons_and_takes_no_form(app: App) -> None:
    task_id, page = with_form(app)
    browser = Browser(app, read_only=True)
    for path in [*PAGES, page]:
        text = browser.get(path).text
        assert 'method="post"' not in text, path
    writer = Browser(app)
    token = writer.token(page)
    browser.client.cookies = writer.client.cookies
    answer = browser.post("/act", {"action": "cancel-task", "target": task_id, "token": token})
    assert answer.status_code == 403
    assert "--read-only" in answer.text
    assert app.get(task_id).status() == "pending"


class TestPassword:
    def test_nothing_is_seen_without_it(self, app: App) -> None:
        task_id, page = with_form(app)
        browser = Browser(app, password="open sesame")
        for path in [*PAGES, page, "/nowhere"]:
            answer = browser.get(path)
            assert answer.url.path == "/login", path
            assert task_id not in answer.text.replace(answer.url.query.decode(), "").replace(page, "")
        assert browser.get("/events?topic=overview").status_code == 401
        assert (
            browser.post("/act", {"action": "cancel-task", "target": task_id, "token": browser.token("/login")}).status_code
            == 401
        )
        assert app.get(task_id).status() == "pending"
        assert browser.get("/static/style.css").status_code == 200

    def test_it_opens_the_page_that_was_asked_for(self, app: App) -> None:
        browser = Browser(app, password="pässword")
        wrong = browser.post("/login", {"password": "password", "token": browser.token("/login"), "back": "/queues"})
        assert wrong.status_code == 401
        assert browser.get("/queues").url.path == "/login"
        before = dict(browser.client.cookies)
        right = browser.post("/login", {"password": "pässword", "token": browser.token("/login"), "back": "/queues"})
        assert right.url.path == "/queues"
        assert dict(browser.client.cookies) != before, "the session is a new one"
        assert browser.get("/tasks").url.path == "/tasks"
        browser.post("/logout", {"token": browser.token("/")})
        assert browser.get("/tasks").url.path == "/login"

    def test_a_cookie_that_was_copied_opens_nothing_after_the_logout(self, app: App) -> None:
        browser = Browser(app, password="x")
        browser.post("/login", {"password": "x", "token": browser.token("/login")})
        copied = dict(browser.client.cookies)
        assert browser.get("/tasks").url.path == "/tasks"
        browser.post("/logout", {"token": browser.token("/")})
        browser.client.cookies.clear()
        browser.client.cookies.update(copied)
        assert browser.get("/tasks").url.path == "/login"

    def test_two_dashboards_on_one_host_leave_each_others_login_alone(self, app: App) -> None:
        origin = "http://127.0.0.1:8001"
        first, second = Browser(app, password="x"), Browser(app, origin, password="y")
        second.client.cookies = first.client.cookies  # browsers tell no ports apart
        first.post("/login", {"password": "x", "token": first.token("/login")})
        second.post("/login", {"password": "y", "token": second.token("/login")}, origin=origin)
        for browser in (first, second, first):
            assert browser.get("/tasks").url.path == "/tasks"
        names = {cookie_name(url, URL(HERE)) for url in ("s3://a/x", "s3://a/y")}
        assert len(names) == 2, "so do two stores behind one proxy"

    def test_who_logged_in_and_what_was_done_is_in_the_log(self, app: App, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "buquet.dashboard")
        task_id, page = with_form(app)
        browser = Browser(app, password="x")
        browser.post("/login", {"password": "no", "token": browser.token("/login")})
        browser.post("/login", {"password": "x", "token": browser.token("/login")})
        browser.post("/act", {"action": "cancel-task", "target": task_id, "token": browser.token(page)})
        browser.post("/logout", {"token": browser.token("/")})
        said = [record.getMessage() for record in caplog.records if record.name == "buquet.dashboard"]
        who = r"testclient, session \S{8}"
        expected = ["login with a wrong password: ", "login: ", f"cancel-task {task_id}: ", "logout: "]
        for line, begins in zip(said, expected, strict=True):
            assert re.match(re.escape(begins) + who, line)
        assert said[2].endswith("The task is cancelled.")

    def test_a_cookie_of_ones_own_making_opens_nothing(self, app: App) -> None:
        browser = Browser(app, password="x")
        until = app.clock.now() + 3600

        def payload(session: dict[str, Any]) -> bytes:
            return b64encode(json.dumps(session).encode())

        forged = TimestampSigner("another secret").sign(payload({"id": "a", "token": "b", "until": until})).decode()
        for cookie in (forged, "a.1.9999999999.", "", "é", "a.b.c.d.e", payload({"until": until}).decode()):
            browser.client.cookies.clear()
            answer = browser.client.get("/", headers={"cookie": f"{COOKIE}={cookie}".encode()}, follow_redirects=False)
            assert answer.status_code == 303, cookie
        browser.get("/login")
        body, _, signature = browser.client.cookies[COOKIE].partition(".")
        browser.client.cookies.clear()
        raised = payload(json.loads(b64decode(body)) | {"until": until}).decode()
        answer = browser.client.get("/", headers={"cookie": f"{COOKIE}={raised}.{signature}"}, follow_redirects=False)
        assert answer.status_code == 303

    def test_the_login_form_needs_its_token_too(self, app: App) -> None:
        browser = Browser(app, password="x")
        browser.get("/login")
        assert browser.post("/login", {"password": "x", "token": "no"}).status_code == 403


async def test_wrong_passwords_are_slow_one_after_another_and_few_at_a_time() -> None:
    from buquet.clock import Clock

    slept: list[float] = []

    class Slow(Clock):
        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            await asyncio.sleep(0)

    logins = Logins(Slow(), "right")
    tried = await asyncio.gather(*(logins.is_password("wrong", "here") for _ in range(CROWD + 6)))
    assert tried.count(None) == 5
    assert sum(slept) == (CROWD + 1) * 0.5
    assert await logins.is_password("right", "here")


@pytest.mark.parametrize("origin", ["here", "there"])
async def test_wrong_passwords_in_flight_do_not_lock_the_right_one_out(origin: str) -> None:
    import asyncio

    turn = asyncio.Event()

    class Stands(Clock):
        async def sleep(self, seconds: float) -> None:
            await turn.wait()
            turn.clear()

    logins = Logins(Stands(), "right")
    wrong = [asyncio.create_task(logins.is_password("wrong", "here")) for _ in range(CROWD + 1)]
    await asyncio.sleep(0)
    right = asyncio.create_task(logins.is_password("right", origin))
    await asyncio.sleep(0)
    later = [asyncio.create_task(logins.is_password("wrong", "here")) for _ in range(5 if origin == "there" else 0)]
    await asyncio.sleep(0)
    turn.set()  # the one whose turn it was is told that it is wrong
    async with asyncio.timeout(10):
        assert await right
    assert sum(each.done() for each in wrong) <= 2 + len(later), "the others still wait"
    for each in (*wrong, *later):
        each.cancel()
    await asyncio.gather(*wrong, *later, return_exceptions=True)
    assert await logins.is_password("right", "here"), "those that were given up on keep nobody waiting"


def test_an_old_session_is_worth_nothing() -> None:
    class Moved(Clock):
        ahead = 0.0

        def now(self) -> float:
            return super().now() + self.ahead

    clock = Moved()
    with App("memory:", clock=clock) as app:
        browser = Browser(app, password="x")
        browser.post("/login", {"password": "x", "token": browser.token("/login")})
        assert browser.get("/tasks").url.path == "/tasks"
        clock.ahead = 13 * 3600
        assert browser.get("/tasks").url.path == "/login"


def test_a_page_that_is_opened_often_asks_the_store_once() -> None:
    writer = App("memory:")
    counting = CountingStore(writer.client.store)
    with App(store=counting) as app:
        browser = Browser(app)
        browser.get("/")
        sent = sum(counting.counts.values())
        for path in PAGES * 5:
            assert browser.get(path).status_code == 200
        assert sum(counting.counts.values()) - sent <= 4


def test_a_store_that_does_not_answer_is_told() -> None:
    class Dead(MemoryStore):
        async def list(self, *_: Any, **__: Any) -> Any:
            raise StoreUnavailable("no route to host")

        async def get(self, *_: Any, **__: Any) -> Any:
            raise StoreUnavailable("no route to host")

    app = App("memory:")
    app.patience = 0.1
    with app.on_store(Dead(app.clock)):
        from buquet.insights import feed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feed, "PATIENCE", 0.1)
            browser = Browser(app)
            answer = browser.get("/")
            assert answer.status_code == 200
            assert "no route to host" in answer.text
            assert browser.get("/tasks/" + "0" * 32).status_code == 503


@pytest.mark.parametrize("topic", ["secrets", f"task:{'0' * 32}", f"run:{'0' * 32}", "task:x", "run:", "task:"])
def test_events_are_for_what_there_is(app: App, topic: str) -> None:
    assert Browser(app).get(f"/events?topic={topic}").status_code == 404


def test_pages_that_begin_to_follow_at_once_find_no_more_room_than_one_after_another(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    from buquet.dashboard import app as dashboard_app

    monkeypatch.setattr(dashboard_app, "MOST_EACH", 3)
    task_id, _ = with_form(app)
    served = dashboard(app)

    async def follow(answers: list[int]) -> None:
        leave = asyncio.Event()

        async def receive() -> dict[str, str]:
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answers.append(message["status"])
                if len(answers) == 10:
                    for each in left:
                        each.set()

        left.append(leave)
        query = f"topic=task:{task_id}".encode()
        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "GET", "path": "/events", "query_string": query, "headers": headers}
        await served({**scope, "client": ("192.0.2.1", 1), "server": ("localhost", 80), "scheme": "http"}, receive, send)

    left: list[asyncio.Event] = []

    async def main() -> list[int]:
        answers: list[int] = []
        await asyncio.gather(*(follow(answers) for _ in range(10)))
        return answers

    assert sorted(app.background.run(main, "follow")) == [200] * 3 + [503] * 7
    assert not served.state.feed._topics


def test_events_of_more_records_than_one_feed_follows_are_refused(app: App) -> None:
    task_id, _ = with_form(app)
    browser = Browser(app)
    feed = browser.client.app.state.feed  # type: ignore[attr-defined]
    feed._topics.update(f"task:{n:032x}" for n in range(MOST_RECORDS))
    assert browser.get(f"/events?topic=task:{task_id}").status_code == 503
    assert feed.has_room("overview")
    assert feed.has_room(f"task:{0:032x}"), "one that is followed already costs nothing more"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_the_page_of_another_site_asks_for_is_refused(app: App, site: str) -> None:
    _, page = with_form(app)
    browser = Browser(app)
    for path in (*PAGES, page, f"{page}/versions", "/events?topic=overview", "/static/live.js"):
        for mode, dest in (("no-cors", "image"), ("cors", "empty"), ("navigate", "iframe"), ("no-cors", "script")):
            headers = {"sec-fetch-site": site, "sec-fetch-mode": mode, "sec-fetch-dest": dest}
            assert browser.get(path, **headers).status_code == 403, (path, mode, dest)
    for own in ("same-origin", "none"):
        assert browser.get("/tasks?all=1", **{"sec-fetch-site": own}).status_code == 200


def test_a_link_on_another_site_opens_a_page_by_the_dashboards_own_and_takes_no_login(app: App) -> None:
    browser = Browser(app, password="x")
    browser.post("/login", {"password": "x", "token": browser.token("/login")})
    mine = dict(browser.client.cookies)
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    browser.client.cookies.clear()  # SameSite=Strict: none is sent along
    cheap = browser.get("/tasks?status=failed&q=%22%3E%3Cb", **followed)
    assert '<meta http-equiv="refresh" content="0; url=/tasks?status=failed&amp;q=%22%3E%3Cb">' in cheap.text
    assert "set-cookie" not in cheap.headers, "it would take the place of the one that was not sent"
    for away in ("//evil.example/", "/%2F/evil.example/"):
        assert 'content="0; url=/"' in browser.client.get(f"http://localhost{away}", headers=followed).text, "it led there"
    for costly in ("/tasks?all=1", "/tasks?key=x", "/tasks?tag=a%3Db", "/runs?all=1", f"/tasks/{'0' * 32}/versions"):
        answer = browser.get(costly, **followed)
        assert "refresh" not in answer.text
        assert f'href="{costly}"' in answer.text
    browser.client.cookies.update(mine)
    assert browser.get("/tasks").url.path == "/tasks"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("192.0.2.7:8000", 200), ("[2001:db8::1]:8000", 200), ("localhost:8000", 200), ("Board.Internal", 200)),
        *(("rebound.example:8000", 421), ("", 421), ("board.internal.evil.example", 421)),
    ],
)
def test_read_only_for_others_it_is_served_by_addresses_and_the_names_that_were_allowed(app: App, host: str, status: int) -> None:
    browser = Browser(app, read_only=True, loopback=False, hosts=["board.internal"])
    assert browser.get("/", host=host).status_code == status


async def test_a_form_that_does_not_come_is_not_waited_for(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(guard, "SLOWEST", 0.05)
    board = dashboard(app)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:8000"), (b"origin", HERE.encode())]
    scope = {"type": "http", "method": "POST", "path": "/act", "query_string": b"", "headers": headers, "scheme": "http"}
    await board({**scope, "server": ("127.0.0.1", 8000)}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


class TestConnections:
    @pytest.fixture
    def address(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
        """Serve a dashboard on a thread, with little patience."""
        import asyncio
        import threading

        monkeypatch.setattr(serve, "HEADERS", 0.3)
        monkeypatch.setattr(serve, "STALLED", 0.3)
        monkeypatch.setattr(serve, "CONNECTIONS", 3)
        sock, _ = serve.listen("127.0.0.1", 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        app = App("memory:")
        server = serve.make_server(app, password=None, read_only=False, host="127.0.0.1")
        server.takes_signals = False
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        yield sock.getsockname()
        server.should_exit = True
        thread.join()
        app.close()

    @pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
    def test_one_that_sends_half_a_header_is_closed(self, address: tuple[str, int], begin: bytes) -> None:
        with socket.create_connection(address, timeout=10) as half:
            half.sendall(begin)
            assert half.recv(1) == b""

    def test_one_that_goes_on_in_halves_is_closed_after_its_first_answer(self, address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as half:
            half.sendall(b"GET /static/live.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HTTP/1.1\r\n")
            answer = b""
            while chunk := half.recv(65536):
                answer += chunk
            assert answer.count(b"HTTP/1.1 200") == 1

    def test_those_that_do_not_take_their_answers_are_given_up(self, address: tuple[str, int]) -> None:
        import contextlib

        with contextlib.ExitStack() as stack:
            for _ in range(3):
                slow = stack.enter_context(socket.socket())
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                slow.connect(address)
                slow.sendall(b"GET /static/style.css HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            for _ in range(100):
                with socket.create_connection(address, timeout=10) as other, contextlib.suppress(ConnectionError):
                    other.sendall(b"GET /static/live.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                    if other.recv(1):
                        return
                time.sleep(0.1)  # for what the kernel does
            pytest.fail("they keep others out")

    def test_more_than_there_is_room_for_are_closed_and_those_within_are_served(self, address: tuple[str, int]) -> None:
        import contextlib

        held = []
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                held.append(stack.enter_context(socket.create_connection(address, timeout=10)))
                held[-1].sendall(b"GET /static/live.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert held[-1].recv(65536).startswith(b"HTTP/1.1 200")
            with socket.create_connection(address, timeout=10) as more, contextlib.suppress(ConnectionError):
                more.sendall(b"GET /static/live.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert more.recv(1) == b""
            held[0].sendall(b"GET /static/live.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert held[0].recv(65536)


class TestCommand:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])  # noqa: S104 - it is what is refused
    def test_others_may_not_come_in_unguarded(self, host: str) -> None:
        outcome = CliRunner().invoke(cli, ["ui", "--host", host, "--url", "memory:"])
        assert isinstance(outcome.exception, UsageError)
        assert "--password" in str(outcome.exception)

    def test_the_password_is_read_from_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from buquet.cli import monitor

        served: list[Any] = []
        monkeypatch.setattr(monitor, "serve", lambda *given, **named: served.append(given))
        file = tmp_path / "password"
        file.write_text("open sesame\n")
        shown = ["ui", "--host", "0.0.0.0", "--url", "memory:"]  # noqa: S104 - it has a password
        assert CliRunner().invoke(cli, [*shown, "--password-file", str(file)]).exit_code == 0
        assert CliRunner().invoke(cli, shown, env={"BUQUET_UI_PASSWORD_FILE": str(file)}).exit_code == 0
        assert CliRunner().invoke(cli, shown, env={"BUQUET_UI_PASSWORD": "open sesame"}).exit_code == 0
        assert [each[3] for each in served] == ["open sesame"] * 3
        for wrong in (["--password-file", str(tmp_path / "none")], ["--password-file", str(file), "--password", "x"]):
            assert isinstance(CliRunner().invoke(cli, [*shown, *wrong]).exception, UsageError)
        file.write_text("\n")
        assert isinstance(CliRunner().invoke(cli, [*shown, "--password-file", str(file)]).exception, UsageError)

    def test_an_empty_password_is_none(self) -> None:
        outcome = CliRunner().invoke(cli, ["ui", "--password", "", "--url", "memory:"])
        assert isinstance(outcome.exception, UsageError)

    def test_a_port_that_is_taken_is_told(self) -> None:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as taken:
            outcome = CliRunner().invoke(cli, ["ui", "--port", str(taken.getsockname()[1]), "--url", "memory:"])
        assert isinstance(outcome.exception, UsageError)
        assert "--port" in str(outcome.exception)

    def test_without_its_packages_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from buquet.cli import monitor

        monkeypatch.setattr(monitor, "find_spec", lambda name: None if name == "uvicorn" else name)
        outcome = CliRunner().invoke(cli, ["ui", "--url", "memory:"])
        assert isinstance(outcome.exception, UsageError)
        assert "uvicorn" in str(outcome.exception)
        assert "pip install 'buquet[ui]>=0.2'" in str(outcome.exception)
