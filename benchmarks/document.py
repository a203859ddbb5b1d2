"""Rewrite the measured parts of docs/performance.md: `python benchmarks/document.py results.json`.

Each part is between two comments that name it. All other text stays as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import costs
import reached
from harness import table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
UNITS = {"_mb": " MB", "_per_s": " a second"}
"""Units by the ends of names."""


def parts(whole: dict[str, Any], file: str) -> dict[str, str]:
    """Return the text of each part."""
    machine = whole["machine"]
    ground = (
        f"Measured on {machine['date']} on {machine['cores']} cores ({machine['cpu']}, {machine['memory_gib']} GiB), "
        f"{machine['system']}, Python {machine['python']}; the load before was {machine['load_before']}."
    )
    others = sorted({result["date"] for result in whole["results"]} - {machine["date"]})
    if others:
        ground += f" Some entries are of other runs ({', '.join(others)}): compare none of theirs with the rest."
    failed = [f"- {name} failed: {each['why']}" for name, each in whole.get("failed", {}).items()]
    return {
        "table": "\n\n".join(filter(None, [table.markdown(whole), ground, "\n".join(failed)])),
        "reached": reached.table(whole),
        "costs": costs.table(whole, file),
        "memory": memory(whole.get("extra", {})),
    }


def memory(extra: dict[str, Any]) -> str:
    """Return the results of the two benchmarks of many items."""
    lines = ["| command | what | |", "|---|---|---:|"]
    for name in ("backlog", "million"):
        for key, value in extra.get(name, {}).items():
            if key == "date":
                continue
            what, unit = key, ""
            for end, told in UNITS.items():
                if key.endswith(end):
                    what, unit = key.removesuffix(end), told
            lines.append(f"| `python benchmarks/{name}.py` | {what.replace('_', ' ')} | {value:,.0f}{unit} |")
    return "\n".join(lines)


def replaced(page: str, name: str, text: str) -> str:
    """Return the page with one part rewritten."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE} has no part {name!r}: the two lines {begin.strip()} and {end} belong around it")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def rewritten(page: str, whole: dict[str, Any], results: Path) -> str:
    """Return the page with all parts rewritten."""
    file = results.resolve()
    name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name
    for part, text in parts(whole, name).items():
        page = replaced(page, part, text)
    return page


def write(whole: dict[str, Any], results: Path) -> None:
    """Write all parts."""
    PAGE.write_text(rewritten(PAGE.read_text(), whole, results))
    print(f"wrote {PAGE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what compare.py wrote with --out")
    path = parser.parse_args().results
    write(json.loads(path.read_text()), path)


if __name__ == "__main__":
    main()
