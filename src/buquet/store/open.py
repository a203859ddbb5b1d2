"""From a URL to a store. Backends are imported when one of theirs is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from buquet.errors import InvalidURL

if TYPE_CHECKING:
    from buquet.clock import Clock
    from buquet.store.base import Store

UNDERSTOOD = """Understood are
  sqlite:path.db                    a file on this machine (sqlite:///path.db for an absolute path)
  s3://bucket/prefix                a bucket on AWS S3 (?region=NAME for another region than us-east-1)
  s3://bucket/prefix?endpoint=URL   a bucket on another S3 server, such as ?endpoint=http://localhost:8333
  memory:                           this process's memory, for tests"""


def open_store(url: str, clock: Clock) -> Store:
    """Return the store that a URL names. Nothing is read or written yet.

    Raises InvalidURL; its text never shows a secret that somebody put into the URL.
    """
    scheme, colon, _ = url.partition(":")
    match scheme.lower() if colon else "":
        case "sqlite":
            return _sqlite(url, clock)
        case "s3":
            return _s3(url, clock)
        case "memory":
            if url.partition(":")[2]:
                msg = "memory: takes nothing after its colon"
                raise InvalidURL(msg)
            from buquet.store.memory import MemoryStore  # noqa: PLC0415 - see above

            return MemoryStore(clock)
        case "":
            msg = f"a store's URL begins with sqlite:, s3: or memory:. {UNDERSTOOD}"
            raise InvalidURL(msg)
        case other:
            msg = f"{other}: is no kind of store that is known here. {UNDERSTOOD}"
            raise InvalidURL(msg)


def _sqlite(url: str, clock: Clock) -> Store:
    path = url.partition(":")[2]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host:
            msg = f"sqlite:// is followed by a host, but the file is on this machine. {UNDERSTOOD}"
            raise InvalidURL(msg)
        path = slash + rest
    path, question, query = path.partition("?")
    if question and query:
        msg = f"a sqlite: URL takes no parameters ({_names(query)})"
        raise InvalidURL(msg)
    path = unquote(path)
    if not path.strip("/") or path.endswith("/") or "\0" in path:
        msg = f"a sqlite: URL needs the path of a file. {UNDERSTOOD}"
        raise InvalidURL(msg)
    from buquet.store.sqlite import SqliteStore  # noqa: PLC0415 - see above

    return SqliteStore(path, clock)


def _s3(url: str, clock: Clock) -> Store:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        msg = f"the s3: URL cannot be read: {error}"
        raise InvalidURL(msg) from None
    if "@" in parts.netloc:
        msg = "no credentials in a URL, please: it is shown and logged. Put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise InvalidURL(msg)
    if not parts.netloc:
        msg = f"an s3: URL needs the name of a bucket. {UNDERSTOOD}"
        raise InvalidURL(msg)
    if parts.fragment:
        msg = "an s3: URL has no part after #"
        raise InvalidURL(msg)
    options = parse_qsl(parts.query, keep_blank_values=True)
    values = dict(options)
    if unknown := sorted(set(values) - {"endpoint", "region"}):
        msg = f"an s3: URL takes ?endpoint= and ?region=, not {', '.join(unknown)}. Credentials belong into the environment"
        raise InvalidURL(msg)
    if len(values) < len(options) or not all(values.values()):
        msg = "a parameter of the s3: URL is empty or there twice"
        raise InvalidURL(msg)
    from buquet.store.s3 import S3Store  # noqa: PLC0415 - obstore takes its time to import, and others do without

    return S3Store(parts.netloc, parts.path, values.get("endpoint"), values.get("region"), clock)


def _names(query: str) -> str:
    return ", ".join(name for name, _ in parse_qsl(query, keep_blank_values=True)) or "?"
