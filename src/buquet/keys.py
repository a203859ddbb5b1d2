"""The only place where a key of the bucket is built or parsed."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple, cast
from urllib.parse import quote, unquote

from buquet.errors import UsageError

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
PRIORITIES = range(10)
LAST_MS = 10**13
"""Entries carry a time of 13 digits, which ends in 2286."""
MAX_NAME = 100
MOST_DIGITS = 19
"""A count in a key has fewer."""
MAX_RECORD = 4 << 20
"""A record, or a part of the journal, that is larger than this many bytes is not read: nothing of ours comes near it."""
LARGEST = 64 << 20
"""The most bytes of a value as JSON: of a task's arguments, a result, a checkpoint."""
MAX_VALUE = 96 << 20
"""Nor is a payload larger than this: 64 MiB of a value, and what encryption adds to it."""

_ID = re.compile(r"[0-9a-f]{32}")
_JOURNAL = re.compile(r"journal/[0-9]{4}-[0-9]{2}-[0-9]{2}/[0-9]{2}/([0-9]{13})-(.+)-([0-9]+)\.ndjson")
_WORKER = re.compile(r"[0-9a-f]{8}\.[0-9a-f]{16}")
_ENTRY = re.compile(r"(?:ready/([^/]+)/([0-9])|later/([^/]+))/([0-9]{13})-([0-9a-f]{32})\.([0-9]{1,18})~([^/]+)")


def most_bytes(key: str) -> int:
    """Return how many bytes an object under this key can have, if it is one of ours."""
    return MAX_VALUE if key.startswith(PAYLOADS) else MAX_RECORD


def quoted(name: str, what: str) -> str:
    """Percent-encode a queue's or task's name for use in a key.

    Raises UsageError when it is empty, no string, or longer than 100 bytes once encoded.
    """
    if not isinstance(cast("object", name), str):
        raise UsageError(f"the name of a {what} is a string, not {name!r}")
    text = (_kept if len(name) <= MAX_NAME else _encoded)(name)
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


_kept = lru_cache(1024)(_encoded)
"""The same few names are in every key; longer texts, which are no names, are not kept."""


def is_name(text: str) -> bool:
    """Tell whether keys can be built with this name of a queue or a task: in what was read it may be anything.

    >>> is_name("images"), is_name("x" * 101), is_name("")
    (True, False, False)
    """
    try:
        quoted(text, "queue")
    except UsageError:
        return False
    return True


def unquoted(text: str) -> str:
    """Return the name that was percent-encoded for a key."""
    return unquote(text)


def is_worker(text: str) -> bool:
    """Tell whether this can be a worker's id."""
    return _WORKER.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Tell whether this can be a task's or run's id: 32 hex digits."""
    return isinstance(cast("object", text), str) and _ID.fullmatch(text) is not None


def keyed_id(queue: str, name: str, key: str) -> str:
    """Return the id of the task that an idempotency key names."""
    parts = "\0".join((quoted(queue, "queue"), quoted(name, "task"), key))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def batch_token(queue: str, name: str, key: str) -> str:
    """Return the token of the batch that an idempotency key names; no task has it as its id."""
    parts = "\0".join((quoted(queue, "queue"), quoted(name, "task"), "batch", key))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def keyed_run(queue: str, workflow: str, key: str) -> str:
    """Return the id of the run that an idempotency key names."""
    parts = "\0".join((quoted(queue, "queue"), quoted(workflow, "workflow"), "run", key))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def pack_id(token: str, index: int) -> str:
    """Return the id of a batch's pack, so that the batch's token and the number of its packs name all of them."""
    return hashlib.sha256(f"{token}\0{index}".encode()).hexdigest()[:32]


def fire_id(schedule: str, fire: int) -> str:
    """Return the id of the task of a schedule's fire at `fire` (milliseconds since 1970); no keyed task has it as its id."""
    return hashlib.sha256(f"\0schedule\0{quoted(schedule, 'schedule')}\0{fire}".encode()).hexdigest()[:32]


def task(task_id: str) -> str:
    """Return the key of a task's record."""
    return f"tasks/{task_id[-2:]}/{task_id}.json"


def task_id_of(key: str) -> str | None:
    """Return the id whose record this key is, or None."""
    task_id = key[9:41]
    return task_id if is_id(task_id) and key == task(task_id) else None


def run(run_id: str) -> str:
    """Return the key of a run's record."""
    return f"runs/{run_id[-2:]}/{run_id}.json"


def run_id_of(key: str) -> str | None:
    """Return the id of the run whose record this key is, or None."""
    run_id = key[8:40]
    return run_id if is_id(run_id) and key == run(run_id) else None


def open_run(run_id: str, gen: int) -> str:
    """Return the key of the entry that says that a run is not over."""
    return f"open/{run_id}.{gen}"


def parse_open(key: str) -> tuple[str, int] | None:
    """Return the run and the generation that the entry of an open run is of, None where it is no such key.

    >>> parse_open(open_run("0" * 32, 2))
    ('00000000000000000000000000000000', 2)
    """
    run_id, dot, gen = key.removeprefix(OPEN).partition(".")
    if not (dot and is_id(run_id) and gen.isdecimal() and gen.isascii() and len(gen) < MOST_DIGITS) or key != open_run(
        run_id, int(gen)
    ):
        return None
    return run_id, int(gen)


def follow_up(run_id: str, kind: str, step: str, index: int, gen: int) -> str:
    """Return the id of a task that follows from a run's state: submitting it again changes nothing."""
    parts = "\0".join((run_id, kind, step, str(index), str(gen)))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def work(run_id: str, step: str, index: int, undone: int, digest: str, *, undoes: bool) -> str:
    """Return the key of a unit of work in a run, which is the same in each generation until the step is undone."""
    return follow_up(run_id, f"{'undo' if undoes else 'step'} key {digest}", step, index, undone)


class Entry(NamedTuple):
    """What an entry's key says."""

    key: str
    queue: str
    priority: int | None
    """None: an entry of `later/`."""
    at: int
    """Milliseconds since 1970: when it was written or, in `later/`, from when on the task may run."""
    task: str
    rev: int
    """The rev of the record version that names it."""
    name: str


def entry(queue: str, priority: int, at: int, due: int, task_id: str, rev: int, name: str) -> str:
    """Build an entry's key: in `later/` when `due` is not 0 and after `at`, else in `ready/`.

    Raises UsageError for a time that no entry can carry: a task under such a key would never be found.
    """
    if max(at, due) >= LAST_MS:
        msg = f"it is {max(at, due)} ms after 1970, in 2286 or later, and no task can be stored: set this machine's clock"
        raise UsageError(msg)
    tail = f"{task_id}.{rev}~{quoted(name, 'task')}"
    if due > at:
        return f"later/{quoted(queue, 'queue')}/{due:013d}-{tail}"
    return f"ready/{quoted(queue, 'queue')}/{priority}/{at:013d}-{tail}"


def parse_entry(key: str) -> Entry | None:
    """Read an entry's key; None when it is none."""
    found = _ENTRY.fullmatch(key)
    if found is None:
        return None
    ready, priority, later, at, task_id, rev, name = found.groups()
    return Entry(
        key, unquote(ready or later), None if priority is None else int(priority), int(at), task_id, int(rev), unquote(name)
    )


def is_own(found: Entry) -> bool:
    """Tell whether its parts give an entry's key again: no other key was written by buquet, nor can every store take it.

    >>> [is_own(parse_entry(f"ready/{queue}/5/1800000000000-{'0' * 32}.0~resize")) for queue in ("a%2Fb", "a b", "..")]
    [True, False, False]
    """
    at, due = (found.at, 0) if found.priority is not None else (-1, found.at)
    try:
        return found.key == entry(found.queue, found.priority or 0, at, due, found.task, found.rev, found.name)
    except UsageError:  # for a name that no queue or task has
        return False


def ready_lane(queue: str, priority: int) -> str:
    """Return the prefix of a queue's ready entries of one priority."""
    return f"ready/{quoted(queue, 'queue')}/{priority}/"


def ready_prefix(queue: str) -> str:
    """Return the prefix of all of a queue's ready entries."""
    return f"ready/{quoted(queue, 'queue')}/"


def later_lane(queue: str) -> str:
    """Return the prefix of a queue's entries that wait for their time."""
    return f"later/{quoted(queue, 'queue')}/"


def lanes(queue: str) -> tuple[str, ...]:
    """Return the lanes of a queue. Each is listed by itself: some stores lose keys where a LIST goes on in another folder."""
    return (*(ready_lane(queue, priority) for priority in PRIORITIES), later_lane(queue))


def lane_at(lane: str, at: int) -> str:
    """Return the key in a lane before which every entry is older than `at` milliseconds."""
    return f"{lane}{max(at, 0):013d}"


def bell(queue: str) -> str:
    """Return the key of a queue's doorbell."""
    return f"bell/{quoted(queue, 'queue')}"


def queue_settings(queue: str) -> str:
    """Return the key of a queue's settings."""
    return f"queues/{quoted(queue, 'queue')}.json"


def queue_of_settings(key: str) -> str:
    """Return the queue whose settings this key is."""
    return unquoted(key.removeprefix(QUEUES).removesuffix(".json"))


def schedule(name: str) -> str:
    """Return the key of a schedule's record."""
    return f"schedules/{quoted(name, 'schedule')}.json"


def schedule_of(key: str) -> str:
    """Return the schedule whose record this key is."""
    return unquoted(key.removeprefix(SCHEDULES).removesuffix(".json"))


def queues_hash(queues: tuple[str, ...]) -> str:
    """Return the `qq` of workers that serve this set of queues."""
    return hashlib.sha256("\0".join(sorted(queues)).encode()).hexdigest()[:8]


def session(worker: str) -> str:
    """Return the key of a worker's session. A worker's id is its `qq`, a dot and a random name."""
    return f"workers/{worker.partition('.')[0]}/{worker}.json"


def worker_of(key: str) -> str:
    """Return the worker whose session this key is."""
    return key.rpartition("/")[2].removesuffix(".json")


def session_of(key: str) -> str | None:
    """Return the worker whose session lies under this key; None for an object that is no session of buquet's.

    >>> session_of(session("0a1b2c3d.0011223344556677")), session_of("workers/.DS_Store")
    ('0a1b2c3d.0011223344556677', None)
    """
    worker = worker_of(key)
    return worker if is_worker(worker) and key == session(worker) else None


def notes(worker: str) -> str:
    """Return the key of the notes to a worker."""
    return f"notes/{worker}"


def control(worker: str) -> str:
    """Return the key of what operators ask of a worker."""
    return f"control/{worker}"


def payload(task_id: str, body: bytes) -> str:
    """Return the key under which a value of a task that is too large for the record is stored."""
    return f"payloads/{task_id}/{hashlib.sha256(body).hexdigest()}"


def payloads(task_id: str) -> str:
    """Return the prefix of a task's payload objects."""
    return f"payloads/{task_id}/"


def journal_hour(at: int) -> str:
    """Return the folder of the journal for the hour of `at` milliseconds since 1970, by UTC.

    >>> journal_hour(1_800_000_000_000)
    'journal/2027-01-15/08/'
    """
    return datetime.fromtimestamp(at / 1000, UTC).strftime("journal/%Y-%m-%d/%H/")


def journal(at: int, worker: str, number: int) -> str:
    """Return the key of the journal's object that a worker begins to write at `at`. Keys sort by time, whoever writes.

    >>> journal(1_800_000_000_000, "ab.cd", 3)
    'journal/2027-01-15/08/1800000000000-ab.cd-3.ndjson'
    """
    return f"{journal_hour(at)}{at:013d}-{worker}-{number}.ndjson"


def journal_at(key: str) -> int | None:
    """Return the time, milliseconds since 1970, in a key of the journal; None when it is none."""
    found = _JOURNAL.fullmatch(key)
    return int(found[1]) if found else None
