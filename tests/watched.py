"""Sees whether anything opens a file, native code and memory maps included, by the kernel's own word (inotify(7))."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of linux/inotify.h.
IN_ACCESS, IN_OPEN = 0x1, 0x20


class Watch:
    """Open files that are looked after."""

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def touched(self) -> bool:
        """Whether one was opened or read since it was asked last."""
        try:
            return bool(os.read(self._number, 1 << 16))
        except BlockingIOError:
            return False


@contextmanager
def watched(*paths: Path) -> Iterator[Watch]:
    """Look after files, or folders with what is in them."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for path in paths:
            if number < 0 or libc.inotify_add_watch(number, os.fsencode(path), IN_ACCESS | IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), "inotify", str(path))
        yield Watch(number)
    finally:
        os.close(number)
