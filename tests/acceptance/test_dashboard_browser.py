"""The dashboard in a real browser, with a real worker behind it: all pages and buttons, the keyboard, a phone, hostile text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from acceptance import dashboardtasks as tasks
from browser import run_browser
from playwright.sync_api import expect

from buquet import App

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

HERE = Path(__file__).parent
PAGES = ("/", "/tasks", "/errors", "/workers", "/queues", "/schedules")
APART = ThreadPoolExecutor(1, "apart")
SOON = 20_000
"""Milliseconds for what takes a heartbeat, a look, and the journal's ten seconds."""


class World(NamedTuple):
    app: App
    """The tasks' App, on the store of the dashboard."""
    address: str
    pages: Callable[..., Page]
    """Opens a page of its own browser context; what its console says is looked at after the test."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with run_browser() as running:
        yield running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[App, str]]:
    url = f"sqlite:{tmp_path_factory.mktemp('dashboard')}/b.db"
    environment = {**os.environ, "BUQUET_URL": url}
    buquet = [sys.executable, "-m", "buquet"]
    app = tasks.app
    os.environ["BUQUET_URL"] = url
    worker = subprocess.Popen(
        [*buquet, "worker", "dashboardtasks:app", "--grace", "1"], cwd=HERE, env=environment, stderr=subprocess.DEVNULL
    )
    ui = subprocess.Popen([*buquet, "ui", "--port", "0", "--json"], env=environment, stdout=subprocess.PIPE)
    try:
        assert ui.stdout
        address = json.loads(ui.stdout.readline())["address"]
        for n in range(60):
            apart(tasks.good.submit, f"v{n}")
        apart(tasks.hostile.options(tags={"t<b>": "v&"}).submit, tasks.HOSTILE)
        apart(tasks.hostile.submit, "again")
        yield app, address
    finally:
        for process in (worker, ui):
            process.terminate()
        assert ui.wait(10) == 0, "the dashboard ends well when it is asked to"
        worker.wait(20)
        apart(app.close)
        del os.environ["BUQUET_URL"]


@pytest.fixture
def world(served: tuple[App, str], browser: Browser) -> Iterator[World]:
    app, address = served
    said: list[str] = []
    contexts: list[Any] = []

    def opened(path: str, **options: Any) -> Page:
        context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 800}), **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(address + path)
        return page

    yield World(app, address, opened)
    for context in contexts:
        context.close()
    assert said == [], "no script or policy error on any page"


def apart(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Make a blocking call in a thread of its own: the driver's event loop runs in this one."""
    return APART.submit(call, *arguments, **named).result(60)


def shows(page: Page, text: str) -> None:
    expect(page.locator("body")).to_contain_text(text, timeout=SOON)


def test_every_page_is_shown_and_follows_what_happens(world: World) -> None:
    page = world.pages("/")
    for path in PAGES:
        page.goto(world.address + path)
        expect(page.locator("#live")).to_have_text("live", timeout=SOON)
        assert page.title() != "owned"
        assert page.locator("nav[aria-label=Pages] a[aria-current]").count() == 1
    page.goto(world.address + "/")
    before = page.locator(".figures dd").first.inner_text()
    shows(page, "on 1 worker")
    shows(page, "ValueError")
    for n in range(5):
        apart(tasks.good.submit, f"more{n}")
    expect(page.locator(".figures dd").first).not_to_have_text(before, timeout=SOON)


def test_hostile_text_is_text_everywhere(world: World) -> None:
    handle = apart(tasks.hostile.submit, tasks.HOSTILE)
    page = world.pages("/errors")
    shows(page, tasks.HOSTILE)
    shows(page, "onerror=")
    for path in ("/", "/tasks", "/queues", "/workers", "/schedules", f"/tasks/{handle.id}", f"/tasks/{handle.id}/versions"):
        page.goto(world.address + path)
        assert page.title().endswith("buquet")
        assert page.locator("#main img, #main script, #main b b").count() == 0
    page.goto(world.address + "/tasks?q=" + "%22%3E%3Cscript%3E")
    assert page.get_by_role("searchbox").input_value() == '"><script>'


def test_a_failed_task_is_found_read_compared_and_run_again(world: World) -> None:
    handle = apart(tasks.hostile.options(key="found-by-key").submit, "look")
    page = world.pages("/tasks")
    page.get_by_label("Key").fill("found-by-key")
    page.get_by_role("button", name="Search").click()
    page.locator("tbody tr a").first.click()
    assert page.url.endswith(handle.id)
    shows(page, "Traceback")
    shows(page, '"value": "look"')
    page.get_by_role("link", name="Versions").click()
    assert page.locator(".difference .new").count() > 0
    page.locator("tbody tr a").last.click()
    shows(page, "claimed")
    page.goto(f"{world.address}/tasks/{handle.id}")
    page.get_by_role("button", name="Run again").click()
    shows(page, "waits again")
    expect(page.locator(".timeline .failed")).to_have_count(2, timeout=SOON)
    assert [event.why for event in apart(handle.history)].count("redriven") == 1


def test_all_of_an_error_group_run_again(world: World) -> None:
    page = world.pages("/errors")
    shows(page, "ValueError")
    group = page.locator("section.group").filter(has_text="ValueError")
    group.get_by_role("button", name=re.compile("Run (all )?again")).click()
    expect(page.locator(".said")).to_have_text(re.compile("^[1-9][0-9]* tasks wait again"), timeout=SOON)


def test_a_running_task_shows_its_progress_and_is_cancelled(world: World) -> None:
    handle = apart(tasks.long.submit, 60)
    page = world.pages(f"/tasks/{handle.id}")
    expect(page.locator("h1 .state")).to_have_text("running", timeout=SOON)
    workers = world.pages("/workers")
    workers.wait_for_selector(f"a[href='/tasks/{handle.id}']", timeout=SOON)
    workers.wait_for_selector("progress", timeout=SOON)
    page.get_by_role("button", name="Cancel").click()
    shows(page, "asked to stop it")
    expect(page.locator("h1 .state")).to_have_text("cancelled", timeout=SOON)
    assert apart(handle.status) == "cancelled"


def test_a_queue_is_paused_and_goes_on(world: World) -> None:
    page = world.pages("/queues")
    queue = page.locator("section.queue").filter(has=page.get_by_role("link", name="default", exact=True))
    queue.get_by_role("button", name="Pause").click()
    shows(page, "Queue default is paused")
    time.sleep(3)  # a worker hears of it by the bell, or within 2 s while it works
    handle = apart(tasks.good.submit, "held up")
    time.sleep(2)
    assert apart(handle.status) == "pending"
    queue.get_by_role("button", name="Resume").click()
    shows(page, "goes on")
    assert apart(handle.result, timeout=30) == "held up"


def test_a_schedule_is_triggered_paused_and_resumed(world: World) -> None:
    page = world.pages("/schedules")
    shows(page, "often <b>")
    page.get_by_role("button", name="Run now").click()
    shows(page, "was submitted")
    submitted = re.search(r"Task ([0-9a-f]{32})", page.locator(".said").inner_text())
    assert submitted
    assert apart(world.app.get(submitted[1]).result, timeout=30) == "by schedule"
    page.get_by_role("button", name="Pause").click()
    shows(page, "is paused.")
    page.get_by_role("button", name="Resume").click()
    shows(page, "not caught up")


def test_it_fits_on_a_phone(world: World) -> None:
    page = world.pages("/", viewport={"width": 360, "height": 740}, has_touch=True)
    failed = apart(tasks.hostile.submit, "phone " + "long" * 100)
    for path in (*PAGES, f"/tasks/{failed.id}", f"/tasks/{failed.id}/versions"):
        page.goto(world.address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, f"{path} scrolls sideways as a whole"


def test_the_keyboard_reaches_everything_and_shows_where_it_is(world: World) -> None:
    page = world.pages("/tasks")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.reload()
    met: set[str] = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        met.add(
            page.evaluate("document.activeElement.innerText || document.activeElement.name || document.activeElement.tagName")
        )
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style not in {"none", ""}, "focus can be seen"
    assert {"Overview", "Queues", "q", "key", "Search"} <= met
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"


def test_the_theme_follows_the_system_and_the_button(world: World) -> None:
    page = world.pages("/", color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.get_by_role("button", name="Change between dark and light").click()
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert dark != light
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == light


def test_it_can_be_read_without_scripts(world: World) -> None:
    page = world.pages("/", java_script_enabled=False)
    for path in PAGES:
        page.goto(world.address + path)
        assert page.locator("h1").inner_text()
        page.locator("table, .nothing, section").first.wait_for()


def test_a_worker_is_drained(world: World) -> None:
    """The last one: there is no worker after it."""
    page = world.pages("/workers")
    page.get_by_role("button", name="Drain").click()
    shows(page, "asked to claim nothing more")
    shows(page, "No worker is running")
