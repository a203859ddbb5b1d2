"""The pages of runs, over a port that has one run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from buquet import App
from buquet.dashboard.app import dashboard
from buquet.errors import Refused, TaskNotFound
from buquet.insights.runview import RunView, StepView

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = "http://127.0.0.1:8000"
RUN, TASK = "a" * 32, "b" * 32
EVIL = "<script>x</script>"


class OneRun:
    """Workflows with one run, which remember what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.reads = 0
        steps = [
            StepView(name="validate", state="completed", started=1000, ended=1500, task_id=TASK, attempts=1),
            StepView(name=EVIL, state="failed", depends=("validate",), started=1500, ended=1600, error=EVIL),
            StepView(name="approved", kind="wait", state="ready", depends=("validate",)),
            StepView(name="label", kind="each", state="running", depends=("validate",), started=1600, done=3, total=7),
        ]
        self.shown = RunView(id=RUN, workflow="order " + EVIL, status="running", started=1000, steps=steps, tags={EVIL: EVIL})

    async def recent(self) -> list[RunView]:
        return [self.shown]

    async def run(self, run_id: str) -> RunView:
        self.reads += 1
        if run_id != RUN:
            msg = f"there is no run {run_id}"
            raise TaskNotFound(msg)
        return self.shown

    async def move(self, run_id: str, move: str) -> str:
        self.asked.append((run_id, move))
        return f"told to {move}"

    async def signal(self, run_id: str, name: str, value: str) -> None:
        if value == "{":
            msg = "no JSON"
            raise Refused(msg)
        self.asked.append((run_id, name, value))


@pytest.fixture
def port() -> OneRun:
    return OneRun()


@pytest.fixture
def client(port: OneRun) -> Iterator[TestClient]:
    with App("memory:") as app:
        yield TestClient(dashboard(app, workflows=port), base_url=HERE)


def post(client: TestClient, **form: str) -> str:
    token = re.search(r'name="token" value="([0-9a-f]+)"', client.get(f"/runs/{RUN}").text)
    assert token
    form |= {"token": token[1], "back": f"/runs/{RUN}", "target": RUN}
    return client.post("/act", data=form, headers={"origin": HERE}).text


def test_a_run_is_drawn_and_its_steps_lead_to_their_tasks(client: TestClient) -> None:
    assert f'href="/runs/{RUN}"' in client.get("/runs").text
    text = client.get(f"/runs/{RUN}").text
    assert text.count("<svg") >= 3
    assert f'href="/tasks/{TASK}"' in text
    assert "3 of 7 items" in text
    assert "<style" not in text, "the policy would not take it; it is in a file"
    assert ".bq" in client.get("/run.css").text
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 4


def test_many_who_look_at_a_run_read_it_once(client: TestClient, port: OneRun) -> None:
    for _ in range(20):
        client.get(f"/runs/{RUN}")
    assert port.reads <= 2


def test_a_run_is_moved_and_gets_signals(client: TestClient, port: OneRun) -> None:
    for move in ("cancel", "pause", "resume", "retry"):
        assert f"told to {move}" in post(client, action=f"{move}-run")
    assert "was sent" in post(client, action="signal-run", name="approved", value='{"granted": true}')
    assert "Not done: no JSON" in post(client, action="signal-run", name="approved", value="{")
    assert port.asked == [
        *((RUN, move) for move in ("cancel", "pause", "resume", "retry")),
        (RUN, "approved", '{"granted": true}'),
    ]


def test_a_run_that_is_not_there(client: TestClient) -> None:
    assert client.get("/runs/" + "c" * 32).status_code == 404


def test_without_workflows_there_are_no_runs() -> None:
    with App("memory:") as app:
        bare = TestClient(dashboard(app), base_url=HERE)
        assert bare.get("/runs").status_code == 404
        assert 'href="/runs"' not in bare.get("/").text
