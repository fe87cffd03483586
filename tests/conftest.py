"""Fixtures that several test files share; what is slow to make is made once a session."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

# Before torch is imported here, and for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "2")

Command = Callable[..., "subprocess.CompletedProcess[str]"]
BUDGET = 64

# `make test-fast` runs these files, but for what exports a bundle or runs a command.
FAST_FILES = {
    "aliases", "attacks_images", "attacks_remote", "bench", "crops", "decoder_passes", "decoders", "doctor", "facade",
    "frame", "gates", "hostile_checkpoint", "jpeg", "kernels", "latency_report", "layering", "layout", "lines", "loading",
    "logits", "longest_edge", "manifest", "models", "optional", "output", "packaging", "page", "pass_cases", "passes",
    "patches", "positions", "preprocess", "promises", "pruners", "records", "resize", "rope", "rounding", "sampling",
    "scenes", "security", "serve_details", "size", "streaming", "tegrastats", "text", "text_files", "text_records",
}  # fmt: skip
SLOW_FIXTURES = {"cuda_bundle", "demo_bundle", "leanvlm", "leanvlm_process", "tensorrt_bundle", "tile_bundle", "tiny_bundle"}


def pytest_configure() -> None:
    """Test files import ONNX Runtime themselves; the tests report nothing either."""
    from leanvlm.runtime.optional import without_telemetry

    without_telemetry()
    # A run in the background or under nohup ignores these, and would hand that down to the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests."""
    for item in items:
        is_slow = SLOW_FIXTURES & {*getattr(item, "fixturenames", ())} or item.get_closest_marker("slow")
        if item.path.stem.removeprefix("test_") in FAST_FILES and not is_slow:
            item.add_marker("fast")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA checkpoint."""
    import tiny

    return tiny.llava(tmp_path_factory.mktemp("checkpoint") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, exported at 16 of 121 image tokens; no test may change it."""
    from leanvlm import ExportConfig, export

    output = tmp_path_factory.mktemp("tiny") / "tiny-16"
    export(ExportConfig(str(tiny_llava), (16,), output))
    return output


@pytest.fixture(scope="session")
def tile_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that exports a tiny checkpoint of a family that cuts tiles, at 6 tokens a crop; no test may change it."""
    import tiny

    from leanvlm import ExportConfig, export

    @cache
    def exported(shape: str) -> Path:
        folder = tmp_path_factory.mktemp("tiles")
        export(ExportConfig(str(tiny.TINY[shape](folder / "checkpoint")), (6,), folder / "bundle"))
        return folder / "bundle"

    return exported


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, exported at 64 of 576 image tokens; no test may change it."""
    from leanvlm import ExportConfig, export

    output = tmp_path_factory.mktemp("demo") / "demo-64"
    export(ExportConfig("demo", (BUDGET,), output))
    return output


@pytest.fixture(scope="session")
def cuda_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model for cuda in fp16, at 64 of 576 image tokens; no test may change it."""
    from leanvlm import ExportConfig, export

    output = tmp_path_factory.mktemp("cuda") / "demo-cuda"
    export(ExportConfig("demo", (BUDGET,), output, target="cuda"))
    return output


@pytest.fixture(scope="session")
def tensorrt_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model for TensorRT in fp16, at 64 of 576 image tokens, without engines; no test may change it."""
    from leanvlm import ExportConfig, export

    output = tmp_path_factory.mktemp("demo") / "demo-trt"
    export(ExportConfig("demo", (BUDGET,), output, target="tensorrt"))
    return output


@pytest.fixture(scope="session")
def sample_image() -> Path:
    """A scene that the built-in model was not trained on."""
    from leanvlm.demo import SAMPLES_DIR

    return SAMPLES_DIR / "complex-9003.png"


@pytest.fixture
def protected() -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder, and a function after which this process may read it and not write to it, root or not."""
    # Not below `tmp_path`, which another user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="leanvlm-protected-"))
    user = os.geteuid()

    def protect() -> None:
        for path in (folder, *(inner for inner in folder.rglob("*") if inner.is_dir())):
            path.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    yield folder, protect
    os.seteuid(user)
    for root, _, _ in os.walk(folder):
        os.chmod(root, 0o755)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def leanvlm_process() -> Command:
    """A function that runs `leanvlm …` in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "leanvlm", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]

    return run


@pytest.fixture
def leanvlm(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A function that runs `leanvlm …` in this process, which spares the imports of a fresh one.

    What libraries write past Python's streams is captured too, and warnings are treated as Python does by default: what a
    user would see on the terminal is in the result.
    """
    from leanvlm.__main__ import main

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["leanvlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as end:
                main()
        return subprocess.CompletedProcess(sys.argv, int(end.value.code or 0), *capfd.readouterr())

    return run
