"""For tests: of code that uses buquet, and of stores of one's own.

`run_until_idle(app)` and `in_memory(app)` are for the first, as is the fixture `buquet_app`, which pytest finds by itself;
`contract.StoreContract` is for the second. `faulty`, `virtual` and `auditor` are what buquet's own tests stand on.
"""

from buquet.testing.attempt import FakeAttempt
from buquet.testing.fixture import MemoryApp, aadvance, advance, arun_until_idle, in_memory, run_until_idle

__all__ = ["FakeAttempt", "MemoryApp", "aadvance", "advance", "arun_until_idle", "in_memory", "run_until_idle"]
