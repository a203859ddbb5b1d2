"""DBOS on PostgreSQL or SQLite: a queue of one-step workflows, enqueued by a client; one worker with DBOS's own settings."""

import sys
import threading

import common
import sqlalchemy as sa
from dbos import DBOS, DBOSClient

QUEUE = "bench"
URL = common.URL.replace("sqlite:", "sqlite:///", 1)


@DBOS.workflow(name="noop")
def noop(sent: float) -> None:
    common.handled(sent)


def launch() -> None:
    DBOS(config={"name": "bench", "system_database_url": URL, "log_level": "WARNING", "application_version": "1"})
    DBOS.launch()
    DBOS.register_queue(QUEUE)


def work() -> None:
    launch()
    threading.Event().wait()


def main() -> None:
    # A first launch in another process creates tables and queue, as in a deployment.
    launch()
    DBOS.destroy()
    client = DBOSClient(system_database_url=URL)
    engine = sa.create_engine(URL.replace("postgresql:", "postgresql+psycopg:", 1))
    table = "workflow_status" if URL.startswith("sqlite") else "dbos.workflow_status"
    # DBOS claims the whole backlog of a queue without a limit in one transaction, before the first start.
    first_claim = sa.text(f"SELECT min(started_at_epoch_ms) FROM {table}")  # noqa: S608 - our own constant
    count_done = sa.text(f"SELECT count(*) FROM {table} WHERE status = 'SUCCESS'")  # noqa: S608 - our own constant

    def one(sent: float) -> None:
        client.enqueue({"queue_name": QUEUE, "workflow_name": "noop", "app_version": "1"}, sent)

    def submit(count: int) -> None:
        for _ in range(count):
            one(0.0)

    def finished() -> int:
        with engine.connect() as db:
            return db.execute(count_done).scalar_one()

    def claimed() -> float:
        with engine.connect() as db:
            return db.execute(first_claim).scalar_one() / 1000

    workers = [(sys.executable, __file__, "work")]
    result = common.measure(submit, lambda: [common.worker(*w) for w in workers], finished, one, claimed=claimed)
    common.report(**result, versions=common.versions("dbos", "sqlalchemy"))


if __name__ == "__main__":
    work() if sys.argv[1:] == ["work"] else main()
