"""Least privilege: each role's policy of docs/policies lets it do its work, and nothing beside, where a server enforces it."""

import asyncio
import json
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from servers import run_moto, run_seaweed

from buquet import AccessDenied, App, RunCancelled, Signal
from buquet.clock import Clock
from buquet.insights.scan import Scan
from buquet.insights.tasks import Filter, find
from buquet.operate.fsck import fsck
from buquet.store.objects import S3Store

POLICIES = Path(__file__).parent.parent.parent / "docs" / "policies"
GO = Signal("go", str)
ROLES = ("producer", "worker", "viewer", "operator")


def users(server, bucket):
    """Create a user of each role, with its policy; return their keys."""
    import boto3

    iam = boto3.client("iam", endpoint_url=server.endpoint, region_name="us-east-1")
    for role in ROLES:
        text = (POLICIES / f"{role}.json").read_text().replace("BUCKET", bucket).replace("PREFIX", "prod")
        iam.create_user(UserName=role)
        iam.put_user_policy(UserName=role, PolicyName="buquet", PolicyDocument=text)
        key = iam.create_access_key(UserName=role)["AccessKey"]
        yield role, (key["AccessKeyId"], key["SecretAccessKey"])


@pytest.fixture(scope="module", params=["SeaweedFS", "moto"])
def guarded(request, s3_environment, tmp_path_factory):
    """A server that enforces the policies, and the keys of a user of each role."""
    folder = tmp_path_factory.mktemp("guarded")
    seaweed = request.param == "SeaweedFS"
    for server in run_seaweed(folder, "-s3.iam.readOnly=false") if seaweed else run_moto(folder):
        bucket = server.new_bucket(versioned=False)
        credentials = dict(users(server, bucket))
        if not seaweed:  # from now on every request is judged
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

        @app.workflow(queue="policies")
        async def flow(text: str) -> str:
            first = await echo.options(undo=forget)(text)
            go = GO.wait(timeout=60, default="x", after=[first])
            return await echo(go)

        @app.task(queue="policies")
        async def forget(result: str | None) -> None:
            pass

        app.echo, app.flow = echo, flow
        return app

    return make


async def test_each_role_can_do_its_work(app_of):
    producer, worker, viewer, operator = (app_of(role) for role in ROLES)
    await operator.client.open()  # as `buquet init` does: not every store can tell a create from an overwrite
    small, large = await producer.echo.asubmit("a"), await producer.echo.asubmit("b" * 100_000)
    again = [await producer.echo.options(key="k").asubmit("c") for _ in range(2)]
    assert [each.created for each in again] == [True, False]
    cancelled = await producer.echo.options(delay=3600).asubmit("d")
    assert await cancelled.acancel() == "cancelled"
    run, stopped = await producer.flow.astart("e"), await producer.flow.astart("f", key="f")
    assert not (await producer.flow.astart("f", key="f")).created
    await GO.asend(run, "g", app=producer)
    # a producer may not write runs, so a worker records the cancel
    cancelling = asyncio.create_task(stopped.acancel())
    while not cancelling.done():
        await worker.worker(drain=True).arun()
    await cancelling
    assert await run.aresult(timeout=10) == "g"
    with pytest.raises(RunCancelled):
        await stopped.aresult(timeout=10)
    await operator.apause_queue("policies")
    await operator.aresume_queue("policies")
    assert await small.aresult(timeout=10) == "a"
    assert await large.aresult(timeout=10) == "b" * 100_000
    found = await find(Filter(), None, Scan(viewer.client))
    plain = sorted(task.state for task in found if not task.run)
    assert plain == ["cancelled", "completed", "completed", "completed"]
    assert (await fsck(viewer.client)).findings == []
    assert (await fsck(operator.client, repair=True)).findings == []
    for app in (producer, worker, viewer, operator):
        await app.aclose()


MAY_NOT_PUT = {
    "viewer": ("tasks/00/x.json", "ready/q/5/x", "bell/q", "notes/w", "control/w", "queues/q.json", "schedules/s.json"),
    "producer": (
        *("control/w", "queues/q.json", "schedules/s.json", "workers/aa/w.json", "runs/00/x.json", "open/x.1"),
        *("journal/2026-01-01/00/x.ndjson", "other.json"),
    ),
    "worker": ("control/w", "queues/q.json", "other.json"),
}
MAY_NOT_DELETE = {
    "viewer": ("tasks/00/x.json", "ready/q/5/x", "notes/w"),
    "producer": (
        *("tasks/00/x.json", "payloads/x/y", "bell/q", "notes/w", "control/w", "queues/q.json", "schedules/s.json"),
        *("workers/aa/w.json", "runs/00/x.json", "open/x.1", "journal/2026-01-01/00/x.ndjson", "buquet.json"),
    ),
    "worker": (
        *("tasks/00/x.json", "runs/00/x.json", "schedules/s.json", "queues/q.json", "bell/q", "buquet.json"),
        "journal/2026-01-01/00/x.ndjson",
    ),
}


@pytest.mark.parametrize("role", MAY_NOT_PUT)
async def test_no_role_can_do_more(app_of, role):
    app = app_of(role)
    store = app.client.store
    for key in MAY_NOT_PUT[role]:
        for write in (store.put, store.create):
            with pytest.raises(AccessDenied):
                await write(key, b"x")
    for key in MAY_NOT_DELETE[role]:
        with pytest.raises(AccessDenied):
            await store.delete(key)
    await app.aclose()


@pytest.mark.parametrize("role", ["viewer", "producer", "worker"])
async def test_only_an_operator_pauses_and_drains(app_of, role):
    app, operator = app_of(role), app_of("operator")
    operator.schedule("nightly", operator.echo, every=3600, args=("x",))
    await operator.worker(drain=True).arun()  # declares the schedule
    worker = operator.worker()
    works = asyncio.create_task(worker.arun())
    assert await (await operator.echo.asubmit("a")).aresult(timeout=10) == "a"  # its session is stored
    refused = (
        *(lambda: app.adrain_worker(worker.id), lambda: app.apause_worker(worker.id), lambda: app.aresume_worker(worker.id)),
        lambda: app.apause_queue("policies"),
    )
    for ask in refused:
        with pytest.raises(AccessDenied):
            await ask()
    if role != "worker":  # a worker keeps the schedules that its code declares
        with pytest.raises(AccessDenied):
            await app.apause_schedule("nightly")
    await operator.adrain_worker(worker.id)
    await works
    await app.aclose()
    await operator.aclose()


@pytest.mark.parametrize("role", ["viewer", "producer", "worker"])
async def test_only_an_operator_overwrites_the_layout(app_of, guarded, role, request):
    if "moto" in request.node.callspec.id:
        pytest.skip("moto judges no conditions of a policy")
    operator, app = app_of("operator"), app_of(role)
    await operator.client.open()
    store = app.client.store
    for write in (lambda: store.put("buquet.json", b"x"), lambda: store.update("buquet.json", b"x", "etag")):
        with pytest.raises(AccessDenied):
            await write()
    await app.client.open()
    elsewhere = f"{guarded[0].replace('/prod', '/prod/inner')}"
    with pytest.raises(AccessDenied, match="buquet init"):
        await App(elsewhere).client.open()
    await app.aclose()
    await operator.aclose()


@pytest.mark.parametrize("role", ["producer", "worker"])
def test_where_a_store_knows_the_condition_a_role_may_create_the_layout_and_never_replace_it(role):
    statements = json.loads((POLICIES / f"{role}.json").read_text())["Statement"]
    (only,) = [each for each in statements if any("buquet.json" in resource for resource in each["Resource"])]
    assert only["Action"] == ["s3:PutObject"]
    assert only["Condition"] == {"Null": {"s3:if-none-match": "false"}}
    assert not [each for each in statements if each["Effect"] != "Allow"]


async def test_nobody_reaches_beyond_the_prefix(app_of):
    for role in ROLES:
        app = app_of(role)
        place = app.client.store.location
        elsewhere = S3Store(place._replace(prefix="other"), Clock())
        with pytest.raises(AccessDenied):
            await elsewhere.put("tasks/00/x.json", b"x")
        await app.aclose()
