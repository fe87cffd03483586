"""Batches on this machine: one session in this process, or several, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import islice
from multiprocessing.connection import wait

from leanvlm.runtime.batch.source import Row, Source
from leanvlm.runtime.batch.work import Job, Outcome, Worker
from leanvlm.runtime.errors import BackendError

AHEAD = 4
"""Calls in hand for each worker: one that takes long holds up those behind it, since rows come in order."""
TOGETHER = 4
"""Rows of a call for each that is answered at once: at its end fewer and fewer are."""


def outcomes(job: Job, source: Source, spans: Sequence[tuple[int, int]], workers: int) -> Iterator[tuple[int, Outcome]]:
    """Answer rows.

    Args:
        job: How.
        source: Of the rows.
        spans: First row, and the one behind the last, of each stretch of rows.
        workers: Sessions.

    Yields:
        Numbers of rows, in order, with their outcomes.

    Raises:
        LeanVLMError: The bundle cannot be used, the input cannot be read on, or a worker's process has ended.
    """
    numbers = (number for start, stop in spans for number in range(start, stop))
    rows = (row for start, stop in spans for row in source.rows(start, stop))
    if workers == 1:
        with closing(Worker(job)) as worker:
            yield from zip(numbers, worker.answers(rows), strict=True)
    else:
        yield from zip(numbers, _in_processes(job, rows, workers), strict=True)


def _in_processes(job: Job, rows: Iterator[Row], workers: int) -> Iterator[Outcome]:
    others = {*multiprocessing.active_children()}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(job,))
    size = 1 if job.rows == 1 else TOGETHER * job.rows
    calls = iter(lambda: list(islice(rows, size)), [])
    try:
        waiting = deque(pool.submit(_answer, call) for call in islice(calls, AHEAD * workers))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(_answer, call) for call in islice(calls, 1))
        pool.shutdown()
    except BrokenProcessPool as error:
        raise BackendError("a worker's process has ended, as when memory runs out; fewer --workers take less") from error
    finally:
        # Whatever ended the run: nothing that is in hand is waited for.
        for process in {*multiprocessing.active_children()} - others:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


# Of a worker's process.
_job: Job
_worker: Worker | None = None


def _begin(job: Job) -> None:
    """Make a worker's process leave Ctrl-C to its parent, and end with it, also where that is killed."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _answer(rows: Sequence[Row]) -> list[Outcome]:
    """Answer rows; the first opens the bundle, so that an error of it reaches the parent as that row's."""
    global _worker
    if _worker is None:
        _worker = Worker(_job)
    return list(_worker.answers(rows))
