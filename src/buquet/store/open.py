"""Opens the store that a URL names."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from buquet.errors import InvalidURL
from buquet.store.base import Location

if TYPE_CHECKING:
    from buquet.clock import Clock
    from buquet.store.base import Store

UNDERSTOOD = """Understood are
  sqlite:path.db                    a file on this machine (sqlite:///path.db for an absolute path)
  s3://bucket/prefix                a bucket on AWS S3 (?region=NAME for another region than us-east-1)
  s3://bucket/prefix?endpoint=URL   a bucket on another S3 server, such as ?endpoint=http://localhost:8333
  az://container/prefix             Azure Blob Storage (the account: AZURE_STORAGE_ACCOUNT_NAME; ?endpoint=URL for another server)
  memory:                           this process's memory, for tests"""


def open_store(url: str, clock: Clock) -> Store:
    """Return the store that a URL names. Nothing is read or written yet.

    Raises InvalidURL. Its message never shows a secret that is part of the URL.
    """
    scheme, colon, rest = url.partition(":")
    match scheme.lower() if colon else "":
        case "sqlite":
            path = _sqlite_path(rest)
            from buquet.store.sqlite import SqliteStore  # noqa: PLC0415 - each backend is imported only when it is used

            return SqliteStore(path, clock)
        case "s3":
            location = _location(url, "s3", ("endpoint", "region"))
            from buquet.store.objects import S3Store  # noqa: PLC0415 - as above

            return S3Store(location, clock)
        case "az":
            location = _location(url, "az", ("endpoint",))
            from buquet.store.objects import AzureStore  # noqa: PLC0415 - as above

            return AzureStore(location, clock)
        case "memory":
            if rest:
                raise InvalidURL("memory: takes nothing after its colon")
            from buquet.store.memory import MemoryStore  # noqa: PLC0415 - as above

            return MemoryStore(clock)
        case "":
            raise InvalidURL(f"a store's URL begins with sqlite:, s3:, az: or memory:. {UNDERSTOOD}")
        case other:
            raise InvalidURL(f"{other}: is no known kind of store. {UNDERSTOOD}")


def _sqlite_path(path: str) -> str:
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host:
            raise InvalidURL(f"sqlite:// is followed by a host, but the file is on this machine. {UNDERSTOOD}")
        path = slash + rest
    path, question, query = path.partition("?")
    if question and query:
        names = ", ".join(name for name, _ in parse_qsl(query, keep_blank_values=True)) or "?"
        raise InvalidURL(f"a sqlite: URL takes no parameters ({names})")
    path = unquote(path)
    if not path.strip("/") or path.endswith("/") or "\0" in path:
        raise InvalidURL(f"a sqlite: URL needs the path of a file. {UNDERSTOOD}")
    return path


def _location(url: str, scheme: str, known: tuple[str, ...]) -> Location:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidURL(f"the {scheme}: URL cannot be read: {error}") from None
    if not parts.netloc:
        raise InvalidURL(f"an {scheme}: URL needs the name of a bucket. {UNDERSTOOD}")
    if parts.fragment:
        raise InvalidURL(f"an {scheme}: URL has no part after #")
    options = parse_qsl(parts.query, keep_blank_values=True)
    values = dict(options)
    if unknown := sorted(set(values) - set(known)):
        names = " and ".join(f"?{name}=" for name in known)
        raise InvalidURL(f"an {scheme}: URL takes {names}, not {', '.join(unknown)}. Credentials belong into the environment")
    if len(values) < len(options) or not all(values.values()):
        raise InvalidURL(f"a parameter of the {scheme}: URL is empty or appears twice")
    return Location(parts.netloc, parts.path, values.get("endpoint"), values.get("region"), scheme)
