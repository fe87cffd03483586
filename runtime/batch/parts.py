"""A batch's output while it is made: a folder of finished parts beside it, from which a run that was killed goes on.

A part is a parquet file of as many rows as every other, and gets its name when it is whole. So a row is in exactly one
part, however often a run is killed. `run.json` says what the parts are answers to.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanvlm.runtime.batch.source import Schema, Table, arrow
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.outputs import check_folder
from leanvlm.runtime.records import load_json

RUN, LOCK = "run.json", "lock"
# What the output says of its run; also how a file of ours is told from others.
METADATA = b"leanvlm.batch"


class Parts:
    """The parts of an output.

    Args:
        output: The file that is made in the end.
        settings: What the answers depend on, as JSON holds it.
        schema: Of the output.
        rows: How many there are.
        part_rows: How many a part has; the last may have fewer.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], schema: Schema, rows: int, part_rows: int) -> None:
        # A link is followed.
        self.output = Path(os.path.realpath(output))
        self.folder = self.output.with_name(f"{self.output.name}.parts")
        self.rows = rows
        self.part_rows = part_rows
        self._settings = {**settings, "part_rows": part_rows}
        self._schema = schema.with_metadata({METADATA: json.dumps(self._settings, sort_keys=True)})

    @property
    def count(self) -> int:
        """How many parts there are in the end."""
        return -(-self.rows // self.part_rows)

    def span(self, number: int) -> tuple[int, int]:
        """Return the first row of a part, and the one behind its last."""
        return number * self.part_rows, min((number + 1) * self.part_rows, self.rows)

    @contextmanager
    def opened(self, *, force: bool, restart: bool) -> Iterator[list[int]]:
        """Take the folder for this run, and yield the numbers of the parts that are missing.

        Args:
            force: An output that is there may be replaced, if a batch wrote it.
            restart: Parts that are there are thrown away.

        Raises:
            InputError: The output is there, another run is at work, or the parts are answers to something else.
        """
        if self._is_finished():
            # Killed between its last two steps.
            self._remove()
            yield []
            return
        self._check_output(force)
        check_folder(self.output.parent, f"--output {self.output}")
        self.folder.mkdir(exist_ok=True)
        with (self.folder / LOCK).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is writing {self.output}; wait for it, or give another --output") from None
            if restart:
                for path in self.folder.iterdir():
                    if path.name != LOCK:
                        path.unlink()
            self._check_settings()
            try:
                yield [number for number in range(self.count) if not self._is_whole(number)]
            finally:
                # A run that never finished anything leaves nothing.
                if self.folder.is_dir() and not any(self.folder.glob("part-*")):
                    shutil.rmtree(self.folder)

    def write(self, number: int, table: Table) -> None:
        """Write a part, whose columns are those of the schema."""
        path = self._path(number)
        new = path.with_name(f".{path.name}.new")
        with new.open("wb") as file:
            arrow("pyarrow.parquet").write_table(table.cast(self._schema), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def join(self) -> None:
        """Make the output of all parts, in order, and remove them."""
        pq = arrow("pyarrow.parquet")
        new = self.folder / f".{self.output.name}.new"
        with pq.ParquetWriter(new, self._schema) as writer:
            for number in range(self.count):
                writer.write_table(pq.read_table(self._path(number), partitioning=None).cast(self._schema))
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(self.output)
        self._remove()

    def _remove(self) -> None:
        """Remove the parts, and only then what says whose they are: a run that is stopped between goes on here."""
        for path in self.folder.glob("part-*"):
            path.unlink()
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.parquet"

    def _check_settings(self) -> None:
        path = self.folder / RUN
        if path.is_file():
            there = load_json(path, InputError)
            names = there.keys() | self._settings.keys() if isinstance(there, dict) else {"all"}
            changed = sorted(name for name in names if isinstance(there, dict) and there.get(name) != self._settings.get(name))
            if changed or not isinstance(there, dict):
                raise InputError(
                    f"{self.folder} holds parts of other settings ({', '.join(changed) or RUN}); repeat its command, "
                    "or give --restart to throw them away"
                )
            return
        foreign = sorted(file.name for file in self.folder.iterdir() if file.name not in (LOCK, f".{RUN}.new"))
        if foreign:
            raise InputError(f"{self.folder} holds {foreign[0]} and no {RUN}: it is no batch's; move it, or give --restart")
        new = self.folder / f".{RUN}.new"
        new.write_text(json.dumps(self._settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        new.replace(path)

    def _is_whole(self, number: int) -> bool:
        """Whether a part is there, and was not cut short, as by a lost machine."""
        path = self._path(number)
        if not path.is_file():
            return False
        first, last = self.span(number)
        try:
            return bool(arrow("pyarrow.parquet").read_metadata(path).num_rows == last - first)
        except (arrow().ArrowException, OSError):
            return False

    def _is_finished(self) -> bool:
        """Whether the output is this very run's, and only its parts were left."""
        return self.folder.is_dir() and (self.folder / RUN).is_file() and self._written() == self._schema.metadata[METADATA]

    def _check_output(self, force: bool) -> None:
        if not os.path.lexists(self.output):
            return
        if not self.output.is_file():
            raise InputError(f"--output {self.output} is no file; give another name")
        if self._written() is None:
            raise InputError(f"--output {self.output} is there and no batch of ours wrote it; give another name, or move it")
        if not force:
            raise InputError(f"--output {self.output} is there; give another name, or --force to replace it")

    def _written(self) -> bytes | None:
        """Return what the output that is there says of its run; None where none of ours is there."""
        if not self.output.is_file():
            return None
        try:
            metadata = arrow("pyarrow.parquet").read_schema(self.output).metadata or {}
        except (arrow().ArrowException, OSError):
            return None
        found = metadata.get(METADATA)
        return None if found is None else bytes(found)
