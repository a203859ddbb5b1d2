"""Problems that are logged once each, however often they are met."""

from __future__ import annotations

import logging

log = logging.getLogger("buquet.worker")

REMEMBERED = 10_000
"""Subjects that are remembered: anybody may put any number of broken objects into a bucket."""


class Reported:
    """Logs an error once for its subject, such as a key; once more where many others were reported since."""

    def __init__(self) -> None:
        self._subjects: dict[str, None] = {}

    def error(self, subject: str, problem: object) -> None:
        """Log a problem, unless one of the same subject was logged lately."""
        if subject not in self._subjects:
            self._subjects[subject] = None
            if len(self._subjects) > REMEMBERED:
                del self._subjects[next(iter(self._subjects))]
            log.error("%s", problem)
