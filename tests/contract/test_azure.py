"""Azure's answers in this library's errors. The store itself is tried by `make stores`: Azurite is not on PyPI."""

import pytest

from buquet import AccessDenied, InvalidURL
from buquet.clock import Clock
from buquet.store.base import Location
from buquet.store.objects import AzureStore, code_of, explain, is_missing
from buquet.store.open import open_store

ANSWER = "Object not found: Server returned non-2xx status code: 404 Not Found: <Error><Code>{}</Code></Error>"


def test_the_url_comes_back_as_it_was_given():
    url = "az://container/a/b?endpoint=http://localhost:10000/devstoreaccount1"
    store = open_store(url, Clock())
    assert isinstance(store, AzureStore)
    assert store.url == url


@pytest.mark.parametrize(
    "url", ["az://", "az:x", "az://c?region=eu", "az://c#x", "az://key@c", "az://c/../d", "az://c?endpoint=ftp://x"]
)
def test_urls_that_cannot_be_meant(url):
    with pytest.raises(InvalidURL):
        open_store(url, Clock())


async def test_without_an_account_it_says_what_to_set(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(AccessDenied, match="AZURE_STORAGE_ACCOUNT_NAME"):
        await open_store("az://container", Clock()).get("x")


def test_a_missing_container_is_not_a_missing_key():
    place = Location("container", "", None, None, "az")
    missing = FileNotFoundError(ANSWER.format("BlobNotFound"))
    gone = FileNotFoundError(ANSWER.format("ContainerNotFound"))
    assert code_of(gone) == "ContainerNotFound"
    assert is_missing(missing)
    assert not is_missing(gone)
    assert "Create it" in str(explain(gone, "GET x", place, answered=True))
