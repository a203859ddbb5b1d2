"""The pure moves: which state allows which, what each spends, and what each leaves alone."""

import pytest
from msgspec import Raw
from msgspec.structs import asdict, replace

from buquet import keys
from buquet.errors import Refused
from buquet.queue import transitions
from buquet.records import ABSENT, ENDED, STATES, TERMINAL, ErrorInfo, Task

NOW = 1_800_000_000_000
ID = "0193b0f2c4a07d3e9c5f1b2a3d4e5f60"
ERROR = ErrorInfo(type="ValueError", message="no luck", traceback="Traceback ...")


def make(state="pending", **changes) -> Task:
    """Return a task as the bucket may hold it."""
    token = "t1" if state == "running" else ""
    worker = "w1" if state in {"running", *ENDED} else ""
    task = Task(id=ID, queue="q", name="resize", state=state, created=NOW, rev=7, worker=worker, token=token)
    entry = keys.entry("q", 5, NOW, 0, ID, 7, "resize")
    return replace(task, entry=entry, attempt=1 if worker else 0, started=NOW if worker else 0, **changes)


MOVES = {
    "claim": lambda task: transitions.claim(task, "w2", "t2", NOW + 5),
    "take_over": lambda task: transitions.take_over(task, "w2", "t2", NOW + 5),
    "lose": lambda task: transitions.lose(task, "t1", NOW + 5),
    "complete": lambda task: transitions.complete(task, "t1", Raw(b"8"), "", NOW + 5),
    "fail": lambda task: transitions.fail(task, "t1", ERROR, NOW + 5),
    "retry": lambda task: transitions.retry(task, "t1", ERROR, NOW + 1005, NOW + 5),
    "snooze": lambda task: transitions.snooze(task, "t1", NOW + 1005, NOW + 5),
    "release": lambda task: transitions.release(task, "t1", NOW + 5),
    "stop": lambda task: transitions.stop(task, "t1", NOW + 5),
    "checkpoint": lambda task: transitions.checkpoint(task, "t1", Raw(b"1"), ""),
    "cancel": lambda task: transitions.cancel(task, NOW + 5),
    "redrive": lambda task: transitions.redrive(task, NOW + 5),
    "prune": lambda task: transitions.prune(task, NOW + 5),
    "touch": transitions.touch,
    "revive": lambda task: transitions.revive(task, make(), NOW + 5),
}

ALLOWED = {
    ("claim", "pending"): "running",
    ("take_over", "running"): "running",
    ("lose", "running"): "pending",
    ("complete", "running"): "completed",
    ("fail", "running"): "failed",
    ("retry", "running"): "pending",
    ("snooze", "running"): "pending",
    ("release", "running"): "pending",
    ("stop", "running"): "cancelled",
    ("checkpoint", "running"): "running",
    ("cancel", "pending"): "cancelled",
    ("cancel", "running"): "running",
    ("redrive", "failed"): "pending",
    ("redrive", "cancelled"): "pending",
    ("redrive", "expired"): "pending",
    **{("prune", state): "pruned" for state in ("completed", "failed", "cancelled", "expired")},
    **{("touch", state): state for state in ("completed", "failed", "cancelled", "expired", "pruned", "tombstone")},
    ("revive", "tombstone"): "pending",
    ("revive", "pruned"): "pending",
}
CLAIMANTS = ("lose", "complete", "fail", "retry", "snooze", "release", "stop", "checkpoint")
PUT_BACK = ("lose", "retry", "snooze", "release")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("move", MOVES)
def test_every_move_from_every_state(move, state):
    task = make(state)
    before = asdict(task)
    if (move, state) in ALLOWED:
        assert MOVES[move](task).state == ALLOWED[move, state]
    else:
        with pytest.raises(Refused, match=state):
            MOVES[move](task)
    assert asdict(task) == before


def test_the_words_for_states_agree():
    assert ENDED < TERMINAL < set(STATES)
    assert set(STATES) - TERMINAL == {"pending", "running"}
    assert {"pruned", "tombstone"} == TERMINAL - ENDED


@pytest.mark.parametrize("move", CLAIMANTS)
@pytest.mark.parametrize("cancel_requested", [False, True])
def test_a_claimant_under_another_token_is_refused(move, cancel_requested):
    """The same worker's next claim of the same task is another claim."""
    task = make("running", cancel_requested=cancel_requested)
    with pytest.raises(Refused, match="under another claim, of w1"):
        MOVES[move](replace(task, token="t0"))


@pytest.mark.parametrize("move", CLAIMANTS)
def test_an_empty_token_is_no_claim_of_a_pending_task(move):
    with pytest.raises(Refused):
        MOVES[move](make("pending", token="t1"))


# ---------------------------------------------------------------------- submit


def test_submit_names_the_entry_of_rev_0_and_sets_the_deadline():
    blank = Task(id=ID, queue="q", name="resize", state="pending", created=NOW, priority=2, expires_ms=500)
    task = transitions.submit(blank, NOW)
    assert keys.parse_entry(task.entry) == keys.Entry(task.entry, "q", 2, NOW, ID, 0, "resize")
    assert (task.due, task.deadline) == (0, NOW + 500)
    assert [event.why for event in task.events] == ["submitted"]


def test_submit_for_later_lies_in_later_and_for_the_past_in_ready():
    blank = Task(id=ID, queue="q", name="resize", state="pending", created=NOW)
    later = transitions.submit(replace(blank, due=NOW + 60_000), NOW)
    assert (later.due, keys.parse_entry(later.entry).priority, keys.parse_entry(later.entry).at) == (
        NOW + 60_000,
        None,
        NOW + 60_000,
    )
    past = transitions.submit(replace(blank, due=NOW - 60_000), NOW)
    assert (past.due, keys.parse_entry(past.entry).priority) == (0, 5)


def test_revive_is_a_fresh_task_under_an_entry_of_the_stubs_next_rev():
    fresh = make(args=Raw(b'{"n":2}'), rev=0)
    revived = transitions.revive(make("pruned", failures=3, losses=2, cancel_requested=True), fresh, NOW + 5)
    assert keys.parse_entry(revived.entry).rev == 8
    assert (revived.failures, revived.losses, revived.cancel_requested, bytes(revived.args)) == (0, 0, False, b'{"n":2}')


def test_bury_is_an_ended_record_without_a_claim():
    entry = keys.parse_entry(keys.entry("q", 5, NOW, 0, ID, 0, "resize"))
    stub = transitions.tombstone(entry.task, entry.queue, entry.name, NOW + 5)
    assert (stub.id, stub.queue, stub.name, stub.state, stub.token) == (ID, "q", "resize", "tombstone", "")


# ---------------------------------------------------------------------- claim


def test_claim_is_under_worker_and_token_and_keeps_the_entry():
    pending = make("pending", failures=2, due=NOW)
    task = transitions.claim(pending, "w2", "t2", NOW + 5)
    assert (task.worker, task.token, task.attempt, task.due, task.started) == ("w2", "t2", 3, 0, NOW + 5)
    assert task.entry == pending.entry
    event = task.events[-1]
    assert (event.at, event.state, event.why, event.attempt, event.worker) == (NOW + 5, "running", "claimed", 3, "w2")


def test_claim_of_a_task_that_was_cancelled_meanwhile_ends_it():
    task = MOVES["claim"](make("pending", cancel_requested=True))
    assert (task.state, task.finished, task.token) == ("cancelled", NOW + 5, "")


@pytest.mark.parametrize(
    ("deadline", "started", "state"),
    [
        (0, 0, "running"),  # no deadline
        (NOW + 5, 0, "running"),  # at the deadline it is not yet past
        (NOW + 4, 0, "expired"),
        (NOW + 4, NOW, "running"),  # it bounds the first start only
    ],
)
def test_the_deadline_bounds_the_first_start_only(deadline, started, state):
    task = MOVES["claim"](replace(make("pending", deadline=deadline), started=started))
    assert task.state == state
    if started:
        assert task.started == started


def test_cancelled_wins_over_expired():
    task = MOVES["claim"](make("pending", deadline=NOW, cancel_requested=True))
    assert task.state == "cancelled"


# ---------------------------------------------------------------------- what each move spends


@pytest.mark.parametrize(
    ("move", "failures", "losses"),
    [
        ("lose", 1, 2),
        ("take_over", 1, 2),
        ("retry", 2, 1),
        ("fail", 2, 1),
        ("snooze", 1, 1),
        ("release", 1, 1),
        ("complete", 1, 1),
        ("stop", 1, 1),
        ("checkpoint", 1, 1),
        ("cancel", 1, 1),
    ],
)
def test_a_failure_spends_an_attempt_a_lost_worker_a_loss_and_the_rest_nothing(move, failures, losses):
    task = MOVES[move](make("running", failures=1, losses=1, max_attempts=9))
    assert (task.failures, task.losses) == (failures, losses)


def test_the_attempt_number_grows_with_failures_only():
    task = make("pending")
    for move, attempt in [("snooze", 1), ("release", 1), ("lose", 1), ("retry", 2), ("snooze", 2), ("retry", 3)]:
        task = transitions.claim(task, "w1", "t1", NOW)
        assert task.attempt == (task.failures + 1)
        task = MOVES[move](replace(task, max_attempts=9))
        assert task.failures + 1 == attempt


@pytest.mark.parametrize(("failures", "state"), [(0, "pending"), (1, "pending"), (2, "failed"), (5, "failed")])
def test_retry_out_of_attempts_fails(failures, state):
    task = MOVES["retry"](make("running", failures=failures, max_attempts=3))
    assert (task.state, task.failures, task.error) == (state, failures + 1, ERROR)


@pytest.mark.parametrize("move", ["lose", "take_over"])
@pytest.mark.parametrize(("losses", "ended"), [(0, False), (1, False), (2, True), (9, True)])
def test_the_last_loss_ends_the_task_as_failed_and_says_why(move, losses, ended):
    task = MOVES[move](make("running", losses=losses, max_losses=3))
    assert task.losses == losses + 1
    assert (task.state == "failed") == ended
    if ended:
        assert task.error.type == "WorkerLost"
        assert f"{losses + 1} workers" in task.error.message
        assert task.token == ""


def test_max_losses_1_runs_once_at_most_after_a_crash():
    assert MOVES["lose"](make("running", max_losses=1)).state == "failed"


# ---------------------------------------------------------------------- putting back


@pytest.mark.parametrize("move", [*PUT_BACK, "redrive"])
def test_what_puts_back_names_the_entry_of_the_next_rev_and_drops_the_claim(move):
    task = make("failed" if move == "redrive" else "running", priority=3)
    back = MOVES[move](task)
    entry = keys.parse_entry(back.entry)
    assert (entry.rev, entry.task, entry.name, entry.queue) == (task.rev + 1, ID, "resize", "q")
    assert back.entry != task.entry
    assert (back.worker, back.token) == ("", "")
    later = move in {"retry", "snooze"}
    assert (entry.priority, entry.at) == ((None, NOW + 1005) if later else (3, NOW + 5))
    assert back.due == (NOW + 1005 if later else 0)


@pytest.mark.parametrize("move", [name for name in MOVES if name not in {*PUT_BACK, "redrive", "revive"}])
def test_no_other_move_changes_the_entry(move):
    for state in STATES:
        if (move, state) in ALLOWED:
            task = make(state)
            assert MOVES[move](task).entry == task.entry


@pytest.mark.parametrize("move", ["retry", "snooze"])
def test_a_wait_of_nothing_is_ready_at_once(move):
    run = {
        "retry": lambda task: transitions.retry(task, "t1", ERROR, NOW, NOW),
        "snooze": lambda task: transitions.snooze(task, "t1", NOW, NOW),
    }
    back = run[move](make("running"))
    assert (back.due, keys.parse_entry(back.entry).priority) == (0, 5)


# ---------------------------------------------------------------------- cancelling


@pytest.mark.parametrize("move", ["retry", "snooze", "release", "lose", "take_over", "stop"])
def test_a_requested_cancel_ends_the_task_instead_of_another_attempt(move):
    task = make("running", cancel_requested=True, failures=1, losses=1)
    ended = MOVES[move](task)
    assert (ended.state, ended.finished, ended.token) == ("cancelled", NOW + 5, "")
    assert ended.entry == task.entry  # no entry is written for a task that ends
    assert (ended.failures, ended.losses) == (1, 1)


@pytest.mark.parametrize("move", ["lose", "take_over", "retry"])
def test_a_requested_cancel_comes_before_running_out(move):
    ended = MOVES[move](make("running", cancel_requested=True, failures=2, losses=9, max_attempts=3, max_losses=10))
    assert ended.state == "cancelled"


@pytest.mark.parametrize(("move", "state"), [("complete", "completed"), ("fail", "failed")])
def test_a_handler_that_finished_first_keeps_its_outcome(move, state):
    assert MOVES[move](make("running", cancel_requested=True)).state == state


def test_cancel_of_a_running_task_only_asks():
    task = make("running")
    asked = MOVES["cancel"](task)
    assert (asked.state, asked.cancel_requested, asked.token, asked.worker) == ("running", True, "t1", "w1")
    assert asked.finished == 0


# ---------------------------------------------------------------------- redrive, prune, touch, checkpoint, result


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_redrive_resets_everything_but_the_checkpoint(state):
    ended = make(
        state,
        failures=3,
        losses=2,
        finished=NOW,
        cancel_requested=True,
        error=ERROR,
        checkpoint=Raw(b"5"),
        args=Raw(b"{}"),
        expires_ms=500,
        deadline=NOW - 1,
        tags={"a": "b"},
    )
    task = transitions.redrive(ended, NOW + 5)
    assert (task.failures, task.losses, task.attempt, task.started, task.finished) == (0, 0, 0, 0, 0)
    assert (task.cancel_requested, task.error, task.deadline) == (False, None, NOW + 505)
    assert (bytes(task.checkpoint), bytes(task.args), task.tags) == (b"5", b"{}", {"a": "b"})
    assert transitions.claim(task, "w2", "t2", NOW + 500).state == "running"
    assert transitions.claim(task, "w2", "t2", NOW + 506).state == "expired"


def test_redrive_without_a_deadline_sets_none():
    assert MOVES["redrive"](make("failed")).deadline == 0


@pytest.mark.parametrize(
    ("state", "hint"), [("completed", "submit a new task"), ("pruned", "submit it anew"), ("running", "not ended")]
)
def test_a_refused_redrive_says_what_to_do(state, hint):
    with pytest.raises(Refused, match=hint):
        MOVES["redrive"](make(state))


def test_prune_leaves_no_values():
    ended = make(
        "completed",
        args=Raw(b"1"),
        args_at="a",
        result=Raw(b"2"),
        result_at="b",
        checkpoint=Raw(b"3"),
        checkpoint_at="c",
        error=ERROR,
        tags={"a": "b"},
        key="k",
    )
    stub = transitions.prune(ended, NOW + 5)
    assert (stub.args, stub.result, stub.checkpoint) == (ABSENT, ABSENT, ABSENT)
    assert (stub.args_at, stub.result_at, stub.checkpoint_at, stub.error, stub.tags) == ("", "", "", None, {})
    assert (stub.id, stub.key, stub.queue, stub.name) == (ended.id, "k", "q", "resize")
    assert [(event.why, event.detail) for event in stub.events] == [("pruned", "it was completed")]


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_touch_changes_nothing(state):
    assert transitions.touch(make(state)) == make(state)


def test_a_checkpoint_changes_nothing_else():
    task = make("running")
    kept = transitions.checkpoint(task, "t1", Raw(b"1"), "at")
    assert replace(kept, checkpoint=ABSENT, checkpoint_at="") == task


def test_a_completed_task_has_its_result_and_no_error_of_an_earlier_attempt():
    task = transitions.complete(make("running", error=ERROR, failures=1), "t1", Raw(b"8"), "", NOW + 5)
    assert (bytes(task.result), task.error, task.finished, task.failures) == (b"8", None, NOW + 5, 1)


# ---------------------------------------------------------------------- the timeline


def test_every_end_says_who_ran_it():
    for move in ("complete", "fail", "stop"):
        assert MOVES[move](make("running")).events[-1].worker == "w1"
    for move in PUT_BACK:
        assert MOVES[move](make("running")).events[-1].worker == "w1"


def test_the_timeline_is_bounded_and_keeps_its_beginning_and_its_end():
    task = transitions.submit(make(rev=0), NOW)
    for number in range(100):
        task = transitions.snooze(transitions.claim(task, "w1", "t1", NOW + number), "t1", 0, NOW + number)
        assert len(task.events) <= transitions.KEPT_EVENTS
        assert len(task.events) + task.dropped == 2 * (number + 1) + 1
    assert (task.events[0].why, task.events[-1].why, task.events[-1].at) == ("submitted", "snoozed", NOW + 99)
    assert [event.at for event in task.events[1:]] == sorted(event.at for event in task.events[1:])


def test_a_long_error_text_is_cut_in_the_timeline():
    task = transitions.fail(make("running"), "t1", ErrorInfo(type="E", message="x" * 5000), NOW)
    assert len(task.events[-1].detail) == 500
    assert len(task.error.message) == 5000
