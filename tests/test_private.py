"""Nothing leaves the device: a command opens no Internet socket and leaves no file but its output, native code included."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from leanvlm.demo import SAMPLES_DIR, SMALL_DIR
from leanvlm.runtime.engines import library
from leanvlm.runtime.optional import TELEMETRY

CONFINED = Path(__file__).with_name("confined.py")
IMAGE = SAMPLES_DIR / "complex-9003.png"

Confined = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> Confined:
    """A function that runs a module without the Internet and with a home of its own, and sees that both homes stay empty."""
    folder = tmp_path_factory.mktemp("private")
    homes = {name: folder / name.lower() for name in ("HOME", "TMPDIR")}
    for home in homes.values():
        home.mkdir()
    # As on a user's machine: nothing is decided beforehand, and caches are where they usually are.
    unset = {*TELEMETRY, "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"}
    variables = {name: value for name, value in os.environ.items() if name not in unset}

    def run(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CONFINED), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, env={**variables, **homes}, input=text, capture_output=True, text=True, check=False
        )
        assert not list(homes["HOME"].iterdir())
        assert sorted(folder.iterdir()) == sorted(homes.values())
        # PyTorch makes an empty folder for its compiler.
        assert {path.name.partition("_")[0] for path in homes["TMPDIR"].rglob("*")} <= {"torchinductor"}
        return done

    return run


@pytest.fixture(scope="module")
def bundle(confined: Confined, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small built-in model, exported from a folder that is a user's."""
    folder = tmp_path_factory.mktemp("user")
    checkpoint = shutil.copytree(SMALL_DIR, folder / "checkpoint")
    output = folder / "bundle"
    done = confined("leanvlm", "export", "--model", checkpoint, "--budget", 64, "-o", output)
    assert done.returncode == 0, done.stderr
    return output


FEW = ("--runs", 1, "--warmup", 0, "--max-new-tokens", 2)
# What each command may write beside the bundle.
COMMANDS: dict[str, tuple[tuple[object, ...], set[str]]] = {
    "dry run": (("export", "--model", "demo-small", "--dry-run"), set()),
    "run": (("run", "BUNDLE", "--image", IMAGE, "--prompt", "What?", "--overlay", "OUT/kept.png"), {"kept.png"}),
    "chat": (("run", "BUNDLE", "--image", IMAGE), set()),
    "openvino": (("run", "BUNDLE", "--image", IMAGE, "--prompt", "What?", "--provider", "openvino:f32"), set()),
    "profile": (
        (
            "profile",
            "BUNDLE",
            "--runs",
            1,
            "--warmup",
            0,
            "--max-new-tokens",
            2,
            "--json",
            "OUT/a.json",
            "--html",
            "OUT/a.html",
        ),
        {"a.json", "a.html"},
    ),
    "inspect": (("inspect", "BUNDLE", "--image", IMAGE, "--verify"), set()),
    "batch": (
        ("batch", IMAGE.parent, "--bundle", "BUNDLE", "--prompt", "What?", "-o", "OUT/a.parquet", "--workers", 2),
        {"a.parquet"},
    ),
    "calibrate": (
        ("calibrate", "gate", "--model", "demo-small", "--scenes", 8, "-o", "OUT/gate.json"),
        {"gate.json", "gate.png"},
    ),
    "eval": (
        ("eval", "BUNDLE", "--scenes", 1, "--kinds", "simple", "--budget", 64, "--json", "OUT/e.json", "--plot", "OUT/e.png"),
        {"e.json", "e.png"},
    ),
    "doctor": (("doctor",), set()),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_keeps_to_itself(name: str, bundle: Path, confined: Confined, tmp_path: Path) -> None:
    for needed in {"openvino": ["openvino"], "batch": ["pyarrow"]}.get(name, []):
        pytest.importorskip(needed)
    arguments, written = COMMANDS[name]
    before = contents(bundle)
    paths = {"BUNDLE": str(bundle), "OUT": str(tmp_path)}
    parts = [str(part) for part in arguments]
    for word, path in paths.items():
        parts = [part.replace(word, path) for part in parts]
    done = confined("leanvlm", *parts, text="What is below the green ring?\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert contents(bundle) == before
    assert {path.name for path in tmp_path.iterdir()} == written


@pytest.mark.skipif(not library.find_spec("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
def test_a_build_keeps_to_itself(tensorrt_bundle: Path, confined: Confined, tmp_path: Path) -> None:
    bundle = shutil.copytree(tensorrt_bundle, tmp_path / "bundle")
    before = contents(bundle)
    done = confined("leanvlm", "build", bundle, "--engine", "tensorrt-rtx", "--sm", 86, "--budget", 64)
    assert done.returncode == 0, done.stderr
    engines = {f"engines/86/{name}.engine" for name in ("vision_64", "decoder")}
    assert set(contents(bundle)) - set(before) == {"engines", "engines/86", *engines}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_optimum_keeps_to_itself(confined: Confined, tmp_path: Path) -> None:
    """Its command line imports far more than ours."""
    command = ("export", "leanvlm", "--model", "demo-small", "--dry-run")
    done = confined("optimum.commands.optimum_cli", *command)
    assert done.returncode == 0, done.stderr
    assert "decoder.onnx" in done.stdout


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return all below a folder, with sizes and times of change."""
    return {
        path.relative_to(folder).as_posix(): ((status := path.stat()).st_size, 0 if path.is_dir() else status.st_mtime_ns)
        for path in folder.rglob("*")
    }


def test_the_probe_sees_a_socket(confined: Confined) -> None:
    """The test module that is its own client and server."""
    assert confined("http.server", "--bind", "127.0.0.1", "0").returncode == -signal.SIGSYS


def test_who_sets_a_variable_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from leanvlm.runtime.optional import require

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    require("json", "cpu")
    assert (os.environ["ORT_DISABLE_TELEMETRY"], os.environ["HF_HUB_DISABLE_TELEMETRY"]) == ("0", "1")
