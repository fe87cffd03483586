"""`python -m bench host`: a picture resized by the processor and by the device, turn by turn in one process.

From JPEG bytes to the first token, and what of it is preprocess; then the processor's own part by itself: Pillow decodes,
resizes and crops, as without the resize graphs; or the file is decoded and the weights are looked up, and nothing else is left.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from bench.latency import machine, prompt_of, timed
from leanvlm.runtime import taps
from leanvlm.runtime.crops import PIXELS, crop
from leanvlm.runtime.cuts import Uncut
from leanvlm.runtime.session import Session, load

PHOTOGRAPH = Path(__file__).parents[1] / "demo" / "photographs" / "coffee.jpg"


@dataclass(frozen=True)
class HostOptions:
    """What is measured.

    Attributes:
        bundle: For cuda, with resize graphs.
        output: JSON file to write, or None.
        size: (width, height) of the JPEG file, made of a photograph.
        runs: Counted runs.
        warmup: Runs before, not counted.
        device: `cpu` only to try this program, or for the processor's part by itself.
    """

    bundle: Path
    output: Path | None = None
    size: tuple[int, int] = (1280, 960)
    runs: int = 30
    warmup: int = 5
    device: str | None = None


def measure_host(options: HostOptions) -> dict[str, Any]:
    """Measure, write the JSON file if one is asked for, and return its content: medians in ms."""
    jpeg = jpeg_of(options.size)
    samples: dict[str, list[float]] = {}

    def keep(run: int, name: str, value: float) -> None:
        if run >= 0:
            samples.setdefault(name, []).append(value)

    with load(options.bundle, device=options.device, cache_mb=0) as session:
        backend: Any = session.backend
        resizers = {"processor": None, "device": backend.new_resizer()}
        prompt = prompt_of(session, 40)
        for run in range(-options.warmup, options.runs):
            for name, resizer in resizers.items():
                backend.resizer = resizer
                found = session.generate(prompt, [jpeg], max_new_tokens=1, ignore_end=True).timings
                keep(run, f"first token, resized by the {name}", found.time_to_first_token)
                keep(run, f"preprocess, resized by the {name}", found.preprocess)
        parts = host_parts(session, resizers["device"], jpeg)
        for run in range(-options.warmup, options.runs):
            for name, work in parts.items():
                keep(run, name, timed(work))
    medians = {name: round(float(np.median(values)), 3) for name, values in samples.items()}
    left, today = medians["decode, weights kept"], medians["decode, resize and crop in Pillow"]
    record = {
        "kind": "host",
        **machine(),
        "command": f"python -m bench host {options.bundle.name} --runs {options.runs}",
        "model": options.bundle.name,
        "processor": platform.machine(),
        "pillow": PIL.__version__,
        "image": {"size": options.size, "bytes": len(jpeg)},
        "runs": options.runs,
        "median_ms": medians,
        "host_part": round(left / today, 3),
        "samples_ms": samples,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return {name: value for name, value in record.items() if name != "samples_ms"}


def host_parts(session: Session, resizer: Any, jpeg: bytes) -> dict[str, Callable[[], Any]]:
    """Return what the processor does for a picture, by name."""
    spec, rule = session.manifest.image, session.manifest.crops

    def left(fresh: bool) -> None:
        if fresh:
            taps.taps.cache_clear()
        for inputs in crop([jpeg], spec, rule, resizer=resizer).inputs.values():
            assert isinstance(inputs[PIXELS], Uncut)
            for piece in inputs[PIXELS].pieces:
                np.asarray(piece.picture.image)

    return {
        "decode, resize and crop in Pillow": lambda: crop([jpeg], spec, rule),
        "decode in Pillow": lambda: Image.open(BytesIO(jpeg)).load(),
        "decode, weights kept": lambda: left(fresh=False),
        "decode, weights new": lambda: left(fresh=True),
    }


def jpeg_of(size: tuple[int, int]) -> bytes:
    """Return a photograph as JPEG bytes of a (width, height)."""
    buffer = BytesIO()
    Image.open(PHOTOGRAPH).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
