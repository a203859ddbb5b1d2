"""The URL of a SQLite file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def url_of(path: Path) -> str:
    """Return the URL of a file by its absolute path; it names the same file when it is read again, by a worker's child say.

    >>> from pathlib import Path
    >>> url_of(Path("/data/50%.db"))
    'sqlite:/data/50%25.db'
    """
    text = str(path.absolute()).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:{text}" if not text.startswith("//") else f"sqlite:/{text.lstrip('/')}"


def is_missing(path: Path) -> bool:
    """Tell that there is no file. Where nobody can tell, opening it says what is wrong."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
