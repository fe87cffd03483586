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
from leanvlm.runtime.optional import TELEMETRY

CONFINED = Path(__file__).with_name("confined.py")
IMAGE = SAMPLES_DIR / "complex-9003.png"

Confined = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> Confined:
    """A function that runs a module without the Internet and with a home of its own, and sees that both homes stay empty."""
    place = tmp_path_factory.mktemp("private")
    homes = {name: place / name.lower() for name in ("HOME", "TMPDIR")}
    for folder in homes.values():
        folder.mkdir()
    # As on a user's machine: nothing is decided beforehand, and caches are where they usually are.
    unset = {*TELEMETRY, "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"}
    variables = {name: value for name, value in os.environ.items() if name not in unset}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CONFINED), *map(str, arguments)]
        done = subprocess.run(command, cwd=place, env={**variables, **homes}, capture_output=True, text=True, check=False)
        assert not list(homes["HOME"].iterdir())
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


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "--model", "demo-small", "--dry-run"),
        ("run", "BUNDLE", "--image", IMAGE, "--prompt", "What is below the green ring?"),
        ("profile", "BUNDLE", "--runs", 1, "--warmup", 0, "--max-new-tokens", 2),
        ("inspect", "BUNDLE", "--image", IMAGE, "--verify"),
        ("doctor",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_keeps_to_itself(arguments: tuple[object, ...], bundle: Path, confined: Confined) -> None:
    before = sorted(bundle.iterdir())
    done = confined("leanvlm", *(bundle if part == "BUNDLE" else part for part in arguments))
    assert done.returncode == 0, done.stderr
    assert sorted(bundle.iterdir()) == before


def test_the_probe_sees_a_socket(confined: Confined) -> None:
    """The test module that is its own client and server."""
    assert confined("http.server", "--bind", "127.0.0.1", "0").returncode == -signal.SIGSYS


def test_who_sets_a_variable_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from leanvlm.runtime.optional import require

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    require("json", "cpu")
    assert (os.environ["ORT_DISABLE_TELEMETRY"], os.environ["HF_HUB_DISABLE_TELEMETRY"]) == ("0", "1")
