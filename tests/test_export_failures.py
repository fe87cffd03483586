"""Exports that fail half-way: a full disk or Ctrl-C at any step leaves nothing new, and an older bundle as it was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny
from conftest import Command

import leanvlm.exporter.pipeline as pipeline
from leanvlm.exporter import ExportConfig, vision_graphs
from leanvlm.exporter.output import files_replaced, put_in_place
from leanvlm.exporter.plan import Plan, plan
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.errors import VerificationError
from leanvlm.runtime.signals import ENDING, Terminated, raised_when_terminated

pytestmark = pytest.mark.alone

# All of the tiny model's image tokens: one graph to trace, not two.
BUDGET = tiny.TOKENS
# Everything in the export that writes, by the name that the pipeline calls it by.
WRITERS = (
    "save_sharing",
    "build_decoder",
    "save",
    "write_text_files",
    "write_manifest",
    "verify",
    "put_in_place",
)


@pytest.fixture(scope="module")
def traced() -> dict[str, bytes]:
    """The vision graphs that were traced so far; tracing is slow, and not what fails here."""
    return {}


@pytest.fixture(autouse=True)
def trace_once(traced: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace each graph only the first time."""
    trace = vision_graphs.trace

    def again(module: Any, *arguments: Any, **options: Any) -> ir.Model:
        # Of the one model there is one tower.
        key = repr(module.prune.pruner) if hasattr(module, "prune") else type(module).__name__
        if key not in traced:
            traced[key] = ir.to_proto(trace(module, *arguments, **options)).SerializeToString()
        return ir.from_proto(_parsed(traced[key]))

    monkeypatch.setattr(vision_graphs, "trace", again)


def _parsed(data: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(data)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "place" / "tiny"


@pytest.fixture
def request_(tiny_llava: Path, output: Path) -> Plan:
    output.parent.mkdir()
    return plan(ExportConfig(str(tiny_llava), (BUDGET,), output, force=True))


def older_bundle(output: Path) -> dict[str, bytes]:
    """Put a bundle in the export's place; what matters is that it stays."""
    output.mkdir(parents=True)
    (output / "leanvlm.json").write_text('{"files": {"vision.data": {}}}', encoding="utf-8")
    (output / "vision.data").write_bytes(b"older")
    return contents(output.parent)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def no_space(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_the_writers_are_what_an_export_calls(request_: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[str] = set()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            called.add(name)
            return function(*arguments, **options)

        return call

    for name in WRITERS:
        monkeypatch.setattr(pipeline, name, noted(name, getattr(pipeline, name)))
    pipeline.export_plan(request_)
    assert called == set(WRITERS)
    assert [path.name for path in request_.config.output_folder.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_at_any_step(
    leanvlm: Command, tiny_llava: Path, output: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = older_bundle(output)
    monkeypatch.setattr(pipeline, writer, no_space)
    result = leanvlm("export", "--model", tiny_llava, "--budget", BUDGET, "-o", output, "--force")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "leanvlm: no space left on the disk: somewhere\n"
    assert contents(output.parent) == before
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a disk of so many kB; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        disk = tmp_path / f"disk-{size}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    leanvlm: Command, tiny_llava: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle has 3.4 MB: the disk is full first in the vision weights, then in the decoder, at last in the small files."""
    usage = shutil.disk_usage
    for size in (800, 2400, 3300):
        disk = small_disk(size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**9))
        result = leanvlm("export", "--model", tiny_llava, "--budget", BUDGET, "-o", disk / "tiny")
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert result.stderr.startswith("leanvlm: no space left on the disk"), result.stderr
        assert result.stderr.count("\n") == 1
        assert not list(disk.iterdir())


def test_a_disk_that_is_too_small_is_seen_before_the_work(
    leanvlm: Command, tiny_llava: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(800)
    result = leanvlm("export", "--model", tiny_llava, "--budget", BUDGET, "-o", disk / "tiny")
    assert result.returncode == 2
    assert "the bundle needs about 0.0" in result.stderr
    assert not list(disk.iterdir())


def test_a_signal_at_any_step(request_: Plan, output: Path) -> None:
    """Ctrl-C, SIGTERM and SIGHUP by turns."""
    steps: list[str] = []
    pipeline.export_plan(request_, steps.append)
    assert len(steps) == request_.steps
    shutil.rmtree(output)
    before = older_bundle(output)
    for number in range(len(steps)):
        passed: list[str] = []

        def press(step: str, number: int = number, passed: list[str] = passed) -> None:
            passed.append(step)
            if len(passed) > number:
                signal.raise_signal(ENDING[number % len(ENDING)])

        with pytest.raises((KeyboardInterrupt, Terminated)), raised_when_terminated():
            pipeline.export_plan(request_, press)
        assert passed == steps[: number + 1]
        assert contents(output.parent) == before, steps[number]
        assert [path.name for path in output.parent.iterdir()] == ["tiny"], steps[number]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_where_something_was_written(
    request_: Plan, output: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last of them the new bundle is in its place, whole."""
    before = older_bundle(output)
    for writer in WRITERS:
        function = getattr(pipeline, writer)

        def strike(*arguments: Any, function: Callable[..., Any] = function, **options: Any) -> Any:
            result = function(*arguments, **options)
            signal.raise_signal(number)
            return result

        monkeypatch.setattr(pipeline, writer, strike)
        with pytest.raises(Terminated), raised_when_terminated():
            pipeline.export_plan(request_)
        monkeypatch.setattr(pipeline, writer, function)
        assert [path.name for path in output.parent.iterdir()] == ["tiny"], writer
        if writer != "put_in_place":
            assert contents(output.parent) == before, writer
    assert set(contents(output)) == {"leanvlm.json", *read_manifest(output).files}


@pytest.mark.parametrize("moment", ["behind the first rename", "at the second rename"])
def test_the_older_bundle_comes_back_when_the_new_one_cannot_take_its_place(
    output: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = older_bundle(output)
    scratch, rename = tmp_path / "scratch", Path.rename
    (scratch / "new").mkdir(parents=True)

    def interrupted(self: Path, target: Path) -> Path:
        if moment == "behind the first rename" and self == output:
            rename(self, target)
            raise KeyboardInterrupt
        if moment == "at the second rename" and self == scratch / "new":
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    config = ExportConfig("demo", output=output, force=True)
    with pytest.raises((KeyboardInterrupt, OSError)):
        put_in_place(scratch / "new", config, files_replaced(config), scratch)
    assert contents(output.parent) == before


def test_a_graph_that_differs_from_its_model_is_not_kept(
    leanvlm: Command, tiny_llava: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*arguments: object, **options: object) -> None:
        raise VerificationError("vision graph of budget 121: features differ")

    monkeypatch.setattr(pipeline, "verify", differs)
    result = leanvlm("export", "--model", tiny_llava, "--budget", BUDGET, "-o", output)
    assert (result.returncode, result.stderr) == (2, "leanvlm: vision graph of budget 121: features differ\n")
    assert not list(output.parent.iterdir())


def _listen_to_ctrl_c() -> None:
    """Let a new process hear Ctrl-C; a shell's background jobs, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_real_ctrl_c_while_tracing(tiny_llava: Path, output: Path) -> None:
    command = [sys.executable, "-m", "leanvlm", "export", "--model", str(tiny_llava), "-o", str(output)]
    scratch = output.parent
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--budget", str(BUDGET)], stdout=log, stderr=log, preexec_fn=_listen_to_ctrl_c)
        # The temporary folder appears right before the tracing, which takes seconds.
        while process.poll() is None and not (scratch.exists() and list(scratch.iterdir())):
            time.sleep(0.05)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=60)
        log.seek(0)
        assert (status, log.read()) == (130, b"leanvlm: interrupted\n")
    assert not list(scratch.iterdir())
