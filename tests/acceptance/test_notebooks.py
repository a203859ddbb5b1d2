"""A notebook, whose cells run on an event loop: blocking calls and their twins, mixed as people do."""

import nbclient
import nbformat
import pytest

TASKS = """
from buquet import App, current

app = App()


@app.task
def double(n: int) -> int:
    return 2 * n
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tasks.py").write_text(TASKS)
    monkeypatch.delenv("BUQUET_URL", raising=False)
    return tmp_path


def printed(folder, *cells):
    """What cells print, one kernel for all of them; a cell that raises fails the test."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    return "".join(output.text for output in outputs).split()


def test_blocking_calls_and_twins_in_one_notebook(folder):
    said = printed(
        folder,
        "from tasks import app, double",
        "handles = [double.submit(1), await double.asubmit(2), *double.submit_many([(3,)])]\nprint(handles[0].status())",
        "app.worker(drain=True).run()\nprint(*[handle.result(timeout=60) for handle in handles])",
        "batch = double.batch([4, 5])\nawait app.worker(drain=True).arun()\nprint(*batch.results(timeout=60))",
        "print(await handles[1].aresult(timeout=60))\napp.close()\nprint(handles[1].result(timeout=60))",
    )
    assert said == ["pending", "2", "4", "6", "8", "10", "4", "4"]


def test_a_notebook_works_its_tasks_off(folder):
    said = printed(
        folder,
        "from tasks import app, double\nfrom buquet.testing import advance, arun_until_idle, in_memory, run_until_idle",
        "memory = in_memory(app)\napp = memory.__enter__()",
        "handle = double.options(delay=86_400).submit(1)\nadvance(app, 60)\nprint(handle.status())",
        "run_until_idle(app)\nprint(handle.result(timeout=60))",
        "handle = double.options(delay=86_400).submit(2)\nawait arun_until_idle(app)\nprint(await handle.aresult())",
        "double.submit(3)\nrun_until_idle(app, virtual=True)\nrun_until_idle(app, inline=True)\nprint('idle')",
    )
    assert said == ["pending", "2", "4", "idle"]
