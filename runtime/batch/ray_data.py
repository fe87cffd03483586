"""Batches on a cluster: Ray Data gives parts to actors, each of which opens the bundle once.

The bundle and the input must have the same paths on every machine, as on a shared disk. The parts are written where the command
runs, so there is one writer, whatever happens to the actors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from leanvlm.runtime.batch.source import Source
from leanvlm.runtime.batch.work import Job, Outcome, Worker
from leanvlm.runtime.errors import BackendError, LeanVLMError
from leanvlm.runtime.optional import require


class Parts:
    """What an actor does: rows from a first one up to a last, answered.

    Args:
        job: How.
        source: Of the rows.
    """

    def __init__(self, job: Job, source: Source) -> None:
        self._job = job
        self._source = source
        self._worker: Worker | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Answer the rows of each stretch; the first opens the bundle, so that an error of it is told as one of a call."""
        if self._worker is None:
            self._worker = Worker(self._job)
        told = []
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            rows = self._source.rows(int(start), int(stop))
            told.append(json.dumps([asdict(self._worker.answer(row)) for row in rows]))
        return {"start": list(batch["start"]), "told": told}


def outcomes(
    job: Job, source: Source, spans: Sequence[tuple[int, int]], workers: int, gpus: float
) -> Iterator[tuple[int, Outcome]]:
    """Answer rows on a cluster: that of `RAY_ADDRESS`, one that runs on this machine, or one that ends with the call.

    Args:
        job: How.
        source: Of the rows.
        spans: First row, and the one behind the last, of each part.
        workers: Actors.
        gpus: Of each actor.

    Yields:
        Numbers of rows with their outcomes, those of a part together, parts in any order.

    Raises:
        LeanVLMError: The bundle cannot be used, or the input cannot be read on.
    """
    ray, data = require("ray", "scale"), require("ray.data", "scale")
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        # A block a part, so that each comes back when it is done.
        asked = data.from_items([{"start": start, "stop": stop} for start, stop in spans], override_num_blocks=len(spans))
        answered = asked.map_batches(
            Parts,
            fn_constructor_args=(job, source),
            batch_size=1,
            concurrency=workers,
            num_cpus=job.threads or 1,
            num_gpus=gpus,
        )
        for record in answered.iter_rows():
            for number, told in enumerate(json.loads(record["told"]), int(record["start"])):
                yield number, Outcome(**told)
    except ray.exceptions.RayError as error:
        raise _ours(error) from error
    finally:
        if ours:
            ray.shutdown()


def _ours(error: BaseException) -> LeanVLMError:
    """Return the error of ours that is behind one of Ray's."""
    cause: Any = error
    while cause is not None:
        if isinstance(cause, LeanVLMError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return BackendError(f"Ray ended the run: {' '.join(str(error).split())[:500]}")
