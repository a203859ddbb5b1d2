"""Takes the screenshots that docs/dashboard.md shows, of a real dashboard with real workers behind it.

    python docs/dashboard/take.py                 # renews the pictures beside this file
    python docs/dashboard/take.py --all FOLDER    # each page, light and dark, on a desktop and on a phone

It needs what the tests need (`pip install '.[test]'`, and a Chromium as tests/browser.py says), and
takes a minute or two.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent.parent / "tests")]

import msgspec  # noqa: E402
from browser import run_browser  # noqa: E402 - found by the line above
from msgspec import UNSET  # noqa: E402
from scene import Decision, app, approved, import_rows, notify, order, send_invoice, thumbnail, transcode  # noqa: E402

from buquet import RunFailed, keys  # noqa: E402 - after those, as the sorter has it
from buquet.records import ErrorInfo, Finished  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

BUQUET = [sys.executable, "-m", "buquet"]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
KEPT = {
    "overview": ("light", "dark", "phone"),
    "tasks": ("light", "phone"),
    "task": ("light",),
    "versions": ("light",),
    "errors": ("light",),
    "workers": ("light",),
    "queues": ("dark",),
    "runs": ("light",),
    "run": ("light", "dark", "phone"),
    "schedules": ("light",),
    "login": ("light",),
}
"""What the documentation shows of each page."""


class Scene(NamedTuple):
    address: str
    guarded: str
    """The address of a dashboard with a password."""
    pages: dict[str, str]
    """The path of each page, by its name."""


@contextmanager
def process(*words: str, folder: str, url: str, json_out: bool = False) -> Iterator[dict[str, Any]]:
    """Run a command until the end of the block; what it says first, with `json_out`."""
    environment = {**os.environ, "BUQUET_URL": url}
    output = subprocess.PIPE if json_out else subprocess.DEVNULL
    running = subprocess.Popen([*BUQUET, *words], cwd=folder, env=environment, stdout=output, stderr=subprocess.DEVNULL)
    try:
        yield json.loads(running.stdout.readline()) if running.stdout else {}
    finally:
        running.terminate()
        running.wait(30)


async def write_past() -> None:
    """Write an hour that never was into the journal, as workers write theirs: nobody waits for it."""
    client, chance = app.client, random.Random(7)
    now = app.clock.now_ms()
    for minute in range(58, 0, -1):
        lines: list[bytes] = []
        for _ in range(int(90 + 60 * math.sin(minute / 9) + chance.randrange(30))):
            name, queue, middle = chance.choice(
                [("thumbnail", "images", 120), ("send_invoice", "default", 45), ("report", "default", 400)]
            )
            at = now - minute * 60_000 + chance.randrange(60_000)
            ran, delay = (
                int(middle * chance.lognormvariate(0, 0.7)),
                int(20 * chance.lognormvariate(0, 1) * (1 + 8 * (30 < minute < 36))),
            )
            failed = name == "send_invoice" and chance.random() < (0.2 if 12 < minute < 16 else 0.02)
            error = ErrorInfo(type="ConnectionRefusedError", message="the mail server does not answer") if failed else UNSET
            line = Finished(
                kind="task", id=app.clock.new_id(), name=name, queue=queue, status="failed" if failed else "completed", at=at,
                submitted=at - ran - delay, ready=at - ran - delay, started=at - ran, ran=ran, attempts=3 if failed else 1,
                error=error, group="0123456789ab" if failed else "",
            )  # fmt: skip
            lines.append(msgspec.json.encode(line) + b"\n")
        await client.reads.put(keys.journal(now - minute * 60_000, "0123abcd.0123456789abcdef", minute), b"".join(lines))


async def fill() -> dict[str, str]:
    """Submit what the pictures show; return the pages of one task and one run."""
    async with app:
        await app.client.open()
        await write_past()
        await asyncio.gather(
            thumbnail.asubmit_many([(f"holiday/{n:04}.jpg",) for n in range(240)]),
            notify.asubmit_many([(f"c{n}",) for n in range(40)]),
            import_rows.asubmit_many([(f"stock-{n}.csv", n) for n in range(1, 26)]),
            send_invoice.options(tags={"tenant": "acme"}).asubmit_many(
                [{"customer": f"c{n}", "amount": n * 1.5} for n in range(100, 160)]
            ),
        )
        failing = await send_invoice.options(key="invoice-2027", tags={"tenant": "acme"}).asubmit("c2027", amount=120.5)
        done = await order.astart("o-1001", ["lamp", "chair"], key="o-1001")
        declined = await order.astart("o-1003", ["desk"], key="o-1003")
        await approved.asend(done, Decision(granted=True, by="Ada"))
        for run in (done, declined):
            with suppress(RunFailed):
                await run.aresult(timeout=60)
        waits = await order.astart("o-1002", ["lamp", "chair", "table"], key="o-1002")
        while not any(step.name == "pack" and step.status == "completed" for step in await waits.asteps()):  # noqa: ASYNC110 - elsewhere
            await asyncio.sleep(0.2)
        # and a little more, so that something runs and waits while the pictures are taken
        await transcode.asubmit_many([(f"talk-{n}.mkv", 40 + 15 * n) for n in range(9)])
        await thumbnail.options(delay=3600).asubmit_many([(f"archive/{n}.jpg",) for n in range(12)])
        return {"task": f"/tasks/{failing.id}", "versions": f"/tasks/{failing.id}/versions", "run": f"/runs/{waits.id}"}


@contextmanager
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="shop-") as folder, ExitStack() as stack:
        # tracebacks name the file, and need not name this folder
        shutil.copy(HERE / "scene.py", folder)
        url = os.environ["BUQUET_URL"] = f"sqlite:{folder}/shop.db"
        for queues in (("images", "default"), ("video",)):
            options = [word for queue in queues for word in ("--queue", queue)]
            stack.enter_context(
                process("worker", "scene:app", "--concurrency", "6", "--grace", "1", *options, folder=folder, url=url)
            )
        served = stack.enter_context(process("ui", "--port", "0", "--json", folder=folder, url=url, json_out=True))
        guarded = stack.enter_context(
            process("ui", "--port", "0", "--json", "--password", "x", folder=folder, url=url, json_out=True)
        )
        pages = {name: f"/{name}" for name in ("tasks", "errors", "workers", "queues", "runs", "schedules", "login")}
        pages |= {"overview": "/"} | asyncio.run(fill())
        yield Scene(served["address"], guarded["address"], pages)


def take(browser: Browser, made: Scene, folder: Path, wanted: dict[str, tuple[str, ...]]) -> None:
    for look in ("light", "dark", "phone", "phone-dark"):
        scheme = "dark" if "dark" in look else "light"
        viewport = PHONE if "phone" in look else DESKTOP
        context = browser.new_context(viewport=viewport, color_scheme=scheme, device_scale_factor=1, has_touch="phone" in look)
        page = context.new_page()
        page.on("console", lambda message: print("console:", message.text))
        page.on("pageerror", lambda error: print("script:", error))
        for name, looks in wanted.items():
            if look in looks:
                shoot(page, made, name, folder / f"{name}-{look}.png")
        context.close()


def shoot(page: Page, made: Scene, name: str, path: Path) -> None:
    page.goto((made.guarded if name == "login" else made.address) + made.pages[name])
    if page.locator("body").get_attribute("data-topic"):
        page.wait_for_selector("#live.on")
    # the folder of the temporary store would be another with each picture
    page.evaluate("document.querySelector('.store').textContent = 'sqlite:shop.db'")
    height = page.evaluate("document.documentElement.scrollHeight")
    page.screenshot(
        path=path, full_page=True, clip={"x": 0, "y": 0, "width": page.viewport_size["width"], "height": min(height, 1600)}
    )
    print(path.name, flush=True)


def main(words: list[str]) -> None:
    everything = len(words) == 2 and words[0] == "--all"
    if words and not everything:
        sys.exit(re.sub(r"\n\nIt needs.*", "", __doc__ or "", flags=re.DOTALL))
    folder = Path(words[1]) if everything else HERE
    folder.mkdir(parents=True, exist_ok=True)
    wanted = dict.fromkeys(KEPT, ("light", "dark", "phone", "phone-dark")) if everything else KEPT
    with scene() as made, run_browser() as browser:  # somebody looks, so that the chart of the backlog has some points
        watching = browser.new_page()
        watching.goto(made.address)
        time.sleep(40)
        take(browser, made, folder, wanted)


if __name__ == "__main__":
    main(sys.argv[1:])
