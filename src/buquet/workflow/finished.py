"""What the journal says of a run that is over."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, cast

import msgspec

from buquet.journal.lines import LONGEST_MESSAGE
from buquet.records import ErrorInfo, Finished

if TYPE_CHECKING:
    from buquet.records import State
    from buquet.workflow.records import RunRecord


def finished_run(run: RunRecord, worker: str) -> Finished:
    """Return the journal's line of a run that is over. Failures of one workflow at one step are of one group."""
    failed = next((name for name, record in run.steps.items() if record.state == "failed"), "")
    group = hashlib.sha256(f"{run.workflow}\0{failed}".encode()).hexdigest()[:12] if run.state == "failed" else ""
    brief = ErrorInfo(type=run.error.type, message=run.error.message[:LONGEST_MESSAGE]) if run.error and group else None
    return Finished(
        kind="run",
        id=run.id,
        name=run.workflow,
        queue=run.queue,
        status=cast("State", run.state),
        at=run.finished,
        submitted=run.created,
        ready=run.created,
        started=run.created,
        ran=max(run.finished - run.created, 0),
        worker=worker,
        error=brief or msgspec.UNSET,
        group=group,
        run=run.id,
        tags=run.tags,
    )
