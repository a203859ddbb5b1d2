"""The examples in the documents are run as they stand, those of one page one after another."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def examples(page, heading=""):
    text = (ROOT / page).read_text()
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "heading", "least"),
    [("docs/workflows.md", "", 10), ("docs/concepts.md", "Workflows", 1), ("README.md", "Workflows", 1)],
)
def test_they_run(page, heading, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BUQUET_URL", raising=False)
    found = examples(page, heading)
    assert len(found) >= least
    names = {"__name__": page}
    for number, code in enumerate(found):
        exec(compile(code, f"{page}, example {number + 1}", "exec", dont_inherit=True), names)  # noqa: S102 - our own pages


def test_the_contributing_guides_test_passes():
    (code,) = [code for code in examples("CONTRIBUTING.md", "Write a test in virtual time") if "def test_" in code]
    names = {}
    exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), names)  # noqa: S102 - our own pages
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
