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
  az://container/prefix             Azure Blob Storage (the account: AZURE_STORAGE_ACCOUNT_NAME; ?endpoint=URL for another server)
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
        case "az":
            return _azure(url, clock)
        case "memory":
            if url.partition(":")[2]:
                raise InvalidURL("memory: takes nothing after its colon")
            from buquet.store.memory import MemoryStore  # noqa: PLC0415 - see above

            return MemoryStore(clock)
        case "":
            raise InvalidURL(f"a store's URL begins with sqlite:, s3:, az: or memory:. {UNDERSTOOD}")
        case other:
            raise InvalidURL(f"{other}: is no kind of store that is known here. {UNDERSTOOD}")


def _sqlite(url: str, clock: Clock) -> Store:
    path = url.partition(":")[2]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host:
            raise InvalidURL(f"sqlite:// is followed by a host, but the file is on this machine. {UNDERSTOOD}")
        path = slash + rest
    path, question, query = path.partition("?")
    if question and query:
        raise InvalidURL(f"a sqlite: URL takes no parameters ({_names(query)})")
    path = unquote(path)
    if not path.strip("/") or path.endswith("/") or "\0" in path:
        raise InvalidURL(f"a sqlite: URL needs the path of a file. {UNDERSTOOD}")
    from buquet.store.sqlite import SqliteStore  # noqa: PLC0415 - see above

    return SqliteStore(path, clock)


def _s3(url: str, clock: Clock) -> Store:
    bucket, prefix, values = _bucket(url, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", ("endpoint", "region"))
    from buquet.store.s3 import S3Store  # noqa: PLC0415 - obstore takes its time to import, and others do without

    return S3Store(bucket, prefix, values.get("endpoint"), values.get("region"), clock)


def _azure(url: str, clock: Clock) -> Store:
    bucket, prefix, values = _bucket(url, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY", ("endpoint",))
    from buquet.store.azure import AzureStore  # noqa: PLC0415 - see above

    return AzureStore(bucket, prefix, values.get("endpoint"), clock)


def _bucket(url: str, credentials: str, taken: tuple[str, ...]) -> tuple[str, str, dict[str, str]]:
    """Return bucket, prefix and parameters of a URL."""
    scheme = url.partition(":")[0].lower()
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidURL(f"the {scheme}: URL cannot be read: {error}") from None
    if "@" in parts.netloc:
        raise InvalidURL(f"no credentials in a URL, please: it is shown and logged. Put them into {credentials}")
    if not parts.netloc:
        raise InvalidURL(f"an {scheme}: URL needs the name of a bucket. {UNDERSTOOD}")
    if parts.fragment:
        raise InvalidURL(f"an {scheme}: URL has no part after #")
    options = parse_qsl(parts.query, keep_blank_values=True)
    values = dict(options)
    if unknown := sorted(set(values) - set(taken)):
        known = " and ".join(f"?{name}=" for name in taken)
        raise InvalidURL(f"an {scheme}: URL takes {known}, not {', '.join(unknown)}. Credentials belong into the environment")
    if len(values) < len(options) or not all(values.values()):
        raise InvalidURL(f"a parameter of the {scheme}: URL is empty or there twice")
    return parts.netloc, parts.path, values


def _names(query: str) -> str:
    return ", ".join(name for name, _ in parse_qsl(query, keep_blank_values=True)) or "?"
