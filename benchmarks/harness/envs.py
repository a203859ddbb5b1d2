"""Virtual environments, one per peer, created once and kept."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path


class InstallError(RuntimeError):
    """pip could not install a peer's packages."""


def environment(folder: Path, name: str, packages: tuple[str, ...]) -> Path:
    """Return the Python of the environment `name`, which is created again if its list of packages changed."""
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    home = folder.resolve() / name
    python = home / "bin" / "python"
    mark = home / "benchmark.json"
    wanted = json.dumps([*packages, sys.version])
    if python.exists() and mark.exists() and mark.read_text() == wanted:
        return python
    print(f"  installing {' '.join(packages)} ...", file=sys.stderr, flush=True)
    venv.create(home, with_pip=True, clear=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InstallError(f"pip install {' '.join(packages)} failed:\n{done.stderr[-2000:]}")
    mark.write_text(wanted)
    return python
