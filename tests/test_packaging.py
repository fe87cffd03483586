"""What is installed is what the repository holds: nothing unlisted, nothing left behind, nothing of one machine.

The continuous checks run this against an editable install and, copied elsewhere, against the wheel.
"""

import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGES: list[str] = SETUPTOOLS["packages"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
DATA = [(package, pattern) for package, patterns in SETUPTOOLS["package-data"].items() for pattern in patterns]
# For a checkout alone.
TRAINING = "leanvlm.demo.training"
# Optimum looks for commands in this namespace and warns of an __init__.py there.
NAMESPACE = "optimum.commands.register"

# Patterns that do not match their own spelling here.
HOME = re.compile(rb"(?<![\w.~])/(home|root|work|Users)/\w")
REGISTRY = re.compile(rb"https?://[^\s'\"]*(pypi|python\w*hosted|/simple\b|/whl\b)|(index-url|find-links)[ =]+\S*/\w")

needs_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git checkout")


def repository_files() -> list[Path]:
    """Return every file that git tracks, or would if it were added."""
    listing = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(["git", "-c", "safe.directory=*", *listing], cwd=ROOT, check=True, capture_output=True).stdout
    return [path for name in names.decode().split("\0") if name and (path := ROOT / name).is_file()]


def folder_of(package: str) -> Path:
    """Return a listed package's folder: its own mapping, or its parent's and its name."""
    if package in FOLDERS:
        return ROOT / FOLDERS[package]
    parent, _, name = package.rpartition(".")
    return folder_of(parent) / name


@needs_checkout
def test_every_folder_with_python_files_is_a_listed_package() -> None:
    library = [folder_of(package) for package in FOLDERS]
    code = {file.parent for file in repository_files() if file.suffix == ".py"}
    inside = {folder for folder in code if any(map(folder.is_relative_to, library))}
    assert inside == {folder_of(package) for package in (*PACKAGES, TRAINING)}
    assert TRAINING not in PACKAGES


@pytest.mark.skipif((ROOT / ".git").exists(), reason="a checkout has it")
def test_training_is_not_installed() -> None:
    assert find_spec(TRAINING) is None


@needs_checkout
def test_only_the_namespace_has_no_init_file() -> None:
    without = [package for package in PACKAGES if not (folder_of(package) / "__init__.py").is_file()]
    assert without == [NAMESPACE]


@needs_checkout
def test_every_data_file_is_declared() -> None:
    declared = {path for package, pattern in DATA for path in folder_of(package).glob(pattern)}
    library = [folder_of(package) for package in PACKAGES]
    held = {file for file in repository_files() if file.suffix != ".py" and any(map(file.is_relative_to, library))}
    assert held <= declared


@pytest.mark.parametrize(("package", "pattern"), DATA)
def test_declared_data_files_are_installed(package: str, pattern: str) -> None:
    folder, _, name = pattern.rpartition("/")
    held = [entry.name for entry in files(package).joinpath(folder).iterdir() if entry.is_file()]
    assert held if name == "*" else name in held


@pytest.mark.parametrize("package", PACKAGES)
def test_every_listed_package_imports(package: str) -> None:
    spec = importlib.import_module(package).__spec__
    assert spec is not None
    assert spec.submodule_search_locations


def test_the_installed_version_is_the_project_s() -> None:
    assert version("leanvlm") == PROJECT["project"]["version"]


def test_optimum_finds_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "leanvlm", "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--budget" in result.stdout


@needs_checkout
@pytest.mark.parametrize("pattern", [HOME, REGISTRY], ids=["path of one machine", "registry host"])
def test_no_file_names_a_machine_or_a_registry(pattern: re.Pattern[bytes]) -> None:
    found = {
        str(file.relative_to(ROOT)): match[0] for file in repository_files() if (match := pattern.search(file.read_bytes()))
    }
    assert not found
