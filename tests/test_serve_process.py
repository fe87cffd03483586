"""`leanvlm serve` as a process: what it prints, how it ends, and that the README's examples work as they are written."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from served import CHAT, JSON, image_part, text_part

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
QUESTION, ANSWER = "What is below the green ring?", "a yellow hexagon"


@contextmanager
def process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve a bundle in a process; gives it, and where it listens."""
    command = [sys.executable, "-m", "leanvlm", "serve", str(bundle), "--port", "0", *options]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stderr is not None
    try:
        first = running.stderr.readline()
        found = re.search(r"serving (\S+) at http://([\w.]+:\d+) ", first)
        assert found is not None, first + running.stderr.read()
        yield running, found[2]
    finally:
        running.kill()
        running.communicate()


def connect(address: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(address, timeout=60)


@contextmanager
def asking(address: str, body: dict[str, Any]) -> Iterator[http.client.HTTPConnection]:
    """Send a request; gives the connection, which is closed behind."""
    connection = connect(address)
    try:
        connection.request("POST", CHAT, json.dumps(body), JSON)
        yield connection
    finally:
        connection.close()


def examples() -> tuple[str, str]:
    """Return the README's example for a shell, and the one in Python."""
    section = README.read_text(encoding="utf-8").partition("### Serve it\n")[2].partition("\n### ")[0]
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", section, re.M)]
    _, shell, python, *_ = blocks
    return shell, python


@pytest.mark.skipif(not README.is_file(), reason="needs the checkout")
def test_the_readme_s_examples(demo_bundle: Path) -> None:
    shell, python = examples()
    assert demo_bundle.name == "demo-64"
    with process(demo_bundle) as (_, address):
        for command in (["bash", "-c", shell], [sys.executable, "-c", python]):
            assert "127.0.0.1:8000" in command[2]
            here = [*command[:2], command[2].replace("127.0.0.1:8000", address)]
            done = subprocess.run(here, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            answer = json.loads(done.stdout)["choices"][0]["message"]["content"] if command[0] == "bash" else done.stdout
            assert answer == ANSWER


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted"), (signal.SIGHUP, 129, "terminal lost")],
)
def test_a_signal_lets_what_runs_finish(
    demo_bundle: Path, sample_image: Path, number: signal.Signals, status: int, word: str
) -> None:
    content = [image_part(sample_image.read_bytes()), text_part(QUESTION)]
    body = {"messages": [{"role": "user", "content": content}], "stream": True, "ignore_eos": True, "max_tokens": 500}
    with process(demo_bundle, "--rows", "1") as (running, address), asking(address, body) as answered:
        with asking(address, body) as waiting, closing(connect(address)) as watching:
            response = answered.getresponse()
            first = response.readline()
            watching.request("GET", "/metrics")
            assert b"leanvlm_waiting 1.0" in watching.getresponse().read()
            running.send_signal(number)
            refused = waiting.getresponse()
            assert (refused.status, refused.getheader("retry-after")) == (503, "2")
            assert json.loads(refused.read())["error"]["code"] == "shutting_down"
        told = (first + response.read()).decode()
        assert told.endswith("data: [DONE]\n\n")
        assert told.count('"finish_reason":"length"') == 1
        _, said = running.communicate(timeout=60)
        assert (running.returncode, said) == (status, f"leanvlm: {word}\n")
        with pytest.raises(ConnectionRefusedError), asking(address, body):
            pass


def test_an_answer_longer_than_the_grace(demo_bundle: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Why?"}], "stream": True, "ignore_eos": True, "max_tokens": 1024}
    with process(demo_bundle, "--rows", "1", "--grace", "0") as (running, address), asking(address, body) as asked:
        response = asked.getresponse()
        first = response.readline()
        running.send_signal(signal.SIGTERM)
        told = (first + response.read()).decode()
        assert '"code":"shutting_down"' in told.rstrip().rpartition("\n")[2]
        assert 'finish_reason":"' not in told
        running.communicate(timeout=60)
        assert running.returncode == 143


def test_whoever_may_use_it_is_said_loudly(demo_bundle: Path) -> None:
    with process(demo_bundle, "--host", "0.0.0.0") as (running, address):
        assert running.stderr is not None
        warning = running.stderr.readline()
        assert warning.startswith("leanvlm: WARNING: whoever reaches 0.0.0.0 can use this server; give --api-key-file")
        connection = connect(f"127.0.0.1:{address.rpartition(':')[2]}")
        connection.request("GET", "/health", headers={"Host": "robot.example"})
        assert connection.getresponse().read() == b'{"status":"ok"}'
        connection.close()


def test_what_cannot_be_served(leanvlm: Command, demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, line in (
            (["--port", port], f"port {port} of 127.0.0.1 is in use; choose another with --port"),
            (["--host", "no.such.host.invalid"], "the host 'no.such.host.invalid' is not known; give an address"),
            (["--host", "203.0.113.7"], "203.0.113.7 is not an address of this machine"),
            (["--api-key-file", tmp_path / "key"], "is empty; write a key of letters and digits into it"),
            (["--port", 0, "--budget", 7], "budget 7 is not in this bundle; it holds 64, 576"),
            (["--port", 0, "--rows", 1000], "1000 rows are not possible"),
            (["--port", 0, "--allow-remote-images", "http://a/b"], "is no host"),
            (["--port", 0, "--max-seconds", 0], "max_seconds 0 is not possible; give more than 0"),
            (["--port", 0, "--max-body-mb", "inf"], "max_body_mb inf is not possible"),
            (["--port", 0, "--grace", "1e12"], "grace 1e+12 is not possible"),
            (["--port", 0, "--name", " "], "the model's name is empty"),
        ):
            result = leanvlm("serve", demo_bundle, *options)
            assert result.returncode == 2, options
            assert line in result.stderr
            assert result.stderr.count("\n") == 1
    assert leanvlm("serve", tmp_path, "--port", 0).stderr.count("\n") == 1


def test_without_the_extra(leanvlm: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = leanvlm("serve", tmp_path)
    assert result.returncode == 2
    assert result.stderr == "leanvlm: serving a bundle needs uvicorn, which is not installed: pip install 'leanvlm[serve]'\n"


def test_running_imports_no_server() -> None:
    code = "import leanvlm.runtime.session, leanvlm.cli, sys; print(sorted({'fastapi', 'uvicorn'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
