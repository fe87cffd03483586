"""Optional packages: what a user is told when one is missing, and what is not covered up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from leanvlm.runtime.errors import MissingExtraError
from leanvlm.runtime.optional import ACTIVITIES, require


def test_an_installed_module_is_returned() -> None:
    assert require("json.decoder", "cpu") is sys.modules["json.decoder"]


@pytest.mark.parametrize(("extra", "activity"), ACTIVITIES.items())
def test_the_message_says_what_to_install(extra: str, activity: str) -> None:
    with pytest.raises(MissingExtraError) as caught:
        require("package_that_nobody_has.part", extra)
    assert str(caught.value) == (
        f"{activity} needs package_that_nobody_has, which is not installed: pip install 'leanvlm[{extra}]'"
    )


def test_the_message_names_another_activity() -> None:
    with pytest.raises(MissingExtraError, match=r"^calibrating needs package_that_nobody_has"):
        require("package_that_nobody_has", "export", "calibrating")


def test_every_extra_is_one_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(ACTIVITIES) == set(project["optional-dependencies"]) - {"dev"}


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("import package_that_nobody_has", ModuleNotFoundError, "package_that_nobody_has"),
        ("from json import nothing_of_this_name", ImportError, "nothing_of_this_name"),
        ("raise ImportError('libcuda.so.1: cannot open shared object file')", ImportError, "libcuda"),
        ("1 / 0", ZeroDivisionError, "division"),
    ],
)
def test_an_error_inside_an_installed_package_is_passed_on(
    source: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=words) as caught:
        require("broken_package", "cpu")
    assert not isinstance(caught.value, MissingExtraError)


def test_a_missing_module_of_an_installed_package_is_reported() -> None:
    """`leanvlm[export]` may hold a version of a package that lacks the module that is needed."""
    with pytest.raises(MissingExtraError, match=r"pip install 'leanvlm\[export\]'"):
        require("json.module_that_nobody_has", "export")
