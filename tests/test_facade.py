"""`import leanvlm`: what it offers, to a program and to a type checker, and the built-in models by their names."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import leanvlm
from leanvlm.demo import ERANK_REF
from leanvlm.runtime import errors
from leanvlm.runtime.bundle import read_manifest


def shown_to_checkers() -> dict[str, str]:
    """Return the names that `leanvlm/__init__.py` imports for type checkers, and the modules that have them."""
    assert leanvlm.__file__ is not None
    tree = ast.parse(Path(leanvlm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_programs_and_type_checkers_see_the_same() -> None:
    shown = shown_to_checkers()
    assert shown.keys() | {"__version__"} == set(leanvlm.__all__) <= set(dir(leanvlm))
    for name, module in shown.items():
        assert getattr(leanvlm, name) is getattr(import_module(module), name)


def test_every_error_is_offered() -> None:
    ours = {name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__}
    assert ours <= set(leanvlm.__all__)


def test_the_version_is_that_of_the_installation() -> None:
    assert leanvlm.__version__ == version("leanvlm")


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'leanvlm' has no attribute 'lode'"):
        getattr(leanvlm, "lode")  # noqa: B009 (mypy knows better)


def test_importing_loads_nothing_else(tmp_path: Path) -> None:
    code = "import leanvlm, sys; print([name for name in sys.modules if name.startswith('leanvlm')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "['leanvlm']\n"


def test_a_built_in_model_brings_its_name_and_reference(demo_bundle: Path) -> None:
    manifest = read_manifest(demo_bundle)
    assert manifest.source.id == "leanvlm-demo"
    assert manifest.pruner.params["erank_ref"] == ERANK_REF
