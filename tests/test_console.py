"""What commands write to a terminal or file that does not have every character."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command

from leanvlm.runtime.commands.ask import Request, ask
from leanvlm.runtime.console import one_line_errors
from leanvlm.runtime.draft import Draft
from leanvlm.runtime.session import Session


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("utf-8", "für 日本 \\udcff"), ("cp1252", "für \\u65e5\\u672c \\udcff"), ("ascii", "f\\xfcr \\u65e5\\u672c \\udcff")],
)
def test_what_an_encoding_does_not_have_is_escaped(encoding: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with one_line_errors():
        for stream in (out, err):
            print("für 日本 \udcff", file=stream, flush=True)
            assert stream.buffer.getvalue().decode(encoding) == written + "\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_json_stays_json(encoding: str, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)

    def says(session: Session, draft: Draft) -> Iterator[None]:
        for token in session.tokenizer.encode("日本 für"):
            draft.ids.append(token)
            yield

    monkeypatch.setattr(Session, "tokens", says)
    options = {"max_new_tokens": 20, "stop": ()}
    with one_line_errors():
        ask(Request(demo_bundle, (), "Hi", False, None, None, None, 1, None, True, options))
    out.flush()
    assert json.loads(out.buffer.getvalue().decode(encoding))["text"] == "日本 für"  # type: ignore[attr-defined]


def test_commands_run_without_utf8(leanvlm_process: Command, demo_bundle: Path, tmp_path: Path) -> None:
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "HF_HUB_OFFLINE": "1"}
    shown = leanvlm_process("inspect", demo_bundle, env=environment)
    assert (shown.returncode, "verified" in shown.stdout) == (0, True), shown.stderr
    planned = leanvlm_process("export", "--model", "demo", "--dry-run", "-o", tmp_path / "übung-日本", env=environment)
    assert (planned.returncode, "\\xfcbung-\\u65e5\\u672c" in planned.stdout) == (0, True), planned.stderr


def closed(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `leanvlm …` as a shell does with streams closed."""
    command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m", "leanvlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_closed_streams_are_the_null_device(demo_bundle: Path) -> None:
    asked = closed("2>&-", "run", demo_bundle, "--prompt", "What is below the green ring?", "--max-new-tokens", 1)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "a\n", "")
    refused = closed(">&- <&-", "run", demo_bundle)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[1:] == [
        "leanvlm: standard input has no message; ask with --prompt, or write one message a line"
    ]
    silent = closed("<&- >&- 2>&-", "--version")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_an_error_that_cannot_be_written_keeps_its_status(tmp_path: Path) -> None:
    assert closed("2>/dev/full", "inspect", tmp_path).returncode == 2


def test_a_folder_whose_name_is_not_utf8_is_refused_in_one_line(leanvlm: Command, demo_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b\udcff"
    folder.symlink_to(demo_bundle)
    for command in (
        ("run", folder, "--prompt", "Hi"),
        ("export", "--model", "demo", "-o", tmp_path / "o\udcff"),
        ("export", "--model", folder, "-o", tmp_path / "o"),
    ):
        result = leanvlm(*command)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "\\udcff is not valid UTF-8, which is needed; rename it" in result.stderr
    assert list(tmp_path.iterdir()) == [folder]


def test_an_image_whose_name_is_not_utf8_is_read(
    leanvlm_process: Command, demo_bundle: Path, sample_image: Path, tmp_path: Path
) -> None:
    shutil.copy(sample_image, tmp_path / "p\udcff.png")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    lines = (b"/image p\xff.png\nWhat is below the green ring?\n").decode(errors="surrogateescape")
    result = leanvlm_process("run", demo_bundle, cwd=tmp_path, env=environment, input=lines, errors="surrogateescape")
    assert (result.returncode, result.stdout) == (0, "a yellow hexagon\n"), result.stderr
    assert "p\\udcff.png waits" in result.stderr


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), None], ids=["interrupted", "broken"])
def test_ctrl_c_while_a_compiled_module_is_imported(cause: BaseException | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Such an import says that it failed, with Ctrl-C as its cause; one that fails by itself is a bug."""
    with pytest.raises(SystemExit if cause else ImportError) as end, one_line_errors():
        raise ImportError("initialization failed") from cause
    if cause:
        assert end.value.code == 130
        assert capsys.readouterr().err == "leanvlm: interrupted\n"
