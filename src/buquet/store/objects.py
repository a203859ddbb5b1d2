"""A bucket behind the object-store client: what all of its kinds share. With `s3`, `azure` and `answers` all that knows obstore.

The client's own retries are off: whether a request may be sent again is the caller's knowledge, not the client's.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import re
import threading
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from obstore.exceptions import BaseError, NotModifiedError

from buquet import keys
from buquet.clock import Clock
from buquet.codec import Oversized
from buquet.errors import AlreadyExists, Changed, InvalidURL, StoreError, UsageError
from buquet.store.answers import Place, explain, is_conflict, is_missing, is_no_version
from buquet.store.base import NOT_MODIFIED, PAGE, Listed, NotModified, Receipt, Stored

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from obstore import GetOptions, PutMode, PutResult
    from obstore.store import AzureStore as AzureClient
    from obstore.store import ClientConfig
    from obstore.store import S3Store as S3Client

    Client = S3Client | AzureClient

T = TypeVar("T")

CONNECT_TIMEOUT = timedelta(seconds=5)
REQUEST_TIMEOUT = timedelta(seconds=30)
ENDPOINT = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>\d{1,5}))?(/[\w./-]*)?", re.ASCII)
PORTS = 65_535
FIRST_LOOK = 0.02
LONGEST_LOOK = 1.0

_started: list[int] = []
"""The process in which obstore's threads were started; they do not survive a fork."""


@functools.cache
def _let_threads_end(clock: Clock) -> None:
    """Wait a moment at the interpreter's exit, once however many stores were used.

    A thread of obstore's that is still handing an answer to Python while the interpreter is taken down aborts the process, which
    then ends with status 134 although all is done (seen in 12 of 40 short processes; in none with this).
    """
    atexit.register(clock.block, 0.05)


class ObjectStore(ABC):
    """Objects in a bucket, under a prefix. No request is sent before the first operation."""

    can_wait = False

    def __init__(self, place: Place, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.place = place
        self.url = place.url
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._closed = False
        self._answered = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def _connect(self) -> Client:
        """Make the client. Raises InvalidURL, AccessDenied."""

    # ------------------------------------------------------------------ operations

    async def create(self, key: str, body: bytes) -> Receipt:
        return await self._write(key, body, "create", AlreadyExists(f"{key} exists in {self.url}"))

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        return await self._write(key, body, {"e_tag": etag}, Changed(f"{key} in {self.url} is no longer the version read"))

    async def put(self, key: str, body: bytes) -> Receipt:
        return await self._write(key, body, "overwrite", None)

    async def _write(self, key: str, body: bytes, mode: PutMode, conflict: StoreError | None) -> Receipt:
        client = await self._opened()
        # in one part whatever its size: a multipart upload is several requests, and not conditional
        answer = await self._ask(f"PUT {key}", lambda: client.put_async(key, body, mode=mode, use_multipart=False))
        if isinstance(answer, BaseException):
            if conflict is not None and (is_conflict(answer) or (mode != "create" and is_missing(answer))):
                raise conflict
            raise self._explain(answer, f"PUT {key}")
        return _receipt(answer)

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        client = await self._opened()
        options: GetOptions = {}
        if unless is not None:
            options["if_none_match"] = unless
        if version is not None:
            options["version"] = version

        async def fetch() -> Stored:
            answer = await client.get_async(key, options=options)
            meta = answer.meta
            # the size comes with the head: what is too large is not read, or one object could use up a worker's memory
            body = Oversized(meta["size"]) if meta["size"] > keys.most_bytes(key) else bytes(await answer.bytes_async())
            return Stored(body, meta["e_tag"] or "", _kept(meta["version"]), meta["last_modified"].timestamp())

        answer = await self._ask(f"GET {key}", fetch)
        if isinstance(answer, NotModifiedError):
            return NOT_MODIFIED
        if isinstance(answer, BaseException):
            if is_missing(answer) or (version is not None and is_no_version(answer)):
                return None
            raise self._explain(answer, f"GET {key}")
        return answer

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """See Store. One request, as long as the server gives full pages.

        SeaweedFS walks folders, so with it one LIST must not span folders of which one's name begins with another's.
        """
        client = await self._opened()

        async def fetch() -> list[Listed]:
            page: list[Listed] = []
            # obstore appends the slash itself, and reads on only when asked for the next chunk
            chunks = client.list(prefix.rstrip("/") or None, offset=after or None, chunk_size=limit)  # pyright: ignore[reportUnknownMemberType]
            async for chunk in chunks:
                # obstore drops a slash at the end of `after`, so that earlier keys may be met
                found = (
                    Listed(one["path"], _quoted(one["e_tag"]), one["last_modified"].timestamp(), one["size"]) for one in chunk
                )
                page += [one for one in found if one.key > after and one.key.startswith(prefix)]
                if len(page) >= limit:
                    break
            return sorted(page)[:limit]

        answer = await self._ask(f"LIST {prefix}", fetch)
        if isinstance(answer, BaseException):
            raise self._explain(answer, f"LIST {prefix}")
        return answer

    async def delete(self, key: str) -> None:
        client = await self._opened()
        answer = await self._ask(f"DELETE {key}", lambda: client.delete_async(key))
        if isinstance(answer, BaseException) and not is_missing(answer):
            raise self._explain(answer, f"DELETE {key}")

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        """See Store. Polls: 20 ms, growing by a quarter to 1 s."""
        until = self.clock.monotonic() + timeout
        wait = FIRST_LOOK
        while True:
            there = await self.get(key, unless=etag)
            if there is not NOT_MODIFIED and (there is not None or etag is not None):
                return True
            left = until - self.clock.monotonic()
            if left <= 0:
                return False
            await self.clock.sleep(min(wait, left))
            wait = min(wait * 1.25, LONGEST_LOOK)

    async def forget_versions(self, key: str) -> None:  # noqa: B027 - as meant: there is nothing to do
        """Do nothing: a lifecycle rule of the bucket removes earlier versions."""

    async def close(self) -> None:
        """Let go of the client and its connections."""
        self._closed = True  # not under the lock, which may be held for as long as credentials are looked for
        self._client = None

    # ------------------------------------------------------------------ requests and their answers

    async def _ask(self, what: str, request: Callable[[], Awaitable[T]]) -> T | Exception:
        """Return the answer, or the client's error.

        Errors are returned, not raised, so that ours have no `__context__`: a server's answer to a bad signature quotes the
        request's headers, a session token among them, and a logged traceback would show it.
        """
        try:
            answer = await request()
        except (BaseError, OSError) as error:
            return error
        except ValueError as error:  # a path that obstore cannot parse
            return UsageError(f"{what}: {error}")
        self._answered = True
        return answer

    def _explain(self, error: BaseException, what: str) -> BaseException:
        return error if isinstance(error, UsageError) else explain(error, what, self.place, answered=self._answered)

    async def _opened(self) -> Client:
        """Return the client, made at first use: in a thread, since a profile may ask a server or a program for credentials."""
        self._check_fork()
        return self._client or await asyncio.to_thread(self._open)

    def _check_fork(self) -> None:
        if _started and _started[0] != os.getpid():
            msg = (
                f"{self.url} cannot be used here: this process was forked from one that had already used S3, "
                "and the client's threads do not survive that. Use multiprocessing's 'spawn', or fork before the first use"
            )
            raise UsageError(msg)

    def _open(self) -> Client:
        self._check_fork()
        client = self._client
        if client is not None:
            return client
        with self._lock:
            if self._closed:
                raise UsageError(f"{self.url} was closed")
            if self._client is None:
                _started[:] = [os.getpid()]
                client = self._connect()
                _let_threads_end(self.clock)
                if self._closed:
                    return client
                self._client = client
            return self._client

    def _client_options(self, endpoint: str | None) -> ClientConfig:
        return {
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
            "connect_timeout": CONNECT_TIMEOUT,
            "timeout": REQUEST_TIMEOUT,
        }

    def _cannot_open(self, error: Exception) -> InvalidURL:
        return InvalidURL(f"{self.url} cannot be opened: {str(error).partition(chr(10))[0]}")


def check_place(place: Place, credentials: str) -> None:
    """Raise InvalidURL for a bucket, prefix or endpoint that cannot be meant. `credentials`: where those belong."""
    bucket, prefix, endpoint = place.bucket, place.prefix, place.endpoint
    if not bucket or "/" in bucket:
        raise InvalidURL(f"the name of a bucket is missing: {place.scheme}://bucket/prefix")
    if "@" in bucket or "@" in (endpoint or ""):
        raise InvalidURL(f"no credentials in a URL, please: it is shown and logged. Put them into {credentials}")
    if any(part in {"", ".", ".."} for part in prefix.split("/")) and prefix:
        raise InvalidURL(f"the prefix {prefix!r} has an empty part, or one that is . or ..")
    if endpoint is not None:
        found = ENDPOINT.fullmatch(endpoint)
        if found is None or int(found["port"] or 0) > PORTS:  # the client panics at some of these
            raise InvalidURL("an endpoint is http://host:port or https://host, and nothing behind it")


def _quoted(etag: str | None) -> str | None:
    """Return an ETag as PUT and GET tell it: Azure's LIST leaves the quotes out, and no session would ever look dead."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag


def _kept(version: str | None) -> str | None:
    return None if version == "null" else version  # what S3 says where versioning is off


def _receipt(answer: PutResult) -> Receipt:
    return Receipt(answer["e_tag"] or "", _kept(answer["version"]))
