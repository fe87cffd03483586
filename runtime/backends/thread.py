"""A thread that does all work of one kind."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue


class _Job:
    """Work, and how it ended. A queue wakes whoever waits sooner than a lock or an event does, by 10 us or more."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.error: BaseException | None = None
        self.ended = False
        self.signal: SimpleQueue[None] = SimpleQueue()


class OneThread:
    """Does work on one thread of its own, whoever asks, and waits for it; the thread ends with this object."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._started = False

    def run(self, work: Callable[[], object]) -> None:
        """Do the work and return when it is done; raises what it raises. One caller at a time."""
        if not self._started:
            self._started = True
            threading.Thread(target=_serve, args=(self._jobs,), name="leanvlm-device", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        job = _Job(work)
        self._jobs.put(job)
        try:
            job.signal.get()
        except BaseException:  # Ctrl-C: what the work writes to is not free before it ends.
            while not job.ended:
                time.sleep(0.001)
            raise
        error = job.error
        if error is not None:
            try:
                raise error
            finally:
                # The error knows this frame: it must not know the error, or both would stay, and what they hold.
                del error, job


def _serve(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job.work()
        except BaseException as error:
            job.error = error
        job.ended = True
        job.signal.put(None)
        # Waiting for the next one must not hold on to this one's tensors.
        del job
