"""A Django TestCase: its rows are in a transaction that only the test's own connection sees."""

import subprocess
import sys

SETTINGS = """
SECRET_KEY = "for tests"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "site.db", "TEST": {"NAME": "test.db"}}}
USE_TZ = True
"""
TESTS = """
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import transaction
from django.test import TestCase

from buquet import App, Backoff
from buquet.testing import in_memory, run_until_idle

app = App("s3://production")


@app.task(backoff=Backoff(initial=60))
def greet(name: str) -> int:
    user, made = User.objects.get_or_create(username=name + "!")
    if made:
        rename.submit(user.pk)
    return User.objects.count()


@app.task
def rename(pk: int) -> None:
    User.objects.filter(pk=pk).update(first_name="renamed")


@app.task
async def count() -> int:
    return await User.objects.acount()


class Tasks(TestCase):
    def test_handlers_see_the_rows_of_the_test(self):
        with in_memory(app):
            User.objects.create(username="ann")
            with self.captureOnCommitCallbacks(execute=True):
                transaction.on_commit(lambda: greet.submit("ann"))
            counted = count.submit()
            run_until_idle(app, inline=True)
            self.assertEqual(User.objects.get(username="ann!").first_name, "renamed")
            self.assertEqual(counted.result(timeout=5), 2)

    async def test_an_async_test_runs_them_on_its_connection(self):
        with in_memory(app):
            await User.objects.acreate(username="ann")
            handles = [await greet.asubmit("bob"), await count.asubmit()]
            await sync_to_async(run_until_idle)(app, inline=True)
            self.assertEqual([await handle.aresult(timeout=5) for handle in handles], [2, 2])

    def test_nothing_is_left_of_another_test(self):
        self.assertEqual(User.objects.count(), 0)
"""


def test_inline_handlers_use_the_connection_of_a_test_case(tmp_path):
    (tmp_path / "settings.py").write_text(SETTINGS)
    (tmp_path / "tests.py").write_text(TESTS)
    command = [sys.executable, "-m", "django", "test", "--settings", "settings", "--pythonpath", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Ran 3 tests" in done.stderr
