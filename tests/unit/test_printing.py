"""What comes from the bucket reaches no terminal, log or page with anything in it that these would obey."""

import importlib
import json
import logging
import re
import sys
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from buquet import App
from buquet.cli import main as command
from buquet.cli import output
from buquet.cli.monitor import next_attempt
from buquet.dashboard.app import GET, dashboard
from buquet.insights.drawing.labels import plain
from buquet.insights.drawing.svg import legal
from buquet.insights.journal import ErrorGroup
from buquet.printing import indented, json_line, printable
from buquet.testing import run_until_idle
from buquet.worker.logs import JsonLines, TextLines

HOSTILE = "\x1b[31m\r\n2026-01-01 00:00:00,000 INFO    forged\x9b1m\x7f\u202egnp.exe\u2066\u2028\u200f"
NAME = "\x1b[31m\n\x9b\u202ex\u2028"
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def unsafe(text, but="\n"):
    return sorted({each for each in text if category(each) in UNSAFE and each not in but})


@given(st.text())
def test_what_is_printable_has_nothing_unsafe_and_says_all_that_was_there(text):
    assert unsafe(printable(text), but="\u200c\u200d") == []
    assert unsafe(indented(text), but="\n\u200c\u200d") == []
    assert all(line.startswith("    ") for line in indented(text).split("\n")[1:])
    assert unsafe(plain(text), but="\u200c\u200d") == []
    assert unsafe(legal(text), but="\t\n\r\u200c\u200d") == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_line_of_json_is_the_same_value_with_nothing_unsafe(text):
    line = json_line([text])
    assert json.loads(line) == [text]
    assert unsafe(line, but="\u200c\u200d") == []


def test_text_that_people_write_stays_as_it_is():
    for text in ("naïve 日本　語", "می‌خواهم", "👩‍🚀", "שלום"):
        assert printable(text) == text


def made(text, kind=TextLines, error=None):
    record = logging.LogRecord("x", logging.INFO, "f", 1, "said: %s", (text,), error and (type(error), error, None))
    record.task, record.step = "0" * 32, text
    return kind().format(record)


def test_a_task_forges_no_line_of_the_log_neither_by_its_text_nor_by_its_traceback():
    lines = made(HOSTILE, error=ValueError(HOSTILE)).split("\n")
    assert [line for line in lines if not line.startswith("    ")] == lines[:1]
    assert len(lines) >= 2
    assert unsafe("".join(lines)) == []


def test_a_line_of_the_log_as_json_has_nothing_unsafe():
    line = made(HOSTILE, JsonLines, ValueError(HOSTILE))
    assert unsafe(line, but="") == []
    assert json.loads(line)["message"] == f"said: {HOSTILE}"


TASKS = """
from buquet import App, current

app = App()


@app.task(name=f"bad{NAME}", max_attempts=1)
def bad(value: str) -> str:
    current().progress(0.5, value)
    raise RuntimeError(value)


@app.task(name=f"good{NAME}")
def good(value: str) -> str:
    return value


@app.task(name=f"later{NAME}", queue=f"queue{NAME}")
def later(value: str) -> None: ...


@app.workflow(name=f"flow{NAME}")
def flow(value: str) -> str:
    return bad(good(value))


app.schedule(f"nightly{NAME}", good, cron="0 2 * * *", args=("x",))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The folder of a store in which every text is hostile, beside the module of its App; the ids of its tasks and its run."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostiletasks.py").write_text(f"NAME = {NAME!r}\n{TASKS}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("BUQUET_URL", f"sqlite:{folder / 'store.db'}")
        tasks = importlib.import_module("hostiletasks")
        with tasks.app as app:
            options = {"key": HOSTILE, "tags": {NAME: HOSTILE[:40]}}
            ids = {
                "bad": tasks.bad.options(**options).submit(HOSTILE).id,
                "good": tasks.good.options(**options).submit(HOSTILE).id,
                "run": tasks.flow.options(key=HOSTILE).start(HOSTILE).id,
            }
            run_until_idle(app)
            tasks.later.options(delay=3600).submit(HOSTILE)
            app.pause_queue(tasks.later.queue)
        yield folder, ids


COMMANDS = (
    *("get {bad}", "get {good}", "history {bad}", "history {bad} --versions", "ls", "stats", "workers", "errors", "fsck"),
    *("run get {run}", "run ls", "run graph {run}", "run graph {run} -f mermaid", "run graph {run} -f svg", "schedule ls"),
    *("run get {run} --watch", "cancel {bad}", "redrive {good}", "doctor"),
)


def run(monkeypatch, capfd, store, arguments):
    """Run a command in the store's folder; return its status and all that it printed."""
    folder, _ = store
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["buquet", *arguments, "--url", f"sqlite:{folder / 'store.db'}"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    out, err = capfd.readouterr()
    return ended.value.code or 0, out + err


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("line", COMMANDS)
def test_no_command_prints_anything_unsafe(store, capfd, monkeypatch, line, as_json):
    _, said = run(monkeypatch, capfd, store, [*line.format(**store[1]).split(), *["--json"] * as_json])
    assert said
    assert unsafe(said) == []
    assert not re.search(r"^2026-01-01 00:00:00,000 INFO", said, re.MULTILINE)


@pytest.mark.parametrize(("name", "status"), [("bad", 1), ("good", 0)])
def test_a_submit_that_waits_prints_nothing_unsafe_of_what_became_of_the_task(store, capfd, monkeypatch, name, status):
    arguments = ["submit", "hostiletasks:app", f"{name}{NAME}", "--args", json.dumps([HOSTILE]), "--key", HOSTILE, "--wait"]
    ended, said = run(monkeypatch, capfd, store, arguments)
    assert ended == status
    assert "forged" in said
    assert unsafe(said) == []
    assert said.count("\n") == 2  # its id, and its end


def test_no_page_of_the_dashboard_shows_anything_unsafe(store):
    folder, ids = store
    with App(f"sqlite:{folder / 'store.db'}") as app:
        client = TestClient(dashboard(app), base_url="http://127.0.0.1:8000")
        pages = [path for path in GET if "{" not in path and path not in {"/events", "/login", "/run.css"}]
        pages += [f"/tasks/{ids['bad']}", f"/tasks/{ids['good']}", f"/tasks/{ids['bad']}/versions", f"/runs/{ids['run']}"]
        shown = isolated = 0
        for path in pages:
            # a form sends what it is about as it is; nobody sees that
            text = re.sub(r'<input type="hidden" name="target" value="[^"]*">', "", client.get(path).text)
            assert unsafe(text, but="\n\t") == [], path
            shown += "forged" in text
            # letters that are written from right to left turn nothing round that stands beside a name
            isolated += "<bdi>bad" in text
        assert shown >= 6
        assert isolated >= 4


def test_on_a_narrow_terminal_an_id_stays_whole_and_a_cut_text_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    times = ["2026-01-01 00:00:00.000 UTC"] * 3
    output.print_table(("id", "error", "", "", "", "example"), [("a" * 32, output.beginning("no " * 90), *times, "b" * 32)])
    shown = capsys.readouterr().out
    assert "a" * 32 in shown
    assert "b" * 32 in shown
    assert "…" in shown
    assert max(map(len, shown.splitlines()[1:])) <= 100, "the header has codes of its style"


def test_errors_names_no_next_attempt_that_has_passed():
    group = ErrorGroup(
        group="g",
        name="n",
        queue="q",
        type="E",
        message="m",
        count=0,
        first=1,
        last=1,
        example="x",
        attempt=1,
        max_attempts=2,
        due=1000,
    )
    assert next_attempt(group, 999).startswith("attempt 1 of 2, next 1970-01-01")
    assert next_attempt(group, 1000) == "attempt 1 of 2"
