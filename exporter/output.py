"""The folder that a bundle is written to: what may be replaced there, and how a finished bundle gets there.

Nothing is ever renamed over something else. A path is taken by making an empty folder, which only one can do, and on POSIX a
folder is renamed over an empty one only. An older bundle moves into the scratch folder first and is removed with it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from leanvlm.exporter.config import ExportConfig
from leanvlm.runtime.backends.portable import CACHE
from leanvlm.runtime.console import check_utf8
from leanvlm.runtime.engines.build import KERNELS, TIMING_CACHE
from leanvlm.runtime.engines.jobs import ENGINES
from leanvlm.runtime.errors import InputError, LeanVLMWarning
from leanvlm.runtime.manifest import MANIFEST
from leanvlm.runtime.outputs import check_folder
from leanvlm.runtime.signals import deferred_signals

# Path in a folder to size and time of change.
Files = Mapping[str, tuple[int, int]]


def check_output(config: ExportConfig) -> None:
    """Check that the output folder can be written.

    Raises:
        InputError: It exists and `force` is off, it holds something else than a bundle, its name is not UTF-8, another export
            writes it, or nothing can be written there.
    """
    output = config.output_folder
    check_utf8(output)
    files_replaced(config)
    _left_over(output)
    # What is missing of its parents is made with it.
    check_folder(next(parent for parent in output.parents if os.path.lexists(parent)), f"-o {config.named_output}")


def files_replaced(config: ExportConfig) -> Files:
    """Return the files that a new bundle would replace.

    Raises:
        InputError: They may not be replaced.
    """
    output = config.output_folder
    if output.is_symlink():
        real = Path(os.path.realpath(output))
        absent = "" if real.exists() else ", which does not exist"
        raise InputError(f"{output} is a link to {real}{absent}; remove the link, or name that folder itself with -o")
    if not output.exists():
        return {}
    if not config.force:
        replaceable = ", or pass --force to replace it" if output.is_dir() else ""
        raise InputError(f"{output} exists; choose another -o{replaceable}")
    if config.here.is_relative_to(output):
        raise InputError(f"the current folder is in {output}, which --force would replace; go elsewhere, or choose another -o")
    return _files_of_bundle(output, output)


def _files_of_bundle(folder: Path, output: Path) -> Files:
    """Return the files of a bundle, called `output` in errors; raises InputError where it holds others than its own."""
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{output} exists and is not a bundle; --force replaces only bundles")
    files = _files(folder)
    if not files:
        return files
    if MANIFEST not in files:
        raise InputError(f"{output} exists and is not a bundle; --force replaces only bundles")
    try:
        # Of any schema: bundles of other versions may be replaced too.
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        engines = [Path(engine["file"]) for engine in data.get("engines", ())]
        known = {MANIFEST, TIMING_CACHE.as_posix(), *data["files"], *(engine.as_posix() for engine in engines)}
        known |= {engine.with_suffix(KERNELS).as_posix() for engine in engines}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{output / MANIFEST} cannot be read, so --force cannot tell the bundle's files from others; move {output} away"
        ) from error
    foreign = sorted(name for name in files if name not in known and not name.startswith(f"{CACHE.as_posix()}/"))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{output} holds {foreign[0]}{more}, which {MANIFEST} does not list; --force replaces only a bundle's own files: "
            "move it away, or choose another -o"
        )
    return files


def _files(folder: Path) -> Files:
    """Return what is below a folder and is no folder itself; links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    found = {}
    for root, folders, names in os.walk(folder, onerror=fail):
        for path in (Path(root, name) for name in (*folders, *names)):
            if path.is_symlink() or not path.is_dir():
                status = path.lstat()
                found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def warn_of_losses(output: Path, files: Files) -> None:
    """Say which files of an older bundle the new one will not have, and what exports that were killed have left."""
    built = [size for name, (size, _) in files.items() if name.startswith(f"{ENGINES.as_posix()}/")]
    if built:
        text = (
            f"{len(built)} files in {output / ENGINES} ({_size(sum(built))}) were built from the older graphs and go with them"
        )
        warnings.warn(text, LeanVLMWarning, stacklevel=2)
    for folder in _left_over(output):
        size = sum(size for size, _ in _files(folder).values())
        older = folder / "older"
        first = (
            f"the bundle that it was to replace is {older}: move that out, then remove the rest"
            if older.exists()
            else "remove it"
        )
        text = f"{folder} ({_size(size)}) is left of an export that was killed; {first}: rm -r {shlex.quote(str(folder))}"
        warnings.warn(text, LeanVLMWarning, stacklevel=2)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _left_over(output: Path) -> list[Path]:
    """Return the scratch folders of exports to this path that did not end by themselves.

    Raises:
        InputError: One of them is still running.
    """
    # As `mkdtemp` names them; the folder inside is made when the lock is held.
    pattern = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}")
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    found = []
    for folder in sorted(path for path in beside if pattern.fullmatch(path.name) and (path / output.name).is_dir()):
        with ExitStack() as stack, suppress(OSError):
            if not _lock(folder, stack):
                raise InputError(f"another export is writing {output}; wait until it has ended, or choose another -o")
            found.append(folder)
    return found


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Lock a folder for as long as the stack lives, at most as long as the process; False if another has locked it.

    Raises:
        OSError: The file system has no locks, or the folder is gone.
    """
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, number)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Make a folder beside the output, locked while this process has it, and remove it at the end with all in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with deferred_signals():
            scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
            stack.callback(_remove, scratch)
            with suppress(OSError):
                _lock(scratch, stack)
        yield scratch


def _remove(folder: Path) -> None:
    with deferred_signals():
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(new: Path, config: ExportConfig, before: Files, scratch: Path) -> None:
    """Move a finished bundle to its place.

    Args:
        new: The bundle, on the same file system.
        config: The request.
        before: What `files_replaced` returned when the export began; only that is replaced.
        scratch: Where an older bundle may go.

    Raises:
        InputError: Something else has come to the path; it stays.
    """
    output = config.output_folder
    # From the older bundle's move to the new one's, neither may be lost.
    with deferred_signals():
        found = files_replaced(config)
        _check_unchanged(output, before, found)
        if os.path.lexists(output):
            _replace(new, output, found, scratch / "older")
        else:
            _take(output, new)


def _check_unchanged(output: Path, before: Files, found: Files) -> None:
    changed = sorted(dict(found.items() - before.items()))
    # Who runs the older bundle may fill its cache.
    changed = [name for name in changed if not (name.startswith(f"{CACHE.as_posix()}/") or name.endswith(KERNELS))]
    if changed:
        raise InputError(
            f"{output / changed[0]} was written while the export ran, and stays; export again, or choose another -o"
        )


def _replace(new: Path, output: Path, found: Files, aside: Path) -> None:
    """Move the older bundle aside and the new one in its place; if that fails, the older one comes back."""
    try:
        output.rename(aside)
        # Nobody can add to it by its name any more.
        _check_unchanged(output, found, _files_of_bundle(aside, output))
        _take(output, new)
    except BaseException:
        if os.path.lexists(aside):
            _bring_back(aside, output)
        raise


def _bring_back(aside: Path, output: Path) -> None:
    try:
        _take(output, aside)
    except (InputError, OSError) as error:
        kept = Path(tempfile.mkdtemp(prefix=f"{output.name}.older.", dir=output.parent)) / output.name
        aside.rename(kept)
        raise InputError(
            f"{output} was written while the export ran, and stays; what was there before is now {kept}"
        ) from error


def _take(output: Path, folder: Path) -> None:
    """Move a folder to a path where nothing is.

    Raises:
        InputError: Something is there, or came first.
    """
    came = InputError(f"{output} was written while the export ran, and stays as it is; export again with another -o")
    try:
        output.mkdir()
    except FileExistsError:
        raise came from None
    try:
        folder.rename(output)
    except OSError as error:
        with suppress(OSError):
            output.rmdir()
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise came from None
        raise
