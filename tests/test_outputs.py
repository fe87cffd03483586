"""What is at the path of a file that a command is to write: checked before the work, nothing of the user's lost."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from PIL import Image

from leanvlm.runtime.outputs import PAGE_MARK, check_outputs, json_bytes, png_bytes, write_outputs
from leanvlm.runtime.signals import Terminated, raised_when_terminated

# Every option that names a file to write, behind the command that it belongs to. The bundle is one by its manifest's name only:
# whatever looked into it would say something else.
COMMANDS = {
    "run": "run bundle --image photo.png --prompt What? --overlay",
    "inspect": "inspect bundle --image photo.png --overlay",
    "profile json": "profile bundle --image photo.png --json",
    "profile html": "profile bundle --image photo.png --html",
    "eval json": "eval bundle --json",
    "eval plot": "eval bundle --plot",
    "eval of a checkpoint": "eval --model checkpoint --pruner agile --json",
    "calibrate": "calibrate gate --model checkpoint --images images -o",
}
OURS = json_bytes({"versions": {"leanvlm": "0"}})


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def nothing(path: Path) -> None:
    pass


# Where the output is to go, what is made there, and what is said.
THERE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "notes": ("new.png", write(b"mine"), "new.png is there and was not written by leanvlm; give another name, or move it"),
    "a picture": ("new.png", lambda path: Image.new("RGB", (3, 3)).save(path), "was not written by leanvlm"),
    "JSON": ("new.png", write(b'{"versions": {"mine": 1}}'), "was not written by leanvlm"),
    "JSON that goes deep": ("new.png", write(b"[" * 100_000), "was not written by leanvlm"),
    "a page": ("new.png", write(b"<!doctype html><title>leanvlm</title>"), "was not written by leanvlm"),
    "a folder": ("new.png", Path.mkdir, "new.png is a folder; give a file"),
    "a link to a file": ("new.png", link("notes.txt"), "was not written by leanvlm"),
    "a link to a folder": ("new.png", link("images"), "new.png is a folder; give a file"),
    "a link to nowhere": ("new.png", link("nowhere/new.png"), "does not exist"),
    "a link to itself": ("new.png", link("new.png"), "new.png cannot be written: Too many levels of symbolic links"),
    "no folder": ("nowhere/new.png", nothing, "the folder nowhere does not exist"),
    "a file as folder": ("notes.txt/new.png", nothing, "the folder notes.txt does not exist"),
    "a name that is too long": (f"{'n' * 249}.png", nothing, "cannot be written: File name too long"),
}
# What each command reads.
READ = {
    **dict.fromkeys(
        ("run", "inspect", "profile json", "profile html"), ("photo.png", "hard.png", "soft.png", "bundle/new.png")
    ),
    **dict.fromkeys(("eval json", "eval plot"), ("bundle/new.png", "bundle/deep/new.png")),
    "eval of a checkpoint": ("checkpoint/new.png",),
    "calibrate": ("images/seen.png", "images/seen.json", "checkpoint/new.json"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what commands read; all of it looks as if leanvlm had written it."""
    monkeypatch.chdir(tmp_path)
    for folder in ("bundle/deep", "checkpoint", "images"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("bundle/leanvlm.json", "checkpoint/config.json", "images/seen.json"):
        (tmp_path / name).write_bytes(OURS)
    for name in ("photo.png", "images/seen.png"):
        (tmp_path / name).write_bytes(png_bytes(Image.new("RGB", (3, 3))))
    (tmp_path / "hard.png").hardlink_to("photo.png")
    (tmp_path / "soft.png").symlink_to("photo.png")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    return tmp_path


def contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def refused(leanvlm: Command, here: Path, command: str, output: str, words: str) -> None:
    """Check that a command says this in one line, and changes nothing."""
    before = contents(here)
    result = leanvlm(*command.split(), output)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert words in result.stderr
    assert contents(here) == before


@pytest.mark.parametrize("there", THERE)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_stays(leanvlm: Command, here: Path, command: str, there: str) -> None:
    output, make, words = THERE[there]
    make(here / output)
    refused(leanvlm, here, COMMANDS[command], output, words)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_input_is_replaced(leanvlm: Command, here: Path, command: str) -> None:
    """By its name, through a link, as a hard link, and in a folder that is read."""
    for output in READ[command]:
        words = (
            "is an input, which would be lost" if "new" not in output else ", which the command reads; give a file elsewhere"
        )
        refused(leanvlm, here, COMMANDS[command], output, words)


def test_the_manifest_is_no_report(leanvlm: Command, here: Path) -> None:
    refused(leanvlm, here, "profile bundle --json", "bundle/leanvlm.json", "is in bundle, which the command reads")


@pytest.mark.parametrize("command", ["profile bundle --html", "eval bundle --plot"])
def test_two_outputs_are_not_one_file(leanvlm: Command, here: Path, command: str) -> None:
    (here / "link.png").symlink_to("new.png")
    for name in ("new.png", f"../{here.name}/new.png", "link.png"):
        refused(leanvlm, here, f"{command} new.png --json", name, "are one file; each needs its own")


def test_the_picture_of_a_gate_is_an_output_too(leanvlm: Command, here: Path) -> None:
    command = "calibrate gate --model checkpoint --images images -o"
    refused(leanvlm, here, command, "new.png", "--output new.png and its picture new.png are one file")
    (here / "cat.png").write_bytes(b"mine")
    refused(leanvlm, here, command, "cat.json", "its picture cat.png is there and was not written by leanvlm")


def test_an_overlay_belongs_to_a_question(leanvlm: Command, here: Path) -> None:
    refused(leanvlm, here, "run bundle --image photo.png --overlay", "new.png", "--overlay needs --prompt")
    refused(leanvlm, here, "eval bundle --plot", "new.svg", "--plot new.svg must end in .png")


@pytest.mark.parametrize("content", [b"", OURS, PAGE_MARK.encode(), png_bytes(Image.new("RGB", (3, 3)))])
def test_what_a_command_wrote_is_replaced(here: Path, content: bytes) -> None:
    (here / "older").write_bytes(content)
    (here / "link").symlink_to("older")
    (here / "fresh").symlink_to("new")
    for name in ("link", "fresh"):
        check_outputs({"--json": here / name})
        write_outputs({here / name: b"newer"})
    # Links are followed.
    assert contents(here) == {**contents(here), "older": b"newer", "link": "older", "fresh": "new", "new": b"newer"}


def test_a_folder_that_cannot_be_written_is_seen_before_the_work(
    protected: tuple[Path, Callable[[], None]], leanvlm: Command
) -> None:
    folder, protect = protected
    (folder / "report.json").write_bytes(OURS)
    # What commands import is imported now: another user may not be able to read where Python is installed.
    for command in ("profile nowhere --json", "export --model demo -o"):
        assert leanvlm(*command.split(), folder).returncode == 2
    protect()
    for name in ("new.json", "report.json"):
        refused(leanvlm, folder, "profile nowhere --json", f"{folder}/{name}", "cannot be written: Permission denied")
    words = f"-o {folder}/a/b cannot be written: Permission denied in {folder}"
    refused(leanvlm, folder, "export --model demo -o", f"{folder}/a/b", words)


# --- Writing ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_older_files(here: Path) -> None:
    """By the limit of a file's size, as quotas and file systems have it too: the second file does not fit."""
    (here / "a").write_bytes(OURS)
    (here / "b").write_bytes(OURS)
    before = contents(here)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_outputs({here / "a": b"new", here / "b": bytes(2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (error.value.errno, contents(here)) == (errno.EFBIG, before)


@pytest.mark.alone
@pytest.mark.parametrize(("step", "all_there"), [("write_bytes", False), ("replace", True)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_all_or_none(
    here: Path, number: int, step: str, all_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, function = contents(here), getattr(Path, step)

    def struck(self: Path, argument: object) -> object:
        signal.raise_signal(number)
        return function(self, argument)

    def written() -> None:
        with raised_when_terminated():
            write_outputs({here / "a": b"new", here / "b": b"new"})

    monkeypatch.setattr(Path, step, struck)
    with pytest.raises(Terminated):
        written()
    assert contents(here) == ({**before, "a": b"new", "b": b"new"} if all_there else before)


def test_what_a_killed_command_left_is_replaced(here: Path) -> None:
    (here / ".a.new").write_bytes(b"hal")
    write_outputs({here / "a": b"whole"})
    assert (here / "a").read_bytes() == b"whole"
    assert not (here / ".a.new").exists()


def test_devices_and_pipes_are_written_as_they_are(here: Path) -> None:
    check_outputs({"--json": Path("/dev/null"), "--html": Path("/dev/full")})
    write_outputs({Path("/dev/null"): b"figures"})
    with pytest.raises(OSError, match="No space left"):
        write_outputs({Path("/dev/full"): b"figures"})
    reader, writer = os.pipe()
    pipe = Path(f"/proc/self/fd/{writer}")
    check_outputs({"--json": pipe})
    write_outputs({pipe: b"figures"})
    assert os.read(reader, 100) == b"figures"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("command", ["run", "inspect", "profile json", "profile html"])
def test_a_report_that_does_not_fit_ends_in_one_line(
    leanvlm: Command, demo_bundle: Path, sample_image: Path, here: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanvlm.runtime.commands import profile

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    before = contents(here)
    monkeypatch.setattr(profile, "peak_memory", lambda config, budget: {"resident": 1, "device": None})
    monkeypatch.setattr(Path, "write_bytes", full)
    parts = [{"bundle": demo_bundle, "photo.png": sample_image}.get(part, part) for part in COMMANDS[command].split()]
    few = ["--runs", 1, "--warmup", 0, "--max-new-tokens", 2] if command.startswith("profile") else []
    result = leanvlm(*parts, "new.png", *few)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"leanvlm: no space left on the disk: {here}/.new.png.new"
    assert "Traceback" not in result.stderr
    assert contents(here) == before
