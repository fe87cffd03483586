"""Where a batch's rows come from: a folder of images, a JSONL file or a parquet file, all read a stretch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.optional import require

# pyarrow has no types of its own.
Table = Any
Schema = Any

# What the output adds to the columns of the input, with Arrow's names for their types.
ANSWER_COLUMNS = {
    "text": "string",
    "finish_reason": "string",
    "prompt_tokens": "int32",
    "completion_tokens": "int32",
    "kept": "int32",
    "total": "int32",
    "time_to_first_token_ms": "float64",
    "error": "string",
}
ASKED_COLUMNS = ("image", "images", "prompt")


@dataclass(frozen=True)
class Row:
    """A question of a batch.

    Attributes:
        images: In order: paths, or the bytes of image files.
        prompt: What to ask.
        error: Why it cannot be asked, if so.
    """

    images: tuple[Path | bytes, ...] = ()
    prompt: str = ""
    error: str | None = None


class Source(Protocol):
    """Rows by their numbers; it can be handed to another process, which opens the files for itself."""

    @property
    def count(self) -> int:
        """How many rows there are."""
        ...

    @property
    def schema(self) -> Schema:
        """Of what the output has of the input: `id`, then the columns that are carried along, without bytes of images."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows from `start` up to `stop`."""
        ...

    def carried(self, start: int, stop: int) -> Table:
        """Return the columns of `schema` for the rows from `start` up to `stop`."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return what changes when the input does, for JSON."""
        ...


def arrow(module: str = "pyarrow") -> Any:
    """Import pyarrow, or a module of it."""
    return require(module, "scale", "reading and writing parquet")


def open_source(path: Path, prompt: str | None) -> Source:
    """Open a batch's input, and check what can be checked of it before any work.

    Args:
        path: A folder, or a file whose ending says what it is.
        prompt: What to ask of rows without a prompt of their own.

    Raises:
        InputError: It is missing, unreadable, of another kind or malformed; of a JSONL file with the number of the line.
    """
    # Imported here, since each of them imports this module.
    from leanvlm.runtime.batch.folder import Folder
    from leanvlm.runtime.batch.jsonl import Jsonl
    from leanvlm.runtime.batch.parquet import Parquet

    kinds: dict[str, type[Jsonl] | type[Parquet]] = {".jsonl": Jsonl, ".ndjson": Jsonl, ".parquet": Parquet}
    if path.is_dir():
        return Folder.open(path, prompt)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder of images, or a file that ends in {', '.join(kinds)}")
    if path.suffix.lower() not in kinds:
        raise InputError(f"{path} is no folder and does not end in {', '.join(kinds)}")
    try:
        return kinds[path.suffix.lower()].open(path, prompt)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def check_columns(path: Path, names: Sequence[str], prompt: str | None) -> None:
    """Check the names of a file's columns.

    Raises:
        InputError: One comes twice or is one of the output's own, or there is no image or nothing to ask.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r} twice; rename one")
    taken = [name for name in names if name in ANSWER_COLUMNS]
    if taken:
        raise InputError(f"{path} has a column {taken[0]!r}, which is a name of the answer's ({', '.join(ANSWER_COLUMNS)})")
    if ("image" in names) == ("images" in names):
        raise InputError(f"{path} needs a column image (a path, or bytes) or a column images (lists of them), and not both")
    if "prompt" not in names and prompt is None:
        raise InputError(f"{path} has no column prompt; give --prompt")


def file_identity(path: Path) -> Mapping[str, Any]:
    """Return a file's size and time of change, since it may be too large to hash."""
    status = path.stat()
    return {"bytes": status.st_size, "changed": status.st_mtime_ns}
