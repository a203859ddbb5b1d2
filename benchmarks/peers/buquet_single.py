"""buquet, one task an item, on SQLite or on SeaweedFS: `submit_many`, one worker process with the default concurrency."""

import asyncio
import sys
import time

import common
import idle

from buquet import App
from buquet.queue.background import new_loop

app = App(common.URL)


@app.task
async def noop(sent: float) -> None:
    common.handled(sent)


async def work(total: int) -> None:
    """Run the worker, and note when it has stored `total` outcomes, by its own count: reading the store would be counted, too."""
    worker = app.worker()
    running = asyncio.create_task(worker.arun())
    while not running.done() and (worker.keeper.completed < total or worker.running):  # noqa: ASYNC110 - a count has no event
        await asyncio.sleep(0.005)
    common.append(common.DONES, time.time())
    await running


def main() -> None:
    handles = []

    def submit(count: int) -> None:
        handles.extend(noop.submit_many((0.0,) for _ in range(count)))

    total = common.TASKS + common.WARM
    result = common.measure(
        submit,
        lambda: [common.worker(sys.executable, __file__, "work", str(total))],
        lambda: total if common.DONES.exists() else 0,
        noop.submit,
    )
    for handle in (*handles[:5], *handles[-5:]):
        handle.result(timeout=10)  # raises unless the outcome is right
    app.close()
    result["idle_hour"] = idle.requests_an_hour(lambda: common.worker(sys.executable, __file__, "work", "0", name="worker-idle"))
    common.report(**result, versions=common.versions("buquet", "obstore"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        with asyncio.Runner(loop_factory=new_loop) as runner:  # the loop of `buquet worker`
            runner.run(work(int(sys.argv[2])))
    else:
        main()
