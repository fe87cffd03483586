"""OpenVINO GenAI's pipeline for vision-language models, on what optimum-intel exports of the checkpoint."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import openvino
import openvino_genai
from PIL import Image

from bench.beside.worker import IMAGE, Answered, Clock


class _Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Times tokens as they come, alone or several."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()

    def write(self, token: Any) -> Any:
        """Note a token."""
        for one in token if isinstance(token, list) else [token]:
            self.clock.add(one)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Do nothing: there is no text to flush."""


class Peer:
    """A pipeline with continuous batching, which is what keeps prefixes.

    Args:
        folder: What optimum-intel wrote.
        threads: Processor threads.
        keep_prefixes: Whether keys and values of earlier prompts are kept.
        precision: Arithmetic asked for, such as `f32`; None leaves it to OpenVINO, which takes bfloat16 where there is any.
    """

    def __init__(self, folder: str, threads: int, keep_prefixes: bool, precision: str | None = None) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = keep_prefixes
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision is not None:
            properties["INFERENCE_PRECISION_HINT"] = precision
        self._pipeline = openvino_genai.VLMPipeline(folder, "CPU", scheduler_config=scheduler, **properties)

    def answer(self, prompt: str, jpeg: bytes, tokens: int) -> Answered:
        """Answer a prompt that is written out."""
        streamer = _Streamer()
        picture = np.asarray(Image.open(BytesIO(jpeg)).convert("RGB"))[None]
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = tokens, True, False, False
        # It puts a line break behind the picture's tokens itself.
        text = prompt.replace(f"{IMAGE}\n", "<ov_genai_image_0>")
        result = self._pipeline.generate(text, images=[openvino.Tensor(picture)], generation_config=config, streamer=streamer)
        return streamer.clock.answered(result.perf_metrics.get_num_input_tokens())

    def versions(self) -> dict[str, str]:
        """Return the version."""
        return {"openvino-genai": str(openvino_genai.__version__)}
