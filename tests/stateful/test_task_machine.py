"""The moves in any order, against a model that counts by itself."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Raw
from msgspec.structs import replace

from buquet import keys
from buquet.errors import Refused
from buquet.queue import transitions
from buquet.records import ErrorInfo, Task

ID = "0193b0f2c4a07d3e9c5f1b2a3d4e5f60"
ERROR = ErrorInfo(type="ValueError", message="no luck")
FIRST = 1_800_000_000_000


class TaskMachine(RuleBasedStateMachine):
    """One task, two workers, a canceller, a reaper and an operator; every stored version gets the next rev, as in the bucket."""

    @initialize(attempts=st.integers(1, 3), losses=st.integers(1, 3), expires=st.sampled_from([0, 50]))
    def submit(self, attempts, losses, expires):
        self.now = FIRST
        self.limit_failures, self.limit_losses, self.expires = attempts, losses, expires
        self.state, self.failures, self.losses, self.cancel, self.fresh = "pending", 0, 0, False, True
        self.deadline = self.now + expires if expires else None
        self.token = ""
        self.tokens = 0
        self.ends = 0
        self.rev_of_entry = 0
        blank = Task(
            id=ID,
            queue="q",
            name="n",
            state="pending",
            created=self.now,
            max_attempts=attempts,
            max_losses=losses,
            expires_ms=expires,
        )
        self.task = transitions.submit(blank, self.now)

    # ------------------------------------------------------------------ how a move is tried

    def store(self, task):
        self.task = replace(task, rev=self.task.rev + 1)

    def attempt(self, move, *, allowed):
        """Store what a move makes; tell whether it was allowed, which must be as expected."""
        if allowed:
            self.store(move(self.task))
            return True
        with pytest.raises(Refused):
            move(self.task)
        return False

    def back(self):
        self.state, self.token = "pending", ""
        self.rev_of_entry = self.task.rev

    def end(self, state):
        self.state, self.token = state, ""
        self.ends += 1

    # ------------------------------------------------------------------ the rules

    @rule(step=st.integers(0, 60))
    def time_passes(self, step):
        self.now += step

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def claim(self, worker):
        token = self.new_token()
        if self.attempt(lambda task: transitions.claim(task, worker, token, self.now), allowed=self.state == "pending"):
            if self.cancel:
                self.end("cancelled")
            elif self.fresh and self.deadline is not None and self.now > self.deadline:
                self.end("expired")
            else:
                self.state, self.token, self.fresh = "running", token, False
                assert self.task.attempt == self.failures + 1

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def take_over(self, worker):
        token = self.new_token()
        taken = self.attempt(lambda task: transitions.take_over(task, worker, token, self.now), allowed=self.state == "running")
        if taken and not self.lost_for_good():
            self.losses += 1
            self.token = token

    @rule(right=st.booleans())
    def lose(self, right):
        if self.try_claimant(right, transitions.lose, self.now) and not self.lost_for_good():
            self.losses += 1
            self.back()

    @rule(right=st.booleans())
    def complete(self, right):
        if self.try_claimant(right, transitions.complete, Raw(b"1"), "", self.now):
            self.end("completed")

    @rule(right=st.booleans())
    def fail(self, right):
        if self.try_claimant(right, transitions.fail, ERROR, self.now):
            self.failures += 1
            self.end("failed")

    @rule(right=st.booleans(), wait=st.sampled_from([0, 30]))
    def retry(self, right, wait):
        if self.try_claimant(right, transitions.retry, ERROR, self.now + wait, self.now):
            if self.cancel:
                self.end("cancelled")
                return
            self.failures += 1
            if self.failures >= self.limit_failures:
                self.end("failed")
            else:
                self.back()

    @rule(right=st.booleans(), wait=st.sampled_from([0, 30]))
    def snooze(self, right, wait):
        if self.try_claimant(right, transitions.snooze, self.now + wait, self.now):
            self.end("cancelled") if self.cancel else self.back()

    @rule(right=st.booleans())
    def release(self, right):
        if self.try_claimant(right, transitions.release, self.now):
            self.end("cancelled") if self.cancel else self.back()

    @rule(right=st.booleans())
    def stop(self, right):
        if self.try_claimant(right, transitions.stop, self.now):
            self.end("cancelled")

    @rule(right=st.booleans())
    def checkpoint(self, right):
        self.try_claimant(right, transitions.checkpoint, Raw(b"1"), "")

    @rule()
    def ask_to_cancel(self):
        if self.attempt(lambda task: transitions.cancel(task, self.now), allowed=self.state in {"pending", "running"}):
            if self.state == "pending":
                self.end("cancelled")
            else:
                self.cancel = True

    @rule()
    def redrive(self):
        if self.attempt(
            lambda task: transitions.redrive(task, self.now), allowed=self.state in {"failed", "cancelled", "expired"}
        ):
            self.failures, self.losses, self.cancel, self.fresh, self.ends = 0, 0, False, True, 0
            self.deadline = self.now + self.expires if self.expires else None
            self.back()

    @precondition(lambda self: self.ends)
    @rule()
    def touch(self):
        self.store(transitions.touch(self.task))

    @precondition(lambda self: self.ends)
    @rule(again=st.booleans())
    def prune(self, again):
        if self.attempt(lambda task: transitions.prune(task, self.now), allowed=self.state != "pruned") and again:
            fresh = replace(self.task, state="pending", failures=0, losses=0, cancel_requested=False, started=0, attempt=0)
            self.store(transitions.revive(self.task, fresh, self.now))
            self.failures, self.losses, self.cancel, self.fresh, self.ends = 0, 0, False, True, 0
            self.deadline = self.now + self.expires if self.expires else None
            self.back()
        else:
            self.state = "pruned"

    # ------------------------------------------------------------------ helpers of the rules

    def new_token(self):
        self.tokens += 1
        return f"t{self.tokens}"

    def try_claimant(self, right, move, *args):
        """Try a claimant's move, under the claim or under an earlier one."""
        token = self.token if right and self.token else "t0"
        return self.attempt(lambda task: move(task, token, *args), allowed=self.state == "running" and token == self.token)

    def lost_for_good(self):
        if self.cancel:
            self.end("cancelled")
            return True
        if self.losses + 1 >= self.limit_losses:
            self.losses += 1
            self.end("failed")
            return True
        return False

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def record_and_model_agree(self):
        task = self.task
        assert (task.state, task.token) == (self.state, self.token)
        if self.state != "pruned":
            assert (task.failures, task.losses, task.cancel_requested) == (self.failures, self.losses, self.cancel)
            assert self.ends <= 1
        assert self.failures <= self.limit_failures
        assert self.losses <= self.limit_losses

    @invariant()
    def the_entry_is_of_the_rev_that_last_put_the_task_back(self):
        entry = keys.parse_entry(self.task.entry)
        assert (entry.rev, entry.task) == (self.rev_of_entry, ID)

    @invariant()
    def the_timeline_ends_with_what_the_record_says(self):
        assert len(self.task.events) <= transitions.KEPT_EVENTS
        assert self.task.events[-1].state == self.state


TestTask = TaskMachine.TestCase
TestTask.settings = settings(max_examples=100, stateful_step_count=30, derandomize=True, deadline=None, database=None)
