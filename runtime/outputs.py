"""The files that a command writes for its user: checked before the work, and there as a whole or not at all.

A file is replaced only by what a command of ours wrote before: reports have the version in them, pages and pictures a mark.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.signals import deferred_signals, raise_again

if TYPE_CHECKING:
    from PIL.Image import Image

PNG_MARK = ("Software", "leanvlm")
PAGE_MARK = '<!doctype html><html lang="en"><meta charset="utf-8"><title>leanvlm profile</title>'
# Beyond any report; nothing larger is read to tell whose it is.
LARGEST_REPORT = 1 << 26


def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[Path] = ()) -> None:
    """Check, before any work, the files that a command is to write.

    Args:
        outputs: The option that names each file, and the file; None where the option is not given.
        inputs: Files that the command reads, and folders all of whose files it may read.

    Raises:
        InputError: A file is a folder, or is in none or in one that cannot be written, is an input, is named by two options, or
            is there and was not written by leanvlm.
    """
    seen: dict[str, Path] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        check_place(option, path, inputs)
        for other, taken in seen.items():
            if _one_file(path, taken):
                raise InputError(f"{other} {taken} and {option} {path} are one file; each needs its own")
        seen[option] = path
        _check_path(option, path)


def check_place(option: str, path: Path, inputs: Sequence[Path]) -> None:
    """Check that an output is a file in a folder that is there, and none of what the command reads.

    Raises:
        InputError: It is a folder, is in none, is an input or in a folder of inputs.
    """
    if os.path.isdir(path):
        raise InputError(f"{option} {path} is a folder; give a file")
    if not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    for read in inputs:
        if _one_file(path, read):
            raise InputError(f"{option} {path} is an input, which would be lost; give another file")
        if os.path.isdir(read) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(read)):
            raise InputError(f"{option} {path} is in {read}, which the command reads; give a file elsewhere")


def check_picture(option: str, path: Path | None) -> None:
    """Check, before any work, the ending of a picture's file; raises InputError where it is not .png."""
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"{option} {path} must end in .png")


def check_folder(folder: Path, what: str) -> None:
    """Check that a file can be made in a folder; raises InputError, which calls the file `what`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what} cannot be written: {error.strerror} in {folder}") from error


def _check_path(option: str, path: Path) -> None:
    """Check that a file can be written, and that none of the user's own is there."""
    if _is_special(path):
        return
    try:
        # Also a link that leads to itself, or a name that is too long, fails here.
        for name in (path, _unfinished(path)):
            with suppress(FileNotFoundError):
                name.stat()
        if path.exists():
            if not _written_by_us(path):
                raise InputError(f"{option} {path} is there and was not written by leanvlm; give another name, or move it")
            path.open("ab").close()
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {error.strerror}") from error
    check_folder(_real(path).parent, f"{option} {path}")


def write_outputs(contents: Mapping[Path, bytes]) -> None:
    """Write files that all appear when each is whole; until then, and if one cannot be written, the older ones stay.

    A link is followed, and a device or a pipe written to as it is.
    """
    with ExitStack() as stack:
        whole = {}
        for path, content in contents.items():
            if _is_special(path):
                path.write_bytes(content)
                continue
            new = _unfinished(path)
            stack.callback(new.unlink, missing_ok=True)
            new.write_bytes(content)
            whole[new] = _real(path)
        raise_again()
        with deferred_signals():
            for new, path in whole.items():
                new.replace(path)


def png_bytes(picture: Image) -> bytes:
    """Return a picture as a PNG file that says who wrote it."""
    from PIL.PngImagePlugin import PngInfo

    mark, buffer = PngInfo(), BytesIO()
    mark.add_text(*PNG_MARK)
    picture.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def json_bytes(figures: Mapping[str, object]) -> bytes:
    """Return a report, whose `versions` must name leanvlm's, as a JSON file."""
    return (json.dumps(figures, indent=1) + "\n").encode()


def _written_by_us(path: Path) -> bool:
    """Whether a file is empty, or a report, page or picture that a command wrote."""
    if path.stat().st_size > LARGEST_REPORT:
        return False
    content = path.read_bytes()
    head = content[:200]
    if not content or head.startswith(PAGE_MARK.encode()):
        return True
    if head.startswith(b"\x89PNG"):
        return b"tEXt" + "\0".join(PNG_MARK).encode() in head
    try:
        return "leanvlm" in json.loads(content)["versions"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _unfinished(path: Path) -> Path:
    real = _real(path)
    return real.with_name(f".{real.name}.new")


def _one_file(first: Path, second: Path) -> bool:
    """Whether two paths are one file, or would be: also through links, where the file is not there yet."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)
