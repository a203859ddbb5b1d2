"""Whether the process of a worker of this machine is gone: never said of one that lives."""

import os
import subprocess
import sys

import pytest
from msgspec.structs import replace

from buquet.records import Session
from buquet.worker import session as sessions
from buquet.worker.session import born, is_gone, is_same_host, place

pytestmark = pytest.mark.skipif(not place(), reason="this machine does not tell processes apart")


def session(pid, **fields):
    there = Session(
        id=f"{0:08}.{0:016}",
        host=os.uname().nodename,
        pid=pid,
        place=place(),
        born=max(born(pid), 0),
        started=1,
        beat=1,
        ttl=30,
        queues=("q",),
        concurrency=1,
    )
    return replace(there, **fields)


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()


def test_a_living_process_is_not_gone(child):
    there = session(child.pid)
    assert is_same_host(there)
    assert not is_gone(there)
    assert not is_same_host(session(os.getpid())), "this process itself"


def test_a_process_that_has_ended_is_gone_before_and_after_its_parent_took_note(child):
    there = session(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert born(child.pid) == -1
    assert is_gone(there)
    child.wait()
    assert is_gone(there)


def test_a_pid_that_was_used_again_is_another_process(child):
    assert is_gone(session(child.pid, born=born(child.pid) - 1))


@pytest.mark.parametrize("fields", [{"pid": 0}, {"born": 0}, {"pid": 1 << 60, "born": 1}])
def test_where_it_cannot_be_told_nobody_is_gone(child, fields):
    assert not is_gone(replace(session(child.pid), **fields))


def test_a_process_whose_start_cannot_be_read_is_not_gone(child, monkeypatch, tmp_path):
    there = session(child.pid)
    monkeypatch.setattr(sessions, "PROC", tmp_path)
    assert not is_gone(there)
    assert place() == ""
    assert not is_same_host(replace(there, place=""))


@pytest.mark.parametrize(
    "fields", [{"host": "elsewhere"}, {"place": ""}, {"place": "another boot"}, {"place": place().replace("pid:[", "pid:[1")}]
)
def test_another_machine_boot_or_container_is_no_neighbour(child, fields):
    assert not is_same_host(session(child.pid, **fields))
