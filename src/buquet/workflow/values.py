"""The values of a run's steps, and the encryption of its errors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from buquet.codec import ANY, decode_stored
from buquet.errors import UnreadableRecord
from buquet.printing import counted
from buquet.queue.values import of_run
from buquet.records import ABSENT, ErrorInfo
from buquet.workflow.expression import PENDING, SKIPPED, evaluate
from buquet.workflow.graph import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from buquet.queue.values import Values
    from buquet.workflow.expression import Expr
    from buquet.workflow.graph import Graph
    from buquet.workflow.records import Fan, ItemError, RunEvent, RunRecord, StepRecord

T = TypeVar("T")

MEND = "Something other than buquet changed it: restore it, or cancel the run"


class Missing(Exception):
    """Values are in payloads that are not fetched yet. `keys` names the payloads, `values` the evaluation that needs them."""

    def __init__(self, keys: set[str], values: StepValues) -> None:
        super().__init__(f"to be fetched first: {counted(len(keys), 'payload')}")
        self.keys = keys
        self.values = values


class _Entry(msgspec.Struct):
    """The result of one task of a fan-out: the value, or the key of its payload."""

    v: Raw = ABSENT
    at: str = ""


_entry = msgspec.json.Decoder(_Entry)
_entries = msgspec.json.Decoder(dict[int, _Entry])
_text = msgspec.json.Decoder(tuple[str, str])


def entry_of(event: RunEvent) -> Raw:
    """Return what a fan-out's record holds of the result of one of its tasks: the value, or the key of its payload."""
    if event.result_at:
        return Raw(msgspec.json.encode({"at": event.result_at}))
    return Raw(b'{"v":' + bytes(event.result) + b"}")


def of_step(name: str, item: int) -> str:
    """Return what the result of a step's task is bound to when it is encrypted."""
    return f"item {item} of step {name}"


def of_signal(name: str) -> str:
    """Return what a signal's value is bound to when it is encrypted."""
    return f"signal {name}"


class StepValues:
    """Looks up the results of a run's steps. Payloads are given to it; it raises Missing for those that are not.

    It keeps each payload that it used, even one that the cache drops: no evaluation fetches a payload twice. Raises
    UnreadableRecord for damaged values, and EncryptionKeyMissing.
    """

    def __init__(
        self,
        graph: Graph,
        cached: Mapping[str, bytes],
        decrypt: Callable[[str, bytes | Raw], bytes | Raw] = lambda _what, body: body,
    ) -> None:
        self.graph = graph
        self.cached = cached
        self.payloads: dict[str, bytes] = {}
        self.fetching = asyncio.Lock()
        self.decrypt = decrypt
        """Decrypts a value; its first argument is what the value is bound to."""
        self._known: dict[str, tuple[StepRecord, Any]] = {}

    def of(self, run: RunRecord, expr: Expr) -> Any:
        """Return the value of an expression in a run, or a mark."""
        return evaluate(expr, lambda step: self.step(run, step))

    def step(self, run: RunRecord, name: str) -> Any:
        """Return the result of a step, or PENDING or SKIPPED."""
        record = run.step(name)
        if record.state == "skipped":
            return SKIPPED
        if record.state != "done":
            return PENDING
        known = self._known.get(name)
        if known is None or known[0] is not record:
            known = self._known[name] = (record, self._value(name, record))
        return known[1]

    def learn(self, name: str, record: StepRecord, value: Any) -> None:
        """Keep the result of a step that ended just now: its record does not hold the result in its stored form yet."""
        self._known[name] = (record, value)

    def _value(self, name: str, record: StepRecord) -> Any:
        if record.fan is not None:
            results = self.results(name, record.fan)
            if not self.graph.steps[name].pack:
                return [results.get(index) for index in range(record.fan.tasks)]
            return [item for index in range(record.fan.tasks) for item in self.of_pack(name, record.fan, index, results)]
        self._need([record.result_at] if record.result_at else [])
        body = self.payloads[record.result_at] if record.result_at else record.result
        what = of_signal(self.graph.steps[name].signal) if record.signal else of_step(name, 0)
        return _read(self.decrypt(what, body), record.result_at or f"the result of step {name!r}", ANY)

    def of_pack(self, name: str, fan: Fan, index: int, results: dict[int, Any]) -> list[Any]:
        """Return the results of a pack's items; None for each item of a pack without a result."""
        pack = packed(self.graph.steps[name], fan)
        size = min(pack, fan.items - pack * index)
        if index not in results:
            return [None] * size
        items: object = results[index].get("results") if isinstance(results[index], dict) else None
        if not isinstance(items, list) or len(cast("list[Any]", items)) != size:
            raise UnreadableRecord(f"the result of pack {index} of step {name!r} is not that of {counted(size, 'item')}. {MEND}")
        return cast("list[Any]", items)

    def results(self, name: str, fan: Fan) -> dict[int, Any]:
        """Return the results of a fan-out's tasks by index, without those that have none."""
        self._need(fan.chunks)
        entries: dict[int, _Entry] = {}
        for key in fan.chunks:
            entries |= _read(self.payloads[key], key, _entries)
        entries |= {index: _read(raw, f"item {index} of step {name!r}", _entry) for index, raw in fan.results.items()}
        self._need(entry.at for entry in entries.values() if entry.at)
        values: dict[int, Any] = {}
        for index, entry in entries.items():
            body = self.decrypt(of_step(name, index), self.payloads[entry.at] if entry.at else entry.v)
            values[index] = _read(body, entry.at or f"item {index} of step {name!r}", ANY)
        return values

    def text(self, error: ItemError) -> str:
        """Return an item's error message, decrypted."""
        if not bytes(error.sealed):
            return error.message
        return _read(self.decrypt("error", error.sealed), f"the error of item {error.index}", _text)[0]

    def _need(self, keys: Iterable[str]) -> None:
        absent: set[str] = set()
        for key in keys:
            if key not in self.payloads:
                body = self.cached.get(key)
                if body is None:
                    absent.add(key)
                else:
                    self.payloads[key] = body
        if absent:
            raise Missing(absent, self)


def _read(body: bytes | Raw, what: str, decoder: msgspec.json.Decoder[T]) -> T:
    return decode_stored(decoder, body, what, MEND)


# ---------------------------------------------------------------------- errors


def hidden(run: RunRecord, values: Values) -> RunRecord:
    """Return a run with its errors encrypted, if the App has keys."""
    return _with_errors(run, lambda error: values.seal_error(of_run(run.id, "error"), error)) if values.sealer.key_id else run


def shown(run: RunRecord, values: Values) -> RunRecord:
    """Return a run with its errors decrypted, if this process has their key."""
    return _with_errors(run, lambda error: values.open_error(of_run(run.id, "error"), error))


def _with_errors(run: RunRecord, change: Callable[[ErrorInfo], ErrorInfo]) -> RunRecord:
    def change_item(item: ItemError) -> ItemError:
        changed = change(ErrorInfo(type=item.type, message=item.message, sealed=item.sealed))
        return replace(item, message=changed.message, sealed=changed.sealed)

    steps = dict(run.steps)
    for name, record in run.steps.items():
        fan, error, undo_error = record.fan, record.error, record.undo_error
        if fan is not None and fan.errors:
            steps[name] = replace(record, fan=replace(fan, errors=tuple(map(change_item, fan.errors))))
        if error is not None or undo_error is not None:
            steps[name] = replace(steps[name], error=error and change(error), undo_error=undo_error and change(undo_error))
    return replace(run, steps=steps, error=run.error and change(run.error))
