"""With keys, nothing of a run's arguments, constants and results can be read in the bucket; names and states can."""

import asyncio
import json

import pytest

from buquet import App, Fail, RunFailed, Signal, each, keys, sleep, when
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
SECRETS = ("argument-s3cret", "constant-s3cret", "result-s3cret", "signal-s3cret", "default-s3cret", "large-s3cret")


@pytest.mark.parametrize("only", [False, True])
def test_values_of_a_run_are_sealed_and_it_ends_as_a_plain_one_does(only):
    async def main(clock):
        store = MemoryStore(clock)
        app = App(store=store, clock=clock, encryption=KEY, encrypted_only=only)
        app.background = Background(clock.loop)
        note = Signal("note", str)

        @app.task
        async def make(argument: str, constant: str) -> dict[str, str]:
            assert (argument, constant) == ("argument-s3cret", "constant-s3cret")
            return {"text": "result-s3cret", "large": "large-s3cret" * 1000}

        @app.task
        async def item(n: int) -> str:
            return f"large-s3cret {n}" * 400

        @app.task
        async def join(made: dict[str, str], items: list[str], signalled: str, late: str) -> str:
            return " ".join([made["text"], str(sum(map(len, items))), signalled, late])

        @app.workflow
        def flow(argument: str) -> str:
            made = make(argument, "constant-s3cret")
            items = each(item, list(range(20)), pack=3)
            first = note.wait(after=[made])
            late = note.wait(timeout=5, default="default-s3cret", after=[first, sleep(1, after=[made])])
            return when(made.text == "result-s3cret", then=lambda: join(made, items, first, late))

        run = await flow.astart("argument-s3cret")
        await note.asend(run, "signal-s3cret")
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.create_task(worker.arun())
        result = await run.aresult(timeout=60)
        worker.stop()
        await working
        assert result == f"result-s3cret {sum(len(f'large-s3cret {n}') * 400 for n in range(20))} signal-s3cret default-s3cret"
        seen = b""
        for prefix in ("tasks/", "runs/", "payloads/", "ready/", "later/", "journal/", "workers/"):
            for listed in await store.list(prefix):
                seen += (await store.get(listed.key)).body
        assert b'"make"' in seen
        assert [secret for secret in SECRETS if secret.encode() in seen] == []

    run_virtual(main)


def an_app(store, clock, key=KEY):
    app = App(store=store, clock=clock, encryption=key)
    app.background = Background(clock.loop)

    @app.task
    async def echo(text: str) -> str:
        return text

    @app.task(max_attempts=1)
    async def jam(text: str) -> str:
        raise Fail(f"it is jammed by {text}")

    app.echo, app.jam = echo, jam
    return app


async def bodies(store, *prefixes):
    return b"".join([(await store.get(each.key)).body for prefix in prefixes for each in await store.list(prefix)])


@pytest.mark.parametrize("what", ["a step", "an item", "an expression", "the result", "an undo"])
def test_why_a_run_failed_is_sealed_and_told_to_those_with_the_key(what):
    async def main(clock):
        store = MemoryStore(clock)
        app = an_app(store, clock)

        @app.task(max_attempts=1)
        async def back(result: str | None) -> None:
            raise Fail("no way back from m-s3cret")

        @app.workflow
        def flow(text: str) -> str:
            if what == "a step":
                return app.jam(text)
            if what == "an item":
                return each(app.jam, [text, text])
            if what == "an undo":
                return app.jam.options(after=[app.echo.options(undo=back)(text)])(text)
            got = app.echo(text)
            return got.missing if what == "the result" else app.echo(got.missing)

        run = await flow.astart("m-s3cret")
        await app.worker(drain=True, heartbeat_thread=False).arun()
        with pytest.raises(RunFailed, match="m-s3cret"):
            await run.aresult(timeout=1)
        assert b"s3cret" not in await bodies(store, "tasks/", "runs/", "payloads/", "journal/")
        told = [each for step in await run.asteps() for each in (step.error, step.undo_error, *(e.message for e in step.errors))]
        assert what == "the result" or "m-s3cret" in " ".join(told)
        assert "no way back from m-s3cret" in " ".join(told) or what != "an undo"
        with pytest.raises(RunFailed, match=r"\(encrypted\)"):
            await an_app(store, clock, []).run(run.id).aresult(timeout=1)

    run_virtual(main)


def test_a_result_that_is_there_from_the_start_is_sealed():
    async def main(clock):
        store = MemoryStore(clock)
        app = an_app(store, clock)

        @app.workflow
        def flow(text: str) -> str:
            return text

        run = await flow.astart("m-s3cret")
        await app.worker(drain=True, heartbeat_thread=False).arun()
        assert await run.aresult(timeout=1) == "m-s3cret"
        assert b"s3cret" not in await bodies(store, "tasks/", "runs/", "payloads/")

    run_virtual(main)


@pytest.mark.parametrize("key", [KEY, ""])
def test_a_result_that_looks_like_an_encrypted_value_fails_the_run(key):
    async def main(clock):
        app = an_app(MemoryStore(clock), clock, key or [])

        @app.workflow
        def flow(text: str) -> dict[str, str]:
            return {"buquet.sealed": app.echo(text)}

        run = await flow.astart("x")
        await app.worker(drain=True, heartbeat_thread=False).arun()
        with pytest.raises(RunFailed, match="marks encrypted values"):
            await run.aresult(timeout=1)

    run_virtual(main)


@pytest.mark.parametrize("places", [("one", "two"), ("one", "said")])
def test_an_encrypted_value_that_is_moved_within_its_run_is_refused(places, caplog):
    async def main(clock):
        store = MemoryStore(clock)
        app = an_app(store, clock)
        go, say = Signal("go", str), Signal("say", str)

        @app.workflow
        def flow() -> str:
            one, two = app.echo.options(step="one")("1"), app.echo.options(step="two")("2")
            said = say.wait(step="said")
            return app.echo(when(go.wait(after=[one, two, said]) == "yes", then=lambda: [one, two, said]))

        run = await flow.astart()
        await say.asend(run, "3")
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(5)
        record = json.loads((await store.get(keys.run(run.id))).body)
        steps, (here, there) = record["steps"], places
        steps[here]["result"], steps[there]["result"] = steps[there]["result"], steps[here]["result"]
        await store.put(keys.run(run.id), json.dumps(record).encode())
        worker.stop()
        await working
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await go.asend(run, "yes")
        await clock.sleep(10)
        assert await run.astatus() == "running"
        worker.stop()
        await working

    run_virtual(main)
    assert "was changed, or belongs elsewhere" in caplog.text


def test_a_schedules_arguments_are_sealed_and_its_fires_have_them(caplog):
    async def main(clock):
        store = MemoryStore(clock)

        def app_with(key):
            app = an_app(store, clock, key)
            seen.clear()

            @app.task
            async def note(text: str) -> None:
                seen.append(text)

            @app.workflow
            def flow(text: str) -> str:
                return app.echo(f"{text} of a run")

            app.schedule("single", note, every=60, args=("m-s3cret",))
            app.schedule("run", flow, every=60, kwargs={"text": "m-s3cret"})
            return app

        seen = []
        app = app_with(KEY)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(150)
        assert set(seen) == {"m-s3cret"}
        runs = [each.key for each in await store.list("runs/")]
        (run,) = [json.loads((await store.get(key)).body)["id"] for key in runs[:1]]
        assert await app.run(run).aresult(timeout=1) == "m-s3cret of a run"
        assert b"s3cret" not in await bodies(store, "schedules/", "tasks/", "runs/", "payloads/")
        before = len(await store.list("tasks/"))
        worker.stop()
        await working
        # one that has no key cannot read what is declared, and says so; it must not fire with what it cannot read
        store_of_keyless = App(store=store, clock=clock, encryption=[])
        store_of_keyless.background = Background(clock.loop)
        store_of_keyless.schedule("single", store_of_keyless.task(name="note")(lambda text: None), every=60, args=("other",))
        worker = store_of_keyless.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(150)
        worker.stop()
        await working
        assert len(await store.list("tasks/")) == before

    run_virtual(main)
    assert "is encrypted under key" in caplog.text


def test_a_schedule_whose_arguments_are_plain_is_declared_anew_where_only_encrypted_values_are_taken():
    async def main(clock):
        store = MemoryStore(clock)
        seen = []

        def app_with(**options):
            app = App(store=store, clock=clock, **options)
            app.background = Background(clock.loop)

            @app.task
            async def note(text: str) -> None:
                seen.append(text)

            app.schedule("s", note, every=60, args=("mine",))
            return app

        plain = app_with(encryption=[])
        await plain.worker(heartbeat_thread=False, max_time=1).arun()
        key = keys.schedule("s")
        await store.put(key, (await store.get(key)).body.replace(b"mine", b"forged"))
        await app_with(encryption=KEY, encrypted_only=True).worker(heartbeat_thread=False, max_time=200).arun()
        assert set(seen) == {"mine"}
        assert b"mine" not in (await store.get(key)).body

    run_virtual(main)
