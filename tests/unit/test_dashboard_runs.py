"""The pages of runs, without a browser, over real runs in memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest
from starlette.testclient import TestClient

from buquet import App, Fail, Run, Signal, each
from buquet.dashboard.app import dashboard
from buquet.operate.bench import CountingStore
from buquet.queue.control import whoami
from buquet.testing.fixture import run_until_idle

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = "http://127.0.0.1:8000"
EVIL = "<script>x</script>"


class World(NamedTuple):
    app: App
    client: TestClient
    sent: CountingStore

    def start(self, value: str = EVIL, **options: object) -> Run[str]:
        run = self.app.workflows[f"order {EVIL}"].options(**options).start(value)
        run_until_idle(self.app)
        return run

    def post(self, run: Run[str], **form: str) -> str:
        open_one = self.app.workflows[f"order {EVIL}"].options(key="for its buttons").start("")
        token = re.search(r'name="token" value="([0-9a-f]+)"', self.client.get(f"/runs/{open_one.id}").text)
        assert token, "it is the session's, for all pages"
        form = {"target": run.id} | form | {"token": token[1], "back": f"/runs/{run.id}"}
        text = self.client.post("/act", data=form, headers={"origin": HERE}).text
        run_until_idle(self.app)
        self.forget(run)
        return text

    def forget(self, run: Run[str]) -> None:
        """Else what was read a second ago is good enough."""
        self.client.app.state.feed.changed("backlog", "runs", f"run:{run.id}")


@pytest.fixture
def world() -> Iterator[World]:
    sent = CountingStore(App("memory:").client.store)
    with App(store=sent) as app:
        go = Signal("go", bool)

        @app.task(name=f"first {EVIL}")
        def first(value: str) -> list[str]:
            return [value] * 3

        @app.task
        def item(value: str) -> str:
            return value

        @app.task(max_attempts=1)
        def last(ok: bool, items: list[str]) -> str:
            if not ok:
                raise Fail(EVIL)
            return items[0]

        @app.workflow(name=f"order {EVIL}")
        def order(value: str) -> str:
            return last(go.wait(), each(item, first(value)))

        yield World(app, TestClient(dashboard(app), base_url=HERE), sent)


def test_a_run_is_drawn_and_its_steps_lead_to_their_tasks(world: World) -> None:
    run = world.start(tags={EVIL: EVIL}, key=EVIL)
    assert f'href="/runs/{run.id}"' in world.client.get("/runs").text
    text = world.client.get(f"/runs/{run.id}").text
    assert text.count("<svg") >= 3
    steps = {step.name: step for step in run.steps()}
    assert f'href="/tasks/{steps["item"].task_id}"' in text
    assert "3 of 3 items" in text
    assert "retried" not in text
    assert "<style" not in text, "the policy would not take it; it is in a file"
    assert ".bq" in world.client.get("/run.css").text
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 8
    task = world.client.get(f"/tasks/{steps['item'].task_id}").text
    assert f'href="/runs/{run.id}"' in task, "and back"


def test_a_run_that_no_worker_has_begun_is_shown(world: World) -> None:
    run = world.app.workflows[f"order {EVIL}"].start("x")
    assert f'href="/runs/{run.id}"' in world.client.get("/runs").text
    text = world.client.get(f"/runs/{run.id}").text
    assert "pending" in text
    run_until_idle(world.app)
    world.forget(run)
    assert "running" in world.client.get(f"/runs?q={run.id}").text, "an id leads to its page"


def test_many_who_open_a_run_or_the_list_read_it_once(world: World) -> None:
    run = world.start()
    for path in (f"/runs/{run.id}", "/runs"):
        world.client.get(path)
        before = sum(world.sent.counts.values())
        for _ in range(20):
            world.client.get(path)
        assert sum(world.sent.counts.values()) - before <= 8


def test_a_signal_lets_a_run_go_on_to_its_result(world: World) -> None:
    run = world.start()
    assert "no JSON" in world.post(run, action="signal-run", name="go", value="{")
    assert "Not done: " in world.post(run, action="signal-run", name="go", value='"text"' * 2)
    for bad in ("", "null", "1", '"yes"'):
        assert "Not done: the value of signal" in world.post(run, action="signal-run", name="go", value=bad)
    page = world.client.get(f"/runs/{run.id}").text
    assert re.findall(r'<button name="value" value="(true|false)">', page) == ["true", "false"]
    assert run.status() == "running"
    assert "was sent" in world.post(run, action="signal-run", name="go", value="true")
    assert run.result(timeout=5) == EVIL
    text = world.client.get(f"/runs/{run.id}").text
    assert "Result" in text
    assert "Send a signal" not in text
    assert f"{whoami()}, by the dashboard" in text, "who sent it is shown"
    assert "Not done: " in world.post(run, action="signal-run", name="go", value="true")


def test_a_signal_is_asked_for_as_its_type_says(world: World) -> None:
    kinds: dict[str, Any] = {"colour": Literal["red", "blue"], "words": str, "many": list[int], "any": Any, "nothing": None}
    signals = [Signal(name, kind) for name, kind in kinds.items()]

    @world.app.workflow
    def asks() -> list[Any]:
        return [each.wait() for each in signals]

    run = asks.start()
    run_until_idle(world.app)
    page = world.client.get(f"/runs/{run.id}").text
    assert re.findall("<option>(&#34;.*?)</option>", page) == ["&#34;blue&#34;", "&#34;red&#34;"]
    assert 'placeholder="[1]"' in page
    for name, bad in (("colour", '"green"'), ("many", ""), ("many", '["x"]')):
        assert "Not done: " in world.post(run, action="signal-run", name=name, value=bad)
    for name, good in (("colour", '"red"'), ("words", "no quotes"), ("many", "[1]"), ("any", ""), ("nothing", "null")):
        assert "was sent" in world.post(run, action="signal-run", name=name, value=good)
    assert run.result(timeout=5) == ["red", "no quotes", [1], None, None]


def test_a_run_is_paused_resumed_cancelled_and_retried(world: World) -> None:
    run = world.start()
    assert "The run is paused" in world.post(run, action="pause-run")
    assert "paused" in world.client.get(f"/runs/{run.id}").text
    assert "The run goes on." in world.post(run, action="resume-run")
    assert "The run is cancelled." in world.post(run, action="cancel-run")
    assert run.status() == "cancelled"
    assert "Not done: " in world.post(run, action="pause-run")
    assert "goes on from its failed steps" in world.post(run, action="retry-run")
    assert run.status() == "running"
    assert "retried 1" in world.client.get(f"/runs/{run.id}").text
    assert "was sent" in world.post(run, action="signal-run", name="go", value="false")
    assert run.status() == "failed"
    text = world.client.get(f"/runs/{run.id}").text
    assert "Why it ended" in text
    assert "<script>" not in text


def test_the_list_is_searched_and_lets_go_of_nothing_that_ended(world: World) -> None:
    world.start("one", key="key-1", tags={"tenant": "acme"})
    ended = world.start("two", key="key-2")
    world.post(ended, action="cancel-run")
    # and the one for its buttons
    for query, found in (
        ("", 3),
        ("q=key-1", 1),
        ("q=tenant%3Dacme", 1),
        ("q=order", 3),
        ("status=cancelled", 1),
        ("status=cancelled&all=1", 1),
        ("all=1", 3),
        ("q=nothing", 0),
        ("q=" + "0" * 32, 0),
        ("q=%22%3E%3Cscript%3E", 0),
    ):
        text = world.client.get(f"/runs?{query}").text
        assert text.count('class="id" href="/runs/') == found, query
        assert "<script>" not in text


@pytest.mark.parametrize("run_id", ["c" * 32, "nonsense", "<script>"])
def test_a_run_that_is_not_there(world: World, run_id: str) -> None:
    answer = world.client.get(f"/runs/{run_id}")
    assert answer.status_code == 404
    assert "<script>" not in answer.text


def test_read_only_has_no_buttons_on_the_pages_of_runs(world: World) -> None:
    run = world.start()
    reader = TestClient(dashboard(world.app, read_only=True), base_url=HERE)
    for path in ("/runs", f"/runs/{run.id}"):
        assert 'method="post"' not in reader.get(path).text


def test_an_error_group_of_steps_lets_their_runs_go_on(world: World) -> None:
    runs = [world.start() for _ in range(2)]
    for run in runs:
        world.post(run, action="signal-run", name="go", value="false")
        assert run.status() == "failed"
    world.app.worker(max_time=0.5).run()  # its end writes the journal
    failed = next(step.task_id for step in runs[0].steps() if step.name == "last")
    page = world.client.get(f"/tasks/{failed}").text
    assert "redrive-task" not in page, "a step is run again by its run"
    (group,) = set(re.findall(r'name="target" value="([0-9a-f]{12})"', world.client.get("/errors").text))
    assert "2 runs go on from the failed steps" in world.post(runs[0], action="redrive-group", target=group)
    assert [run.steps()[-1].gen for run in runs] == [2, 2]


def test_what_waits_for_every_worker_is_not_said_to_have_no_handler(world: World) -> None:
    world.app.workflows[f"order {EVIL}"].start("x")
    assert "no live worker handles" in world.client.get("/queues").text, "there is no worker at all"
