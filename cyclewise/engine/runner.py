"""The engine's thread: the only one that steps, while any thread submits and cancels.

Whoever has a prompt's token ids (a server, after another thread or process has made them of text)
hands a `Job` and a listener to `Runner.submit`, and the listener is called with each `Event`, on
the engine's thread: it must only pass it on. Every answer of a job that was taken on ends with
exactly one last event, whatever happens: a step that fails, a thread that dies, the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from cyclewise.engine.job import Event, Job
from cyclewise.engine.scheduler import Limits, Numbers, Scheduler
from cyclewise.engine.watch import Standing, Watch
from cyclewise.errors import EngineError

if TYPE_CHECKING:
    from cyclewise.engine.engine import Engine

Listener = Callable[[Event], None]


class Runner:
    """Runs an engine until it is closed. Without jobs its thread sleeps."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        after_step: Callable[[], None] | None = None,
        watch: Watch | None = None,
    ) -> None:
        """engine      for this runner alone
        after_step  called on the engine's thread when listeners have been told all of a step, so
                    that a thread which waits for many of them is woken once
        watch       clocks the steps of watched jobs
        """
        self._scheduler = Scheduler(engine, limits, watch=watch)
        self._after_step = after_step
        self._listeners: dict[Job, Listener] = {}
        self._open: dict[Job, set[int]] = {}  # answers whose last event has not been passed on
        self._wake = threading.Condition()  # of what follows
        self._close_at: float | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cyclewise-engine", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the thread has ended though nobody closed it: nothing will be answered."""
        return self._error is not None or not (self._thread.is_alive() or self._ended)

    def clock(self) -> float:
        """Seconds by the clock of `Job.deadline` and `Event.time`."""
        return self._scheduler.clock()

    def numbers(self) -> Numbers:
        """What observers want to know."""
        return self._scheduler.numbers()

    def standings(self) -> list[Standing]:
        """Who runs and who waits."""
        return self._scheduler.standings()

    def submit(self, job: Job, listener: Listener) -> None:
        """Take a job on; the listener is told on the engine's thread what becomes of it.

        Raises what `Scheduler.submit` raises, and EngineError if the engine was closed or failed;
        the listener is not called then.
        """
        with self._wake:
            if self.failed:
                raise EngineError("the engine has failed, and answers nothing any more")
            if self._ended or self._close_at is not None:
                raise EngineError("the engine is being closed, and takes nothing on any more")
            self._listeners[job] = listener
            self._open[job] = set(range(job.params.n))
            try:
                self._scheduler.submit(job)
            except BaseException:
                self._forget(job)
                raise
            self._wake.notify()

    def cancel(self, job: Job, index: int | None = None) -> None:
        """End one answer of a job, or all, before the next step begins. Its last event says so,
        unless it has ended by then.
        """
        with self._wake:
            self._scheduler.cancel(job, index)
            self._wake.notify()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take nothing on any more, and end when all is answered; what is not by the time that is
        given ends with EngineError. Returns when the thread has ended.
        """
        with self._wake:
            self._close_at = self.clock() + drain_seconds
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._has_work():
                self._tell_all(self._scheduler.step())
        except BaseException as error:
            self._error = error
        self._end()

    def _has_work(self) -> bool:
        """Wait for work; False when it is time to end."""
        with self._wake:
            while not self._scheduler.has_work:
                if self._close_at is not None:
                    return False
                self._wake.wait()
            return self._close_at is None or self.clock() < self._close_at

    def _end(self) -> None:
        with self._wake:
            self._ended = True
        if self._error is None:
            error = EngineError("the engine was closed before the answer was complete")
        else:
            error = EngineError(f"the engine has failed: {self._error!r}")
            error.__cause__ = self._error
        with suppress(BaseException):  # it may be what has failed
            self._tell_all(self._scheduler.fail_all(error))
        left = [(job, index) for job, indices in self._open.items() for index in sorted(indices)]
        self._tell_all([Event(job, i, self.clock(), [], [], None, error) for job, i in left])

    def _tell_all(self, events: Sequence[Event]) -> None:
        for event in events:
            self._tell(event)
        if events and self._after_step is not None:
            self._after_step()

    def _tell(self, event: Event) -> None:
        job = event.job
        if event.is_last:
            self._open[job].discard(event.index)
        try:
            self._listeners[job](event)
        except Exception:  # nobody listens any more
            self._listeners[job] = _ignore
            self._scheduler.cancel(job)
        if not self._open[job]:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        del self._listeners[job], self._open[job]


def _ignore(event: Event) -> None:
    """The listener of a job whose own has failed."""
