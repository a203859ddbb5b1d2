"""What the options that choose tasks mean."""

from __future__ import annotations

from buquet.errors import UsageError
from buquet.insights.tasks import STATUSES, Filter, Status, wanted_status


def selection(status: str | None, queue: str | None, name: str | None, tag: list[str] | None) -> Filter:
    """Return the filter that --status, --queue, --name and --tag make. Raises UsageError."""
    known: Status | None = next((each for each in STATUSES if each == status), None)
    if status is not None and known is None:
        raise UsageError(f"--status is one of {', '.join(STATUSES)}, not {status!r}")
    return Filter(*wanted_status(known), queue, name, tags_of(tag))


def tags_of(tag: list[str] | None) -> dict[str, str]:
    """Return the tags that --tag options name. Raises UsageError."""
    tags: dict[str, str] = {}
    for each in tag or ():
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise UsageError(f"--tag takes NAME=VALUE, not {each!r}")
        tags[name] = value
    return tags
