"""Map and reduce over 10,000 items: which words in the standard library's sources are anagrams of each other?

    python examples/mapreduce.py

runs the workflow on a temporary store, with a worker in this process. 20 tasks of 500 words each map the 10,000 words,
concurrently on any number of workers:

    buquet worker mapreduce:app --processes 4
    buquet run start mapreduce:app anagrams --args '["/usr/lib/python3", 10000]' --wait
"""

import asyncio
import re
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

from buquet import App, each

app = App()


@app.task
def words(folder: str, most: int) -> list[str]:
    """Return up to `most` different words of the sources in a folder."""
    found: dict[str, None] = {}
    for path in sorted(Path(folder).rglob("*.py")):
        found |= dict.fromkeys(re.findall(r"\b[a-z]{4,15}\b", path.read_text(encoding="utf-8", errors="replace")))
        if len(found) >= most:
            break
    return list(found)[:most]


@app.task
def letters(word: str) -> tuple[str, str]:
    """Map: return a word's letters in order, which are equal for all its anagrams."""
    return "".join(sorted(word)), word


@app.task
def largest(pairs: list[tuple[str, str]], most: int) -> list[list[str]]:
    """Reduce: return the largest groups of words with the same letters."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, word in pairs:
        groups[key].append(word)
    return sorted((sorted(group) for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))[:most]


@app.workflow
def anagrams(folder: str, count: int = 10_000) -> list[list[str]]:
    return largest(each(letters, words(folder, count), pack=500), 5)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        app.use(f"sqlite:{folder}/store.db")
        async with app:
            worker = app.worker()
            working = asyncio.create_task(worker.arun())
            run = await anagrams.astart(sysconfig.get_paths()["stdlib"])
            for group in await run.aresult(timeout=120):
                print(", ".join(group))
            for step in await run.asteps():
                print(f"{step.name}: {f'{step.total} items' if step.total else 'one task'}, {step.status}")
            worker.stop()
            await working


if __name__ == "__main__":
    asyncio.run(main())
