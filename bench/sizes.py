"""`python -m bench sizes`: models whose images have a size, at several shares of their tokens, beside transformers with SDPA.

One process holds the checkpoint on the GPU and the bundle made of it; all answer about the same picture, of the exported
shape, in turn. Transformers gets what its own image processor makes of the picture, and reads all image tokens.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from bench.families import measure_each
from bench.shapes import SIZED, make_shape
from leanvlm.exporter import ExportConfig
from leanvlm.exporter.config import Share
from leanvlm.exporter.pipeline import export_plan
from leanvlm.exporter.plan import plan
from leanvlm.runtime.crops import crop
from leanvlm.runtime.session import Session, load, user_message

PROMPT = "Describe the image."
SHARES = (50, 25, 10)


@dataclass(frozen=True)
class SizesOptions:
    """What is measured.

    Attributes:
        names: Of `SIZED`.
        work: Folder for checkpoints and bundles, each removed when it has been measured.
        output: JSON file to write, after every model.
        side: Pixels on each side of the picture, rounded to whole tokens.
        target: `cuda`, or `cpu` to try the command.
        small: Narrow models of two layers, to try the command.
        runs: Counted runs of each.
        warmup: Runs before them.
    """

    names: tuple[str, ...]
    work: Path
    output: Path
    side: int = 1036
    target: str = "cuda"
    small: bool = False
    runs: int = 20
    warmup: int = 4


def measure_sizes(options: SizesOptions) -> Path:
    """Export, verify and time each; a model that fails is recorded with its error, and the others go on."""
    record: dict[str, Any] = {
        "kind": "sizes",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "target": options.target,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "runs": options.runs,
        "warmup": options.warmup,
        "models": {},
    }
    measure_each(record, options.names, options.work, options.output, lambda name, folder: _measure(name, folder, options))
    return options.output


def _measure(name: str, folder: Path, options: SizesOptions) -> dict[str, Any]:
    begin = perf_counter()
    checkpoint = make_shape(name, folder / "checkpoint", options.small)
    made, factor = perf_counter(), SIZED[name].factor
    side = round(options.side / factor) * factor
    budgets = tuple(Share(share, 100) for share in SHARES)
    config = ExportConfig(
        str(checkpoint), budgets, folder / "bundle", target=options.target, image_sizes=((side, side),)  # type: ignore[arg-type]
    )  # fmt: skip
    steps: list[tuple[float, str]] = []
    manifest = export_plan(plan(config), lambda step: steps.append((round(perf_counter() - begin, 1), step)))
    exported = perf_counter()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    picture = _picture(side)
    with load(folder / "bundle", cache_mb=0) as session:
        peer = Peer(checkpoint, session, picture)
        samples = _samples(session, peer, picture, options)
        (inputs,) = crop([picture], session.manifest.image, session.manifest.crops).inputs.values()
        graphs = {budget: session.manifest.vision_graph(budget) for budget in manifest.budgets}
        shares = {str(b): session.backend.vision_shares(graph, inputs, options.runs) for b, graph in graphs.items()}
        equal = peer.first_token() == session.generate(PROMPT, [picture], budget=max(manifest.budgets), **_one()).token_ids[0]
    return {
        "family": manifest.family,
        "pixels": [side, side],
        "tokens": manifest.tokens_per_crop,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "seconds": {"checkpoint": round(made - begin, 1), "export and verify": round(exported - made, 1)},
        "steps": steps,
        "versions": {**manifest.versions, "torch": torch.__version__, "transformers": transformers.__version__},
        "runtime": session.backend.versions(),
        "verification": dict(manifest.verification),
        "first token as transformers": equal,
        "shares": shares,
        "samples_ms": samples,
    }


def _one() -> dict[str, Any]:
    return {"max_new_tokens": 1, "ignore_end": True}


def _samples(session: Session, peer: Peer, picture: bytes, options: SizesOptions) -> dict[str, dict[str, list[float]]]:
    """Return whose answer, a budget's or transformers', to stage to its times; all take turns."""
    samples: dict[str, dict[str, list[float]]] = {}
    asked: dict[str, Callable[[], Mapping[str, float]]] = {"transformers": peer.times}
    for budget in session.manifest.budgets:
        asked[str(budget)] = lambda budget=budget: _times(session, picture, budget)
    for run in range(-options.warmup, options.runs):
        for name, times in asked.items():
            for stage, value in times().items():
                kept = samples.setdefault(name, {}).setdefault(stage, [])
                if run >= 0:
                    kept.append(round(value, 4))
    return samples


def _times(session: Session, picture: bytes, budget: int) -> dict[str, float]:
    """Return the stages of one answer of one token, in ms."""
    found = session.generate(PROMPT, [picture], budget=budget, **_one()).timings
    return {
        "preprocess": found.preprocess, "vision graph": found.vision, "splice": found.splice, "prefill": found.prefill,
        "sample": sum(found.sample), "first token": found.time_to_first_token,
    }  # fmt: skip


class Peer:
    """The checkpoint in transformers, with SDPA, in the bundle's dtype, asked the same."""

    def __init__(self, checkpoint: Path, session: Session, picture: bytes) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        kind: Any = transformers.AutoModelForImageTextToText
        self.model: Any = kind.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").to(self.device).eval()
        self.processor: Any = transformers.AutoImageProcessor.from_pretrained(checkpoint)
        self.picture = picture
        encoded = session.encode_images([picture], max(session.manifest.budgets))
        ids = session.prompt_ids([user_message(PROMPT, 1)], [encoded[0].arrangement])
        self.ids = torch.tensor([session.prompt(ids, encoded).ids], device=self.device)
        self.marks = (self.ids == session.manifest.image_token_id).int()

    def prepared(self) -> dict[str, Any]:
        """Return the model's inputs from the picture's file, on the device."""
        image = Image.open(BytesIO(self.picture)).convert("RGB")
        found = self.processor(images=[image], return_tensors="pt")
        pixels = found["pixel_values"].to(self.device, self.model.dtype)
        return {
            "input_ids": self.ids, "mm_token_type_ids": self.marks, "pixel_values": pixels,
            "image_grid_thw": found["image_grid_thw"].to(self.device), "attention_mask": torch.ones_like(self.ids),
        }  # fmt: skip

    @torch.no_grad()
    def first_token(self) -> int:
        """Return the most probable first token of an answer."""
        return int(self.model(**self.prepared(), logits_to_keep=1).logits[0, -1].argmax())

    @torch.no_grad()
    def times(self) -> dict[str, float]:
        """Return what one answer of one token takes, in ms; the tower is timed apart as well, and not in the sum."""
        begin = perf_counter()
        inputs = self.prepared()
        self._wait()
        ready = perf_counter()
        int(self.model(**inputs, logits_to_keep=1).logits[0, -1].argmax())
        done = perf_counter()
        self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        self._wait()
        seen = perf_counter()
        vision = 1e3 * (seen - done)
        return {
            "preprocess": 1e3 * (ready - begin),
            "vision": vision,
            "prefill": 1e3 * (done - ready) - vision,
            "first token": 1e3 * (done - begin),
        }

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _picture(side: int) -> bytes:
    """Return a picture of the exported size, as JPEG bytes: smooth parts, edges and noise."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[0:side, 0:side] / side
    levels = np.stack([rows, columns, 1 - rows], axis=2) * 180 + 30
    levels[side // 4 : side // 2, side // 5 : side // 2] = rng.uniform(0, 255, (1, 1, 3))
    levels[side // 2 :, side // 2 :] += rng.normal(0, 30, (side - side // 2, side - side // 2, 3))
    buffer = BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
