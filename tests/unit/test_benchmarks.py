"""What the benchmarks make of their results; none is run here."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import costs  # noqa: E402 - the programs beside the package, which import one another by these names
import document  # noqa: E402
import reached  # noqa: E402
from harness import table  # noqa: E402

RUN = {"date": "2026-01-02 03:04 UTC", "cores": 2}
LATER = {**RUN, "date": "2026-01-03 03:04 UTC"}


def entry(name, submit=100.0, drain=100.0, **more):
    return {"name": name, "label": name, "workers": "1 process", "submit_per_s": submit, "drain_per_s": drain, **more}


def whole(*entries, machine=RUN):
    found = {}
    for each in entries:
        found = table.add(found, each["name"], each, machine, peer=True)
    return found


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_the_page_shows_the_results_that_lie_beside_it():
    results = ROOT / "benchmarks" / "results.json"
    page = document.PAGE.read_text()
    assert document.rewritten(page, json.loads(results.read_text()), results) == page, "run benchmarks/document.py"


def test_a_page_without_a_place_for_a_part_is_told_so():
    with pytest.raises(ValueError, match="no part 'costs': the two lines"):
        document.replaced("# Performance\n", "costs", "text")


def test_an_entry_that_fails_is_noted_until_it_succeeds_and_takes_nothings_place():
    first = whole(entry("celery-redis", 50.0), entry("buquet-s3"))
    assert [each["name"] for each in first["results"]] == ["buquet-s3", "celery-redis"]
    assert first["ratios"]["buquet-s3"]["celery-redis"]["submit_per_s"] == 2
    second = table.add(first, "celery-redis", {"failed": "MissingError: no redis\nmore"}, LATER, peer=True)
    assert second["results"] == first["results"]
    assert second["failed"] == {"celery-redis": {"why": "MissingError: no redis", "date": LATER["date"]}}
    third = table.add(second, "celery-redis", entry("celery-redis", 25.0), LATER, peer=True)
    assert third["failed"] == {}
    assert third["ratios"]["buquet-s3"]["celery-redis"]["submit_per_s"] == 4
    assert {each["date"] for each in third["results"]} == {RUN["date"], LATER["date"]}


def test_what_was_asked_stands_beside_what_was_reached():
    batch = entry("buquet-s3-batch", 1000.0, 799.0, requests={"all": {"PUT": 0.06}})
    text = reached.table(whole(batch, entry("celery-redis")))
    assert row(text, "batch on SeaweedFS: submit").endswith("| at least 10 times | 10 times | reached |")
    assert row(text, "batch on SeaweedFS: drain").endswith("| at least 8 times | 7.99 times | **missed** |")
    assert row(text, "batch on SeaweedFS: PUT").endswith("| at most 0.06 | 0.06 | reached |")
    assert row(text, "batch on SQLite").endswith("| - | not measured |")
    mixed = table.add(whole(batch), "celery-redis", entry("celery-redis"), LATER, peer=True)
    assert row(reached.table(mixed), "batch on SeaweedFS: submit").endswith("| reached, but of different runs |")
    memory = {"items": 1_000_000, "submitter_mb": 200.0, "worker_mb": 201.0}
    text = reached.table(table.add(mixed, "million", memory, LATER, peer=False))
    assert row(text, "a million items on SQLite: submitter").endswith("| 200 MB | reached |")
    assert row(text, "a million items on SQLite: worker").endswith("| 201 MB | **missed** |")
    text = reached.table(table.add(mixed, "million", {**memory, "items": 1000}, LATER, peer=False))
    assert row(text, "a million items on SQLite: submitter").endswith("| not measured |")


def test_costs_are_those_of_the_counted_requests():
    counted = {"all": {"PUT": 4.0, "GET": 1.0, "LIST": 0.5, "DELETE": 1.0}}
    text = costs.table(whole(entry("buquet-s3", requests=counted, idle_hour={"GET": 1000.0})), "results.json")
    assert "| 4,000,000 | 500,000 | 1,000,000 | 1,000,000 | 22.90 |" in row(text, "a million tasks in a backlog")
    assert "| 0 | 0 | 730,000 | 0 | 0.29 |" in row(text, "an idle worker")
    assert "not measured" in row(text, "a million batched items")
    with pytest.raises(ValueError, match="no price is known for HUG"):
        costs.dollars({"HUG": 1})
