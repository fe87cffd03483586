"""The comparison with other programs: its chapter by hand, its prompts and files, a peer in a process, and the soak."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the checkout: bench is not installed")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The package `bench`, importable from the checkout's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import bench.beside.measure
        import bench.beside.prepare
        import bench.beside.worker
        import bench.peers_report
        import bench.soak

        yield bench


def row(first: float, second: float, turns: list[float], budget: int | None, tokens: list[int], **more: Any) -> dict[str, Any]:
    def answer(ms: float) -> dict[str, Any]:
        return {"tokens": tokens, "first_ms": ms, "steps_ms": [10.0, 12.0], "prompt_tokens": 600}

    # Three rounds, of which the one in the middle counts.
    rounds = [
        {
            "questions": [{"first": answer(first * scale), "second": answer(second * scale)}],
            "chat": [answer(ms * scale) for ms in turns],
            "peak_bytes": int(1e9 * scale),
            "versions": {"python": "3.12.0", "thing": "1.0 (bf16)"},
        }
        for scale in (0.5, 1.0, 4.0)
    ]
    return {"module": "m", "budget": budget, "exact": False, "note": "", "rounds": rounds, **more}


@pytest.fixture
def data() -> dict[str, Any]:
    turns = [1000.0, 100.0, 100.0, 110.0, 119.0]
    return {
        "kind": "peers", "commit": "0123456789", "date": "2026-01-02", "command": "python -m bench peers", "machine": "one",
        "flags": [], "threads": 2, "environment": {"OMP_NUM_THREADS": "2"}, "rounds": 3, "repeats": 1, "tokens": 4,
        "chat_tokens": 4, "model": "a model", "picture": "a picture", "prompts": {"turns": ["a"] * 5},
        "reference": "transformers fp32",
        "rows": {
            "transformers fp32": row(4000, 3000, turns, None, [1, 2, 3, 4], exact=True),
            "other bf16": row(1000, 900, turns, None, [1, 2, 9, 4]),
            "ours onnxruntime fp32, all": row(3000, 200, turns, None, [1, 2, 3, 4], exact=True),
            "ours openvino fp32, all": row(1100, 200, turns, None, [1, 2, 3, 9]),
            "ours onnxruntime fp32, 64": row(2000, 200, turns, 64, [5, 6, 7, 8]),
            "ours openvino fp32, 64": row(770, 192, turns, 64, [5, 6, 7, 9]),
        },
    }  # fmt: skip


def test_the_chapter_says_what_the_figures_give(bench: ModuleType, data: dict[str, Any]) -> None:
    text = bench.peers_report.peers_section(Path("peers-cpu.json"), data)
    assert "| ours openvino fp32, 64 | 770 | 0.77 | 192 | 105 | 1.19 | 11.0 | 4.00 | 6 of 8 |" in text
    assert "| other bf16 | 1000 | 1.00 | 900 | 105 | 1.19 | 11.0 | 4.00 | 4 of 8 |" in text
    assert "`ours openvino fp32, 64`: 770 ms, the lowest of all rows." in text
    assert "- `ours onnxruntime fp32, all`: all of 8 tokens equal." in text
    assert text.count("holds.") == 7
    assert "not** hold" not in text


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("ours openvino fp32, 64", {"first": 780}, "0.78 of the best peer's"),
        ("ours openvino fp32, 64", {"first": 1010}, "0.51 of our fp32 bundle's"),
        ("ours openvino fp32, all", {"first": 1101}, "1.10 of the best peer's"),
        ("ours onnxruntime fp32, 64", {"second": 501}, "Second question, `ours onnxruntime fp32, 64`: 0.25 of the first"),
        ("ours openvino fp32, 64", {"turn": 121}, "Turn 5, `ours openvino fp32, 64`: 121 ms, 1.21 of turn 2's"),
    ],
)
def test_what_does_not_hold_is_said(
    bench: ModuleType, data: dict[str, Any], name: str, change: dict[str, float], said: str
) -> None:
    held = bench.peers_report.peers_section(Path("peers-cpu.json"), data).count("not** hold")
    changed = copy.deepcopy(data)
    middle = changed["rows"][name]["rounds"][1]
    for which in ("first", "second"):
        middle["questions"][0][which]["first_ms"] = change.get(which, middle["questions"][0][which]["first_ms"])
    middle["chat"][-1]["first_ms"] = change.get("turn", middle["chat"][-1]["first_ms"])
    text = bench.peers_report.peers_section(Path("peers-cpu.json"), changed)
    assert text.count("not** hold") > held
    (line,) = (line for line in text.splitlines() if said in line)
    assert line.endswith("does **not** hold.")


def test_wrong_tokens_and_failures_are_said(bench: ModuleType, data: dict[str, Any]) -> None:
    wrong = row(3000, 200, [1.0] * 5, None, [1, 2, 3, 9], exact=True)
    data["rows"] |= {
        "ours onnxruntime fp32, all": wrong,
        "broken": {**row(1, 1, [1.0] * 5, None, []), "rounds": [], "error": "no"},
    }
    text = bench.peers_report.peers_section(Path("peers-cpu.json"), data)
    assert "- `ours onnxruntime fp32, all`: only 6 of 8 tokens equal." in text
    assert "- broken: no" in text


def test_a_chats_turn_begins_as_the_one_before(bench: ModuleType) -> None:
    worker = bench.beside.worker
    prompts = [worker.conversation(turn) for turn in range(len(worker.TURNS))]
    for before, after in pairwise(prompts):
        assert after.startswith(before + worker.REPLY)
    assert all(prompt.count(worker.IMAGE) == 1 and prompt.endswith(" ASSISTANT:") for prompt in prompts)


def test_every_requirement_is_pinned(bench: ModuleType) -> None:
    from bench.beside.environments import ENVIRONMENTS, REQUIREMENTS

    assert {file.name for file in REQUIREMENTS.glob("*")} == set(filter(None, ENVIRONMENTS.values()))
    for file in REQUIREMENTS.glob("*.txt"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_every_row_has_a_module_and_an_environment(bench: ModuleType) -> None:
    from bench.beside.environments import ENVIRONMENTS
    from bench.beside.rows import OURS, PEERS, REFERENCE

    for one in (*PEERS.values(), *OURS.values()):
        assert (ROOT / "bench" / "beside" / f"{one.module}.py").is_file()
        assert one.environment in ENVIRONMENTS
    assert PEERS[REFERENCE].exact
    assert {one.budget for one in OURS.values()} == {None, 64}


def test_nothing_half_made_is_taken_for_whole(bench: ModuleType, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError

    once = bench.beside.prepare.once
    with pytest.raises(RuntimeError):
        once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()
    made = once(tmp_path / "made", lambda folder: folder.mkdir())
    assert list(made.iterdir()) == []
    assert once(made, fail) == made


def test_a_row_that_is_not_known_is_one_line(bench: ModuleType, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench",
        "peers",
        "--rows",
        "ollama",
        "--work",
        str(tmp_path),
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no row is called 'ollama'; there are: transformers fp32;" in done.stderr


def test_a_peer_in_its_process_answers_as_a_fresh_session(bench: ModuleType, tiny_bundle: Path, sample_image: Path) -> None:
    from leanvlm.runtime import load

    worker = bench.beside.worker
    options = {"bundle": str(tiny_bundle), "provider": "onnxruntime", "threads": 2}
    with load(tiny_bundle, threads=2) as session:
        options["budget"] = session.manifest.budgets[0]
    job = {"module": "bench.beside.ours", "options": options, "pictures": [str(sample_image)] * 3, "tokens": 3}
    job |= {"chat_tokens": 2, "repeats": 1}
    command = [sys.executable, "-m", "bench.beside.worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with load(tiny_bundle, threads=2, cache_mb=0) as fresh:
        asked = {"raw": True, "budget": options["budget"], "ignore_end": True}
        (question,) = found["questions"]
        for which, prompt in (("first", worker.FIRST), ("second", worker.SECOND)):
            answer = fresh.generate(prompt, [sample_image], max_new_tokens=3, **asked)
            assert question[which]["tokens"] == list(answer.token_ids)
            assert len(question[which]["steps_ms"]) == 2
        for turn, told in enumerate(found["chat"]):
            answer = fresh.generate(worker.conversation(turn), [sample_image], max_new_tokens=2, **asked)
            assert told["tokens"] == list(answer.token_ids)
    assert found["peak_bytes"] > 1e7


def test_the_soak_sees_what_grows(bench: ModuleType, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leanvlm.runtime import load

    with load(tiny_bundle, threads=2, cache_mb=0.05) as session:
        found = bench.soak.soak(session, answers=20, warmup=2)
        assert 0 < found["cached_bytes"] <= 0.05 * 2**20
        held = []
        answer_of = session.generate

        def leak(*args: Any, **more: Any) -> Any:
            held.append(np.ones(1 << 20))
            return answer_of(*args, **more)

        monkeypatch.setattr(session, "generate", leak)
        assert bench.soak.soak(session, answers=20, warmup=2)["after_bytes"] - found["after_bytes"] > 20 * 8e6


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["onnxruntime", "openvino"])
def test_memory_stays_over_300_answers(bench: ModuleType, demo_bundle: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    found = bench.soak.measure_soak(bench.soak.SoakOptions(demo_bundle, providers=(provider,)))["providers"][provider]
    assert found["after_bytes"] <= bench.soak.MOST * found["before_bytes"]
    assert found["cached_bytes"] <= found["bound_bytes"]
