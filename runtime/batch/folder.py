"""A folder of images, those in its folders too, all asked the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.batch.source import Row, Schema, Table, arrow
from leanvlm.runtime.errors import InputError

# Of the formats that `load_image` opens.
ENDINGS = {
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".tif", ".tiff", ".jp2", ".j2k",
    ".jpx", ".avif", ".heif", ".heic",
}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """Images by their names, in the order of the characters' numbers.

    Attributes:
        path: Of the folder.
        names: Of the images, relative to it.
        prompt: What each is asked.
    """

    path: Path
    names: tuple[str, ...]
    prompt: str

    @classmethod
    def open(cls, path: Path, prompt: str | None) -> Folder:
        """Find the images: files with the ending of an image; what begins with a dot is passed over, links to folders too."""
        if prompt is None:
            raise InputError(f"{path} is a folder of images; give --prompt, which each of them is asked")
        names = []
        for root, folders, files in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found = (os.path.join(root, name) for name in files if not name.startswith("."))
            names += [os.path.relpath(name, path) for name in found if os.path.splitext(name)[1].lower() in ENDINGS]
        if not names:
            raise InputError(f"{path} has no images in it ({', '.join(sorted(ENDINGS))})")
        return cls(path, tuple(sorted(names)), prompt)

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.names)

    @property
    def schema(self) -> Schema:
        """The name of each image, as id and as path."""
        pa = arrow()
        return pa.schema([("id", pa.string()), ("image", pa.string())])

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Yield a question for each image."""
        for name in self.names[start:stop]:
            yield Row((self.path / name,), self.prompt)

    def carried(self, start: int, stop: int) -> Table:
        """Return the images' names; bytes of one that are no UTF-8 are escaped."""
        names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in self.names[start:stop]]
        return arrow().table({"id": names, "image": names}, schema=self.schema)

    def identity(self) -> Mapping[str, Any]:
        """Return a checksum of names, sizes and times of change."""
        digest = hashlib.sha256()
        for name in self.names:
            status = (self.path / name).lstat()
            digest.update(os.fsencode(name) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return {"kind": "folder", "rows": self.count, "sha256": digest.hexdigest()}


def _raise(error: OSError) -> None:
    raise error
