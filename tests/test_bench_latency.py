"""The latency bench from beginning to end on the processor, with a small random checkpoint: the program, not the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the checkout: bench is not installed"),
]


def _bench(*arguments: object) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bench", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_picture_is_resized_on_both_sides(cuda_bundle: Path, tmp_path: Path) -> None:
    _bench("host", cuda_bundle, "--device", "cpu", "--runs", 2, "--output", tmp_path / "host.json")
    data = json.loads((tmp_path / "host.json").read_text(encoding="utf-8"))
    assert len(data["samples_ms"]) == 8
    assert all(len(values) == 2 and min(values) > 0 for values in data["samples_ms"].values())


def test_every_required_figure_is_measured_and_reported(tmp_path: Path) -> None:
    from leanvlm.exporter import ExportConfig, export

    checkpoint, output = tmp_path / "checkpoint", tmp_path / "figures.json"
    _bench("checkpoint", "--small", "--output", checkpoint)
    bundles = {precision: tmp_path / precision for precision in ("fp16", "int4")}
    for precision, folder in bundles.items():
        export(ExportConfig(str(checkpoint), (64,), folder, target="cuda", precision=precision))
    options = [item for precision, folder in bundles.items() for item in (f"--{precision}", folder)]
    _bench("latency", "--checkpoint", checkpoint, *options, "--device", "cpu", "--runs", 2, "--no-static", "--output", output)
    data = json.loads(output.read_text(encoding="utf-8"))
    names = (
        "torch_graph_vision vision_64 prefill_104_fp16 prefill_104_int4 decode_fp16 decode_int4 decode_fp16_graph_only "
        "ttft_64 ttft_576 ttft_64_pixels ttft_64_jpeg transformers_ttft_576 preprocess pillow_decode_resize"
    )
    assert all(len(data["samples_ms"][name]) == 2 and min(data["samples_ms"][name]) > 0 for name in names.split())
    assert data["floors_ms"].keys() >= {"prefill_104_fp16", "decode_fp16", "decode_int4"}
    assert all(row["cosine"] > 0.999 and row["same_first_token"] for row in data["agreement"]["fp16"].values())
    assert data["shapes"]["prompt_tokens"] == 104
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from bench.latency_report import latency_section

        assert "missed" in latency_section(output, data)
