"""A parquet file, whose images are paths relative to it, bytes, or both in one record as Hugging Face's datasets have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.batch.source import ASKED_COLUMNS, Row, Schema, Table, arrow, check_columns, file_identity
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.records import shorten

# Rows that are held at once, with the bytes of their images.
HELD = 32
WANTED = "paths (strings), bytes, or records of bytes and path"


@dataclass(frozen=True)
class Parquet:
    """The rows of a file; row groups are read one at a time.

    Attributes:
        path: Of the file.
        groups: How many rows each row group has.
        prompt: What rows without a prompt are asked.
    """

    path: Path
    groups: tuple[int, ...]
    prompt: str | None

    @classmethod
    def open(cls, path: Path, prompt: str | None) -> Parquet:
        """Read the file's own description, and check its columns."""
        with _readable(path) as file:
            meta, schema = file.metadata, file.schema_arrow
            check_columns(path, schema.names, prompt)
            _check_types(path, schema)
            if not meta.num_rows:
                raise InputError(f"{path} has no rows in it")
            return cls(path, tuple(meta.row_group(number).num_rows for number in range(meta.num_row_groups)), prompt)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return sum(self.groups)

    @property
    def schema(self) -> Schema:
        """The file's own, with the row's number where it has no id, paths of images as they are and no bytes of them."""
        pa = arrow()
        with _readable(self.path) as file:
            fields = [field for field in map(_kept, file.schema_arrow) if field is not None]
        identity = next((field for field in fields if field.name == "id"), pa.field("id", pa.int64()))
        return pa.schema([identity, *(field for field in fields if field.name != "id")])

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Yield a question for each row; what is missing in one is its error."""
        for batch in self._batches(start, stop, ASKED_COLUMNS):
            for record in batch.to_pylist():
                yield self._row(record)

    def carried(self, start: int, stop: int) -> Table:
        """Return the columns of the schema."""
        pa, schema = arrow(), self.schema
        columns = {"id": pa.array(range(start, stop), pa.int64())}
        if batches := list(self._batches(start, stop, schema.names)):
            table = pa.Table.from_batches(batches)
            columns |= {name: table[name] for name in table.column_names}
        return pa.table([_paths(columns[field.name], field.type) for field in schema], schema=schema)

    def identity(self) -> Mapping[str, Any]:
        """Return the file's size and time of change."""
        return {"kind": "parquet", "rows": self.count, **file_identity(self.path)}

    def _row(self, record: Mapping[str, Any]) -> Row:
        images = record["images"] if "images" in record else [record["image"]]
        found = tuple(map(self._image, images or ()))
        prompt = record.get("prompt") or self.prompt or ""
        missing = "no image" if not found or None in found else "no prompt" if not prompt.strip() else None
        return Row(error=f"the row has {missing}") if missing else Row(tuple(one for one in found if one is not None), prompt)

    def _image(self, value: Any) -> Path | bytes | None:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return self.path.parent / value if value and "\0" not in value else None
        return value or None

    def _batches(self, start: int, stop: int, names: Any) -> Iterator[Any]:
        """Yield the rows in batches of at most `HELD`."""
        begin = 0
        with _readable(self.path) as file:
            columns = [name for name in file.schema_arrow.names if name in names]
            for number, size in enumerate(self.groups if columns else ()):
                first, last = max(start - begin, 0), min(stop - begin, size)
                begin += size
                if first < last:
                    yield from _cut(file.iter_batches(HELD, row_groups=[number], columns=columns), first, last)


def _cut(batches: Any, first: int, last: int) -> Iterator[Any]:
    """Yield the rows from `first` up to `last` of batches that follow one another."""
    begin = 0
    for batch in batches:
        low, high = max(first - begin, 0), min(last - begin, batch.num_rows)
        begin += batch.num_rows
        if low < high:
            yield batch.slice(low, high - low)
        if begin >= last:
            return


@contextmanager
def _readable(path: Path) -> Iterator[Any]:
    """Open a parquet file, and say in one line what is wrong with it."""
    pa, pq = arrow(), arrow("pyarrow.parquet")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {shorten(error)}") from error


def _check_types(path: Path, schema: Schema) -> None:
    types = arrow("pyarrow.types")
    for field in schema:
        kind = field.type
        if field.name == "images":
            if not (types.is_list(kind) or types.is_large_list(kind)):
                raise InputError(f"{path}: the column images has {kind}, not lists of {WANTED}")
            kind = kind.value_type
        if field.name in ("image", "images") and not (_is_text(kind) or _is_bytes(kind) or _is_record(kind)):
            raise InputError(f"{path}: the column {field.name} has {kind}, not {WANTED}")
        if field.name == "prompt" and not _is_text(kind):
            raise InputError(f"{path}: the column prompt has {kind}, not strings")


def _is_text(kind: Any) -> bool:
    types = arrow("pyarrow.types")
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_bytes(kind: Any) -> bool:
    types = arrow("pyarrow.types")
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_record(kind: Any) -> bool:
    return bool(arrow("pyarrow.types").is_struct(kind)) and {"bytes", "path"} >= {
        kind.field(i).name for i in range(kind.num_fields)
    }


def _kept(field: Any) -> Any:
    """Return what the output has of a column: of records the path, of bytes nothing (None)."""
    if field.name not in ("image", "images"):
        return field.remove_metadata()
    pa = arrow()
    kind = field.type if field.name == "image" else field.type.value_type
    if _is_record(kind) and kind.get_field_index("path") >= 0:
        return pa.field(field.name, pa.string() if field.name == "image" else pa.list_(pa.string()))
    return field.remove_metadata() if _is_text(kind) else None


def _paths(column: Any, kind: Any) -> Any:
    """Return a column with the paths of its records."""
    if column.type == kind:
        return column
    pa = arrow()
    path = _path_of if kind == pa.string() else _paths_of
    return pa.array([path(value) for value in column.to_pylist()], kind)


def _path_of(value: Any) -> Any:
    return value and value.get("path")


def _paths_of(values: Any) -> Any:
    return values and [_path_of(value) for value in values]
