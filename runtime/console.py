"""How commands talk: results on standard output, everything else on standard error, errors in one line."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from leanvlm.runtime.errors import LeanVLMError

INTERRUPTED = 130


def stderr_console() -> Console:
    """Return a console on standard error, for progress and notes."""
    return Console(file=sys.stderr, highlight=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line for an error that a user can mend: status 2, or 130 for Ctrl-C.

    A full disk, a missing permission and the like are such errors; anything else is a bug and keeps its traceback.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except LeanVLMError as error:
            _fail(str(error), error.exit_status)
        except BrokenPipeError:
            sys.stderr.close()
            raise SystemExit(1) from None
        except OSError as error:
            if error.errno is None:
                raise
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
            _fail(f"{reason}: {error.filename}" if error.filename else reason, 2)


def _fail(message: str, status: int) -> None:
    print(f"leanvlm: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    """Show our own warnings as one line; libraries' are for developers."""
    if category is UserWarning:
        print(f"leanvlm: warning: {message}", file=sys.stderr)
