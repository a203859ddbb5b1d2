"""buquet, many items a task, on SQLite or on SeaweedFS: `task.batch(items, pack=100)`, one worker process."""

import asyncio
import sys
import time

import common

from buquet import App
from buquet.queue.background import new_loop

PACK = int(common.setting("pack", "100"))
app = App(common.URL)


@app.task
async def noop(item: int | float) -> int | float:  # noqa: PYI041 - an int is to stay one
    common.handled(item if isinstance(item, float) else 0.0)  # a probe's item is the time when it was sent
    return item


async def work(total: int) -> None:
    """Run the worker, and note when it has stored the outcomes of `total` tasks, by its own count."""
    worker = app.worker()
    running = asyncio.create_task(worker.arun())
    while not running.done() and (worker.keeper.completed < total or worker.running):  # noqa: ASYNC110 - a count has no event
        await asyncio.sleep(0.005)
    common.append(common.DONES, time.time())
    await running


def main() -> None:
    batches = []

    def submit(count: int) -> None:
        batches.append((count, noop.batch(range(count), pack=PACK)))

    objects = -(-common.TASKS // PACK) + -(-common.WARM // PACK)
    total = common.TASKS + common.WARM
    result = common.measure(
        submit,
        lambda: [common.worker(sys.executable, __file__, "work", str(objects))],
        lambda: total if common.DONES.exists() else 0,
        lambda sent: noop.batch([sent]),
    )
    for count, batch in batches:
        if list(batch.results()) != list(range(count)):
            raise RuntimeError("a batch's results are not its items")
    app.close()
    common.report(**result, versions=common.versions("buquet", "obstore"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        with asyncio.Runner(loop_factory=new_loop) as runner:  # the loop of `buquet worker`
            runner.run(work(int(sys.argv[2])))
    else:
        main()
