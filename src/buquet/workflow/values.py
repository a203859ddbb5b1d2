"""What the steps of a run came to, as far as it is at hand."""

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
    from buquet.workflow.records import Event, Fan, ItemError, RunRecord, StepRecord

    Change = Callable[[ErrorInfo], ErrorInfo]


def hidden(run: RunRecord, values: Values) -> RunRecord:
    """Return a run as it may be stored."""
    return _changed(run, lambda error: values.seal_error(of_run(run.id, "error"), error)) if values.sealer.key_id else run


def shown(run: RunRecord, values: Values) -> RunRecord:
    """Return a run with the texts of its errors, where a key for them is here."""
    return _changed(run, lambda error: values.open_error(of_run(run.id, "error"), error))


def _changed(run: RunRecord, change: Change) -> RunRecord:
    steps = {name: _of_step(record, change) for name, record in run.steps.items()}
    return replace(run, steps=steps, error=run.error and change(run.error))


def _of_step(record: StepRecord, change: Change) -> StepRecord:
    fan = record.fan
    if fan is not None and fan.errors:
        record = replace(record, fan=replace(fan, errors=tuple(_of_item(each, change) for each in fan.errors)))
    if record.error is None and record.undo_error is None:
        return record
    return replace(
        record, error=record.error and change(record.error), undo_error=record.undo_error and change(record.undo_error)
    )


def _of_item(error: ItemError, change: Change) -> ItemError:
    changed = change(ErrorInfo(type=error.type, message=error.message, sealed=error.sealed))
    return replace(error, message=changed.message, sealed=changed.sealed)


T = TypeVar("T")

MEND = "Something other than buquet changed it: restore it, or cancel the run"


class Missing(Exception):
    """Values lie in payload objects that are not fetched yet. `keys` names them, and `values` the evaluation that needs them."""

    def __init__(self, keys: set[str], values: StepValues) -> None:
        super().__init__(f"to be fetched first: {counted(len(keys), 'payload')}")
        self.keys = keys
        self.values = values


class _Entry(msgspec.Struct):
    """What is kept of the result of one task of an `each`: the value, or the payload that holds it."""

    v: Raw = ABSENT
    at: str = ""


_entry = msgspec.json.Decoder(_Entry)
_entries = msgspec.json.Decoder(dict[int, _Entry])
_text = msgspec.json.Decoder(tuple[str, str])


def kept(event: Event) -> Raw:
    """Return what is kept of the result of one task of an `each`: the value, or where it lies."""
    if event.result_at:
        return Raw(msgspec.json.encode({"at": event.result_at}))
    return Raw(b'{"v":' + bytes(event.result) + b"}")


def of_step(name: str, item: int) -> str:
    """Return what the result of a step's task is bound to where it is encrypted."""
    return f"item {item} of step {name}"


def of_signal(name: str) -> str:
    """Return what a signal's value is bound to where it is encrypted."""
    return f"signal {name}"


def plain(_what: str, body: bytes | Raw) -> bytes | Raw:
    """Return a value that is not encrypted."""
    return body


class StepValues:
    """Looks steps up in a run's record; the bodies of payloads are given to it. Raises Missing for those that are not.

    It keeps every body that it has used, whatever becomes of the cache: so no evaluation needs a payload twice.
    Raises UnreadableRecord for what is damaged, and EncryptionKeyMissing.
    """

    def __init__(
        self,
        graph: Graph,
        cached: Mapping[str, bytes],
        opened: Callable[[str, bytes | Raw], bytes | Raw] = plain,
    ) -> None:
        self.graph = graph
        self.cached = cached
        self.payloads: dict[str, bytes] = {}
        self.fetching = asyncio.Lock()
        self.opened = opened
        """Decrypts what is encrypted; it is told what a value is bound to."""
        self._known: dict[str, tuple[StepRecord, Any]] = {}

    def of(self, run: RunRecord, expr: Expr) -> Any:
        """Return what an expression comes to in a run as its record is."""
        return evaluate(expr, lambda step: self.step(run, step))

    def step(self, run: RunRecord, name: str) -> Any:
        """Return what a step came to: its value, PENDING or SKIPPED."""
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
        """Take note of what a step came to just now: its record does not hold it as it will be stored."""
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
        return _read(self.opened(what, body), record.result_at or f"what step {name!r} came to", ANY)

    def of_pack(self, name: str, fan: Fan, index: int, results: dict[int, Any]) -> list[Any]:
        """Return what the items of a pack came to, None for each where the pack has no result."""
        pack = packed(self.graph.steps[name], fan)
        size = min(pack, fan.items - pack * index)
        if index not in results:
            return [None] * size
        found: object = results[index].get("results") if isinstance(results[index], dict) else None
        if not isinstance(found, list) or len(cast("list[Any]", found)) != size:
            raise UnreadableRecord(f"the result of pack {index} of step {name!r} is not that of {counted(size, 'item')}. {MEND}")
        return cast("list[Any]", found)

    def results(self, name: str, fan: Fan) -> dict[int, Any]:
        """Return what the tasks of a step that is an `each` came to, by their index; those without a result are not in it."""
        self._need(fan.chunks)
        found: dict[int, _Entry] = {}
        for key in fan.chunks:
            found |= _read(self.payloads[key], key, _entries)
        found |= {index: _read(raw, f"item {index} of step {name!r}", _entry) for index, raw in fan.results.items()}
        self._need(each.at for each in found.values() if each.at)
        bodies = {index: self.payloads[each.at] if each.at else each.v for index, each in found.items()}
        opened = {index: self.opened(of_step(name, index), body) for index, body in bodies.items()}
        return {index: _read(body, found[index].at or f"item {index} of step {name!r}", ANY) for index, body in opened.items()}

    def text(self, error: ItemError) -> str:
        """Return what an item's error says, decrypted."""
        if not bytes(error.sealed):
            return error.message
        return _read(self.opened("error", error.sealed), f"the error of item {error.index}", _text)[0]

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
