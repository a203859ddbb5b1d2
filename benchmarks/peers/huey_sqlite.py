"""Huey on SQLite with fsync, one consumer of two threads."""

import common
from huey import SqliteHuey

huey = SqliteHuey(filename=common.URL.removeprefix("sqlite:"), fsync=True)


@huey.task()
def noop(sent: float) -> bool:
    common.handled(sent)
    return True  # huey stores no result for None


def main() -> None:
    from huey_sqlite import huey, noop  # Huey names a task by its module: that of the consumer, not __main__

    def submit(count: int) -> None:
        for _ in range(count):
            noop(0.0)

    def workers():
        return [common.worker(common.tool("huey_consumer"), "huey_sqlite.huey", "-w", "2", "-k", "thread", "-q")]

    common.report(**common.measure(submit, workers, huey.result_count, noop), versions=common.versions("huey"))


if __name__ == "__main__":
    main()
