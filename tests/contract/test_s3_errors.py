"""What a user reads when S3 cannot be used, and what never appears there."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from servers import ACCESS_KEY, SECRET_KEY, S3Server, free_ports

from buquet.clock import Clock
from buquet.errors import (
    AccessDenied,
    AlreadyExists,
    BucketMissing,
    BuquetError,
    Changed,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnfit,
    UsageError,
)
from buquet.store.base import Store, Stored
from buquet.store.open import open_store

Operation = Callable[[Store], Coroutine[Any, Any, object]]

EVERY: dict[str, Operation] = {
    "create": lambda store: store.create("tasks/00/a", b"x"),
    "update": lambda store: store.update("tasks/00/a", b"x", '"0"'),
    "put": lambda store: store.put("tasks/00/a", b"x"),
    "get": lambda store: store.get("tasks/00/a"),
    "get version": lambda store: store.get("tasks/00/a", version="v"),
    "list": lambda store: store.list("tasks/00/"),
    "delete": lambda store: store.delete("tasks/00/a"),
}
TOKEN = "a-session-token-that-nobody-may-see"


def every(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("operation", [pytest.param(EVERY[name], id=name) for name in names or EVERY])


@pytest.fixture(params=["seaweed", "moto_server"])
def server(request: pytest.FixtureRequest) -> S3Server:
    return request.getfixturevalue(request.param)


class Scripted(ThreadingHTTPServer):
    """A server that gives one answer to everything, and remembers what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status = 200
        self.body = b""
        self.asked: list[tuple[str, str]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def says(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        self.body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""

    def store(self) -> Store:
        return open_store(f"s3://bucket/prefix?endpoint={self.endpoint}", Clock())


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path))
        body = self.server.body.replace(b"{token}", (self.headers.get("x-amz-security-token") or "").encode())
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_POST = do_HEAD = _answer  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted(s3_environment: None) -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


# ---------------------------------------------------------------------- real servers


@every()
async def test_wrong_secret_is_denied(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, operation: Operation) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    store = open_store(seaweed.url(), Clock())
    with pytest.raises(AccessDenied) as caught:
        await operation(store)
    text = str(caught.value)
    assert store.url in text
    assert "AWS_ACCESS_KEY_ID" in text
    assert "a-wrong-secret" not in everything(caught.value)


@every("get", "get version", "list")
async def test_missing_bucket(server: S3Server, operation: Operation) -> None:
    url = f"s3://no-such-bucket/p?endpoint={server.endpoint}"
    with pytest.raises(BucketMissing) as caught:
        await operation(open_store(url, Clock()))
    assert "'no-such-bucket'" in str(caught.value)
    assert server.endpoint in str(caught.value)
    assert f"buquet init --url '{url}'`" in str(caught.value)


@every("create", "update", "put", "delete")
async def test_writes_to_a_missing_bucket(moto_server: S3Server, operation: Operation) -> None:
    """Not on SeaweedFS: it makes the bucket of a PUT whose sender may do so."""
    with pytest.raises(BucketMissing):
        await operation(open_store(f"s3://no-such-bucket/p?endpoint={moto_server.endpoint}", Clock()))


@every()
async def test_nothing_listens(s3_environment: None, operation: Operation) -> None:
    (port,) = free_ports(1)
    store = open_store(f"s3://bucket/p?endpoint=http://127.0.0.1:{port}", Clock())
    with pytest.raises(StoreUnavailable) as caught:
        await operation(store)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "connection refused" in str(caught.value)


async def test_large_body_is_one_conditional_request(seaweed: S3Server) -> None:
    store = open_store(seaweed.url(), Clock())
    body = os.urandom(12_000_000)
    first = await store.create("payloads/a/b", body)
    with pytest.raises(AlreadyExists):
        await store.create("payloads/a/b", body)
    there = await store.get("payloads/a/b")
    assert isinstance(there, Stored)
    assert (there.body == body, there.etag) == (True, first.etag)


async def test_credentials_of_a_profile(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    seaweed.url()  # its bucket is made with the credentials of the environment
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    shared = tmp_path / "credentials"
    shared.write_text(f"[mine]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    await open_store(seaweed.url(), Clock()).put("bell/q", b"")
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(AccessDenied, match="other"):
        await open_store(seaweed.url(), Clock()).put("bell/q", b"")
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    with pytest.raises(AccessDenied, match="boto3"):
        await open_store(seaweed.url(), Clock()).put("bell/q", b"")


PROCESS = """
import json, pathlib, time
folder = pathlib.Path({folder!r})
(folder / "asked").touch()
for _ in range(500):
    if (folder / "answer").exists():
        break
    time.sleep(0.01)
else:
    (folder / "late").touch()
print(json.dumps({{"Version": 1, "AccessKeyId": {key!r}, "SecretAccessKey": {secret!r}}}))
"""


async def test_a_profile_that_takes_long_to_give_credentials_does_not_hold_up_the_loop(
    seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = seaweed.url()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "give.py").write_text(PROCESS.format(folder=str(tmp_path), key=ACCESS_KEY, secret=SECRET_KEY))
    (tmp_path / "config").write_text(f"[profile slow]\ncredential_process = {sys.executable} {tmp_path}/give.py\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "slow")
    store = open_store(url, Clock())
    put = asyncio.create_task(store.put("bell/q", b""))
    async with asyncio.timeout(60):
        while not (tmp_path / "asked").exists():  # noqa: ASYNC110 - another process gives no event here
            await asyncio.sleep(0.01)
    (tmp_path / "answer").touch()
    await put
    assert not (tmp_path / "late").exists()
    await store.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_forked_child_is_told(seaweed: S3Server) -> None:
    url = seaweed.url()
    store = open_store(url, Clock())
    await store.put("bell/q", b"")
    out, into = os.pipe()
    child = os.fork()
    if not child:
        # nothing of the parent's may run on here: no loop, no pytest
        said: list[tuple[str, str]] = []
        for one in (store, open_store(url, Clock())):
            try:
                one.get("bell/q").send(None)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is to judge it
                said.append((type(error).__name__, str(error)))
        os.write(into, json.dumps(said).encode())
        os._exit(0)
    os.close(into)
    await asyncio.to_thread(os.waitpid, child, 0)
    with os.fdopen(out) as answers:
        said = json.load(answers)
    assert [name for name, _ in said] == ["UsageError"] * 2
    assert all("forked" in text and "spawn" in text for _, text in said)
    assert isinstance(await store.get("bell/q"), Stored)  # the parent goes on


# ---------------------------------------------------------------------- scripted answers


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "ExpiredToken", AccessDenied),
        (400, "RequestTimeout", StoreUnavailable),
        (400, "AuthorizationHeaderMalformed", StoreRefused),
        (400, "NotImplemented", StoreUnfit),
        (400, "InvalidRequest", StoreRefused),
        (401, "", AccessDenied),
        (403, "AccessDenied", AccessDenied),
        (403, "RequestTimeTooSkewed", AccessDenied),
        (403, "QuotaExceeded", StoreFull),
        (404, "NoSuchBucket", BucketMissing),
        (429, "", StoreUnavailable),
        (500, "InternalError", StoreUnavailable),
        (501, "NotImplemented", StoreUnfit),
        (502, "", StoreUnavailable),
        (503, "SlowDown", StoreUnavailable),
        (507, "XMinioStorageFull", StoreFull),
    ],
)
@every("create", "update", "put", "get", "list", "delete")
async def test_refusals(scripted: Scripted, status: int, code: str, expected: type[StoreError], operation: Operation) -> None:
    scripted.says(status, code, "says the server")
    with pytest.raises(StoreError) as caught:
        await operation(scripted.store())
    assert type(caught.value) is expected
    assert str(status) in str(caught.value) or expected is BucketMissing
    assert len(scripted.asked) == 1, "nothing is sent again"


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("get", "s3:GetObject on arn:aws:s3:::bucket/prefix/tasks/*, or s3:ListBucket on arn:aws:s3:::bucket where there is no"),
        ("update", "s3:PutObject on arn:aws:s3:::bucket/prefix/tasks/*"),
        ("delete", "s3:DeleteObject on arn:aws:s3:::bucket/prefix/tasks/*"),
        ("list", "s3:ListBucket on arn:aws:s3:::bucket"),
    ],
)
async def test_a_denied_request_names_the_right_that_is_missing(scripted: Scripted, name: str, right: str) -> None:
    scripted.says(403, "AccessDenied", "Access Denied")
    with pytest.raises(AccessDenied) as caught:
        await EVERY[name](scripted.store())
    assert f"The credentials lack the right {right}" in str(caught.value)


@pytest.mark.parametrize("status", [409, 412])
async def test_conflicts(scripted: Scripted, status: int) -> None:
    scripted.says(status, "ConditionalRequestConflict")
    for name, expected in (
        ("create", AlreadyExists),
        ("update", Changed),
        ("put", StoreUnavailable),
        ("delete", StoreUnavailable),
    ):
        with pytest.raises(expected):
            await EVERY[name](scripted.store())


async def test_version_ids_of_another_store(scripted: Scripted) -> None:
    scripted.says(400, "InvalidArgument", "Invalid version id specified")
    assert await scripted.store().get("tasks/00/a", version="1") is None
    with pytest.raises(StoreRefused):
        await scripted.store().get("tasks/00/a")


async def test_one_request_each(scripted: Scripted) -> None:
    scripted.says(200)
    scripted.body = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    store = scripted.store()
    await store.list("ready/q%2Fx/5/", after="ready/q%2Fx/5/1~a%7E")
    scripted.says(204)
    await store.delete("ready/q%2Fx/5/1~a%7E")
    assert [method for method, _ in scripted.asked] == ["GET", "DELETE"]
    listing = scripted.asked[0][1]
    assert "prefix=prefix%2Fready%2Fq%252Fx%2F5%2F" in listing
    assert "start-after=prefix%2Fready%2Fq%252Fx%2F5%2F1%7Ea%257E" in listing


async def test_full_page_is_one_request(scripted: Scripted) -> None:
    keys = [f"ready/q/5/{n:04d}" for n in range(1000)]
    contents = "".join(
        f"<Contents><Key>prefix/{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>0</Size></Contents>"
        for key in keys
    )
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>more</NextContinuationToken>"
    scripted.says(200)
    scripted.body = f"<ListBucketResult>{more}{contents}</ListBucketResult>".encode()
    assert [one.key for one in await scripted.store().list("ready/q/5/")] == keys
    assert len(scripted.asked) == 1


async def test_secrets_are_nowhere(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's answer to a bad signature quotes the request's headers."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    scripted.says(403, "SignatureDoesNotMatch", "does not match")
    scripted.body += b"<CanonicalRequest>x-amz-security-token:{token}</CanonicalRequest>"
    store = scripted.store()
    shown = f"{store.url} {store!r} {vars(store)!r}"
    for name, operation in EVERY.items():
        with pytest.raises(AccessDenied) as caught:
            await operation(store)
        shown += f"{name} {everything(caught.value)}"
    shown += f"{vars(store)!r}"
    for secret in (SECRET_KEY, TOKEN):
        assert secret not in shown


def everything(error: BaseException | None) -> str:
    """Return all that a log may show of an error, with what it was raised from, suppressed or not."""
    text = ""
    while error is not None:
        text += "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
        error = error.__cause__ or error.__context__
    return text


async def test_closed_store_says_so(s3_environment: None) -> None:
    store = open_store("s3://bucket/p?endpoint=http://127.0.0.1:1", Clock())
    await store.close()
    with pytest.raises(UsageError, match="closed"):
        await store.get("bell/q")


def test_errors_can_be_pickled_and_are_ours(s3_environment: None) -> None:
    store = open_store("s3://bucket/p?endpoint=http://127.0.0.1:1", Clock())
    with pytest.raises(BuquetError) as caught:
        asyncio.run(store.get("bell/q"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - our own
