"""Three-step workflows of DBOS on SQLite: run_dbos.py FILE SECONDS."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dbos import DBOS

SECONDS = float(sys.argv[2])
DBOS(config={"name": "bench", "system_database_url": f"sqlite:///{sys.argv[1]}", "log_level": "WARNING"})


@DBOS.step()
def one(n: int) -> int:
    return n + 1


@DBOS.step()
def two(n: int) -> int:
    return n * 2


@DBOS.step()
def three(n: int) -> int:
    return n - 1


@DBOS.workflow()
def flow(n: int) -> int:
    return three(two(one(n)))


def check(n: int) -> None:
    assert flow(n) == (n + 1) * 2 - 1


def rate(run_some) -> float:
    begun = time.perf_counter()
    done = 0
    while time.perf_counter() - begun < SECONDS:
        done += run_some(done)
    return done / (time.perf_counter() - begun)


def main() -> None:
    DBOS.launch()
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
    DBOS.destroy()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
