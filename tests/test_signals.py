"""Ctrl-C, SIGTERM and SIGHUP end a command with one line and leave nothing half-written, whenever they come."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import Command

from leanvlm.runtime.console import one_line_errors
from leanvlm.runtime.sandbox import sandbox
from leanvlm.runtime.signals import Terminated, deferred_signals, raised_when_terminated

pytestmark = pytest.mark.alone

ENDS = {
    signal.SIGINT: (130, "leanvlm: interrupted\n"),
    signal.SIGTERM: (143, "leanvlm: terminated\n"),
    signal.SIGHUP: (129, "leanvlm: terminal lost\n"),
}

# Runs the command line in a process that signals itself when a function is called, or a module imported.
CHILD = """
import importlib, os, signal, sys, threading

moment, numbers, arguments = sys.argv[1], [int(number) for number in sys.argv[2].split(",")], sys.argv[3:]

def strike():
    # As from outside: to the process, at any of its threads.
    for number in numbers:
        os.kill(os.getpid(), number)
    threading.Event().wait(0.05)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            sys.meta_path.remove(self)
            strike()

def wrap(module, name):
    function = getattr(module, name)
    def call(*arguments, **options):
        strike()
        return function(*arguments, **options)
    setattr(module, name, call)

from leanvlm.__main__ import main
if ":" in moment:
    module, name = moment.split(":")
    wrap(importlib.import_module(module), name)
else:
    sys.meta_path.insert(0, Finder())
sys.argv = ["leanvlm", *arguments]
main()
"""


def _as_in_a_terminal() -> None:
    """Let a new process hear all signals; a shell's background jobs, and what they start, ignore Ctrl-C."""
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)


def strike(moment: str, numbers: tuple[int, ...], *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that gets signals at a moment: `module` when it is imported, `module:function` when it is called."""
    command = [sys.executable, "-c", CHILD, moment, ",".join(str(int(number)) for number in numbers), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, preexec_fn=_as_in_a_terminal, timeout=120
    )


@pytest.mark.parametrize("number", ENDS)
def test_from_the_first_import_on(tmp_path: Path, number: signal.Signals) -> None:
    result = strike("numpy", (number,), "inspect", "anything", cwd=tmp_path)
    assert (result.returncode, result.stderr) == ENDS[number]


def test_nothing_heavy_is_imported_before_signals_are_heard() -> None:
    code = "import sys, leanvlm.__main__; assert not {'numpy', 'typer', 'rich', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Steps of an export in their order; before the last one nothing may be left, behind it all is there.
EXPORT = {
    "start": ("torch", (signal.SIGTERM,)),
    "tracing": ("torch.export:export", (signal.SIGHUP,)),
    "building": ("leanvlm.exporter.pipeline:build_decoder", (signal.SIGTERM, signal.SIGHUP)),
}


@pytest.mark.parametrize("moment", EXPORT)
def test_an_export_leaves_nothing(tiny_llava: Path, tmp_path: Path, moment: str) -> None:
    where, numbers = EXPORT[moment]
    result = strike(where, numbers, "export", "--model", tiny_llava, "--budget", 121, "-o", "x", cwd=tmp_path)
    assert (result.returncode, result.stderr) in [ENDS[number] for number in numbers]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_request_that_a_library_swallows_comes_again(
    tiny_llava: Path, leanvlm: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, goes_on: bool
) -> None:
    """As torch does, whose dispatcher makes an error of its own of it, logs that, and may try another way."""
    import torch

    real, before = torch.export.export, signal.getsignal(signal.SIGINT)

    def swallowing(*arguments: object, **options: object) -> object:
        try:
            signal.raise_signal(number)
        except BaseException as request:
            logging.getLogger("library").error("the operation failed")
            if not goes_on:
                raise RuntimeError("the operation failed") from request
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", swallowing)
    result = leanvlm("export", "--model", tiny_llava, "--budget", 121, "-o", "x")
    assert (result.returncode, result.stderr) == ENDS[number]
    assert not list(workplace.iterdir())
    assert signal.getsignal(signal.SIGINT) is before
    assert logging.getLogger("library").isEnabledFor(logging.ERROR)


def test_an_export_that_is_put_in_place_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leanvlm.exporter import ExportConfig
    from leanvlm.exporter.output import put_in_place, scratch_folder

    config, rename = ExportConfig("demo", output=tmp_path / "x"), Path.rename

    def struck(self: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return rename(self, target)

    def export() -> None:
        with raised_when_terminated(), scratch_folder(config.output_folder) as scratch:
            (scratch / "x").mkdir()
            (scratch / "x" / "file").touch()
            monkeypatch.setattr(Path, "rename", struck)
            put_in_place(scratch / "x", config, {}, scratch)

    with pytest.raises(Terminated):
        export()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["x", "x/file"]


def test_removing_is_not_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor by an impatient second Ctrl-C."""
    from leanvlm.exporter.output import scratch_folder

    remove = shutil.rmtree

    def struck(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)
        remove(*arguments, **options)  # type: ignore[arg-type]

    def export() -> None:
        with scratch_folder(tmp_path / "x") as scratch:
            (scratch / "file").touch()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(shutil, "rmtree", struck)
    with pytest.raises(KeyboardInterrupt):
        export()
    assert not list(tmp_path.iterdir())


# What a profile and a calibration call, in their order. Behind the last one of each, what they write is there.
PROFILE = (
    "leanvlm.runtime.commands.profile:read_image",
    "leanvlm.runtime.commands.profile:load",
    "leanvlm.runtime.commands.profile:answer_once",
    "leanvlm.runtime.commands.profile:crop",
    "onnxruntime:InferenceSession.end_profiling",
    "leanvlm.runtime.backends.ort:check_graph",
    "leanvlm.runtime.commands.profile:peak_memory",
    "subprocess:Popen.communicate",
    "leanvlm.runtime.commands.profile_report:page",
    "pathlib:Path.write_bytes",
    "pathlib:Path.replace",
)
CALIBRATE = (
    "leanvlm.calibration.cli:check_outputs",
    "leanvlm.exporter.checkpoint:open_checkpoint",
    "leanvlm.exporter.checkpoint:load_model",
    "leanvlm.calibration.gate:exact_effective_rank",
    "leanvlm.calibration.gate:measure",
    "leanvlm.calibration.gate:fit_gate",
    "leanvlm.calibration.gate:draw_histogram",
    "pathlib:Path.write_bytes",
    "pathlib:Path.replace",
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is the one for temporary files too: what is left in either shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def strike_behind(moment: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal when a function has done its work."""
    # What imports functions by their names gets them as they are.
    for module in ("leanvlm.exporter.pipeline", "leanvlm.calibration.cli", "leanvlm.calibration.study"):
        importlib.import_module(module)
    owner, _, name = moment.rpartition("." if "." in moment.partition(":")[2] else ":")
    holder = pkgutil.resolve_name(owner)
    function = getattr(holder, name)

    def struck(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        signal.raise_signal(number)
        return result

    monkeypatch.setattr(holder, name, struck)


@pytest.mark.parametrize(
    ("command", "moment"), [("profile", moment) for moment in PROFILE] + [("calibrate", moment) for moment in CALIBRATE]
)
def test_profile_and_calibrate_leave_nothing(
    command: str, moment: str, tiny_bundle: Path, leanvlm: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "profile": ("profile", tiny_bundle, "--runs", 1, "--warmup", 0, "--json", "a.json", "--html", "a.html"),
        "calibrate": ("calibrate", "gate", "--model", "demo-small", "--scenes", 8, "--budget", 64, "-o", "a.json"),
    }
    number = list(ENDS)[1 + len(moment) % 2]
    strike_behind(moment, number, monkeypatch)
    ended = leanvlm(*arguments[command])
    assert (ended.returncode, ended.stderr) == ENDS[number]
    written = {"profile": ["a.html", "a.json"], "calibrate": ["a.json", "a.png"]}[command]
    assert sorted(path.name for path in workplace.iterdir()) == (written if moment == "pathlib:Path.replace" else [])
    # No process that was started lives on, but for the one that ends with this one, as `test_sandbox` has it.
    sandbox().stop()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_handlers_are_put_back_and_those_of_others_stay(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, one_line_errors():
        signal.raise_signal(number)
    assert (end.value.code, capsys.readouterr().err) == ENDS[number]
    assert signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)  # As under nohup.
    try:
        with one_line_errors(), deferred_signals() as came:
            signal.raise_signal(number)
        assert not came.is_set()
    finally:
        signal.signal(number, before)


def test_one_request_ends_once() -> None:
    """SIGTERM and SIGHUP together, as systemd may send them: the second must not cut the first one's cleaning."""
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)
            cleaned.append(True)

    with pytest.raises(Terminated) as end, raised_when_terminated():
        work()
    assert (end.value.code, cleaned) == (143, [True])


def test_deferred_signals_come_at_the_end() -> None:
    passed = []

    def work() -> None:
        with deferred_signals() as outer:
            with deferred_signals() as inner:
                signal.raise_signal(signal.SIGINT)
                passed.append(inner.is_set())
            passed.append(outer.is_set())

    with pytest.raises(KeyboardInterrupt):
        work()
    assert passed == [True, True]


def test_other_threads_change_no_handlers() -> None:
    results: list[object] = []

    def work() -> None:
        with raised_when_terminated(), deferred_signals():
            results.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [signal.SIG_DFL]
