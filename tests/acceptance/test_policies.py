"""Least privilege: each role's policy of docs/policies lets it do its work, and nothing beside, where a server enforces it."""

from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from servers import run_moto

from buquet import AccessDenied, App
from buquet.clock import Clock
from buquet.insights.scan import Scan
from buquet.insights.tasks import Filter, find
from buquet.operate.fsck import fsck
from buquet.store.s3 import S3Store

POLICIES = Path(__file__).parent.parent.parent / "docs" / "policies"
ROLES = ("producer", "worker", "viewer", "operator")


@pytest.fixture(scope="module")
def guarded(s3_environment, tmp_path_factory):
    """A moto server that enforces the policies, and the keys of a user of each role."""
    import boto3

    for server in run_moto(tmp_path_factory.mktemp("guarded")):
        bucket = server.new_bucket(versioned=False)
        iam = boto3.client("iam", endpoint_url=server.endpoint, region_name="us-east-1")
        credentials = {}
        for role in ROLES:
            text = (POLICIES / f"{role}.json").read_text().replace("BUCKET", bucket).replace("PREFIX", "prod")
            iam.create_user(UserName=role)
            iam.put_user_policy(UserName=role, PolicyName="buquet", PolicyDocument=text)
            key = iam.create_access_key(UserName=role)["AccessKey"]
            credentials[role] = (key["AccessKeyId"], key["SecretAccessKey"])
        # from now on every request is judged
        plain = {"Content-Type": "text/plain"}
        urlopen(Request(f"{server.endpoint}/moto-api/reset-auth", data=b"0", headers=plain, method="POST")).read()  # noqa: S310
        yield f"s3://{bucket}/prod?endpoint={server.endpoint}", credentials


@pytest.fixture
def app_of(guarded, monkeypatch):
    url, credentials = guarded

    def make(role):
        key, secret = credentials[role]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        app = App(url)
        app.client.store._open()  # takes the credentials that are there now

        @app.task(queue="policies")
        async def echo(text: str) -> str:
            return text

        app.echo = echo
        return app

    return make


async def test_each_role_can_do_its_work(app_of):
    producer, worker, viewer, operator = (app_of(role) for role in ROLES)
    small, large = await producer.echo.asubmit("a"), await producer.echo.asubmit("b" * 100_000)
    again = [await producer.echo.options(key="k").asubmit("c") for _ in range(2)]
    assert [each.created for each in again] == [True, False]
    cancelled = await producer.echo.options(delay=3600).asubmit("d")
    assert await cancelled.acancel() == "cancelled"
    await worker.worker(drain=True).arun()
    assert await small.aresult(timeout=10) == "a"
    assert await large.aresult(timeout=10) == "b" * 100_000
    found = await find(viewer.client, Filter(), None, Scan(viewer.client))
    assert sorted(task.state for task in found) == ["cancelled", "completed", "completed", "completed"]
    assert (await fsck(viewer.client)).findings == []
    assert (await fsck(operator.client, repair=True)).findings == []
    for app in (producer, worker, viewer, operator):
        await app.aclose()


@pytest.mark.parametrize(
    ("role", "request_"),
    [
        ("viewer", lambda store: store.put("tasks/00/x.json", b"x")),
        ("viewer", lambda store: store.delete("tasks/00/x.json")),
        ("producer", lambda store: store.put("workers/aa/w.json", b"x")),
        ("producer", lambda store: store.delete("tasks/00/x.json")),
        ("producer", lambda store: store.delete("workers/aa/w.json")),
        ("worker", lambda store: store.delete("tasks/00/x.json")),
        ("worker", lambda store: store.delete("buquet.json")),
    ],
)
async def test_no_role_can_do_more(app_of, role, request_):
    app = app_of(role)
    with pytest.raises(AccessDenied):
        await request_(app.client.store)
    await app.aclose()


async def test_nobody_reaches_beyond_the_prefix(app_of):
    for role in ROLES:
        app = app_of(role)
        place = app.client.store.place
        elsewhere = S3Store(place.bucket, "other", place.endpoint, None, Clock())
        with pytest.raises(AccessDenied):
            await elsewhere.put("tasks/00/x.json", b"x")
        await app.aclose()
