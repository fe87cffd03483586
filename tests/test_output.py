"""What is at an export's path, or comes to it meanwhile: nothing of a user's is lost, and each refusal is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.output import check_output, files_replaced, put_in_place, scratch_folder, warn_of_losses
from leanvlm.runtime.errors import InputError, LeanVLMWarning

ENGINE = "engines/86/vision_64.engine"


def older_bundle(folder: Path) -> Path:
    """Write a folder that looks like a bundle, with an engine and ONNX Runtime's cache."""
    manifest = {"schema": 0, "files": {"vision.data": {}}, "engines": [{"file": ENGINE}]}
    for name in ("vision.data", ENGINE, "engines/timing.cache", "engines/onnxruntime/any.engine"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("older", encoding="utf-8")
    (folder / "leanvlm.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, str | None]:
    """Return all below a folder: paths, and what files hold."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8") if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def export(config: ExportConfig, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Do what an export does with its path, and something else while it runs."""
    check_output(config)
    before = files_replaced(config)
    with scratch_folder(config.output_folder) as scratch:
        new = scratch / config.output_folder.name
        new.mkdir()
        (new / "leanvlm.json").write_text("new", encoding="utf-8")
        meanwhile()
        put_in_place(new, config, before, scratch)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def make_folder(path: Path) -> None:
    path.mkdir()


def make_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes").write_text("mine", encoding="utf-8")


def make_file(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def make_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", [make_folder, make_full_folder, make_file, make_link, older_bundle])
def test_what_comes_to_the_place_meanwhile_stays(here: Path, make: Callable[[Path], object], force: bool) -> None:
    expected: dict[str, str | None] = {}

    def meanwhile() -> None:
        make(here / "x")
        expected.update(contents(here))

    config = ExportConfig("demo", output="x", force=force)
    if force and make is make_folder:
        return export(config, lambda: make(here / "x"))  # Empty: nothing is lost, and --force allows it.
    with pytest.raises(InputError, match=r"x (exists|is a link|was written)|x/.* was written") as error:
        export(config, meanwhile)
    assert "\n" not in str(error.value)
    # The scratch folder is gone.
    assert contents(here) == {name: text for name, text in expected.items() if not name.startswith(".x.")}
    return None


@pytest.mark.parametrize("kind", ["file", "folder", "empty", "link"])
def test_nothing_is_replaced_that_comes_at_the_last_moment(here: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look and the rename: the rename itself must not replace."""
    make = {"file": make_file, "folder": make_full_folder, "empty": make_folder, "link": make_link}[kind]
    lexists = os.path.lexists

    def late(path: Path) -> bool:
        there = lexists(path)
        if path == here / "x" and not there:
            make(path)
        return there

    monkeypatch.setattr(os.path, "lexists", late)
    with pytest.raises(InputError, match="was written while the export ran"):
        export(ExportConfig("demo", output="x"))
    assert [path.name for path in here.iterdir()] == ["x"]
    expected = {"file": {"x": "mine"}, "folder": {"x": None, "x/notes": "mine"}}.get(kind, {"x": None})
    assert (contents(here), (here / "x").is_symlink()) == (expected, kind == "link")


def test_an_older_bundle_is_kept_where_its_place_is_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something comes between the two renames: it stays, and the older bundle is somewhere that the error names."""
    older_bundle(here / "x")
    before, rename = contents(here / "x"), Path.rename

    def late(self: Path, target: Path) -> Path:
        result = rename(self, target)
        if self == here / "x":
            make_file(self)
        return result

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(InputError, match="what was there before is now") as error:
        export(ExportConfig("demo", output="x", force=True))
    assert (here / "x").read_text(encoding="utf-8") == "mine"
    assert contents(Path(str(error.value).rsplit(" ", 1)[1])) == before


def test_force_replaces_a_bundle_of_any_schema_and_says_that_engines_go(here: Path) -> None:
    config = ExportConfig("demo", output="x", force=True)
    older_bundle(here / "x")
    with pytest.warns(LeanVLMWarning, match=r"3 files in .*x/engines \(0.0 MB\) were built from the older graphs and go"):
        warn_of_losses(config.output_folder, files_replaced(config))
    # Who runs the older bundle meanwhile fills its cache.
    export(config, lambda: (here / "x/engines/onnxruntime/more").write_text("cache", encoding="utf-8"))
    assert contents(here) == {"x": None, "x/leanvlm.json": "new"}


@pytest.mark.parametrize("name", ["notes.txt", "engines/notes.txt", "engines/89/decoder.engine", "deep/er/notes", "link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_force_names_what_no_bundle_has(here: Path, name: str, when: str) -> None:
    older_bundle(here / "x")

    def add() -> None:
        path = here / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "link":
            path.symlink_to(here)
        else:
            path.write_text("mine", encoding="utf-8")

    if when == "before":
        add()
    with pytest.raises(InputError, match=rf"x holds {name}, which leanvlm.json does not list"):
        export(ExportConfig("demo", output="x", force=True), add if when == "meanwhile" else lambda: None)
    assert [path.name for path in here.iterdir()] == ["x"]
    assert (here / "x/vision.data").is_file()
    assert os.path.lexists(here / "x" / name)


def test_force_replaces_only_what_was_there_at_the_start(here: Path) -> None:
    """Such as an engine that was built meanwhile: it is the bundle's own, and nobody was told that it goes."""
    older_bundle(here / "x")
    with pytest.raises(InputError, match=rf"x/{ENGINE} was written while the export ran"):
        export(
            ExportConfig("demo", output="x", force=True), lambda: (here / "x" / ENGINE).write_text("newer", encoding="utf-8")
        )
    assert (here / "x" / ENGINE).read_text(encoding="utf-8") == "newer"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {}, "engines": [3]}', "[" * 100_000])
def test_a_bundle_that_cannot_be_read_is_not_replaced(here: Path, text: str) -> None:
    (older_bundle(here / "x") / "leanvlm.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"leanvlm.json cannot be read, so --force cannot tell .* move .*x away"):
        check_output(ExportConfig("demo", output="x", force=True))


def test_the_second_of_two_exports_is_told_at_once(here: Path) -> None:
    config = ExportConfig("demo", output="x")

    def second() -> None:
        with pytest.raises(InputError, match=r"another export is writing .*x; wait"):
            check_output(config)
        with pytest.raises(InputError, match="another export is writing"):
            check_output(ExportConfig("demo", output="../here/x", force=True))
        check_output(ExportConfig("demo", output="y"))

    export(config, second)
    assert contents(here) == {"x": None, "x/leanvlm.json": "new"}


def test_two_exports_that_begin_at_once(here: Path) -> None:
    """Neither saw the other: the first to end wins."""
    config = ExportConfig("demo", output="x")

    def first() -> None:
        with scratch_folder(config.output_folder) as scratch:
            (scratch / "x").mkdir()
            (scratch / "x" / "leanvlm.json").write_text("first", encoding="utf-8")
            put_in_place(scratch / "x", config, {}, scratch)

    with pytest.raises(InputError, match="x exists; choose another -o"):
        export(config, first)
    assert contents(here) == {"x": None, "x/leanvlm.json": "first"}


def test_paths_are_absolute_from_the_start(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "elsewhere").mkdir()
    export(ExportConfig("demo", output="x"), lambda: monkeypatch.chdir(here / "elsewhere"))
    assert contents(here) == {"elsewhere": None, "x": None, "x/leanvlm.json": "new"}


@pytest.mark.parametrize("current", [".", "engines/86"])
def test_the_current_folder_is_not_replaced(here: Path, current: str, monkeypatch: pytest.MonkeyPatch) -> None:
    older_bundle(here / "x")
    before = contents(here)
    monkeypatch.chdir(here / "x" / current)
    with pytest.raises(InputError, match=r"the current folder is in .*x, which --force would replace"):
        check_output(ExportConfig("demo", output=os.path.relpath(here) + "/x", force=True))
    assert contents(here) == before


def test_a_link_to_itself_is_refused(here: Path) -> None:
    (here / "x").symlink_to("x")
    with pytest.raises(InputError, match="x is a link to "):
        check_output(ExportConfig("demo", output="x"))
    assert ExportConfig("demo", output="x/y").output_folder == here / "x" / "y"


def test_what_a_killed_export_left_is_said(here: Path) -> None:
    """Killed for good: nothing could be removed. It is told from an export that runs, and from a user's own folders."""
    code = (
        "import os; from pathlib import Path; from leanvlm.exporter.output import scratch_folder\n"
        f"with scratch_folder(Path({str(here / 'x')!r})) as scratch:\n"
        "    (scratch / 'x').mkdir(); (scratch / 'x' / 'vision.data').write_bytes(bytes(2_500_000)); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (here / ".x.settings").mkdir()
    (here / ".x.notmine_" / "y").mkdir(parents=True)
    left = next(path for path in here.iterdir() if (path / "x").is_dir())
    config = ExportConfig("demo", output="x")
    check_output(config)
    with pytest.warns(LeanVLMWarning) as told:
        warn_of_losses(config.output_folder, {})
    assert [str(warning.message) for warning in told] == [
        f"{left} (2.5 MB) is left of an export that was killed; remove it: rm -r {left}"
    ]
    older_bundle(left / "older")
    with pytest.warns(
        LeanVLMWarning, match="the bundle that it was to replace is .*/older: move that out, then remove the rest"
    ):
        warn_of_losses(config.output_folder, {})


def test_the_command_refuses_before_the_work(leanvlm: Command, here: Path) -> None:
    older_bundle(here / "x")
    (here / "x" / "notes").write_text("mine", encoding="utf-8")
    result = leanvlm("export", "--model", "demo", "-o", "x", "--force")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "x holds notes, which leanvlm.json does not list" in result.stderr
