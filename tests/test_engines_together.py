"""Builds of one bundle after and beside one another, cut short, or without room: an engine and its entry come together."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command
from fake_builder import Settings, tensorrt

from leanvlm.runtime.bundle import file_sha256, read_manifest, write_manifest
from leanvlm.runtime.engines import build as building
from leanvlm.runtime.engines import jobs as planning
from leanvlm.runtime.engines.build import Builder, build_engines
from leanvlm.runtime.engines.jobs import BuildConfig, BuildPlan, plan_build
from leanvlm.runtime.engines.library import quiet_logger
from leanvlm.runtime.engines.profiles import Limits
from leanvlm.runtime.errors import BundleError, InputError, LeanVLMWarning
from leanvlm.runtime.signals import Terminated, raised_when_terminated

pytestmark = pytest.mark.alone

LIMITS = Limits(2, 700, 1000)
VERSION = "10.3.0"


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    on_gpu(monkeypatch, 86)
    return shutil.copytree(tensorrt_bundle, tmp_path / "bundle")


def on_gpu(monkeypatch: pytest.MonkeyPatch, sm: int) -> None:
    monkeypatch.setattr(planning, "this_sm", lambda: sm)


def planned(bundle: Path, version: str = VERSION, **options: Any) -> tuple[BuildPlan, Builder]:
    module = tensorrt(version, [])
    config = BuildConfig(bundle, "tensorrt", limits=LIMITS, **options)
    return plan_build(config, read_manifest(bundle), module), Builder(module, quiet_logger(module, []), [])


def listed(bundle: Path) -> list[str]:
    return [engine.file for engine in read_manifest(bundle).engines]


def check_whole(bundle: Path) -> None:
    """Check that the manifest lists the engines that are there, as they are, and that nothing is unfinished."""
    engines = read_manifest(bundle).engines
    assert {engine.file for engine in engines} == {str(path.relative_to(bundle)) for path in bundle.rglob("*.engine")}
    for engine in engines:
        assert (engine.bytes, engine.sha256) == ((bundle / engine.file).stat().st_size, file_sha256(bundle / engine.file))
    assert not list(bundle.rglob(".*"))


def test_builds_for_other_gpus_and_budgets_stay(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engines(*planned(bundle, budgets=(64,)))
    build_engines(*planned(bundle, budgets=(576,)))
    on_gpu(monkeypatch, 89)
    build_engines(*planned(bundle, budgets=(64,)))
    names = ["engines/86/vision_64.engine", "engines/86/vision_576.engine", "engines/86/decoder.engine"]
    assert listed(bundle) == [*names, "engines/89/vision_64.engine", "engines/89/decoder.engine"]
    # The same again replaces its own, with what belonged to them.
    on_gpu(monkeypatch, 86)
    (bundle / "engines/86/vision_64.kernels").write_bytes(b"of the older engine")
    build_engines(*planned(bundle, "10.16.1.11", budgets=(64,)))
    versions = {engine.file: engine.version for engine in read_manifest(bundle).engines}
    assert len(versions) == 5
    assert {file for file, version in versions.items() if version == "10.16.1.11"} == {names[0], names[2]}
    assert not (bundle / "engines/86/vision_64.kernels").exists()
    check_whole(bundle)


def test_builds_that_run_at_once_keep_one_anothers_engines(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins before the other has written anything; and they write in turn."""
    plans = []
    for sm in (80, 86, 89):
        on_gpu(monkeypatch, sm)
        plans.append(planned(bundle))
    beside: list[int] = []
    locked = threading.Lock()
    write = write_manifest

    def alone(folder: Path, manifest: Any) -> None:
        assert locked.acquire(blocking=False)
        beside.append(len(manifest.engines))
        write(folder, manifest)
        locked.release()

    monkeypatch.setattr(building, "write_manifest", alone)
    threads = [threading.Thread(target=build_engines, args=arguments) for arguments in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert beside == list(range(1, 10))
    assert sorted(listed(bundle)) == sorted(str(job.file) for plan, _ in plans for job in plan.jobs)
    check_whole(bundle)


def test_a_build_waits_for_another_process(bundle: Path) -> None:
    code = (
        "import fcntl, os, sys; number = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(number, fcntl.LOCK_EX)\n"
        "print(flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(bundle)], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        thread = threading.Thread(target=build_engines, args=planned(bundle, budgets=(64,)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert listed(bundle) == []
        other.communicate()
        thread.join()
    check_whole(bundle)
    assert len(listed(bundle)) == 2


def test_engines_of_older_graphs_do_not_come_into_a_new_bundle(bundle: Path) -> None:
    plan, builder = planned(bundle)
    manifest = read_manifest(bundle)
    write_manifest(bundle, replace(manifest, verification={}))
    with pytest.raises(BundleError, match=r"bundle was exported again while engines/86/vision_64.engine was built"):
        build_engines(plan, builder)
    assert not (bundle / "engines").exists()
    check_whole(bundle)


# --- Cut short ----------------------------------------------------------------------------------------------------------

# What a build calls, in its order: by the owner and the name.
MOMENTS: dict[str, tuple[Any, str]] = {
    "clearing": (building, "_remove_left_over"),
    "parsing": (building, "_parse"),
    "checking": (building, "check_ends"),
    "configuring": (building, "_configure"),
    "shapes": (building, "_add_profile"),
    "timings": (building, "_timing_cache"),
    "building": (Settings, "get_timing_cache"),
    "adding": (building, "_add"),
    "locking": (building, "_locked"),
    "writing": (Path, "write_bytes"),
    "reading": (building, "read_manifest"),
    "entering": (building, "write_manifest"),
    "renaming": (Path, "replace"),
}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(bundle: Path, moment: str, at_the_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second engine, so that there is one before."""
    owner, name = MOMENTS[moment]
    function = getattr(owner, name)
    build_engines(*planned(bundle, budgets=(64,)))
    struck: list[int] = []

    def strike(*arguments: Any, **options: Any) -> Any:
        number = (signal.SIGTERM, signal.SIGHUP)[at_the_end]
        if not at_the_end:
            struck.append(number)
            signal.raise_signal(number)
        result = function(*arguments, **options)
        if at_the_end and not struck:
            struck.append(number)
            signal.raise_signal(number)
        return result

    plan, builder = planned(bundle, "10.16.1.11")
    monkeypatch.setattr(owner, name, strike)
    with pytest.raises(Terminated), raised_when_terminated():
        build_engines(plan, builder)
    monkeypatch.undo()
    assert struck
    assert len(listed(bundle)) in (2, 3)
    check_whole(bundle)


def test_a_signal_while_the_library_builds(bundle: Path) -> None:
    plan, builder = planned(bundle)

    def strike(job: Any, phase: str, share: float) -> None:
        if job.budget is None and share == 0:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated), raised_when_terminated():
        build_engines(plan, builder, strike)
    assert len(listed(bundle)) == 2
    check_whole(bundle)


def test_what_a_killed_build_left_is_removed_and_said(bundle: Path) -> None:
    left = bundle / ".vision_64.engine.new"
    left.write_bytes(bytes(2_500_000))
    with pytest.warns(
        LeanVLMWarning, match=r"removed .*/\.vision_64\.engine\.new \(2\.5 MB\), left of a build that was killed"
    ):
        build_engines(*planned(bundle))
    check_whole(bundle)


# --- Without room -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [Path, building], ids=["the engine", "the manifest"])
def test_a_full_disk_leaves_the_older_engine(bundle: Path, owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engines(*planned(bundle))
    before = read_manifest(bundle)

    def full(path: Path, *arguments: Any) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    plan, builder = planned(bundle, "10.16.1.11")
    monkeypatch.setattr(owner, "write_bytes" if owner is Path else "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        build_engines(plan, builder)
    monkeypatch.undo()
    assert read_manifest(bundle) == before
    check_whole(bundle)


def test_a_bundle_that_cannot_be_written_is_seen_before_the_build(
    bundle: Path, protected: tuple[Path, Callable[[], None]]
) -> None:
    folder, protect = protected
    bundle = shutil.copytree(bundle, folder / "bundle")
    protect()
    with pytest.raises(InputError, match=f"engines cannot be written: Permission denied in {bundle}"):
        planned(bundle)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "is a folder, or in none; give a file"),
        ("nowhere/timings", "is a folder, or in none; give a file"),
        ("leanvlm.json", "is a file of the bundle, which would be lost"),
        ("vision.data", "is a file of the bundle, which would be lost"),
    ],
)
def test_timings_that_would_replace_something_else(bundle: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(bundle, timing_cache=bundle / name)


@pytest.mark.parametrize("answer", [None, SimpleNamespace()])
def test_timings_that_are_none(bundle: Path, tmp_path: Path, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another version TensorRT makes nothing, of another GPU it takes nothing: the user's file stays, ours begins anew."""
    create = Settings.create_timing_cache
    monkeypatch.setattr(Settings, "create_timing_cache", lambda self, data: answer if data == b"other" else create(self, data))
    monkeypatch.setattr(Settings, "set_timing_cache", lambda self, cache, ignore_mismatch: cache is not answer)
    mine = tmp_path / "mine"
    mine.write_bytes(b"other")
    with pytest.raises(InputError, match=r"--timing-cache .*mine is of another version or GPU, or is none"):
        build_engines(*planned(bundle, timing_cache=mine))
    assert mine.read_bytes() == b"other"
    assert listed(bundle) == []
    (bundle / "engines").mkdir()
    (bundle / "engines/timing.cache").write_bytes(b"other")
    build_engines(*planned(bundle))
    assert (bundle / "engines/timing.cache").read_bytes() == b"timings"


def test_kernels_beside_an_engine_do_not_keep_a_bundle_from_being_replaced(bundle: Path, leanvlm: Command) -> None:
    build_engines(*planned(bundle))
    (bundle / "engines/86/decoder.kernels").write_bytes(b"compiled")
    from leanvlm.exporter import ExportConfig
    from leanvlm.exporter.output import check_output

    check_output(ExportConfig("demo", output=bundle, force=True))
    (bundle / "engines/86/other.kernels").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds engines/86/other\.kernels, which leanvlm\.json does not list"):
        check_output(ExportConfig("demo", output=bundle, force=True))
