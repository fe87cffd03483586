"""The table of attacks in SECURITY.md names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "SECURITY.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="needs the checkout: the page is not installed")


def rows() -> list[tuple[str, str, str]]:
    """Return the table's rows: attack, what happens, tests."""
    table = PAGE.read_text(encoding="utf-8").partition("## Attacks")[2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert all(len(row) == 3 for row in cells)
    return [(attack, happens, tests) for attack, happens, tests in cells[2:] if tests]


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_attack_names_tests_that_exist() -> None:
    found = rows()
    assert len({attack for attack, _, _ in found}) == len(found) >= 25
    for attack, happens, tests in found:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
        assert named, attack
        assert len(named) == tests.count("`") // 2, attack
        assert happens, attack
        assert {f"{file}::{name}" for file, name in named if name not in functions(file)} == set()


def test_every_test_of_an_attack_is_in_the_table() -> None:
    named = set(re.findall(r"test_attacks_\w+", PAGE.read_text(encoding="utf-8")))
    assert named == {path.stem for path in (ROOT / "tests").glob("test_attacks_*.py")}
