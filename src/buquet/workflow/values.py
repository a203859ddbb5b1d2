"""What the steps of a run came to, as far as it is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from buquet.workflow.expression import PENDING, SKIPPED, evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from buquet.workflow.expression import Expr
    from buquet.workflow.graph import Graph
    from buquet.workflow.records import Fan, RunRecord, StepRecord


class Missing(Exception):
    """Values lie in payload objects that are not at hand. `keys` names them."""

    def __init__(self, keys: set[str]) -> None:
        super().__init__(f"{len(keys)} payloads are to be fetched first")
        self.keys = keys


class Values:
    """Looks steps up in a run's record; the bodies of payloads are given to it. Raises Missing for those that are not."""

    def __init__(self, graph: Graph, payloads: Mapping[str, bytes]) -> None:
        self.graph = graph
        self.payloads = payloads
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

    def _value(self, name: str, record: StepRecord) -> Any:
        if record.fan is not None:
            pack = self.graph.steps[name].pack
            results = self.results(record.fan)
            each = [results.get(index) for index in range(record.fan.tasks)]
            if not pack:
                return each
            sizes = [min(pack, record.fan.items - pack * index) for index in range(record.fan.tasks)]
            parts = [part["results"] if part else [None] * size for part, size in zip(each, sizes, strict=True)]
            return [item for part in parts for item in part]
        body = self._body(record.result_at) if record.result_at else record.result
        return msgspec.json.decode(body)

    def results(self, fan: Fan) -> dict[int, Any]:
        """Return what the tasks of an `each` came to, by their index; those without a result are not in it."""
        absent = {key for key in fan.chunks if key not in self.payloads}
        if absent:
            raise Missing(absent)
        found: dict[int, Any] = {}
        for key in fan.chunks:
            found |= msgspec.json.decode(self.payloads[key], type=dict[int, Any])
        found |= {index: msgspec.json.decode(raw) for index, raw in fan.results.items()}
        absent = {each["at"] for each in found.values() if _elsewhere(each) and each["at"] not in self.payloads}
        if absent:
            raise Missing(absent)
        return {
            index: msgspec.json.decode(self.payloads[each["at"]]) if _elsewhere(each) else each["v"]
            for index, each in found.items()
        }

    def _body(self, key: str) -> bytes:
        body = self.payloads.get(key)
        if body is None:
            raise Missing({key})
        return body


def _elsewhere(entry: dict[str, Any]) -> bool:
    return "at" in entry
