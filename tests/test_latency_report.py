"""The chapter of a latency measurement and the floors' arithmetic, by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the checkout: bench is not installed")

SHAPES = {
    "layers": 32,
    "hidden": 4096,
    "intermediate": 11008,
    "vocab": 32064,
    "vision_blocks": 23,
    "vision_width": 1024,
    "vision_intermediate": 4096,
    "vision_tokens": 577,
    "image_tokens": 576,
    "prompt_tokens": 104,
}
MEDIANS = {
    "torch_graph_vision": 3.2,
    "vision_64": 3.6,
    "prefill_104_fp16": 4.2,
    "prefill_104_int4": 4.0,
    "decode_fp16": 4.0,
    "decode_int4": 1.6,
    "decode_fp16_graph_only": 3.8,
    "decode_int4_graph_only": 1.5,
    "ttft_64": 14.0,
    "ttft_576": 31.5,
    "transformers_ttft_576": 63.0,
    "preprocess": 5.0,
    "pillow_decode_resize": 4.8,
}
MORE = {
    "ttft_32": 13.2,
    "ttft_128": 15.4,
    "ttft_192": 17.5,
    "ttft_64_jpeg": 21.1,
    "ttft_576_jpeg": 38.6,
    "ttft_576_pixels": 40.0,
    "genai_decode_fp16": 4.4,
} | {f"ttft_{budget}_int4": value for budget, value in ((32, 13.0), (64, 13.8), (128, 15.6), (192, 18.1), (576, 33.9))}
PREFILL = {32: 3.6, 64: 4.2, 128: 5.6, 192: 7.4, 576: 20.1}
STAGES = {"preprocess": 5.0, "vision": 3.6, "splice": 0.4, "prefill": 0.0, "sample": 0.05}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The package `bench`, importable from the checkout's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import bench.latency_report
        import bench.report

        yield bench


@pytest.fixture
def data() -> dict[str, Any]:
    """A measurement on which every bound holds."""
    stages = {
        precision: {
            str(budget): {name: around(slower * (time or prefill)) for name, time in STAGES.items()}
            for budget, prefill in PREFILL.items()
        }
        for precision, slower in (("fp16", 1.0), ("int4", 1.05))
    }
    return {
        "kind": "latency",
        "commit": "0123456789abcdef",
        "date": "2026-01-02",
        "gpu": "NVIDIA H200",
        "model": "LLaVA-1.5-7B's shapes, random weights",
        "versions": {"onnxruntime": "1.31.1", "python": "3.12.3"},
        "command": "python -m bench latency",
        "copy_bandwidth_bytes_per_s": 4.0e12,
        "matmul_flop_per_s": 8.0e14,
        "weights_bytes": 14_000_000_000,
        "decoder_weights_bytes": {"fp16": 13_214_679_040, "int4": 3_600_000_000},
        "shapes": dict(SHAPES),
        "peak_device_bytes_64": 15_400_000_000,
        "image": {"bytes": 312_345, "width": 1280, "height": 960},
        "samples_ms": {name: around(value) for name, value in (MEDIANS | MORE).items()},
        "stages_ms": stages,
        "agreement": {
            "fp16": {"64": {"cosine": 0.99991, "same_first_token": True}},
            "int4": {"64": {"cosine": 0.99, "same_first_token": False, "logit_difference": 0.25}},
        },
    }


def around(middle: float) -> list[float]:
    """Twenty-one samples with a known median, and one of them far off."""
    return [middle * (1 + 0.001 * k) for k in range(-10, 10)] + [10 * middle]


def row(text: str, start: str) -> list[str]:
    """Return the cells of the first table row that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def section(bench: ModuleType, data: dict[str, Any]) -> str:
    return bench.latency_report.latency_section(Path("h200-model.json"), data)


def test_the_weights_counted_are_those_of_the_decoder(bench: ModuleType) -> None:
    shapes = bench.roofline.Shapes(**SHAPES)
    head = 4096 * 32064
    assert 2 * (bench.roofline.layer_weights(shapes) + head) == 13_214_679_040


def test_operations_of_a_model_small_enough_to_count(bench: ModuleType) -> None:
    shapes = bench.roofline.Shapes(
        layers=1,
        hidden=2,
        intermediate=3,
        vocab=5,
        vision_blocks=1,
        vision_width=2,
        vision_intermediate=4,
        vision_tokens=3,
        image_tokens=2,
        prompt_tokens=2,
    )
    # One layer has 4 matrices of 2 x 2 and 3 of 2 x 3; of two tokens one attends to one and one to two; the head is 2 x 5.
    assert bench.roofline.layer_weights(shapes) == 34
    assert bench.roofline.decoder_flops(shapes, 2) == 2 * 2 * 34 + (1 + 2) * 2 * (2 * 2) + 2 * 2 * 5
    # A block has 4 matrices of 2 x 2 and 2 of 2 x 4, and 3 tokens attend to 3; the projector has 2 of 2 x 2.
    assert bench.roofline.vision_weights(shapes) == (32, 8)
    assert bench.roofline.vision_flops(shapes) == 2 * 3 * 32 + 3 * 3 * 2 * (2 * 2) + 2 * 2 * 8


def test_a_floor_is_the_larger_time(bench: ModuleType) -> None:
    floor = bench.roofline.floor_ms
    assert floor(moved=8e9, flops=1e12, bandwidth=4e12, rate=1e15) == pytest.approx(2.0)
    assert floor(moved=8e9, flops=5e12, bandwidth=4e12, rate=1e15) == pytest.approx(5.0)


def test_floors_of_a_measurement(bench: ModuleType, data: dict[str, Any]) -> None:
    data["shapes"]["heads"] = 32  # More than is needed is no error.
    found = bench.roofline.floors(data)
    # 23 blocks of 12 x 1024² weights and two projector matrices; all for 577 and 576 tokens, and attention between 577.
    tower, projector = 23 * 12 * 1024**2, 1024 * 4096 + 4096**2
    flops = 2 * 577 * tower + 4 * 23 * 577**2 * 1024 + 2 * 576 * projector
    assert found == pytest.approx(
        {
            "vision": 1e3 * flops / 8e14,
            "prefill_104_fp16": 3.30366976,
            "decode_fp16": 3.30366976,
            "decode_int4": 0.9,
        }
    )


def test_every_bound_holds_with_its_ratio(bench: ModuleType, data: dict[str, Any]) -> None:
    text = section(bench, data)
    floor = 13.21467904 / 4
    wanted = {
        "vision at 64 tokens": (3.6 / 3.2, "at most 1.25"),
        "prefill, fp16": (4.2 / floor, "at most 1.5"),
        "prefill, int4": (4.0 / 4.2, "at most 1"),
        "decode step, fp16, over": (4.0 / floor, "at most 1.35"),
        "decode step, int4, over": (1.6 / 0.9, "at most 2"),
        "decode step, fp16: share": ((4.0 - 3.8) / 4.0, "at most 0.1"),
        "decode step, int4: share": ((1.6 - 1.5) / 1.6, "at most 0.1"),
        "first token, unpruned over": (31.5 / 14, "at least 2"),
        "first token, unpruned in": (63 / 14, "at least 3"),
        "preprocess over": (5.0 / 4.8, "at most 1.1"),
        "device memory": (15.4 / 14, "at most 1.15"),
    }
    for start, (ratio, bound) in wanted.items():
        assert row(text, start)[-3:] == [f"{ratio:.3f}", bound, "holds"]
    assert "Bounds that hold: 11 of 11; missed: 0; not measured: 0." in text
    gains = "the first token with 64 image tokens comes 2.25 times sooner than unpruned and 4.50 times sooner than unpruned in"
    assert f"From pixels of the model's own size, {gains} transformers." in text
    assert "From the whole picture" not in text, "its time with 64 tokens was not measured"


def test_a_missed_bound_says_by_how_much(bench: ModuleType, data: dict[str, Any]) -> None:
    data["samples_ms"]["vision_64"] = around(5.0)
    data["samples_ms"]["ttft_576"] = around(25.2)
    data["samples_ms"]["preprocess"] = [1.10001]
    data["samples_ms"]["pillow_decode_resize"] = [1.0]
    text = section(bench, data)
    assert row(text, "vision at 64 tokens")[1:] == ["5.000 ms", "3.200 ms", "1.562", "at most 1.25", "missed by 25.0 %"]
    assert row(text, "first token, unpruned over")[-3:] == ["1.800", "at least 2", "missed by 10.0 %"]
    assert row(text, "preprocess over")[-1] == "missed by less than 0.1 %"
    assert "Bounds that hold: 8 of 11; missed: 3;" in text


def test_a_bound_that_is_met_exactly_holds(bench: ModuleType) -> None:
    bound = bench.latency_report.Bound
    assert bound("", "a", "b", 1.25).verdict(1.25) == "holds"
    assert bound("", "a", "b", 2.0, least=True).verdict(2.0) == "holds"


def test_what_was_not_measured(bench: ModuleType, data: dict[str, Any], tmp_path: Path) -> None:
    """A required row says so, an optional one is left out, and the rest stays."""
    whole = section(bench, data)
    for name in ("transformers_ttft_576", "decode_int4_graph_only", *MORE):
        del data["samples_ms"][name]
    data["samples_ms"]["torch_graph_vision"] = []
    del data["peak_device_bytes_64"], data["stages_ms"]["int4"], data["agreement"], data["image"]
    text = section(bench, data)
    assert row(text, "first token, unpruned in")[1:] == ["", "14.000 ms", "", "at least 3", "not measured"]
    assert row(text, "vision at 64 tokens")[-1] == row(text, "device memory")[-1] == "not measured"
    assert "decode step, int4: share" in whole
    assert "decode step, int4: share" not in text
    assert "Bounds that hold: 7 of 10; missed: 0; not measured: 3." in text
    for heading in ("### Agreement", "### Stages from JPEG bytes to the first token, int4", "`genai_decode_fp16`"):
        assert heading in whole
        assert heading not in text
    bench.latency_report.latency_pictures(tmp_path / "h200.png", data)
    assert len(list(tmp_path.iterdir())) == 3


def test_without_any_sample_there_is_no_picture(bench: ModuleType, data: dict[str, Any], tmp_path: Path) -> None:
    data |= {"samples_ms": {}, "stages_ms": {}}
    text = section(bench, data)
    bench.latency_report.latency_pictures(tmp_path / "h200.png", data)
    assert list(tmp_path.iterdir()) == []
    assert "![" not in text
    assert "Bounds that hold: 1 of 10; missed: 0; not measured: 9." in text  # The memory needs no sample.


def test_tables_of_stages_times_agreement_and_floors(bench: ModuleType, data: dict[str, Any]) -> None:
    text = section(bench, data)
    assert row(text, "image tokens") == ["image tokens", "32", "64", "128", "192", "576"]
    assert row(text, "prefill | 3.6")[2] == "4.200 (4.234)"
    assert row(text, "sum of the medians")[2] == f"{5.0 + 3.6 + 0.4 + 4.2 + 0.05:.3f}"
    assert row(text, "time to first token")[5] == "38.600 (38.909)"
    assert row(text, "`vision_64`")[1:] == ["3.600", "3.571", "3.629", "21"]
    assert "|  | cosine | same first token | logit difference |" in text
    assert row(text, "int4, 64") == ["int4, 64", "0.99", "no", "0.25"]
    assert row(text, "fp16, 64") == ["fp16, 64", "0.99991", "yes", ""]
    assert row(text, "decode_int4 |")[-3:] == ["0.900", "1.600", "1.78"]


def test_what_the_pictures_show(bench: ModuleType, data: dict[str, Any]) -> None:
    charts = bench.latency_report.charts(data)
    assert list(charts["stages"].bars) == [f"{p}, {b}" for p in ("fp16", "int4") for b in (32, 64, 128, 192, 576)]
    assert charts["stages"].bars["fp16, 64"] == {**STAGES, "prefill": 4.2}
    assert sorted(charts["ttft"].series["fp16"]) == [(32, 13.2), (64, 14.0), (128, 15.4), (192, 17.5), (576, 31.5)]
    assert (64, 13.8) in charts["ttft"].series["int4"]
    assert charts["ttft"].level == ("transformers, 576", 63.0)
    vision = bench.roofline.floors(data)["vision"]
    floor = 13.21467904 / 4
    measured = {"vision": 3.6 / vision, "prefill 104 fp16": 4.2 / floor, "decode fp16": 4.0 / floor, "decode int4": 1.6 / 0.9}
    assert {name: bar["measured"] for name, bar in charts["floors"].bars.items()} == pytest.approx(measured)
    # The vision graph's bound is on PyTorch's time, the others' on their floors.
    bounds = {"vision": 1.25 * 3.2 / vision, "prefill 104 fp16": 1.5, "decode fp16": 1.35, "decode int4": 2.0}
    assert charts["floors"].marks[1] == pytest.approx(bounds)


def test_runs_that_do_not_count_are_a_condition(bench: ModuleType, data: dict[str, Any]) -> None:
    assert "that do not count" not in section(bench, data)
    assert "at least 21 samples of each time after 5 runs that do not count;" in section(bench, data | {"warm_up": 5})


def test_pictures_are_those_that_the_text_shows(bench: ModuleType, data: dict[str, Any], tmp_path: Path) -> None:
    sizes = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        bench.latency_report.latency_pictures(folder / "h200-model.png", copy.deepcopy(data))
        pictures = {path.name: Image.open(path).convert("RGB") for path in sorted(folder.iterdir())}
        assert list(pictures) == ["h200-model-floors.png", "h200-model-stages.png", "h200-model-ttft.png"]
        assert all(len(picture.getcolors(1 << 20) or []) > 50 for picture in pictures.values())
        sizes.append({name: picture.size for name, picture in pictures.items()})
    assert sizes[0] == sizes[1]
    text = section(bench, data)
    assert all(f"](results/{name})" in text for name in sizes[0])


def test_a_bar_is_as_long_as_its_value(bench: ModuleType, tmp_path: Path) -> None:
    plot = bench.latency_plot
    bars = {"short": {"part": 1.0}, "long": {"part": 1.0, "other": 2.0}}
    plot.save_bars(tmp_path / "bars.png", plot.Bars("", "", bars, {"part": "#0000FF", "other": "#00FF00"}))
    picture = Image.open(tmp_path / "bars.png").convert("RGB")
    lengths = {}
    for number, name in enumerate(bars):
        y = plot.TOP + round(plot.ROW * (number + 0.5))
        line = [picture.getpixel((x, y)) for x in range(plot.WIDTH)]
        lengths[name] = [line.count(colour) for colour in ((0, 0, 255), (0, 255, 0))]
    unit = (plot.WIDTH - plot.RIGHT - plot.NAMES) / 3
    # The edges are smoothed, and the axis covers a point.
    assert lengths["short"] == pytest.approx([unit, 0], abs=4)
    assert lengths["long"] == pytest.approx([unit, 2 * unit], abs=4)


def test_the_chapter_has_its_place_in_the_report(
    bench: ModuleType, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.report, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.report, "REPORT", tmp_path / "RESULTS.md")
    (tmp_path / "h200-model.json").write_text(json.dumps(data), encoding="utf-8")
    bench.report.write_report()
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "## Latency of LLaVA-1.5-7B's shapes, random weights, on NVIDIA H200" in text
    assert "[h200-model.json](results/h200-model.json)" in text
    assert str(tmp_path) not in text
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_stored_floors_are_what_the_arithmetic_gives(bench: ModuleType) -> None:
    for path in bench.report.RESULTS.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("kind") == "latency":
            assert data["floors_ms"] == pytest.approx(bench.roofline.floors(data))
