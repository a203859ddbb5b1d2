"""The task of test_batch_processes.py, for its worker processes. Each execution leaves a line in a file at its end."""

import os
import time

from buquet import App, Fail

app = App()


@app.task(queue="packs", max_attempts=1)
def work(n: int) -> int:
    time.sleep(0.02)
    with open(os.environ["SIDE_FILE"], "a") as side:  # noqa: PTH123
        side.write(f"{n}\n")
    if n % 50 == 7:
        raise Fail(f"not {n}")
    return n
