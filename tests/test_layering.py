"""Imports go one way, and only the torch side loads torch."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leanvlm.calibration
import leanvlm.demo
import leanvlm.exporter
import leanvlm.runtime

HEAVY = ("torch", "transformers", "onnx", "onnxscript", "optimum")
# Part of the library to the parts that it may import.
ALLOWED = {
    "runtime": {"runtime"},
    "demo": {"demo", "runtime"},
    "exporter": {"demo", "exporter", "runtime"},
    "calibration": {"calibration", "demo", "exporter", "runtime"},
}
# A command that measures the built-in model with what measures every model; nothing of the demo imports it.
COMMANDS = {"demo": {"evaluate.py": {"leanvlm.calibration", "leanvlm.exporter"}}}
MODULES = {"runtime": leanvlm.runtime, "demo": leanvlm.demo, "exporter": leanvlm.exporter, "calibration": leanvlm.calibration}

SHOW_HELP = """
from leanvlm.runtime.cli import main
sys.argv = ["leanvlm", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""


def sources(part: str) -> list[Path]:
    """Return the Python files of a part of the library, where it is installed."""
    found = sorted(Path(MODULES[part].__path__[0]).rglob("*.py"))
    assert found
    return found


def imported(source: Path) -> Iterator[str]:
    """Yield the modules that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loaded_after(code: str, folder: Path) -> set[str]:
    """Run code in a fresh process, away from the repository; return the heavy packages that it loaded."""
    report = f"import json; print(); print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    command = [sys.executable, "-c", f"import sys\n{code}\n{report}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import leanvlm.runtime",
        "import leanvlm.runtime.session",
        "import leanvlm.runtime.text",
        "import leanvlm.runtime.preprocess",
        "import leanvlm.runtime.backends.ort",
        "import leanvlm.demo.scenes",
        "import leanvlm.demo.batches",
        "import leanvlm.exporter",
        SHOW_HELP,
    ],
    ids=lambda code: code.removeprefix("import ") if code.startswith("import ") else "leanvlm --help",
)
def test_nothing_of_the_torch_side_is_loaded(code: str, tmp_path: Path) -> None:
    assert loaded_after(code, tmp_path) == set()


def test_the_probe_sees_what_is_loaded(tmp_path: Path) -> None:
    assert "torch" in loaded_after("import leanvlm.exporter.pruners", tmp_path)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part: str) -> None:
    allowed = {f"leanvlm.{name}" for name in ALLOWED[part]}
    wrong = {
        f"{source.name}: {name}"
        for source in sources(part)
        for name in imported(source)
        if name.startswith("leanvlm.")
        and ".".join(name.split(".")[:2]) not in allowed | COMMANDS.get(part, {}).get(source.name, set())
    }
    assert not wrong


def test_the_runtime_never_imports_the_torch_side() -> None:
    wrong = {f"{file.name}: {name}" for file in sources("runtime") for name in imported(file) if name.split(".")[0] in HEAVY}
    assert not wrong


def test_onnxruntime_is_imported_through_require() -> None:
    """Which first turns its telemetry off."""
    files = [*(file for part in MODULES for file in sources(part)), *(Path(__file__).parents[1] / "bench").glob("*.py")]
    wrong = {f"{file.name}: {name}" for file in files for name in imported(file) if name.startswith("onnxruntime")}
    assert not wrong


@pytest.mark.parametrize("part", ["runtime", "demo"])
def test_what_devices_import_is_python_3_10(part: str) -> None:
    trees = [ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 10)) for source in sources(part)]
    assert trees
