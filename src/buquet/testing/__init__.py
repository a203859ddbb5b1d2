"""Helpers for tests of code that uses buquet, and for tests of your own stores.

To test tasks and workflows, use `run_until_idle(app)`, `in_memory(app)`, or the pytest fixture `buquet_app`. To test a store,
subclass `contract.StoreContract`. buquet's own tests also use `faulty`, `virtual` and `auditor`.
"""

from buquet.testing.fixture import FakeAttempt, MemoryApp, aadvance, advance, arun_until_idle, in_memory, run_until_idle

__all__ = ["FakeAttempt", "MemoryApp", "aadvance", "advance", "arun_until_idle", "in_memory", "run_until_idle"]
