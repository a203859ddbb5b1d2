"""Celery on Redis, results in Redis, a prefork worker of two processes."""

import common
from celery import Celery
from redis import Redis

app = Celery("celery_redis", broker=common.URL, backend=common.URL)


@app.task(name="noop")
def noop(sent: float) -> None:
    common.handled(sent)


def main() -> None:
    redis = Redis.from_url(common.URL)

    def submit(count: int) -> None:
        for _ in range(count):
            noop.delay(0.0)

    def finished() -> int:
        # Each result is one key. A few other keys are Celery's bookkeeping.
        return sum(1 for _ in redis.scan_iter("celery-task-meta-*", count=10_000)) if redis.llen("celery") == 0 else 0

    def workers():
        return [common.worker(common.tool("celery"), "-A", "celery_redis", "worker", "-c", "2", "--loglevel", "WARNING")]

    common.report(**common.measure(submit, workers, finished, noop.delay), versions=common.versions("celery", "redis"))


if __name__ == "__main__":
    main()
