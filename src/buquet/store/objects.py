"""Buckets on S3 and Azure. No other file uses obstore.

The client's own retries are off: only the caller knows whether a request may be sent again.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import re
import shlex
import threading
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from obstore import store as clients
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from buquet import keys
from buquet.codec import Oversized
from buquet.errors import (
    AccessDenied,
    AlreadyExists,
    BucketMissing,
    Changed,
    InvalidURL,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnfit,
    UsageError,
    install,
)
from buquet.store.base import NOT_MODIFIED, PAGE, Listed, NotModified, Receipt, Stored

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from obstore import GetOptions, PutMode, PutResult
    from obstore.auth.boto3 import Boto3CredentialProvider

    from buquet.clock import Clock
    from buquet.store.base import Location

    Client = clients.S3Store | clients.AzureStore


STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>\s*([\w.]+)\s*</Code>")
MESSAGE = re.compile(r"<Message>([^<]{1,300})")

NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
FULL = {"QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", "InsufficientStorage"}
DENIED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
"""Refusals of credentials with status 400."""
LACKING = {"AccessDenied", "AuthorizationPermissionMismatch"}
"""Refusals of valid credentials that lack a right."""
RIGHTS = {"GET": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
PASSING = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
ROLE = ("169.254.169.254", "/latest/api/token", "/latest/meta-data")
"""Where obstore asks for the role of a machine, if it finds no other credentials."""

SIGNS = {
    "ConnectionRefused": "nothing listens there: connection refused",
    "ConnectionReset": "connection reset",
    "dns error": "the host's name is not known",
    "kind: Timeout": "not in time",
    "TimedOut": "not in time",
    "certificate": "its certificate is not trusted",
}
"""Words in obstore's description of a request without an answer, and their meaning."""


def status_of(error: BaseException) -> int:
    """Return the HTTP status in an obstore error; 0 if there was no answer."""
    match = STATUS.search(str(error))
    return int(match[1]) if match else 0


def code_of(error: BaseException) -> str:
    """Return the code in an obstore error, such as NoSuchBucket; empty if it has none."""
    match = CODE.search(str(error))
    return match[1] if match else ""


def is_conflict(error: BaseException) -> bool:
    """Tell whether the condition of a PUT was not met. 409: another conditional write of the key was in flight."""
    if code_of(error) in NO_BUCKET:  # the 404 of a conditional PUT comes as a PreconditionError, too
        return False
    return isinstance(error, AlreadyExistsError | PreconditionError) or status_of(error) in {409, 412}


def is_missing(error: BaseException) -> bool:
    """Tell whether the key, but not the bucket, is missing."""
    return isinstance(error, FileNotFoundError) and code_of(error) not in NO_BUCKET


def is_no_version(error: BaseException) -> bool:
    """Tell whether a version does not exist. S3 answers 400 to an id that it never made, 405 to a delete marker."""
    return (status_of(error), code_of(error)) in {(400, "InvalidArgument"), (400, "NoSuchVersion"), (405, "MethodNotAllowed")}


def explain(error: BaseException, what: str, location: Location, *, answered: bool) -> StoreError:
    """Return the error of buquet for an obstore error. `answered`: whether the store ever answered a request with success."""
    status, code = status_of(error), code_of(error)
    said = _said(error, status, code)
    where = location.endpoint or ("AWS" if location.scheme == "s3" else "Azure")
    if code in NO_BUCKET:
        how = f"Create it, or run `buquet init --url {shlex.quote(location.url)}`" if location.scheme == "s3" else "Create it"
        return BucketMissing(f"there is no bucket {location.bucket!r} at {where}. {how}")
    if any(sign in str(error) for sign in ROLE):
        if answered:  # the role gave credentials before, and will again
            return StoreUnavailable(f"{what} in {location.url}: the machine's role could not be asked ({said})")
        return AccessDenied(f"no credentials were found for {what} in {location.url}. {_looked(location)}")
    if code in FULL or status == 507:
        return StoreFull(f"{what} in {location.url}: {said}. Free space or raise the quota; nothing was written")
    if code in ELSEWHERE or "incorrectly configured region" in str(error) or status == 301:
        return StoreRefused(f"{what} in {location.url}: {said}. Name the bucket's own region, by ?region= or AWS_REGION")
    if code in LACKING:
        return AccessDenied(f"{what} in {location.url} was denied: {said}. {_right(what, location)}")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in {401, 403} or code in DENIED:
        return AccessDenied(f"{what} in {location.url} was denied: {said}. {_looked(location)}")
    if status == 501 or code == "NotImplemented":
        return StoreUnfit(f"{what}: {where} does not do this ({said}). buquet needs PUT with If-None-Match and If-Match")
    if status in {0, 408, 409, 412, 429} or status >= 500 or code in PASSING:
        return StoreUnavailable(f"{what} in {location.url}: {said}")
    return StoreRefused(f"{what} in {location.url}: {said}")


def _right(what: str, location: Location) -> str:
    """Return which right valid credentials lack."""
    verb, _, key = what.partition(" ")
    if location.scheme == "az":
        return f"The identity lacks the right to {verb} blobs there: give it the role Storage Blob Data Contributor"
    folder, slash, _ = key.partition("/")
    bucket = f"arn:aws:s3:::{location.bucket}"
    objects = "/".join(filter(None, (bucket, location.prefix, folder, slash and "*")))
    missing = f"s3:ListBucket on {bucket}" if verb == "LIST" else f"{RIGHTS[verb]} on {objects}"
    hidden = f", or s3:ListBucket on {bucket} where there is no such object" if verb == "GET" else ""
    return f"The credentials lack the right {missing}{hidden}"


def _looked(location: Location) -> str:
    if location.scheme == "az":
        return "Credentials are taken from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or other AZURE_… variables"
    return (
        "Credentials are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else from AWS_PROFILE and the files in ~/.aws "
        "(with boto3 installed), else from the role of this container or machine"
    )


def _said(error: BaseException, status: int, code: str) -> str:
    """Return the answer in a few words. All of it would show signed headers that it may quote."""
    text = str(error)
    if status:
        message = MESSAGE.search(text)
        return " ".join(filter(None, (str(status), code, message[1].strip().rstrip(".") if message else "")))
    for sign, meaning in SIGNS.items():
        if sign in text:
            return f"no answer ({meaning})"
    return "no answer: " + text.partition("\n")[0][-200:]


T = TypeVar("T")

CONNECT_TIMEOUT = timedelta(seconds=5)
REQUEST_TIMEOUT = timedelta(seconds=30)
REGION = "us-east-1"
ENDPOINT = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>\d{1,5}))?(/[\w./-]*)?", re.ASCII)
PORTS = 65_535
FIRST_POLL = 0.02
LONGEST_POLL = 1.0

_started: list[int] = []
"""The process in which obstore's threads were started. They do not survive a fork."""


@functools.cache
def _let_threads_end(clock: Clock) -> None:
    """Wait 50 ms at the interpreter's exit, once per process.

    A thread of obstore that hands an answer to Python while the interpreter shuts down aborts the process with status 134.
    """
    atexit.register(clock.block, 0.05)


class ObjectStore(ABC):
    """Objects in a bucket, under a prefix. No request is sent before the first operation.

    Raises InvalidURL for a bucket, prefix or endpoint that cannot exist.
    """

    can_wait = False
    credentials: ClassVar[str]
    """The environment variables that hold the credentials."""

    def __init__(self, location: Location, clock: Clock) -> None:
        _check_location(location, self.credentials)
        endpoint = location.endpoint and location.endpoint.rstrip("/")
        self.location = location._replace(prefix=location.prefix.strip("/"), endpoint=endpoint)
        self.clock = clock
        self.url = self.location.url
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._closed = False
        self._answered = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def _connect(self) -> Client:
        """Make the client. Raises AccessDenied, and BaseError or ValueError where the client refuses its configuration."""

    # ------------------------------------------------------------------ operations

    async def create(self, key: str, body: bytes) -> Receipt:
        return await self._write(key, body, "create", AlreadyExists(f"{key} exists in {self.url}"))

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        return await self._write(key, body, {"e_tag": etag}, Changed(f"{key} in {self.url} is no longer the version read"))

    async def put(self, key: str, body: bytes) -> Receipt:
        return await self._write(key, body, "overwrite", None)

    async def _write(self, key: str, body: bytes, mode: PutMode, conflict: StoreError | None) -> Receipt:
        client = await self._opened()
        # in one part whatever its size: a multipart upload is several requests, and cannot be conditional
        answer: PutResult | Exception = await self._ask(
            f"PUT {key}", lambda: client.put_async(key, body, mode=mode, use_multipart=False)
        )
        if isinstance(answer, BaseException):
            if conflict is not None and (is_conflict(answer) or (mode != "create" and is_missing(answer))):
                raise conflict
            raise self._explain(answer, f"PUT {key}")
        return Receipt(answer["e_tag"] or "", _version(answer["version"]))

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
            # the size comes with the headers; a body that is too large is not read, since it could fill the memory of a worker
            body = Oversized(meta["size"]) if meta["size"] > keys.most_bytes(key) else bytes(await answer.bytes_async())
            return Stored(body, meta["e_tag"] or "", _version(meta["version"]), meta["last_modified"].timestamp())

        answer = await self._ask(f"GET {key}", fetch)
        if isinstance(answer, NotModifiedError):
            return NOT_MODIFIED
        if isinstance(answer, BaseException):
            if is_missing(answer) or (version is not None and is_no_version(answer)):
                return None
            raise self._explain(answer, f"GET {key}")
        return answer

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """Send one request if the server returns full pages.

        SeaweedFS walks folders: one LIST must not span two folders of which one name starts with the other.
        """
        client = await self._opened()

        async def fetch() -> list[Listed]:
            page: list[Listed] = []
            # obstore appends the slash itself, and requests the next chunk only when asked for it
            chunks = client.list(prefix.rstrip("/") or None, offset=after or None, chunk_size=limit)  # pyright: ignore[reportUnknownMemberType]
            async for chunk in chunks:
                listed = [
                    Listed(meta["path"], _quoted(meta["e_tag"]), meta["last_modified"].timestamp(), meta["size"])
                    for meta in chunk
                ]
                # obstore drops a slash at the end of `after`, so that the chunk may hold earlier keys
                page += [entry for entry in listed if entry.key > after and entry.key.startswith(prefix)]
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
        """Poll after 20 ms, then at intervals that grow by a quarter to 1 s."""
        until = self.clock.monotonic() + timeout
        wait = FIRST_POLL
        while True:
            stored = await self.get(key, unless=etag)
            if stored is not NOT_MODIFIED and (stored is not None or etag is not None):
                return True
            left = until - self.clock.monotonic()
            if left <= 0:
                return False
            await self.clock.sleep(min(wait, left))
            wait = min(wait * 1.25, LONGEST_POLL)

    async def forget_versions(self, key: str) -> None:  # noqa: B027 - intended: there is nothing to do
        """Do nothing: a lifecycle rule of the bucket removes earlier versions."""

    async def close(self) -> None:
        """Drop the client and its connections."""
        self._closed = True  # without the lock, which is held while credentials are looked for
        self._client = None

    # ------------------------------------------------------------------ requests and their answers

    async def _ask(self, what: str, request: Callable[[], Awaitable[T]]) -> T | Exception:
        """Return the answer, or the client's error.

        The error is returned, not raised, so that ours has no `__context__`. A server's answer to a bad signature quotes the
        headers of the request, which may hold a session token, and a logged traceback would show them.
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
        return error if isinstance(error, UsageError) else explain(error, what, self.location, answered=self._answered)

    async def _opened(self) -> Client:
        """Return the client. It is made in a thread, since a profile may ask a server or a program for credentials."""
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
        with self._lock:
            if self._closed:
                raise UsageError(f"{self.url} was closed")
            if self._client is None:
                _started[:] = [os.getpid()]
                try:
                    client = self._connect()
                except (BaseError, ValueError) as error:
                    problem = InvalidURL(f"{self.url} cannot be opened: {str(error).partition(chr(10))[0]}")
                else:
                    _let_threads_end(self.clock)
                    if self._closed:
                        return client
                    self._client = client
                    return client
                raise problem  # here, so that it has no `__context__`
            return self._client

    def _options(self, endpoint: str | None) -> clients.ClientConfig:
        return {
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
            "connect_timeout": CONNECT_TIMEOUT,
            "timeout": REQUEST_TIMEOUT,
        }


class S3Store(ObjectStore):
    """A bucket on S3, or on a server that speaks its protocol.

    Credentials are looked for where AWS's own tools look: in the environment, in a profile or shared file (needs boto3), and
    then in the role of the container or machine.
    """

    credentials = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

    def _connect(self) -> Client:
        location = self.location
        endpoint = location.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        provider = _profile()
        of_profile = provider.config.get("region") if provider else None
        region = location.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or of_profile or REGION
        config: clients.S3Config = {
            "bucket": location.bucket,
            "region": region,
            # AWS's certificates do not cover names with dots, and few other servers take the bucket's name as a host
            "virtual_hosted_style_request": endpoint is None and "." not in location.bucket,
            "disable_bulk_delete": True,
        }
        if endpoint is not None:
            config["aws_endpoint_url_s3"] = endpoint
        return clients.S3Store(
            prefix=location.prefix or None,
            config=config,
            client_options=self._options(endpoint),
            retry_config={"max_retries": 0},
            credential_provider=provider,
        )


class AzureStore(ObjectStore):
    """A container of Azure Blob Storage.

    The account is AZURE_STORAGE_ACCOUNT_NAME. Credentials are AZURE_STORAGE_ACCOUNT_KEY, a SAS token, a service principal or a
    managed identity, as the client finds them in AZURE_… variables.
    """

    credentials = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"

    def _connect(self) -> Client:
        location = self.location
        if not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
            msg = f"{self.url}: the account of the container is not known. Name it in AZURE_STORAGE_ACCOUNT_NAME"
            raise AccessDenied(msg)
        config: clients.AzureConfig = {"container_name": location.bucket}
        if location.endpoint is not None:
            config["endpoint"] = location.endpoint
        return clients.AzureStore(
            prefix=location.prefix or None,
            config=config,
            client_options=self._options(location.endpoint),
            retry_config={"max_retries": 0},
        )


def _check_location(location: Location, credentials: str) -> None:
    bucket, endpoint = location.bucket, location.endpoint
    if not bucket or "/" in bucket:
        raise InvalidURL(f"the name of a bucket is missing: {location.scheme}://bucket/prefix")
    if "@" in bucket or "@" in (endpoint or ""):
        raise InvalidURL(f"a URL is shown and logged, and takes no credentials. Put them into {credentials}")
    prefix = location.prefix.strip("/")
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        raise InvalidURL(f"the prefix {prefix!r} has an empty part, or one that is . or ..")
    if endpoint is not None:
        match = ENDPOINT.fullmatch(endpoint)
        if match is None or int(match["port"] or 0) > PORTS:  # the client panics at some of these
            raise InvalidURL("an endpoint is http://host:port or https://host, and nothing behind it")


def _profile() -> Boto3CredentialProvider | None:
    """Return boto3's credentials if AWS's tools would look at a profile or a shared file first."""
    environ = os.environ
    profile = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE")
    if environ.get("AWS_ACCESS_KEY_ID") or (environ.get("AWS_WEB_IDENTITY_TOKEN_FILE") and not profile):
        return None
    files = (environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), environ.get("AWS_CONFIG_FILE", "~/.aws/config"))
    if not profile and not any(_exists(file) for file in files):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 - boto3 is slow to import, and optional
    except ImportError:
        if not profile:
            return None
        msg = f"the AWS profile {profile!r} takes boto3 to read: {install('s3')}, or put the keys into the environment"
        raise AccessDenied(msg) from None
    try:
        return Boto3CredentialProvider()
    except ValueError:  # it has no credentials; obstore's own chain is next
        return None
    except Exception as error:  # noqa: BLE001 - botocore's errors have no common base class
        raise AccessDenied(f"the AWS profile cannot be used: {error}") from None


def _exists(file: str) -> bool:
    try:
        return Path(file).expanduser().exists()
    except (OSError, RuntimeError):  # no rights, or no home directory
        return False


def _quoted(etag: str | None) -> str | None:
    """Return an ETag as PUT and GET return it: Azure's LIST leaves the quotes out, and no session would ever look dead."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag


def _version(version: str | None) -> str | None:
    return None if version == "null" else version  # S3 returns "null" where versioning is off
