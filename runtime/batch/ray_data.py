"""Batches on a cluster: Ray Data gives parts to actors, each of which opens the bundle once.

The bundle and the input must have the same paths on every machine, as on a shared disk. The parts are written where the command
runs, so there is one writer, whatever happens to the actors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from leanvlm.runtime.batch.source import Source
from leanvlm.runtime.batch.work import Job, Outcome, Worker
from leanvlm.runtime.errors import BackendError, LeanVLMError
from leanvlm.runtime.optional import require

FAILED = -1


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
        """Answer the rows of each stretch; what ends the run is told too, since Ray would wrap an error several times."""
        starts, told = [], []
        try:
            # Opened by the first call, so that an error of the bundle is told likewise.
            self._worker = self._worker or Worker(self._job)
            for start, stop in zip(batch["start"], batch["stop"], strict=True):
                rows = self._source.rows(int(start), int(stop))
                starts.append(int(start))
                told.append(json.dumps([asdict(outcome) for outcome in self._worker.answers(rows)]))
        except LeanVLMError as error:
            return {"start": [FAILED], "told": [str(error)]}
        return {"start": starts, "told": told}


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
    # What goes wrong is said in one line.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    try:
        data.DataContext.get_current().enable_progress_bars = False
        # A block a part, so that each comes back when it is done.
        asked = data.from_items([{"start": start, "stop": stop} for start, stop in spans], override_num_blocks=len(spans))
        pool = data.ActorPoolStrategy(size=workers)
        needs = {"num_cpus": job.threads or 1, "num_gpus": gpus}
        answered = asked.map_batches(Parts, fn_constructor_args=(job, source), batch_size=1, compute=pool, **needs)
        for record in answered.iter_rows():
            if record["start"] == FAILED:
                raise BackendError(record["told"])
            for number, told in enumerate(json.loads(record["told"]), int(record["start"])):
                yield number, Outcome(**told)
    except ray.exceptions.RayError as error:
        raise BackendError(f"Ray ended the run: {' '.join(str(error).split())[:500]}") from error
    finally:
        if ours:
            ray.shutdown()
