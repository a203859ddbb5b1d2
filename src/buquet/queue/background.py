"""The blocking methods: an event loop in its own thread runs the async methods behind them."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from buquet import forking
from buquet.errors import UsageError, WrongLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from concurrent.futures import Future

P = ParamSpec("P")
S = TypeVar("S", bound="AtHome")
T = TypeVar("T")

log = logging.getLogger("buquet")


def new_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop, of uvloop if it is installed: a request to S3 then costs a quarter less CPU (measured)."""
    try:
        import uvloop  # noqa: PLC0415 - there is none for Windows
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if any. A blocking call blocks it."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Background:
    """The loop that runs blocking calls and rings of the bell. It starts at first use.

    A test or simulation passes its own `loop`, and then makes no blocking calls.
    """

    _hinted = False
    """Whether this process has logged that a blocking call blocks an event loop."""
    _workers: list[asyncio.AbstractEventLoop] = []  # noqa: RUF012 - the loops of this process on which workers run

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._meanwhile: tuple[int, Callable[[Future[Any]], None]] | None = None
        forking.watch(self)

    def after_fork(self) -> None:
        """Leave the loop to the parent process, whose thread runs it. The child starts its own loop."""
        forking.LEFT_BEHIND.append((self._loop, self._thread))
        self._loop = self._thread = None
        self._lock = threading.Lock()
        for loop in self._workers:  # it runs in the child only if an async handler on it has forked
            loop.call_soon(forking.end_stray)
        self._workers.clear()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop. It is started if necessary."""
        forking.check()
        with self._lock:
            return self._loop or self._begin(new_loop())

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run the caller's loop in the thread."""
        with self._lock:
            self._begin(loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="buquet", daemon=True)
        self._thread.start()
        return loop

    @contextmanager
    def serving(self, loop: asyncio.AbstractEventLoop) -> Generator[None]:
        """Refuse blocking calls on a loop while a worker runs on it: they might wait forever."""
        self._workers.append(loop)
        try:
            yield
        finally:
            self._workers.remove(loop)

    def check_caller(self, blocking: str) -> None:
        """Raise WrongLoop, which names the async twin, if a blocking call would wait forever.

        On any other running loop, such as a notebook's, the call only blocks the loop for a while. A log line says so once.
        """
        here = running_loop()
        if here is None:
            return
        if here is self._loop or here in self._workers:
            msg = f"{blocking}() blocks, and a worker or a handler runs on this event loop: use `await a{blocking}()` instead"
            raise WrongLoop(msg)
        if not Background._hinted and not _in_notebook():
            Background._hinted = True
            log.warning(
                "%s() blocks this thread's event loop until it returns. `await a%s()` does not (this is said once)",
                *(blocking, blocking),
                stacklevel=4,
            )

    @contextmanager
    def meanwhile(self, work: Callable[[Future[Any]], None]) -> Generator[None]:
        """While this thread waits for a blocking call, run `work(future)` in it, until the call's future is done."""
        self._meanwhile = (threading.get_ident(), work)
        try:
            yield
        finally:
            self._meanwhile = None

    def begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start a coroutine. Any other thread may wait for the future."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop)

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], blocking: str, interrupted: Callable[[], None] | None = None) -> T:
        """Run a coroutine and wait for it in this thread. `blocking` is the method's name, for messages.

        KeyboardInterrupt cancels the coroutine and is raised. With `interrupted`, that is called instead, and the wait goes on.
        """
        self.check_caller(blocking)
        future = self.begin(work)
        while True:
            try:
                if self._meanwhile is not None and self._meanwhile[0] == threading.get_ident():
                    self._meanwhile[1](future)
                return future.result()
            except CancelledError:
                raise UsageError(f"the App was closed while {blocking}() was at it") from None
            except KeyboardInterrupt:
                if interrupted is None or future.done():
                    future.cancel()
                    raise
                interrupted()
            except BaseException:
                future.cancel()
                raise

    def spawn(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Start a coroutine that nobody waits for. It must not raise."""
        self.loop.call_soon_threadsafe(self._start, work)

    _running: set[asyncio.Task[object]] = set()  # noqa: RUF012 - a loop holds tasks weakly; this keeps them until they are done

    def _start(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        task = asyncio.get_running_loop().create_task(work())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    @property
    def started(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None

    def stop(self) -> None:
        """End the thread, if it runs, and cancel the calls that other threads wait for."""
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None:
                return
            self._loop = self._thread = None
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class HasBackground(Protocol):
    """An App, or another owner of the loop of blocking calls."""

    @property
    def background(self) -> Background:
        """The loop of blocking calls."""
        ...


class AtHome(Protocol):
    """An object with blocking methods; they run on the loop of its `home`."""

    @property
    def home(self) -> HasBackground:
        """Its App."""
        ...


def blocking(method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[S, P], T]:
    """Return the blocking twin of an async method, for the class that defines it. The async name is the blocking one after an a.

    >>> class Handle:  # doctest: +SKIP
    ...     async def aresult(self, timeout: float | None = None) -> int: ...
    ...     result = blocking(aresult)
    """
    name = method.__name__.removeprefix("a")

    @wraps(method)
    def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.home.background.run(lambda: method(self, *args, **kwargs), name)

    summary, _, rest = (method.__doc__ or "").partition("\n")
    twin.__name__ = name
    twin.__qualname__ = f"{method.__qualname__.removesuffix(method.__name__)}{name}"
    twin.__doc__ = f"{summary} Blocks; `{method.__name__}` is its async twin.\n{rest}"
    return twin


def _in_notebook() -> bool:
    """Return whether this is IPython, whose cells run on an event loop that serves nobody else."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython is not None and get_ipython() is not None


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
