"""With keys, nothing of a run's arguments, constants and results can be read in the bucket; names and states can."""

from buquet import App, Signal, each, when
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
SECRETS = ("argument-s3cret", "constant-s3cret", "result-s3cret", "signal-s3cret", "default-s3cret", "large-s3cret")


def test_values_of_a_run_are_sealed_and_it_ends_as_a_plain_one_does():
    async def main(clock):
        store = MemoryStore(clock)
        app = App(store=store, clock=clock, encryption=KEY)
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
            late = note.wait(timeout=5, default="default-s3cret", after=[first])
            return when(made.text == "result-s3cret", then=lambda: join(made, items, first, late))

        run = await flow.astart("argument-s3cret")
        await note.asend(run, "signal-s3cret")
        await app.worker(drain=True, heartbeat_thread=False).arun()
        result = await run.aresult()
        assert result == f"result-s3cret {sum(len(f'large-s3cret {n}') * 400 for n in range(20))} signal-s3cret default-s3cret"
        seen = b""
        for prefix in ("tasks/", "runs/", "payloads/", "ready/", "later/", "journal/", "workers/"):
            for listed in await store.list(prefix):
                seen += (await store.get(listed.key)).body
        assert b'"make"' in seen
        assert [secret for secret in SECRETS if secret.encode() in seen] == []

    run_virtual(main)
