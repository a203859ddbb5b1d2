"""Three-step workflows of buquet on SQLite: run_buquet.py FILE SECONDS."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from buquet import App

app = App(f"sqlite:{sys.argv[1]}")
SECONDS = float(sys.argv[2])


@app.task
def one(n: int) -> int:
    return n + 1


@app.task
def two(n: int) -> int:
    return n * 2


@app.task
def three(n: int) -> int:
    return n - 1


@app.workflow
def flow(n: int) -> int:
    return three(two(one(n)))


def check(n: int) -> None:
    assert flow.start(n).result(timeout=60) == (n + 1) * 2 - 1


def rate(run_some) -> float:
    begun = time.perf_counter()
    done = 0
    while time.perf_counter() - begun < SECONDS:
        done += run_some(done)
    return done / (time.perf_counter() - begun)


def main() -> None:
    worker = app.worker(concurrency=16)
    thread = threading.Thread(target=worker.run)
    thread.start()
    for n in range(10):
        check(n)

    def single(n: int) -> int:
        check(n)
        return 1

    with ThreadPoolExecutor(16) as pool:

        def sixteen(n: int) -> int:
            list(pool.map(check, range(n, n + 64)))
            return 64

        result = {"alone": rate(single), "side_by_side": rate(sixteen)}
    worker.stop()
    thread.join()
    app.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
