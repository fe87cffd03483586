"""Where a checkpoint's programs run: one process beside this one, of bounded memory and time, for all bundles.

A chat template is a program, and so are regular expressions of a tokenizer. Whoever wrote the bundle wrote them;
`sandbox_worker` says what they may use up. It is started when a bundle is opened, takes 20 MB, and ends with this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanvlm.runtime.errors import BackendError, InputError

WORKER = Path(__file__).with_name("sandbox_worker.py")
NEEDS = ("jinja2", "markupsafe", "tokenizers")

Reply = tuple[str, Any]


class Sandbox:
    """The process; `sandbox()` returns the one of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._at_exit: Any = None

    def start(self) -> None:
        """Start it, if it does not run, and do not wait until it is ready."""
        with self._lock:
            self._running()

    def stop(self) -> None:
        """End it now and not with this process; the next request starts another."""
        with self._lock:
            self._stop()

    def ask(self, kind: str, *arguments: Any) -> Reply:
        """Send a request and return the reply, as `sandbox_worker` describes them.

        Where the program ended the process, the reply is `size` with the reason.

        Raises:
            BackendError: The process cannot be started.
            InputError: The request holds what JSON does not.
        """
        try:
            line = json.dumps((kind, *arguments), default=_plain).encode() + b"\n"
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"the messages cannot be passed to the chat template: {error}") from error
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:  # Such as Ctrl-C: the reply would be taken for that of the next request.
                self._stop()
                raise
            if not reply.endswith(b"\n"):
                return "size", _reason(self._stop())
        name, value = json.loads(reply)
        return name, value

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        folders = {str(Path(str(spec.origin)).parents[1]) for name in NEEDS if (spec := find_spec(name)) is not None}
        # Isolated from the environment and the working folder; of its own session, so that Ctrl-C is not for it.
        command = [sys.executable, "-I", "-S", str(WORKER), *sorted(folders)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise BackendError(f"chat templates run in a process of their own, which cannot be started: {error}") from error
        self._at_exit = weakref.finalize(self, _end, self._process, os.getpid())
        return self._process

    def _stop(self) -> int:
        """End the process, if there is one, and return its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        self._at_exit.detach()
        _end(process, os.getpid())
        return int(process.returncode)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a process of ours, not one of whom this process was forked from."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):  # What could not be written.
            pipe.close()
    process.wait()


def _reason(status: int) -> str:
    return {-signal.SIGXCPU: "takes too long", -signal.SIGKILL: "needs too much memory"}.get(status, "ended its process")


def _plain(value: Any) -> Any:
    """Return what a template sees of an object that JSON does not have, such as an image in a message."""
    return dict(value) if isinstance(value, Mapping) else str(value)


@cache
def _of(pid: int) -> Sandbox:
    return Sandbox()


def sandbox() -> Sandbox:
    """Return this process's sandbox; one that was forked off gets its own."""
    return _of(os.getpid())
