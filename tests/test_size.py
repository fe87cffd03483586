"""Nothing grows past what a reader holds in mind."""

import ast
from pathlib import Path

import pytest

import leanvlm
import leanvlm.calibration
import leanvlm.demo
import leanvlm.exporter
import leanvlm.runtime

LIBRARY = (leanvlm, leanvlm.calibration, leanvlm.demo, leanvlm.exporter, leanvlm.runtime)
SOURCES = sorted({file for part in LIBRARY for folder in part.__path__ for file in Path(folder).rglob("*.py")})
FILE_LINES = 400
FUNCTION_LINES = 60


def code_lines(text: str) -> int:
    """Count the lines that are neither empty nor only a comment."""
    return sum(1 for line in map(str.strip, text.splitlines()) if line and not line.startswith("#"))


def function_lengths(text: str) -> dict[str, int]:
    """Return each function's length, from `def` to its last line."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert code_lines(text) <= FILE_LINES
    assert {name: length for name, length in function_lengths(text).items() if length > FUNCTION_LINES} == {}


def test_the_ruler_measures() -> None:
    text = "# a comment\n\ndef f():\n    # another\n    return 1\n"
    assert code_lines(text) == 2
    assert function_lengths(text) == {"f": 3}
