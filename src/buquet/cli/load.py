"""Finds a user's App by MODULE:APP."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import TYPE_CHECKING

from buquet.app import App
from buquet.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def find_app(target: str, folder: Path) -> App:
    """Import `module:app` with `folder` on the path. Raises UsageError that says what is missing, and where it was looked for."""
    name, colon, attribute = target.partition(":")
    if not name or not colon or not attribute:
        msg = f"{target!r} does not name an App: write MODULE:APP, for instance tasks:app for `app = App()` in tasks.py"
        raise UsageError(msg)
    module = _import(name, folder)
    value: object = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if isinstance(value, App):
        return value
    apps = [f"{name}:{each}" for each, found in vars(module).items() if isinstance(found, App)]
    there = f"it has {', '.join(apps)}" if apps else "it has no App; make one with `app = buquet.App()`"
    problem = f"has no {attribute!r}" if value is None else f"has a {type(value).__name__} named {attribute!r}, and no App"
    raise UsageError(f"module {name} {problem}: {there}")


def _import(name: str, folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            msg = f"there is no module {name!r} in {folder} or on Python's path. Go to the folder that holds it, or install it"
            raise UsageError(msg) from None
        raise UsageError(f"module {name} does not import: it needs {error.name!r}, which is not installed here") from None
    except SystemExit as error:
        msg = (
            f"module {name} ends the program when it is imported (exit {error.code}). Put that under `if __name__ == '__main__':`"
        )
        raise UsageError(msg) from None
    except Exception as error:  # noqa: BLE001 - whatever a user's module raises is told
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        own = "".join(lines[-3:]).rstrip()
        raise UsageError(f"module {name} does not import. It raised:\n{own}") from None
