"""How commands talk: results on standard output, everything else on standard error, errors in one line."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvlm.runtime.errors import InputError, LeanVLMError, LeanVLMWarning
from leanvlm.runtime.signals import Terminated, raised_when_terminated

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130


def stderr_console() -> Console:
    """Return a console on standard error, for progress and notes."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def check_utf8(folder: str | Path) -> None:
    """Check that the name of a bundle's or checkpoint's folder is UTF-8: the libraries that open files in it take no other.

    Raises:
        InputError: It is not.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise InputError(f"the folder's name {folder} is not valid UTF-8, which is needed; rename it") from None


def help_without_command(context: Any) -> None:
    """Print the help of a command that has others and was called without one."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def parse_ids(option: str, text: str | None) -> tuple[int, ...] | None:
    """Read token ids such as 5,6; None stays None.

    Raises:
        InputError: Something that is no token id.
    """
    if text is None:
        return None
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise InputError(f"{option} {text!r} is not a list of token ids, such as 5,6")
    return tuple(int(part) for part in text.split(","))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line for an error that a user can mend: status 2.

    Ctrl-C, SIGTERM and SIGHUP end it with one line too, when what is half-done is cleared away: status 130, 143 and 129. A full
    disk, a missing permission and the like are errors of the first kind; anything else is a bug and keeps its traceback.
    """
    _prepare_streams()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with raised_when_terminated():
                yield
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except ImportError as error:
            # A compiled module that Ctrl-C stops while it is imported says only that it could not be.
            if not _was_interrupted(error):
                raise
            _fail("interrupted", INTERRUPTED)
        except Terminated as end:
            _fail(end.reason, int(end.code or 0))
        except LeanVLMError as error:
            _fail(str(error), error.exit_status)
        except BrokenPipeError:
            # Nobody reads on; what is still in the buffer would fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except OSError as error:
            if error.errno is None:
                raise
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
            _fail(f"{reason}: {error.filename}" if error.filename else reason, 2)


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an error."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_utf8(stream: Any) -> bool:
    """Return whether a stream can write every character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def _prepare_streams() -> None:
    """Make the standard streams usable whatever they are.

    One that is closed (`>&-`) is the null device: else what belongs to standard error would go to standard output, and a file
    opened later would get the free number, and a library's messages. Output escapes what its encoding does not have, such
    as a kanji on a terminal of Latin letters; input keeps bytes that are no text, as names of files may have them.
    """
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _fail(message: str, status: int) -> None:
    # The status says it where nobody can be told.
    with suppress(OSError):
        print(f"leanvlm: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    """Show our own warnings as one line; libraries' are for developers."""
    if issubclass(category, LeanVLMWarning):
        print(f"leanvlm: warning: {message}", file=sys.stderr)
