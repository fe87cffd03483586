"""What CONTRIBUTING promises: each promise is kept by a test, and nothing that is registered goes unmentioned."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import FAST_FILES, SLOW_FIXTURES

from leanvlm.exporter.passes import CUDA, CUDA_DECODER, ROUNDED, TENSORRT, TENSORRT_DECODER, Pass
from leanvlm.exporter.pruners import PRUNERS
from leanvlm.runtime.answer import STAGES

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PARTS = ("calibration", "demo", "exporter", "leanvlm", "runtime")
# Where a change is registered, each a literal dict.
REGISTRIES = {
    "FAMILIES": "exporter/families/__init__.py",
    "ARCHITECTURES": "exporter/families/__init__.py",
    "DECODERS": "exporter/decoders/__init__.py",
    "TARGETS": "exporter/targets.py",
    "PRUNERS": "exporter/pruners/__init__.py",
    "COMMANDS": "leanvlm/cli.py",
    "TINY": "tests/tiny.py",
}
# Baselines, which no paper proposes.
BASELINES = {"uniform", "random", "none"}

pytestmark = pytest.mark.skipif(not CONTRIBUTING.is_file(), reason="needs the checkout: the page is not installed")


def text() -> str:
    return CONTRIBUTING.read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """Return each heading of the page and what stands under it."""
    _, *parts = re.split(r"^## ", text(), flags=re.MULTILINE)
    return {heading: body for heading, _, body in (part.partition("\n") for part in parts)}


def promises() -> list[tuple[str, str, str]]:
    """Return the table's rows: section, promise, tests."""
    rows = [line for line in sections()["Promises"].splitlines() if line.startswith("|")][2:]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in rows]
    assert all(len(row) == 3 for row in cells)
    return cells  # type: ignore[return-value]


def functions(file: Path) -> set[str]:
    """Return the names of a test file's functions."""
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test_that_exists() -> None:
    rows = promises()
    assert len(rows) > 20
    wrong = set()
    for _, promise, tests in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
        wrong |= {promise} if not named or len(named) != tests.count("`") // 2 else set()
        for file, name in named:
            path = ROOT / "tests" / f"{file}.py"
            if not path.is_file() or name not in functions(path):
                wrong.add(f"{promise}: {file}::{name}")
    assert not wrong


def test_every_section_has_a_promise() -> None:
    assert {section for section, _, _ in promises()} == set(sections()) - {"Promises"}
    assert len({promise for _, promise, _ in promises()}) == len(promises())


@pytest.mark.parametrize(("name", "file"), REGISTRIES.items())
def test_every_registry_is_a_literal_dict_and_on_the_page(name: str, file: str) -> None:
    assert f"`{name}` (`{file}`)" in text()
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    values = {ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target): node.value for node in nodes}
    assert isinstance(values[name], ast.Dict)


def test_the_stages_are_those_of_the_page() -> None:
    listed = re.search(r"Stages are exactly ([\w, ]+), in code", text())
    assert listed is not None
    assert tuple(listed[1].split(", ")) == STAGES


def library() -> list[Path]:
    return [file for part in PARTS for file in sorted((ROOT / part).rglob("*.py"))]


def test_configuration_is_frozen() -> None:
    classes = [
        node
        for file in library()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Pruner", "Recipe", "Rule", "Spec", "Target"))
    ]
    data = {node.name: made for node in classes for made in map(ast.unparse, node.decorator_list)}
    assert {"ExportConfig", "SamplingConfig", "PositionRule", "AgilePruner", "Target"} <= set(data)
    assert {name for name, made in data.items() if made.startswith("dataclass") and "frozen=True" not in made} == set()


def test_nothing_is_called_utils() -> None:
    assert not [file for file in library() if file.stem in ("utils", "helpers", "common", "misc")]


def test_every_tolerance_has_its_reason() -> None:
    file = ROOT / "exporter" / "tolerances.py"
    lines = file.read_text(encoding="utf-8").splitlines()
    bounds = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.Assign)]
    assert len(bounds) > 8
    assert all(lines[node.lineno - 2].startswith("# ") for node in bounds)


def test_the_verification_has_no_bounds_of_its_own() -> None:
    tree = ast.parse((ROOT / "exporter" / "verify.py").read_text(encoding="utf-8"))
    numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, float)]
    assert not [number for number in numbers if 0 < number < 1]


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - BASELINES))
def test_every_method_names_its_paper(name: str) -> None:
    pruner = PRUNERS[name]
    assert re.search(r"arXiv \d{4}\.\d{5}", f"{sys.modules[pruner.__module__].__doc__}{pruner.__doc__}")


@pytest.mark.parametrize("passes", [CUDA, CUDA_DECODER, ROUNDED, TENSORRT, TENSORRT_DECODER])
def test_every_pass_is_tested(passes: dict[str, Pass]) -> None:
    files = [file for file in sorted((ROOT / "tests").glob("*.py")) if file.name != Path(__file__).name]
    tests = "".join(file.read_text(encoding="utf-8") for file in files)
    assert not {name for name, rewrite in passes.items() if f'"{name}"' not in tests and rewrite.__name__ not in tests}


def test_the_fast_tests_are_there(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("fast") is not None
    assert {"frame", "layering", "manifest", "preprocess", "pruners", "passes", "records", "sampling", "text"} <= FAST_FILES
    for name in FAST_FILES:
        tree = ast.parse((ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8"))
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert [test for test in tests if not SLOW_FIXTURES & {argument.arg for argument in test.args.args}], name
