"""The dashboard in a real browser, with a real worker behind it: all pages and buttons, the keyboard, a phone, hostile text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from acceptance import dashboardtasks as tasks
from browser import run_browser
from playwright.sync_api import expect

from buquet import App, Handle, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page
    from servers import S3Server

HERE = Path(__file__).parent
PAGES = ("/", "/tasks", "/errors", "/workers", "/queues", "/runs", "/schedules")
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


@contextmanager
def serve(url: str, *options: str) -> Iterator[str]:
    """Run a worker and a dashboard, each a process; the dashboard's address."""
    environment = {**os.environ, "BUQUET_URL": url}
    buquet = [sys.executable, "-m", "buquet"]
    # a dashboard refuses a store that nothing was ever written to, and the worker may be slower to write
    subprocess.run([*buquet, "init"], env=environment, stdout=subprocess.DEVNULL, check=True)
    worker = subprocess.Popen(
        [*buquet, "worker", "dashboardtasks:app", "--grace", "1"], cwd=HERE, env=environment, stderr=subprocess.DEVNULL
    )
    ui = subprocess.Popen([*buquet, "ui", "--port", "0", "--json", *options], env=environment, stdout=subprocess.PIPE)
    try:
        assert ui.stdout
        yield json.loads(ui.stdout.readline())["address"]
    finally:
        for process in (worker, ui):
            process.terminate()
        assert ui.wait(20) == 0, "the dashboard ends well when it is asked to"
        worker.wait(20)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[App, str]]:
    url = f"sqlite:{tmp_path_factory.mktemp('dashboard')}/b.db"
    app = tasks.app
    os.environ["BUQUET_URL"] = url
    try:
        with serve(url) as address:
            for n in range(60):
                apart(tasks.good.submit, f"v{n}")
            apart(tasks.hostile.options(tags={"t<b>": "v&"}).submit, tasks.HOSTILE)
            apart(tasks.hostile.submit, "again")
            yield app, address
    finally:
        apart(app.close)
        del os.environ["BUQUET_URL"]


@pytest.fixture
def world(served: tuple[App, str], browser: Browser) -> Iterator[World]:
    app, address = served
    with looking(browser, address) as opened:
        yield World(app, address, opened)


@contextmanager
def looking(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Open pages, each in a browser context of its own; what their consoles said is looked at in the end."""
    said: list[str] = []
    contexts: list[Any] = []

    def opened(path: str, **options: Any) -> Page:
        context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 800}), **options)
        contexts.append(context)
        page = context.new_page()
        # a browser reports the answer to a wrong password, too
        page.on("console", lambda each: said.append(f"{each.type}: {each.text}") if " 401 " not in each.text else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(address + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == [], "no script or policy error on any page"


def apart(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Make a blocking call in a thread of its own: the driver's event loop runs in this one."""
    return APART.submit(call, *arguments, **named).result(60)


def shows(page: Page, text: str) -> None:
    expect(page.locator("body")).to_contain_text(text, timeout=SOON)


def lists_one(page: Page) -> None:
    """Reload until one task is listed: a search by tag is answered within two seconds, from what is known by then."""
    for _ in range(10):
        with suppress(AssertionError):
            return expect(page.locator("tbody tr")).to_have_count(1, timeout=2000)
        page.reload()
    return expect(page.locator("tbody tr")).to_have_count(1)


def test_every_page_is_shown_and_follows_what_happens(world: World) -> None:
    page = world.pages("/")
    for path in PAGES:
        page.goto(world.address + path)
        expect(page.locator("#live.on")).to_have_text(re.compile("^as of [0-9:]{8}$"), timeout=SOON)
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
    run = apart(tasks.flow.options(tags={"r<b>": "v&"}, key=tasks.HOSTILE).start, tasks.HOSTILE)
    for path in (*PAGES, f"/tasks/{handle.id}", f"/tasks/{handle.id}/versions", f"/runs/{run.id}"):
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
    expect(page).to_have_url(re.compile(handle.id), timeout=SOON)
    shows(page, "Traceback")
    shows(page, '"value": "look"')
    page.get_by_role("link", name="Versions").click()
    expect(page.locator(".difference .new").first).to_be_visible(timeout=SOON)
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
    expect(page.locator(".said")).to_have_text(re.compile("^[1-9][0-9]* tasks? waits? again"), timeout=SOON)


def test_a_running_task_shows_its_progress_and_is_cancelled(world: World) -> None:
    handle = apart(tasks.long.submit, 60)
    page = world.pages(f"/tasks/{handle.id}")
    expect(page.locator("h1 .state")).to_have_text("running", timeout=SOON)
    workers = world.pages("/workers")
    workers.wait_for_selector(f"a[href='/tasks/{handle.id}']", timeout=SOON)
    workers.wait_for_selector("progress", timeout=SOON)
    page.get_by_role("button", name="Cancel").click()
    shows(page, "asked to stop the task")
    expect(page.locator("h1 .state")).to_have_text("cancelled", timeout=SOON)
    assert apart(handle.status) == "cancelled"


def held_up() -> Handle[str]:
    """Return a task that stays where it is: workers hear of a pause by the bell, or within a few seconds."""
    for _ in range(20):
        handle = apart(tasks.good.submit, "held up")
        try:
            apart(handle.result, timeout=2)
        except TimeoutError:
            assert apart(handle.status) == "pending"
            return handle
    pytest.fail("the workers go on")


def test_a_queue_is_paused_and_goes_on(world: World) -> None:
    page = world.pages("/queues")
    queue = page.locator("section.queue").filter(has=page.get_by_role("link", name="default", exact=True))
    queue.get_by_role("button", name="Pause").click()
    shows(page, "Queue default is paused")
    handle = held_up()
    queue.get_by_role("button", name="Resume").click()
    shows(page, "goes on")
    assert apart(handle.result, timeout=30) == "held up"


def test_a_schedule_is_triggered_paused_and_resumed(world: World) -> None:
    page = world.pages("/schedules")
    shows(page, "often <b>")
    page.get_by_role("button", name="Trigger").click()
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
    run = apart(tasks.flow.start, "phone " + "long" * 100)
    for path in (*PAGES, f"/tasks/{failed.id}", f"/tasks/{failed.id}/versions", f"/runs/{run.id}"):
        page.goto(world.address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, f"{path} scrolls sideways as a whole"
        cut = """[...document.querySelectorAll("header nav a, .wide td, .wide tbody th")]
            .filter((each) => each.getBoundingClientRect().right > innerWidth || each.getBoundingClientRect().left < 0)
            .map((each) => each.textContent)"""
        assert page.evaluate(cut) == [], f"{path} cuts something off"
    graph = page.get_by_role("region", name="Graph of the steps")
    wide = graph.evaluate("(each) => each.scrollWidth > each.clientWidth + 2")
    assert graph.locator("xpath=following-sibling::p").is_visible() == wide, "what is cut off says so"


def test_a_refresh_turns_no_row_into_another(world: World) -> None:
    chosen = apart(tasks.good.options(delay=5000).submit, "chosen")
    page = world.pages("/tasks?name=good&status=pending")
    link = page.locator(f"a[href='/tasks/{chosen.id}']")
    link.focus(timeout=SOON)
    page.evaluate("document.activeElement.closest('tr').mine = true")
    sooner = apart(tasks.good.options(delay=3000).submit, "sooner")  # its row comes before the other
    before = page.locator(f"a[href='/tasks/{sooner.id}']")
    expect(before).to_have_count(1, timeout=SOON)
    focused = "[document.activeElement.getAttribute('href'), document.activeElement.closest('tr').mine]"
    assert page.evaluate(focused) == [f"/tasks/{chosen.id}", True]
    apart(sooner.cancel)
    expect(before).to_have_count(0, timeout=SOON)
    assert page.evaluate(focused) == [f"/tasks/{chosen.id}", True]
    apart(chosen.cancel)
    expect(link).to_have_count(0, timeout=SOON)
    assert page.evaluate("document.activeElement === document.body"), "what is gone leaves the focus to no other"


def test_a_page_says_how_old_it_is_and_stands_still_when_asked(world: World) -> None:
    page = world.pages("/tasks?name=good&status=pending")
    page.clock.install()
    page.reload()
    mark = page.locator("#live")
    expect(mark).to_have_class("live on", timeout=SOON)
    page.get_by_role("button", name="Stop updating this page").click()
    expect(mark).to_have_text(re.compile("^paused, as of [0-9:]{8}$"))
    handle = apart(tasks.good.options(delay=4000).submit, "unseen")
    page.clock.fast_forward(10_000)
    expect(mark).to_have_class("live old")
    page.clock.fast_forward(20_000)
    expect(mark).to_have_class("live off")
    row = page.locator(f"a[href='/tasks/{handle.id}']")
    assert row.count() == 0
    page.get_by_role("button", name="Update this page again").click()
    expect(row).to_have_count(1, timeout=SOON)
    expect(mark).to_have_class("live on", timeout=SOON)
    apart(handle.cancel)


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
        style = page.evaluate(
            "document.activeElement === document.body ? '' : getComputedStyle(document.activeElement).outlineStyle"
        )
        assert style != "none", "focus can be seen"
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


def run_page(world: World) -> tuple[Run[str], Page]:
    """Start a run, and return its page once it waits for its signal."""
    run = apart(tasks.flow.start, "by hand")
    page = world.pages(f"/runs/{run.id}")
    expect(page.locator("tr", has_text="waits for 'go <b>'")).to_be_visible(timeout=SOON)
    return run, page


def test_a_run_is_found_followed_signalled_and_completes(world: World) -> None:
    run, page = run_page(world)
    listed = world.pages("/runs")
    listed.locator(f"a[href='/runs/{run.id}']").wait_for(timeout=SOON)
    assert listed.locator("tr", has=listed.locator(f"a[href='/runs/{run.id}']")).inner_text().count("flow <script>")
    page.get_by_role("button", name="Send true").click()
    shows(page, "was sent")
    expect(page.locator("h1 .state").first).to_have_text("completed", timeout=SOON)
    assert apart(run.result, timeout=30) == "good by hand"
    graph = page.get_by_role("region", name="Graph of the steps")
    assert graph.locator("[data-step='other <i>']").count() == 1
    assert page.get_by_role("region", name="When each step ran").locator("svg").count() == 1
    expect(page.locator("section", has_text="Result").locator("pre")).to_have_text('"good by hand"')
    # a step leads to its task, and that back to the run
    graph.locator("a", has_text="again").first.click()
    page.wait_for_url("**/tasks/*")
    shows(page, "completed")
    page.get_by_role("link", name="Workflow run").click()
    page.wait_for_url(f"**/runs/{run.id}")
    expect(listed.locator("tr", has=listed.locator(f"a[href='/runs/{run.id}']"))).to_contain_text("completed", timeout=SOON)
    listed.get_by_role("searchbox").fill(run.id)
    listed.get_by_role("button", name="Search").click()
    listed.wait_for_url(f"**/runs/{run.id}")


def test_a_run_is_paused_resumed_cancelled_and_retried_and_fails(world: World) -> None:
    run, page = run_page(world)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("h1 .state").last).to_have_text("paused", timeout=SOON)
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible(timeout=SOON)
    page.get_by_role("button", name="Cancel").click()
    shows(page, "is being cancelled")
    expect(page.locator("h1 .state")).to_have_text("cancelled", timeout=SOON)
    shows(page, "undo done")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("h1 .state")).to_have_text("running", timeout=SOON)
    shows(page, "retried 1")
    expect(page.locator("tr", has_text="waits for 'go <b>'")).to_be_visible(timeout=SOON)
    page.get_by_role("button", name="Send false").click()
    expect(page.locator("h1 .state")).to_have_text("failed", timeout=SOON)
    shows(page, "Why it ended")
    shows(page, "bad <script>")
    assert apart(run.status) == "failed"


def test_tasks_are_found_by_id_name_tag_and_state(world: World) -> None:
    tagged = apart(tasks.good.options(tags={"tenant": "acme"}).submit, "tagged")
    waiting = apart(tasks.good.options(delay=3600, tags={"tenant": "acme"}).submit, "later")
    page = world.pages("/tasks")
    page.get_by_role("searchbox").fill(tagged.id)
    page.get_by_role("button", name="Search").click()
    page.wait_for_url(f"**/tasks/{tagged.id}")
    page.goto(world.address + "/tasks?tag=tenant%3Dacme&status=pending")
    lists_one(page)
    assert page.locator("tbody a").first.get_attribute("href") == f"/tasks/{waiting.id}"
    # the list of what ended follows the journal, which is written every ten seconds
    page.goto(world.address + "/tasks?name=good&status=completed")
    expect(page.locator(f"a[href='/tasks/{tagged.id}']")).to_have_count(1, timeout=SOON)
    page.get_by_label("Tag").fill("tenant=acme")
    page.get_by_role("button", name="Search").click()
    lists_one(page)
    page.get_by_label("Tag").fill("")
    page.get_by_label("Status").select_option("failed")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("tbody tr")).to_have_count(0)
    apart(waiting.cancel)


def test_all_that_is_on_a_runs_page_is_reached_by_the_keyboard(world: World) -> None:
    _, page = run_page(world)
    met: list[str] = []
    for _ in range(45):
        page.keyboard.press("Tab")
        met.append(
            page.evaluate(
                "document.activeElement.getAttribute('href') || document.activeElement.name || document.activeElement.innerText"
            )
        )
        shown = page.evaluate(
            "(({outlineStyle, outlineWidth}) => outlineStyle + ' ' + outlineWidth)(getComputedStyle(document.activeElement))"
        )
        assert page.evaluate("document.activeElement === document.body") or not shown.startswith("none"), (
            f"focus can be seen on {met[-1]}"
        )
    assert {"Pause", "Cancel", "value"} <= set(met)
    step = next(href for href in met if href and href.startswith("/tasks/"))
    page.locator(f"a[href='{step}']").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{step}")


def test_a_worker_is_paused_and_goes_on(world: World) -> None:
    page = world.pages("/workers")
    shows(page, "buquet 0.")
    page.get_by_role("button", name="Pause").click()
    shows(page, "asked to claim nothing")
    handle = held_up()
    expect(page.get_by_role("button", name="Resume")).to_be_visible(timeout=SOON)
    expect(page.locator("section.worker .state").last).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    assert apart(handle.result, timeout=60) == "held up"


@pytest.mark.timeout(240)
def test_the_same_on_s3_behind_a_password(browser: Browser, seaweed: S3Server) -> None:
    url = seaweed.url("dashboard")
    environment = {**os.environ, "BUQUET_URL": url}

    def command(*words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "buquet", *words, "--json"], cwd=HERE, env=environment, stdout=subprocess.PIPE, check=True
        )
        return json.loads(done.stdout)

    with serve(url, "--password", "open sesame") as address, looking(browser, address) as opened:
        command("submit", "dashboardtasks:app", tasks.HOSTILE, "--args", '["on S3"]')
        run = command("run", "start", "dashboardtasks:app", "flow " + tasks.HOSTILE, "--args", '["on S3"]')["id"]
        page = opened(f"/runs/{run}")
        page.get_by_label("Password").fill("sesame")
        page.get_by_role("button", name="Log in").click()
        shows(page, "That is not the password")
        page.get_by_label("Password").fill("open sesame")
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"**/runs/{run}")
        expect(page.locator("tr", has_text="waits for 'go <b>'")).to_be_visible(timeout=SOON)
        page.get_by_role("button", name="Send true").click()
        expect(page.locator("h1 .state").first).to_have_text("completed", timeout=SOON)
        for path in PAGES:
            page.goto(address + path)
            expect(page.locator("#live")).to_have_class("live on", timeout=SOON)
        page.goto(address + "/errors")
        shows(page, "ValueError: on S3")
        page.locator("section.group a.id").first.click()
        page.get_by_role("link", name="Versions").click()
        expect(page.locator(".difference .new").first, "a versioned bucket keeps them").to_be_visible(timeout=SOON)
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Password")).to_be_visible()


def test_a_worker_is_drained(world: World) -> None:
    """The last one: there is no worker after it."""
    page = world.pages("/workers")
    page.get_by_role("button", name="Drain").click()
    shows(page, "asked to claim nothing more")
    shows(page, "No worker is running")
