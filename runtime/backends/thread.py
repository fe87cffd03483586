"""A thread that does all work of one kind."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

from leanvlm.runtime.errors import BackendError

# Seconds that the end of a thread's owner waits for the work in hand: a step takes milliseconds.
PATIENCE = 10.0


class Job:
    """Work that a thread was given, and how it ended. A queue wakes whoever waits sooner than a lock or an event, by 10 us."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work: Callable[[], object] | None = work
        self.error: BaseException | None = None
        self.failed = self.ended = False
        self._signal: SimpleQueue[None] = SimpleQueue()

    def do(self) -> None:
        """Do the work: on the thread that was given it."""
        assert self.work is not None
        try:
            self.work()
        except BaseException as error:
            self.error, self.failed = error, True
        # Nobody may hold on to its tensors because it is remembered.
        self.work = None
        self.ended = True
        self._signal.put(None)

    def wait(self) -> None:
        """Return when the work is done.

        Raises:
            BackendError: It failed, and an earlier call said how.
            BaseException: What the work raised.
        """
        self.join()
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                # The error knows this frame: it must not know the error, or both would stay, and what they hold.
                del error
        if self.failed:
            raise BackendError("the run that this one needs failed")

    def join(self) -> None:
        """Return when the work is done, however it ended. One caller at a time."""
        try:
            if not self.ended:
                self._signal.get()
        except BaseException:  # Ctrl-C: what the work writes to is not free before it ends.
            while not self.ended:
                time.sleep(0.001)
            raise


class OneThread:
    """Does work on one thread of its own, whoever asks; the thread ends with this object."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], object]) -> Job:
        """Give the thread work, behind what it was given before."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._jobs,), name="leanvlm-device", daemon=True)
            self._thread.start()
            weakref.finalize(self, _end, self._jobs, self._thread)
        job = Job(work)
        self._jobs.put(job)
        return job

    def run(self, work: Callable[[], object]) -> None:
        """Do the work and return when it is done; raises what it raises. Work of the thread's own is done at once."""
        if self._thread is threading.current_thread():
            work()
        else:
            self.start(work).wait()


def _end(jobs: SimpleQueue[Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    # When the interpreter ends, what the work uses must not go before the work has.
    if thread is not threading.current_thread():
        thread.join(PATIENCE)


def _serve(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.do()
        # Waiting for the next one must not hold on to this one.
        del job
