"""Encrypted values: what is hidden, what stays readable, who can read, and what becomes of a task whose key is not there."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs import in_virtual_time

from buquet import (
    App,
    EncryptionKeyMissing,
    InvalidArgument,
    KeyConflict,
    TaskFailed,
    UnreadableRecord,
    UsageError,
    current,
    keys,
)
from buquet.queue.background import Background
from buquet.queue.values import of_task
from buquet.sealing import Keyring, Sealer, key_id_of, sealer
from buquet.store.memory import MemoryStore
from buquet.testing.auditor import Auditor, read_bucket
from buquet.testing.virtual import run_virtual

ONE, TWO = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
SECRET = "the-eagle-has-landed"


virtual = in_virtual_time(lambda clock: clock, MemoryStore)


def make_app(clock, store, encryption, *, only=False):
    """An App with tasks that take, return, keep and tell a secret."""
    app = App(store=store, clock=clock, encryption=encryption, encrypted_only=only)
    app.background = Background(clock.loop)

    @app.task
    async def echo(text: str, size: int = 1) -> str:
        await current().acheckpoint(text * size)
        return text * size

    @app.task(max_attempts=1)
    async def fails(text: str) -> None:
        raise ValueError(f"cannot do {text}")

    @app.task(max_attempts=1)
    async def item(text: str) -> str:
        if text.endswith("bad"):
            raise ValueError(text)
        return text

    return app


async def everything(store):
    """All bytes that lie in the store, earlier versions included."""
    kept = [each for versions in store._earlier.values() for each in versions.values()]
    return b"\n".join(each.body for each in [*store._objects.values(), *kept])


def drain(app):
    return app.worker(drain=True, heartbeat_thread=False).arun()


@virtual
async def test_no_value_lies_readable_in_the_bucket_and_names_and_states_do(clock, store):
    app = make_app(clock, store, ONE)
    small, large = await app.tasks["echo"].asubmit(SECRET), await app.tasks["echo"].asubmit(SECRET, size=10_000)
    failing = await app.tasks["fails"].asubmit(SECRET)
    batch = await app.tasks["item"].abatch([SECRET, SECRET + "bad"])
    await drain(app)
    assert await small.aresult() == SECRET
    assert await large.aresult() == SECRET * 10_000
    with pytest.raises(TaskFailed, match=f"ValueError: cannot do {SECRET}") as caught:
        await failing.aresult()
    assert SECRET in caught.value.traceback
    (bad,) = await batch.afailed()
    assert (bad.item, SECRET in bad.error) == (SECRET + "bad", True)
    lying = await everything(store)
    assert SECRET.encode() not in lying
    assert b"fails" in lying
    assert b"ValueError" in lying
    record = await failing.arecord()
    assert (record.state, record.name, record.error.message) == ("failed", "fails", "(encrypted)")
    assert Auditor().findings(await read_bucket(store, ["default"])) == []


@virtual
async def test_without_keys_nothing_is_hidden(clock, store):
    app = make_app(clock, store, [])
    await app.tasks["echo"].asubmit(SECRET)
    assert SECRET.encode() in await everything(store)


@virtual
async def test_a_worker_without_the_key_leaves_the_task_to_one_that_has_it(clock, store):
    with_key, without = make_app(clock, store, ONE), make_app(clock, store, [])
    handle = await with_key.tasks["echo"].asubmit(SECRET)
    plain = await without.tasks["echo"].asubmit("plain")
    await drain(without)
    record = await handle.arecord()
    assert (record.state, record.failures, len(record.events)) == ("pending", 0, 1), "not even claimed"
    assert await plain.aresult() == "plain"
    await drain(with_key)
    assert await handle.aresult() == SECRET
    with pytest.raises(EncryptionKeyMissing, match="BUQUET_ENCRYPTION_KEYS"):
        await without.get(handle.id).aresult()


@virtual
async def test_a_checkpoint_under_another_key_gives_the_task_back_unspent(clock, store):
    old, new = make_app(clock, store, []), make_app(clock, store, ONE)
    handle = await old.tasks["echo"].asubmit(SECRET)
    held = await old.client.read(handle.id)
    sealed, at = await new.client.values.put(of_task(handle.id, "checkpoint"), b'"half"')
    from msgspec.structs import replace

    await old.client.register.update(held, replace(held.record, checkpoint=sealed, checkpoint_at=at))
    worker = old.worker(heartbeat_thread=False, max_time=5)
    await worker.arun()
    record = await handle.arecord()
    assert (record.state, record.failures) == ("pending", 0)
    assert (record.events[-1].why, record.events[-1].detail) == ("snoozed", "its worker lacks the key")
    await drain(new)
    assert await new.get(handle.id).aresult() == SECRET


@virtual
async def test_a_task_that_cannot_be_opened_is_cancelled_all_the_same(clock, store):
    with_key, without = make_app(clock, store, ONE), make_app(clock, store, [])
    expiring = await with_key.tasks["echo"].options(expires=10).asubmit(SECRET)
    await clock.sleep(11)
    await drain(without)
    assert await expiring.astatus() == "expired"


@virtual
async def test_keys_are_rotated(clock, store):
    old, both, new = (make_app(clock, store, keys) for keys in (ONE, [TWO, ONE], TWO))
    before = await old.tasks["echo"].asubmit(SECRET)
    after = await both.tasks["echo"].asubmit(SECRET)
    await drain(new)
    assert [await before.astatus(), await after.astatus()] == ["pending", "completed"]
    await drain(both)
    assert await both.get(before.id).aresult() == SECRET


@virtual
async def test_a_key_submitted_again_is_the_same_task_also_after_a_rotation(clock, store):
    for size in (1, 10_000):
        old, new = make_app(clock, store, ONE), make_app(clock, store, [TWO, ONE])
        key = f"k{size}"
        first = await old.tasks["echo"].options(key=key).asubmit(SECRET * size)
        for app in (old, new):
            again = await app.tasks["echo"].options(key=key).asubmit(SECRET * size)
            assert (again.id, again.created) == (first.id, False)
            with pytest.raises(KeyConflict):
                await app.tasks["echo"].options(key=key).asubmit("other" * size)


@virtual
async def test_a_value_moved_to_another_task_is_not_taken_for_its_own(clock, store):
    app = make_app(clock, store, ONE)
    mine, theirs = await app.tasks["echo"].asubmit("mine"), await app.tasks["echo"].asubmit("theirs")
    held, other = await app.client.read(mine.id), await app.client.read(theirs.id)
    from msgspec.structs import replace

    await app.client.register.update(held, replace(held.record, args=other.record.args))
    await drain(app)
    with pytest.raises(TaskFailed, match="changed, or belongs elsewhere"):
        await mine.aresult()
    assert await theirs.aresult() == "theirs"


@given(body=st.binary(max_size=200), context=st.text(max_size=20))
def test_what_is_sealed_opens_in_its_own_place_only(body, context):
    ring = Keyring([ONE])
    sealed = ring.seal(body, context)
    assert sealed == ring.seal(body, context), "the same write, sent again, has the same bytes"
    assert bytes(ring.open(sealed, context)) == body
    assert key_id_of(sealed) == ring.key_id
    with pytest.raises(UnreadableRecord):
        ring.open(sealed, context + "x")
    with pytest.raises(EncryptionKeyMissing):
        Keyring([TWO]).open(sealed, context)


def test_a_changed_value_is_refused():
    ring = Keyring([ONE])
    sealed = json.loads(ring.seal(b'"hello"', "x"))["buquet.sealed"]
    for at in range(9, len(sealed)):
        changed = sealed[:at] + ("A" if sealed[at] != "A" else "B") + sealed[at + 1 :]
        with pytest.raises(UnreadableRecord):
            ring.open(json.dumps({"buquet.sealed": changed}).encode(), "x")


def test_a_users_value_is_never_taken_for_a_sealed_one():
    looks_sealed = b'{"buquet.sealed":"abc.def"}'
    with pytest.raises(InvalidArgument, match="Name the field otherwise"):
        Sealer().seal(looks_sealed, "x")
    ring = Keyring([ONE])
    assert bytes(ring.open(ring.seal(looks_sealed, "x"), "x")) == looks_sealed
    near = b'{"buquet.sealed":"abc.def","more":1}'
    assert Sealer().open(Sealer().seal(near, "x"), "x") == near


def test_plain_values_are_refused_where_only_encrypted_ones_are_taken(caplog):
    async def main(clock):
        store = MemoryStore(clock)
        app, keyless = make_app(clock, store, [ONE], only=True), make_app(clock, store, [])
        ours, theirs = await app.tasks["echo"].asubmit(SECRET), await keyless.tasks["echo"].asubmit("from who has no key")
        swapped = await app.tasks["echo"].asubmit(SECRET)
        key = keys.task(swapped.id)
        await store.put(key, json.dumps({**json.loads((await store.get(key)).body), "args": {"text": "forged"}}).encode())
        await app.worker(heartbeat_thread=False, max_time=300).arun()
        assert await ours.aresult(timeout=1) == SECRET
        assert await theirs.astatus() == "pending"
        with pytest.raises(TaskFailed, match="is not encrypted, and this App takes only encrypted values"):
            await swapped.aresult(timeout=1)
        key = keys.task(ours.id)
        await store.put(key, json.dumps({**json.loads((await store.get(key)).body), "result": "forged"}).encode())
        with pytest.raises(UnreadableRecord, match="is not encrypted"):
            await app.tasks["echo"].get(ours.id).aresult(timeout=1)
        # the mode was turned on too early: without it what waits is run
        await drain(make_app(clock, store, [ONE]))
        assert await theirs.astatus() == "completed"

    run_virtual(main)
    assert sum("takes only encrypted values: they are left" in line for line in caplog.messages) == 1


def test_the_mode_without_plain_values_comes_from_the_environment_and_needs_keys(monkeypatch):
    monkeypatch.setenv("BUQUET_ENCRYPTED_ONLY", "1")
    assert not sealer([ONE]).can_open("")
    assert sealer([ONE], only=False).can_open("")
    with pytest.raises(UsageError, match="needs keys"):
        sealer([])
    monkeypatch.setenv("BUQUET_ENCRYPTED_ONLY", "yes")
    with pytest.raises(UsageError, match=r"is 1 .on. or 0 .off., not 'yes'"):
        sealer([ONE])


@pytest.mark.parametrize("bad", ["hello", "c2hvcnQ=", ONE + "A", "é" * 44])
def test_a_bad_key_is_refused_and_never_shown(bad):
    with pytest.raises(UsageError, match="openssl") as caught:
        Keyring([bad])
    assert bad not in str(caught.value)


def test_keys_come_from_the_environment(monkeypatch):
    assert type(sealer(None)) is Sealer
    monkeypatch.setenv("BUQUET_ENCRYPTION_KEYS", f" {TWO} ,{ONE},")
    ring = sealer(None)
    assert ring.key_id == Keyring([TWO]).key_id
    assert ring.can_open(Keyring([ONE]).key_id)
    assert ONE not in repr(ring)
    assert type(sealer([])) is Sealer, "an App may say that it wants none"
