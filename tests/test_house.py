"""The rules of this repository, as tests. Each failure names the rule and the place."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from buquet.errors import install

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "buquet").rglob("*.py"))
MOST_LINES = 600

MANY = ("PROCESSES", "report['lines']", "len(self.steps)", "min(named, 10**18)")
"""Numbers before a noun that are always more than one."""

DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}

OWNERS = {
    "obstore": {"store/objects.py"},
    "sqlite3": {"store/sqlite.py", "store/sqlite_writer.py"},
}
"""The only files that may import a package."""

FOREIGN = ("/" + "work/", "/" + "root/", "/" + "home/")
"""Paths of a machine, written so that this file does not contain them."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "buquet").as_posix()


def project_files() -> list[Path]:
    """Return the files that git tracks or would track; without git, all files outside of hidden folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - git from the path
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        found = [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])]
    return [path for path in found if path.is_file()]


def exported() -> list[str]:
    return list(importlib.import_module("buquet").__all__)


def test_every_exported_name_is_there_and_documented() -> None:
    buquet = importlib.import_module("buquet")
    names = exported()
    assert names, "buquet.__all__ is empty"
    assert len(names) == len(set(names))
    missing = [name for name in names if not hasattr(buquet, name)]
    assert not missing, f"in __all__, but not in buquet: {missing}"
    bare: list[str] = []
    for name in names:
        value = getattr(buquet, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not value.__dict__.get("__doc__") if inspect.isclass(value) else not value.__doc__:
            bare.append(name)
        if inspect.isclass(value):
            bare += [f"{name}.{each}" for each, member in vars(value).items() if undocumented(each, member)]
    assert not bare, f"public, but without a docstring: {bare}"


def undocumented(name: str, member: object) -> bool:
    if name.startswith("_"):
        return False
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, classmethod | staticmethod):
        member = member.__func__
    return inspect.isfunction(member) and not member.__doc__


def test_no_public_name_is_left_out_of_all() -> None:
    buquet = importlib.import_module("buquet")
    here = {name for name, value in vars(buquet).items() if not name.startswith("_") and not inspect.ismodule(value)}
    here -= {"annotations", "TYPE_CHECKING"}
    assert here <= set(exported()), f"imported into buquet, but not in __all__: {sorted(here - set(exported()))}"


def test_a_long_file_gives_its_reason_in_its_first_line() -> None:
    texts = {name_of(path): path.read_text().splitlines() for path in SOURCES}
    long = [name for name, lines in texts.items() if len(lines) > MOST_LINES and "long" not in lines[0].lower()]
    assert not long, f"over {MOST_LINES} lines: split by subject, or say in the first line why the file is long: {long}"


SAME_PART = {"app", "control", "fleet", "handle", "records", "runs", "schedules", "tasks", "values"}
"""Names of files that two rooms have: the same part of the queue and of workflows, or of what is read and of how it is shown."""


def test_no_two_classes_and_no_two_files_share_a_name() -> None:
    classes: dict[str, list[str]] = {}
    files: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.stem not in {"__init__", *SAME_PART}:
            files.setdefault(path.stem, []).append(name_of(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(name_of(path))
    twins = {name: places for name, places in {**classes, **files}.items() if len(places) > 1}
    assert not twins, f"one name for two things: {twins}"


def test_no_file_is_a_drawer() -> None:
    drawers = [name_of(path) for path in SOURCES if DRAWERS & {part.lower().strip("_") for part in (*path.parts, path.stem)}]
    assert not drawers, f"say what is in it: {drawers}"


def test_every_counted_noun_agrees_with_its_number() -> None:
    """ "1 tasks" is wrong. Exceptions are constants, which are never 1, and `done/whole`."""
    nouns = "tasks|items|runs|workers|packs|attempts|lines|records|entries|payloads|stubs|objects|handles|handlers|slots|steps"
    wrong = re.compile(rf"(?<!/)\{{+ ?(?!MOST|[A-Z_]+[:,}}])[^{{}}]*\}}+ (running |worker )?({nouns})\b(?!/)")
    package = ROOT / "src" / "buquet"
    pages = [path for path in (*SOURCES, *(package / "dashboard" / "templates").glob("*.html")) if "testing" not in path.parts]
    found = {f"{path.relative_to(package)}: {hit[0]}" for path in pages for hit in wrong.finditer(path.read_text())}
    excepted = {each for each in found if any(text in each for text in MANY)}
    assert found == excepted, "use counted() of buquet.printing"


@pytest.mark.parametrize("package", OWNERS)
def test_only_its_owner_imports(package: str) -> None:
    importers = {name_of(path) for path in SOURCES if package in imports_of(path)}
    assert importers <= OWNERS[package], f"{package} is for {OWNERS[package]} alone, but {importers - OWNERS[package]} import it"


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_no_file_names_a_place_on_some_machine() -> None:
    found: list[str] = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FOREIGN if word in text]
    assert not found


def modules() -> list[str]:
    package = importlib.import_module("buquet")
    return [found.name for found in pkgutil.walk_packages(package.__path__, "buquet.") if not found.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_hold(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    markers = ("<!-- the test command -->", "<!-- end -->")
    assert [readme.count(marker) for marker in markers] == [1, 1]
    block = readme.partition(markers[0])[2].partition(markers[1])[0].strip()
    assert re.fullmatch(r"```bash\n[^`]+\n```", block), "one code block between the markers, and nothing else"
    assert "-m venv" in block
    assert ".[test]" in block
    assert "-m pytest" in block
    run = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in run.splitlines() if line.startswith("command="))
    script = f'{extract}; printf %s "$command"'
    taken = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert taken.strip() == block.removeprefix("```bash").removesuffix("```").strip()
    assert 'bash -euo pipefail -c "$command"' in run, "and what is taken from there is what runs"


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200, "move details to the page of their subject in docs/"


def resolves(name: str) -> bool:
    """Tell whether a dotted name below `buquet` is a module, or an attribute of one."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(["buquet", *parts[:size]]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            value = getattr(value, part, None)
        return value is not None
    return False


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_and_function_on_the_map_exists(page: str) -> None:
    package = ROOT / "src" / "buquet"
    rooms = {path.stem for path in package.iterdir()}
    missing: list[str] = []
    for text in sorted(set(re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()))):
        if re.fullmatch(r"[\w./-]+/|[\w./-]+\.(py|md|toml)", text):
            folders = (ROOT, package, ROOT / "tests" / "acceptance")
            missing += [] if any((folder / text).exists() for folder in folders) else [text]
        elif re.fullmatch(r"[a-z_]+(\.\w+)+", text):
            name = text.removeprefix("buquet.")
            missing += [text] if name.partition(".")[0] in rooms and not resolves(name) else []
    assert not missing, f"{page} names what is not there: {missing}"


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    names = {re.split(r"[\[<>=~! ]", each)[0] for each in wanted} - {"buquet"}
    text = (ROOT / "docs" / "dependencies.md").read_text()
    reasons = {cell for line in text.splitlines() if line.startswith("|") for cell in re.split(r" *\| *", line.strip("| "))[:2]}
    assert names <= reasons, f"no line in docs/dependencies.md: {names - reasons}"


def test_every_link_between_pages_leads_somewhere() -> None:
    broken: list[str] = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        broken += [f"{page.name}: {to}" for to in targets if "://" not in to and not (page.parent / to).exists()]
    assert not broken


def test_every_hint_to_install_an_extra_names_its_version() -> None:
    """An older project on PyPI has the same name. Without the version, pip would install that one."""
    command = re.compile(r"pip install '?buquet\[")
    told = [str(path) for path in SOURCES if command.search(path.read_text()) and path.name != "errors.py"]
    assert not told, "take errors.install"
    assert re.fullmatch(r"pip install 'buquet\[ui\]>=\d+\.\d+'", install("ui"))
