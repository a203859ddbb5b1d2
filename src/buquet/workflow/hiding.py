"""What the errors in a run's record say: with keys, encrypted as it is stored, and decrypted where people look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from buquet.records import ErrorInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.queue.payloads import Values
    from buquet.workflow.records import ItemError, RunRecord, StepRecord

    Change = Callable[[ErrorInfo], ErrorInfo]


def hidden(run: RunRecord, values: Values) -> RunRecord:
    """Return a run as it may be stored."""
    return _changed(run, lambda error: values.hide_of_run(run.id, error)) if values.sealer.key_id else run


def shown(run: RunRecord, values: Values) -> RunRecord:
    """Return a run with the texts of its errors, where a key for them is here."""
    return _changed(run, lambda error: values.shown_of_run(run.id, error))


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
