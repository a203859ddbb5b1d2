"""A store that counts what is asked of it, and how that went: for bench and metrics."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from buquet.errors import AlreadyExists, Changed, StoreError, StoreRefused
from buquet.store.base import NotModified, PassingStore

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from buquet.store.base import Op, Store

T = TypeVar("T")


class CountingStore(PassingStore):
    """Passes every request on, and counts it by kind (PUT, GET, LIST, DELETE) and outcome. Waiting is not a request.

    Outcomes: ok, missing and unchanged (of a GET), conflict, refused, unavailable, cancelled.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.counts: Counter[tuple[str, str]] = Counter()

    def total(self, kind: str) -> int:
        """Return how many requests of a kind there were, whatever came of them."""
        return sum(number for (each, _), number in dict(self.counts).items() if each == kind)

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:  # noqa: ARG002 - the base's
        kind = "PUT" if op in {"create", "update"} else op.upper()
        outcome = "cancelled"
        try:
            answer = await send()
            outcome = "unchanged" if isinstance(answer, NotModified) else "missing" if kind == "GET" and answer is None else "ok"
        except (AlreadyExists, Changed):
            outcome = "conflict"
            raise
        except StoreError as error:
            outcome = "refused" if isinstance(error, StoreRefused) else "unavailable"
            raise
        else:
            return answer
        finally:
            self.counts[kind, outcome] += 1
