"""What commands write to a terminal or file that does not have every character."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from conftest import Command

from leanvlm.runtime.ask import Request, ask
from leanvlm.runtime.console import one_line_errors
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
    monkeypatch.setattr(Session, "_tokens", lambda session, *rest: (token for token in session.tokenizer.encode("日本 für")))
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
