"""Keys are built and parsed in one place; whatever a queue or task is called, the way there and back is the same."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buquet import keys
from buquet.errors import UsageError

fixed = settings(derandomize=True, deadline=None, database=None)

ID = "0193b0f2c4a07d3e9c5f1b2a3d4e5f60"

# a character may take twelve bytes in a key, and a name has a hundred
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ids = st.text("0123456789abcdef", min_size=32, max_size=32)
moments = st.integers(0, 10**13 - 1)


@fixed
@given(queue=names, name=names, priority=st.integers(0, 9), at=moments, task=ids, rev=st.integers(0, 10**9))
def test_an_entry_of_ready_reads_back_as_it_was_written(queue, name, priority, at, task, rev):
    key = keys.entry(queue, priority, at, 0, task, rev, name)
    assert keys.parse_entry(key) == keys.Entry(key, queue, priority, at, task, rev, name)
    assert key.startswith(keys.ready_lane(queue, priority))
    assert key.startswith(keys.ready_prefix(queue))


@fixed
@given(queue=names, name=names, at=st.integers(0, 10**12), wait=st.integers(1, 10**12), task=ids, rev=st.integers(0, 10**9))
def test_an_entry_of_later_reads_back_with_its_due_time(queue, name, at, wait, task, rev):
    key = keys.entry(queue, 5, at, at + wait, task, rev, name)
    assert keys.parse_entry(key) == keys.Entry(key, queue, None, at + wait, task, rev, name)
    assert key.startswith(keys.later_lane(queue))


@fixed
@given(queue=names, name=names)
def test_every_key_is_printable_ascii_of_plain_segments(queue, name):
    for key in (keys.entry(queue, 5, 1, 0, ID, 0, name), keys.entry(queue, 5, 1, 2, ID, 0, name), keys.bell(queue)):
        assert key.isascii()
        assert key.isprintable()
        assert " " not in key
        assert len(key) <= 1024
        assert not {"", ".", ".."} & set(key.split("/"))


@fixed
@given(one=names, other=names)
def test_two_names_never_share_a_key(one, other):
    if one != other:
        assert keys.quoted(one, "queue") != keys.quoted(other, "queue")
        assert not keys.ready_prefix(one).startswith(keys.ready_prefix(other))
        assert keys.keyed_id(one, "n", "k") != keys.keyed_id(other, "n", "k")


@fixed
@given(times=st.lists(moments, min_size=2, max_size=5))
def test_entries_of_a_lane_sort_by_time(times):
    written = [keys.entry("q", 5, at, 0, ID, 0, "n") for at in times]
    assert [keys.parse_entry(key).at for key in sorted(written)] == sorted(times)


@fixed
@given(at=moments, since=moments)
def test_a_cursor_stands_before_what_is_not_older(at, since):
    key = keys.entry("q", 5, at, 0, ID, 0, "n")
    assert (key > keys.lane_at(keys.ready_lane("q", 5), since)) == (at >= since)


def test_a_cursor_of_before_1970_is_the_very_start():
    assert keys.lane_at("ready/q/5/", -5) == "ready/q/5/0000000000000"


@pytest.mark.parametrize("name", ["", "x" * 101, "ü" * 17, "\ud800"])
def test_a_name_that_is_empty_too_long_or_no_text_is_refused(name):
    with pytest.raises(UsageError, match="1 to 100 bytes"):
        keys.quoted(name, "queue")


@pytest.mark.parametrize(
    ("name", "quoted"),
    [("a/b", "a%2Fb"), (".", "%2E"), ("..", "%2E%2E"), ("...", "..."), ("a~b", "a%7Eb"), ("%", "%25"), ("x" * 100, "x" * 100)],
)
def test_what_would_mean_something_in_a_key_is_encoded(name, quoted):
    assert keys.quoted(name, "task") == quoted


@pytest.mark.parametrize(
    "key",
    [
        "",
        "ready/q/5/",
        "tasks/60/" + ID + ".json",
        f"ready/q/10/1800000000000-{ID}.0~n",
        f"ready/q/5/180000000000-{ID}.0~n",
        f"ready/q/5/1800000000000-{ID[:-1]}.0~n",
        f"ready/q/5/1800000000000-{ID.upper()}.0~n",
        f"ready/q/5/1800000000000-{ID}.~n",
        f"ready/q/5/1800000000000-{ID}.-1~n",
        f"ready/q/5/1800000000000-{ID}.0~",
        f"ready/q/5/1800000000000-{ID}.0~n/x",
        f"later/q/5/1800000000000-{ID}.0~n",
        f"xready/q/5/1800000000000-{ID}.0~n",
    ],
)
def test_what_is_no_entry_is_told_so(key):
    assert keys.parse_entry(key) is None


def test_a_due_time_that_has_come_is_ready():
    assert keys.entry("q", 5, 1000, 1000, ID, 0, "n").startswith("ready/")
    assert keys.entry("q", 5, 1000, 1001, ID, 0, "n").startswith("later/")


@fixed
@given(task=ids)
def test_a_tasks_record_lies_under_its_last_two_digits(task):
    assert keys.task(task) == f"tasks/{task[-2:]}/{task}.json"
    assert keys.task_id_of(keys.task(task)) == task


@pytest.mark.parametrize(
    "key", [f"tasks/61/{ID}.json", f"tasks/60/{ID}", f"tasks/60/{ID}.json.bak", f"runs/60/{ID}.json", "tasks/60/"]
)
def test_a_key_that_is_no_record_names_no_task(key):
    assert keys.task_id_of(key) is None


@pytest.mark.parametrize("text", ["", ID[:-1], ID + "0", ID.upper(), ID[:-1] + "g", ID + "\n", "../../buquet.json"])
def test_what_is_no_id_is_told_so(text):
    assert not keys.is_id(text)
    assert keys.is_id(ID)


def test_a_key_is_one_task_within_its_queue_and_name():
    same = keys.keyed_id("q", "n", "k")
    assert same == keys.keyed_id("q", "n", "k")
    assert keys.is_id(same)
    assert len({same, keys.keyed_id("q2", "n", "k"), keys.keyed_id("q", "n2", "k"), keys.keyed_id("q", "n", "k2")}) == 4
    # the parts are told apart wherever the borders are
    assert keys.keyed_id("a", "b", "c") != keys.keyed_id("a", "bc", "")
    assert keys.keyed_id("q", "n", "a\0b") != keys.keyed_id("q", "n\0a", "b")


def test_a_session_is_named_after_the_set_of_its_queues():
    assert keys.queues_hash(("a", "b")) == keys.queues_hash(("b", "a"))
    assert keys.queues_hash(("a", "b")) != keys.queues_hash(("ab",))
    worker = f"{keys.queues_hash(('q',))}.0123456789abcdef"
    assert keys.session_of(keys.session(worker)) == worker
    assert set(keys.queues_hash(("q",))) <= set(string.hexdigits)


def test_a_payload_is_named_after_its_content():
    assert keys.payload(ID, b"1") != keys.payload(ID, b"2")
    assert keys.payload(ID, b"1") == keys.payload(ID, b"1")
    assert keys.payload(ID, b"1").startswith(keys.payloads(ID))


@pytest.mark.parametrize(("at", "due"), [(10**13, 0), (0, 10**13)])
def test_an_entry_that_nobody_could_read_again_is_refused(at, due):
    with pytest.raises(UsageError, match="set this machine's clock"):
        keys.entry("q", 5, at, due, "ab" * 16, 0, "n")
