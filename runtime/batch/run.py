"""A batch from beginning to end: its checks, its rows in parts, its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from leanvlm.runtime.batch import local, ray_data
from leanvlm.runtime.batch.parts import Parts
from leanvlm.runtime.batch.source import ANSWER_COLUMNS, Source, Table, arrow, open_source
from leanvlm.runtime.batch.work import Job, Outcome
from leanvlm.runtime.bundle import file_sha256, read_manifest
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.generation import GenerationSettings
from leanvlm.runtime.manifest import MANIFEST
from leanvlm.runtime.optional import require

ENGINES = {"local": "this machine", "ray": "Ray Data"}
PART_ROWS = 64


@dataclass(frozen=True)
class BatchConfig:
    """What `leanvlm batch` was asked.

    Attributes:
        source: A folder of images, a JSONL or a parquet file.
        bundle: Its folder.
        output: The parquet file to write.
        engine: One of `ENGINES`.
        prompt: What rows without one are asked.
        budget: Image tokens kept per crop.
        device: As `load` takes it.
        provider: Likewise.
        threads: Likewise, of each worker.
        workers: Sessions that are open at once.
        rows: Answers at once, of each worker; where that changes a kernel's rounding, a near tie may fall otherwise.
        gpus: Of each worker, with Ray.
        part_rows: Rows of a part, which a kill may cost at most.
        force: Replace the output.
        restart: Throw away what an earlier run has finished.
        options: As `Session.stream` takes them.
    """

    source: Path
    bundle: Path
    output: Path
    engine: str = "local"
    prompt: str | None = None
    budget: int | None = None
    device: str | None = None
    provider: str | None = None
    threads: int | None = None
    workers: int = 1
    rows: int = 1
    gpus: float = 0.0
    part_rows: int = PART_ROWS
    force: bool = False
    restart: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"--engine {self.engine} is not one of {', '.join(ENGINES)}")
        if self.gpus and self.engine != "ray":
            raise InputError("--gpus goes with --engine ray; --device cuda takes the GPU of this machine")


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        rows: Of the output.
        found: Of them, those that an earlier run had finished.
        errors: Rows of this run that failed.
        seconds: That this run took.
    """

    rows: int
    found: int
    errors: int
    seconds: float


Progress = Callable[[int, int, int], None]
"""Is told how many rows there are, how many are done, and how many of this run's failed."""


def run_batch(config: BatchConfig, progress: Progress = lambda rows, done, errors: None) -> Summary:
    """Answer every row of an input.

    Raises:
        LeanVLMError: Something of the input, the bundle or the output cannot be used; nothing was written. Or the run cannot go
            on; what it has finished stays, and the same command goes on from there.
    """
    begin = perf_counter()
    arrow()
    if config.engine == "ray":
        require("ray.data", "scale", "--engine ray")
    manifest = read_manifest(config.bundle)
    budget = manifest.budget(config.budget)
    _check_options(config, manifest.decoder.context_length)
    source = open_source(config.source, config.prompt)
    parts = Parts(config.output, _settings(config, source, budget), _schema(source), source.count, config.part_rows)
    # Absolute, since workers may be elsewhere.
    job = Job(config.bundle.absolute(), budget, config.device, config.provider, config.threads, config.rows, config.options)
    errors = 0
    with parts.opened(force=config.force, restart=config.restart) as missing:
        asked = sum(stop - start for start, stop in map(parts.span, missing))
        done = found = source.count - asked
        progress(source.count, done, errors)
        whole = Collected(parts, source)
        for number, outcome in _outcomes(config, job, source, parts, missing) if missing else ():
            whole.add(number, outcome)
            done, errors = done + 1, errors + (outcome.error is not None)
            progress(source.count, done, errors)
        if parts.folder.is_dir():
            parts.join()
    return Summary(source.count, found, errors, perf_counter() - begin)


def _check_options(config: BatchConfig, context: int) -> None:
    """Refuse what every row would fail of; raises InputError."""
    options = GenerationSettings.from_folder(config.bundle).options(**config.options)
    if options.max_new_tokens >= context:
        raise InputError(f"--max-new-tokens {options.max_new_tokens} leaves no room for a prompt; the context holds {context}")


class Collected:
    """Outcomes until their part is complete, and is written.

    Args:
        parts: Of the output.
        source: Of the rows.
    """

    def __init__(self, parts: Parts, source: Source) -> None:
        self._parts = parts
        self._source = source
        self._open: dict[int, dict[int, Outcome]] = {}

    def add(self, number: int, outcome: Outcome) -> None:
        """Take the outcome of a row."""
        part = number // self._parts.part_rows
        start, stop = self._parts.span(part)
        rows = self._open.setdefault(part, {})
        rows[number] = outcome
        if len(rows) == stop - start:
            answers = [asdict(rows[row]) for row in range(start, stop)]
            table = self._source.carried(start, stop)
            self._parts.write(part, _with_answers(table, answers))
            del self._open[part]


def _outcomes(config: BatchConfig, job: Job, source: Source, parts: Parts, missing: list[int]) -> Iterator[tuple[int, Outcome]]:
    spans = list(map(parts.span, missing))
    if config.engine == "ray":
        return ray_data.outcomes(job, source, spans, config.workers, config.gpus)
    return local.outcomes(job, source, spans, config.workers)


def _settings(config: BatchConfig, source: Source, budget: int) -> dict[str, Any]:
    """Return what the answers depend on. Engine, workers and threads are not among it: a run may go on with others."""
    return {
        "leanvlm": version("leanvlm"),
        "input": source.identity(),
        # The manifest has the checksum of every file.
        "bundle": file_sha256(config.bundle / MANIFEST),
        "prompt": config.prompt,
        "budget": budget,
        "device": config.device,
        "provider": config.provider,
        "rows": config.rows,
        "options": {name: value for name, value in config.options.items() if value not in (None, ())},
    }


def _schema(source: Source) -> Any:
    pa = arrow()
    return pa.schema([*source.schema, *((name, pa.type_for_alias(kind)) for name, kind in ANSWER_COLUMNS.items())])


def _with_answers(table: Table, answers: list[dict[str, Any]]) -> Table:
    pa = arrow()
    for name, kind in ANSWER_COLUMNS.items():
        table = table.append_column(name, pa.array([answer[name] for answer in answers], pa.type_for_alias(kind)))
    return table
