"""Imports go one way, and only the torch side loads torch."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leanvlm
import leanvlm.calibration
import leanvlm.demo
import leanvlm.exporter
import leanvlm.runtime

HEAVY = ("torch", "transformers", "onnx", "onnxscript", "optimum")
# What running a bundle needs, and showing help does not.
RUNNING = ("numpy", "PIL", "jinja2", "onnxruntime", "tokenizers")
# In the order of imports: each may import itself and those before it, and the package's own modules all of them.
ORDER = ("runtime", "exporter", "demo", "calibration")
MODULES = {"runtime": leanvlm.runtime, "demo": leanvlm.demo, "exporter": leanvlm.exporter, "calibration": leanvlm.calibration}
OTHERS = re.compile(r"leanvlm[./](exporter|demo|calibration)\b")

CALL = """
from leanvlm.__main__ import main
sys.argv = ["leanvlm", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
SHOW_HELP = CALL.format(arguments=["--help"])


def sources(part: str) -> list[Path]:
    """Return the Python files of a part of the library, where it is installed."""
    found = sorted(Path(MODULES[part].__path__[0]).rglob("*.py"))
    assert found
    return found


def own_sources() -> list[Path]:
    """Return the package's own Python files, where they are installed."""
    found = sorted(Path(leanvlm.__path__[0]).glob("*.py"))
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
    """Run code in a fresh process, away from the repository; return the modules that it loaded."""
    report = "import json; print(); print(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", f"import sys\n{code}\n{report}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import leanvlm; leanvlm.load",
        "import leanvlm; leanvlm.export",
        "import leanvlm.runtime",
        "import leanvlm.runtime.session",
        "import leanvlm.runtime.text",
        "import leanvlm.runtime.preprocess",
        "import leanvlm.runtime.backends.ort",
        "import leanvlm.demo.scenes",
        "import leanvlm.demo.mixture",
        "import leanvlm.exporter",
        SHOW_HELP,
    ],
    ids=lambda code: code.removeprefix("import ") if code.startswith("import ") else "leanvlm --help",
)
def test_nothing_of_the_torch_side_is_loaded(code: str, tmp_path: Path) -> None:
    assert not loaded_after(code, tmp_path) & {*HEAVY}


@pytest.mark.parametrize("code", ["import leanvlm", SHOW_HELP], ids=["import leanvlm", "leanvlm --help"])
def test_nothing_that_runs_bundles_is_loaded(code: str, tmp_path: Path) -> None:
    assert not loaded_after(code, tmp_path) & {*HEAVY, *RUNNING, "rich"}


def test_running_loads_the_runtime_alone(tiny_bundle: Path, sample_image: Path, tmp_path: Path) -> None:
    """So a device may go without the other parts."""
    arguments = ["run", str(tiny_bundle), "--image", str(sample_image), "--prompt", "What?", "--max-new-tokens", "2"]
    loaded = loaded_after(CALL.format(arguments=arguments), tmp_path)
    assert "onnxruntime" in loaded
    assert {name for name in loaded if name.startswith("leanvlm") and not name.startswith("leanvlm.runtime.")} == {
        "leanvlm",
        "leanvlm.__main__",
        "leanvlm.cli",
        "leanvlm.runtime",
    }


def test_the_probe_sees_what_is_loaded(tmp_path: Path) -> None:
    assert "torch" in loaded_after("import leanvlm.exporter.pruners", tmp_path)


@pytest.mark.parametrize("part", ORDER)
def test_imports_go_one_way(part: str) -> None:
    allowed = {f"leanvlm.{name}" for name in ORDER[: ORDER.index(part) + 1]}
    wrong = {
        f"{source.name}: {name}"
        for source in sources(part)
        for name in imported(source)
        if name.split(".")[0] == "leanvlm" and ".".join(name.split(".")[:2]) not in allowed
    }
    assert not wrong


def test_the_runtime_has_two_floors() -> None:
    """The library knows no command; facts about the machine, below it, know nothing else of the runtime but its errors."""
    root = Path(leanvlm.runtime.__path__[0])
    below = ("leanvlm.runtime.machine", "leanvlm.runtime.errors", "leanvlm.runtime.optional")
    wrong = set()
    for source in sources("runtime"):
        names = {name for name in imported(source) if name.startswith("leanvlm.runtime")}
        floor = source.relative_to(root).parts[0]
        if floor == "machine":
            wrong |= {f"{source.name}: {name}" for name in names if not name.startswith(below)}
        elif floor != "commands":
            wrong |= {f"{source.name}: {name}" for name in names if name.startswith("leanvlm.runtime.commands")}
    assert not wrong


def test_the_runtime_names_no_other_part() -> None:
    wrong = {
        f"{file.name}: {node.value}"
        for file in sources("runtime")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OTHERS.search(node.value)
    }
    assert not wrong


def test_the_runtime_never_imports_the_torch_side() -> None:
    wrong = {f"{file.name}: {name}" for file in sources("runtime") for name in imported(file) if name.split(".")[0] in HEAVY}
    assert not wrong


def test_onnxruntime_is_imported_through_require() -> None:
    """Which first turns its telemetry off."""
    files = [
        *own_sources(),
        *(file for part in MODULES for file in sources(part)),
        *(Path(__file__).parents[1] / "bench").glob("*.py"),
    ]
    wrong = {f"{file.name}: {name}" for file in files for name in imported(file) if name.startswith("onnxruntime")}
    assert not wrong


def test_what_devices_import_is_python_3_10() -> None:
    commands = [source for source in sources("calibration") if source.name == "cli.py"]
    for source in (*own_sources(), *sources("runtime"), *sources("demo"), *commands):
        assert ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 10))
