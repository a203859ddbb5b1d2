"""The only place where a key of the bucket is built or parsed."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import quote, unquote

from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUT = "buquet.json"
TASKS = "tasks/"
READY = "ready/"
LATER = "later/"
WORKERS = "workers/"
NOTES = "notes/"
CONTROL = "control/"
BELLS = "bell/"
RUNS = "runs/"
OPEN = "open/"
PAYLOADS = "payloads/"
JOURNAL = "journal/"
QUEUES = "queues/"
SCHEDULES = "schedules/"
TASK_FOLDERS = tuple(f"{TASKS}{folder:02x}/" for folder in range(256))
PRIORITIES = range(10)
LAST_MS = 10**13
"""Entries carry a time of 13 digits, which ends in 2286."""
MAX_NAME = 100
MOST_DIGITS = 19
"""A count in a key has fewer digits."""
MAX_RECORD = 4 << 20
"""The most bytes of a record, or of an object of the journal, that are read. buquet never writes as many."""
LARGEST = 64 << 20
"""The most bytes of a value as JSON: of a task's arguments, a result, a checkpoint."""
MAX_VALUE = 96 << 20
"""The most bytes of a payload that are read: a value of 64 MiB, and what encryption adds to it."""

_ID = re.compile(r"[0-9a-f]{32}")
_JOURNAL = re.compile(r"journal/[0-9]{4}-[0-9]{2}-[0-9]{2}/[0-9]{2}/([0-9]{13})-(.+)-([0-9]+)\.ndjson")
_PAYLOAD = re.compile(r"payloads/[0-9a-f]{32}/[0-9a-f]{64}(\.[0-9a-f]{1,18})?")
_WORKER = re.compile(r"[0-9a-f]{8}\.[0-9a-f]{16}")
_OPEN = re.compile(r"open/([0-9a-f]{32})\.([0-9]{1,18})")
_ENTRY = re.compile(r"(?:ready/([^/]+)/([0-9])|later/([^/]+))/([0-9]{13})-([0-9a-f]{32})\.([0-9]{1,18})~([^/]+)")


def most_bytes(key: str) -> int:
    """Return how many bytes of an object under this key are read at most."""
    return MAX_VALUE if key.startswith(PAYLOADS) else MAX_RECORD


# ---------------------------------------------------------------------- names


def quoted(name: str, what: str) -> str:
    """Percent-encode the name of a queue, task or the like for a key.

    Raises UsageError for a name that is empty, not a string, or longer than 100 bytes once encoded.
    """
    if not isinstance(cast("object", name), str):
        raise UsageError(f"the name of a {what} is a string, not {name!r}")
    text = (_cached if len(name) <= MAX_NAME else _encoded)(name)
    if not text or len(text) > MAX_NAME:
        msg = f"the name of a {what} must have 1 to {MAX_NAME} bytes (percent-encoded), and this has {len(text)}: {name[:120]!r}"
        raise UsageError(msg)
    return text


def _encoded(name: str) -> str:
    try:
        text = quote(name, safe="").replace("~", "%7E")
    except UnicodeEncodeError:
        return ""
    return text.replace(".", "%2E") if text in {".", ".."} else text


_cached = lru_cache(1024)(_encoded)
"""The same few names are in every key. Longer texts are not names, and are not cached."""


def is_name(text: str) -> bool:
    """Tell whether a queue or a task can have this name.

    >>> is_name("images"), is_name("x" * 101), is_name("")
    (True, False, False)
    """
    try:
        quoted(text, "queue")
    except UsageError:
        return False
    return True


# ---------------------------------------------------------------------- ids


def is_id(text: str) -> bool:
    """Tell whether this can be the id of a task or run: 32 hex digits."""
    return isinstance(cast("object", text), str) and _ID.fullmatch(text) is not None


def is_worker(text: str) -> bool:
    """Tell whether this can be a worker's id."""
    return _WORKER.fullmatch(text) is not None


def _hashed(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def keyed_id(queue: str, name: str, key: str) -> str:
    """Return the id of the task with this idempotency key."""
    return _hashed(quoted(queue, "queue"), quoted(name, "task"), key)


def batch_token(queue: str, name: str, key: str) -> str:
    """Return the token of the batch with this idempotency key. No task has it as its id."""
    return _hashed(quoted(queue, "queue"), quoted(name, "task"), "batch", key)


def keyed_run(queue: str, workflow: str, key: str) -> str:
    """Return the id of the run with this idempotency key."""
    return _hashed(quoted(queue, "queue"), quoted(workflow, "workflow"), "run", key)


def pack_id(token: str, index: int) -> str:
    """Return the id of a batch's pack, from the batch's token and the pack's index."""
    return _hashed(token, str(index))


def fire_id(schedule: str, fire: int) -> str:
    """Return the id of the task of a schedule's fire at `fire` (milliseconds since 1970). No keyed task has the same id."""
    return _hashed("", "schedule", quoted(schedule, "schedule"), str(fire))


def run_task_id(run_id: str, kind: str, step: str, index: int, gen: int) -> str:
    """Return the id of a run task, so that a second submit of it changes nothing."""
    return _hashed(run_id, kind, step, str(index), str(gen))


def work(run_id: str, step: str, index: int, undone: int, digest: str, *, undoes: bool) -> str:
    """Return the key of a unit of work in a run. It is the same in each generation until the step is undone."""
    return run_task_id(run_id, f"{'undo' if undoes else 'step'} key {digest}", step, index, undone)


def queues_hash(queues: tuple[str, ...]) -> str:
    """Return the first part of the ids of workers that serve this set of queues."""
    return hashlib.sha256("\0".join(sorted(queues)).encode()).hexdigest()[:8]


def queues_hash_of(worker: str) -> str:
    """Return the first part of a worker's id. Workers that serve the same queues share it."""
    return worker.partition(".")[0]


# ---------------------------------------------------------------------- records


def task(task_id: str) -> str:
    """Return the key of a task's record."""
    return f"tasks/{task_id[-2:]}/{task_id}.json"


def task_id_of(key: str) -> str | None:
    """Return the id of the task whose record has this key; None for any other key."""
    task_id = key[9:41]
    return task_id if is_id(task_id) and key == task(task_id) else None


def run(run_id: str) -> str:
    """Return the key of a run's record."""
    return f"runs/{run_id[-2:]}/{run_id}.json"


def run_id_of(key: str) -> str | None:
    """Return the id of the run whose record has this key; None for any other key."""
    run_id = key[8:40]
    return run_id if is_id(run_id) and key == run(run_id) else None


def schedule(name: str) -> str:
    """Return the key of a schedule's record."""
    return f"schedules/{quoted(name, 'schedule')}.json"


def schedule_of(key: str) -> str:
    """Return the name of the schedule whose record has this key."""
    return unquote(key.removeprefix(SCHEDULES).removesuffix(".json"))


def queue_settings(queue: str) -> str:
    """Return the key of a queue's settings."""
    return f"queues/{quoted(queue, 'queue')}.json"


def queue_of_settings(key: str) -> str:
    """Return the queue whose settings have this key."""
    return unquote(key.removeprefix(QUEUES).removesuffix(".json"))


def bell(queue: str) -> str:
    """Return the key of a queue's bell."""
    return f"bell/{quoted(queue, 'queue')}"


def queue_of_bell(key: str) -> str:
    """Return the queue whose bell has this key."""
    return unquote(key.removeprefix(BELLS))


def session(worker: str) -> str:
    """Return the key of a worker's session. A worker's id is the hash of its queues, a dot and a random name."""
    return f"workers/{queues_hash_of(worker)}/{worker}.json"


def session_of(key: str) -> str | None:
    """Return the id of the worker whose session has this key; None for any other key.

    >>> session_of(session("0a1b2c3d.0011223344556677")), session_of("workers/.DS_Store")
    ('0a1b2c3d.0011223344556677', None)
    """
    worker = key.rpartition("/")[2].removesuffix(".json")
    return worker if is_worker(worker) and key == session(worker) else None


def notes(worker: str) -> str:
    """Return the key of the notes to a worker."""
    return f"notes/{worker}"


def control(worker: str) -> str:
    """Return the key of operators' requests to a worker."""
    return f"control/{worker}"


# ---------------------------------------------------------------------- entries


class Entry(NamedTuple):
    """The parts of an entry's key."""

    key: str
    queue: str
    priority: int | None
    """None: an entry of `later/`."""
    at: int
    """Milliseconds since 1970: when it was written or, in `later/`, when the task is due."""
    task: str
    rev: int
    """The rev of the record version that names the entry."""
    name: str


def entry(queue: str, priority: int, at: int, due: int, task_id: str, rev: int, name: str) -> str:
    """Return an entry's key: in `later/` if `due` is after `at`, else in `ready/`.

    Raises UsageError for a time that no entry can carry: nobody would find the task.
    """
    if max(at, due) >= LAST_MS:
        msg = f"it is {max(at, due)} ms after 1970, in 2286 or later, and no task can be stored: set this machine's clock"
        raise UsageError(msg)
    tail = f"{task_id}.{rev}~{quoted(name, 'task')}"
    if due > at:
        return f"later/{quoted(queue, 'queue')}/{due:013d}-{tail}"
    return f"ready/{quoted(queue, 'queue')}/{priority}/{at:013d}-{tail}"


def parse_entry(key: str, *, own: bool = False) -> Entry | None:
    """Return the parts of an entry's key; None for any other key. `own`: None, too, for a key that buquet cannot have written.

    >>> [bool(parse_entry(f"ready/{queue}/5/{10**12}-{'0' * 32}.0~resize", own=True)) for queue in ("a%2Fb", "a b", "..")]
    [True, False, False]
    """
    match = _ENTRY.fullmatch(key)
    if match is None:
        return None
    ready, priority, later, at, task_id, rev, name = match.groups()
    queue = ready or later
    if own and not (_is_encoded(queue) and _is_encoded(name) and (rev[0] != "0" or rev == "0")):
        return None
    return Entry(key, unquote(queue), None if priority is None else int(priority), int(at), task_id, int(rev), unquote(name))


@lru_cache(1024)
def _is_encoded(text: str) -> bool:
    """Tell whether this is how `quoted` writes a name."""
    try:
        return quoted(unquote(text), "queue") == text
    except UsageError:
        return False


def ready_lane(queue: str, priority: int) -> str:
    """Return the prefix of a queue's ready entries of one priority."""
    return f"ready/{quoted(queue, 'queue')}/{priority}/"


def ready_prefix(queue: str) -> str:
    """Return the prefix of all of a queue's ready entries."""
    return f"ready/{quoted(queue, 'queue')}/"


def later_lane(queue: str) -> str:
    """Return the prefix of a queue's delayed entries."""
    return f"later/{quoted(queue, 'queue')}/"


def lanes(queue: str) -> tuple[str, ...]:
    """Return the lanes of a queue. Each needs a LIST of its own: some stores lose keys where a LIST spans two folders."""
    return (*(ready_lane(queue, priority) for priority in PRIORITIES), later_lane(queue))


def lane_at(lane: str, at: int) -> str:
    """Return the key in a lane that sorts after all entries from before `at` (milliseconds since 1970)."""
    return f"{lane}{max(at, 0):013d}"


def open_run(run_id: str, gen: int) -> str:
    """Return the key of the entry of a run that has not ended."""
    return f"open/{run_id}.{gen}"


def parse_open(key: str) -> tuple[str, int] | None:
    """Return the run and the generation of the entry of an open run; None for any other key.

    >>> parse_open(open_run("0" * 32, 2))
    ('00000000000000000000000000000000', 2)
    """
    match = _OPEN.fullmatch(key)
    if match is None or key != open_run(match[1], int(match[2])):
        return None
    return match[1], int(match[2])


# ---------------------------------------------------------------------- payloads and the journal


def payload(task_id: str, body: bytes) -> str:
    """Return the key of a value that is too large for the record of its task or run."""
    return f"payloads/{task_id}/{hashlib.sha256(body).hexdigest()}"


def payloads(task_id: str) -> str:
    """Return the prefix of the payloads of a task or run."""
    return f"payloads/{task_id}/"


def owner_of_payload(key: str) -> str | None:
    """Return the id of the task or run that a payload belongs to; None for any other key."""
    owner = key.removeprefix(PAYLOADS).partition("/")[0]
    return owner if is_id(owner) else None


def journal_hour(at: int) -> str:
    """Return the folder of the journal for the hour of `at` (milliseconds since 1970), by UTC.

    >>> journal_hour(1_800_000_000_000)
    'journal/2027-01-15/08/'
    """
    return datetime.fromtimestamp(at / 1000, UTC).strftime("journal/%Y-%m-%d/%H/")


def journal(at: int, worker: str, number: int) -> str:
    """Return the key of an object of the journal that a worker begins to write at `at`. Keys sort by time.

    >>> journal(1_800_000_000_000, "ab.cd", 3)
    'journal/2027-01-15/08/1800000000000-ab.cd-3.ndjson'
    """
    return f"{journal_hour(at)}{at:013d}-{worker}-{number}.ndjson"


def journal_at(key: str) -> int | None:
    """Return the time (milliseconds since 1970) in a key of the journal; None for any other key."""
    match = _JOURNAL.fullmatch(key)
    return int(match[1]) if match else None


# ---------------------------------------------------------------------- unknown objects


def _is_note(key: str) -> bool:
    name = key.partition("/")[2]
    return is_worker(name) or name.startswith("clock.")  # an object by which a reader learns the store's time


def _is_entry(key: str) -> bool:
    return parse_entry(key, own=True) is not None


def _is_named(key: str, name_of: Callable[[str], str], build: Callable[[str], str]) -> bool:
    name = name_of(key)
    return is_name(name) and key == build(name)


_OURS: dict[str, Callable[[str], object]] = {
    TASKS: lambda key: task_id_of(key) or "/doctor-" in key,  # doctor removes its own
    RUNS: run_id_of,
    PAYLOADS: _PAYLOAD.fullmatch,
    JOURNAL: _JOURNAL.fullmatch,
    WORKERS: session_of,
    NOTES: _is_note,
    CONTROL: _is_note,
    BELLS: lambda key: _is_named(key, queue_of_bell, bell),
    QUEUES: lambda key: _is_named(key, queue_of_settings, queue_settings),
    SCHEDULES: lambda key: _is_named(key, schedule_of, schedule),
    OPEN: parse_open,
    READY: _is_entry,
    LATER: _is_entry,
}


def is_unknown(key: str) -> bool:
    """Tell whether buquet cannot have written a key under one of its prefixes.

    >>> is_unknown("ready/default/.DS_Store"), is_unknown("bell/default")
    (True, False)
    """
    return not _OURS[key[: key.index("/") + 1]](key)
