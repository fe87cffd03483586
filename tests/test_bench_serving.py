"""The bench of a server: what its clients take for right, and what its chapter says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the checkout: bench is not installed")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The package `bench`, importable from the checkout's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import bench.serving
        import bench.serving_report

        yield bench


def record(**soak: Any) -> dict[str, Any]:
    times = {"session": [20.0, 21.0, 22.0], "server": [25.0, 26.0, 40.0]}
    found = {
        "outcomes": {"streamed": 9, "aborted": 1}, "wrong_answers": 0, "before_bytes": 100_000_000, "after_bytes": 104_000_000,
        "seconds": 3.0, "left_running": 0.0, "left_waiting": 0.0, "status": 143,
    }  # fmt: skip
    return {
        "machine": "a machine", "versions": {"onnxruntime": "1.32"}, "date": "2026-11-26", "command": "python -m bench serving",
        "rounds": 3, "most_added_ms": 10.0, "most": 1.05, "first_token_ms": {"known": times}, "requests": 10, "clients": 2,
        "warmup": 3, "cache_mb": 2.0, "max_queue": 8, "soak": {**found, **soak},
    }  # fmt: skip


def test_the_chapter(bench: ModuleType) -> None:
    text = bench.serving_report.serving_section(Path("serving.json"), record())
    assert "| 21.00 (21.80) | 26.00 (37.20) | +5.00 | yes |" in text
    assert "| 9 streamed; 1 aborted |" in text
    assert "100, 104 (+4.0 %)" in text
    assert "**no**" not in text
    grown = bench.serving_report.serving_section(Path("serving.json"), record(after_bytes=106_000_000))
    assert "| within 5 % | **no** |" in grown


def test_a_stream_ends_once(bench: ModuleType) -> None:
    def event(text: str, reason: str = "null") -> str:
        return f'data: {{"choices":[{{"delta":{{"content":"{text}"}},"finish_reason":{reason}}}]}}\n\n'

    done = "data: [DONE]\n\n"
    assert bench.serving._streamed(event("a") + event(" b") + event("", '"stop"') + done) == "a b"
    for wrong in (event("a") + done, event("a", '"stop"') * 2 + done, event("a", '"stop"') + event("b")):
        with pytest.raises(bench.serving.LeanVLMError, match="a stream ends with"):
            bench.serving._streamed(wrong)
