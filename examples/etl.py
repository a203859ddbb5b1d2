"""Extract, transform, load: reads the CSV, JSON and text files of Python and its packages into one SQLite table.

    python examples/etl.py

runs the workflow on a temporary store, with a worker in this process, and prints the results. In production, run these three
commands, each as often and on as many machines as you like:

    buquet worker etl:app
    buquet run start etl:app etl --args '[["/usr/lib/python3"], "files.db"]' --key 2026-01-31
    buquet run get RUN --watch
"""

import asyncio
import csv
import json
import sqlite3
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from buquet import App, each

app = App()


@dataclass
class Found:
    csv: list[str]
    json: list[str]
    text: list[str]


@dataclass
class File:
    path: str
    kind: str
    entries: int
    """Rows of a CSV file, values of a JSON file, words of a text."""
    commonest: str


@app.task
def find(folders: list[str], most: int) -> Found:
    """List the files of each kind, at most `most` of each."""
    csv, json, text = (
        sorted(str(path) for folder in folders for path in Path(folder).rglob(f"*.{end}"))[:most]
        for end in ("csv", "json", "txt")
    )
    return Found(csv, json, text)


@app.task
def read_csv(path: str) -> File:
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return File(path, "csv", len(rows), Counter(cell for row in rows for cell in row).most_common(1)[0][0][:40])


@app.task(max_attempts=1)  # a retry does not help if a file is not valid JSON
def read_json(path: str) -> File:
    values: dict[str, object] | list[object] = json.loads(Path(path).read_text(encoding="utf-8"))
    return File(path, "json", len(values), type(values).__name__)


@app.task
def read_text(path: str) -> File:
    words = Path(path).read_text(encoding="utf-8", errors="replace").split()
    return File(path, "text", len(words), Counter(words).most_common(1)[0][0][:40] if words else "")


@app.task
def clean(files: Sequence[File | None]) -> list[File]:
    """Drop unreadable and empty files."""
    return [file for file in files if file is not None and file.entries]


@app.task
def load(database: str, tables: list[File], values: list[File], texts: list[File]) -> int:
    """Write all rows in one transaction. A second run changes nothing, since a task may run twice."""
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE IF NOT EXISTS files (path PRIMARY KEY, kind, entries, commonest)")
        rows = [(file.path, file.kind, file.entries, file.commonest) for file in [*tables, *values, *texts]]
        db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
    return len(rows)


@app.workflow
def etl(folders: list[str], database: str, most: int = 200) -> int:
    found = find(folders, most)
    # the three kinds are read concurrently; an unreadable file is None in its list, and the others remain
    tables = clean.options(step="clean_csv")(each(read_csv.options(allow_failures=True), found.csv))
    values = clean.options(step="clean_json")(each(read_json.options(allow_failures=True), found.json))
    texts = clean.options(step="clean_text")(each(read_text.options(allow_failures=True), found.text, pack=20))
    return load(database, tables, values, texts)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        app.use(f"sqlite:{folder}/store.db")
        async with app:
            worker = app.worker()
            working = asyncio.create_task(worker.arun())
            places = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib")]
            run = await etl.astart(places, f"{folder}/files.db", key="today")
            print(f"{await run.aresult(timeout=120)} files were loaded")
            with sqlite3.connect(f"{folder}/files.db") as db:
                for row in db.execute("SELECT kind, count(*), sum(entries) FROM files GROUP BY kind"):
                    print("{}: {} files with {} entries".format(*row))
            for step in await run.asteps():
                for error in step.errors[:3]:
                    print(f"{step.name} left out item {error.index}: {error.type}")
            worker.stop()
            await working


if __name__ == "__main__":
    asyncio.run(main())
