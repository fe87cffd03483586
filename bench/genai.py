"""onnxruntime-genai's own generate loop around the same decoder weights, for comparison.

Its loop wants token ids, so the decoder is built once more, with its token table inside, by the same builder.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.config import ExportConfig
from leanvlm.exporter.decoders import decoder_for
from leanvlm.exporter.decoders.genai import write_text_checkpoint
from leanvlm.exporter.decoders.in_memory import in_memory
from leanvlm.runtime.optional import require
from leanvlm.runtime.positions import PositionRule

PROMPT_TOKENS = 104


def build(checkpoint: Path, folder: Path, precision: str, target: str) -> Path:
    """Write a decoder with `genai_config.json` into a new folder."""
    source = open_checkpoint(ExportConfig(str(checkpoint)))
    decoder = source.family.parts(load_model(source)).decoder
    class_name = decoder_for(source.config.text_config).builder
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        text = Path(scratch) / "decoder"
        write_text_checkpoint(source, text)
        builder = require("onnxruntime_genai.models.builder", "gpu-export")
        options = ["prune_lm_head=true", "enable_cuda_graph=true"] if target == "cuda" else ["prune_lm_head=true"]
        extra = builder.parse_extra_options(str(text), str(text), str(folder), precision, target, scratch, options)
        details = extra.pop("hf_details")
        extra.pop("_effective_builder_config", None)
        io_dtype, onnx_dtype = builder.set_io_dtype(precision, target, extra), builder.set_onnx_dtype(precision, extra)
        model: Any = in_memory(getattr(builder, class_name), decoder, PositionRule("compact"))(
            details["hf_config"], io_dtype, onnx_dtype, target, scratch, extra
        )
        model.make_model(str(text))
        folder.mkdir(parents=True)
        model.save_model(str(folder))
        model.make_genai_config(details["hf_config"], details.get("extra_kwargs", {}), str(folder))
        for file in text.glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
    return folder


def decode_times(folder: Path, runs: int, warmup: int) -> list[float]:
    """Return the times of its decode steps behind a prompt of 104 tokens, in ms."""
    genai: Any = require("onnxruntime_genai", "gpu-export")
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    steps = runs + warmup
    params.set_search_options(max_length=PROMPT_TOKENS + steps + 2, min_length=PROMPT_TOKENS + steps + 2, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens([[1] + [7 + index % 50 for index in range(PROMPT_TOKENS - 1)]])
    times = []
    for _ in range(steps):
        begin = perf_counter()
        generator.generate_next_token()
        generator.get_next_tokens()
        times.append(1e3 * (perf_counter() - begin))
    return times[warmup:]
