"""What others need for the same work, on the same weights: transformers, and PyTorch's kernels in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

Array = npt.NDArray[Any]
STATIC_TOKENS = 33


class Transformers:
    """The checkpoint in transformers: fp16, SDPA attention, eager.

    Attributes:
        model: The model on the GPU.
        processor: Its processor, as `AutoProcessor` gives it.
    """

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa")
        self.model = self.model.to(self.device).eval()
        self.dtype = dtype
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)

    def inputs(self, image: Image.Image, prompt: str) -> Any:
        """Return the model's inputs on the device, prepared by its own processor."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(images=image, text=text, return_tensors="pt").to(self.device, self.dtype)

    @torch.no_grad()
    def first_token(self, image: Image.Image, prompt: str) -> int:
        """Return the first greedy token of an answer."""
        return int(self.model(**self.inputs(image, prompt), logits_to_keep=1).logits[0, -1].argmax())

    @torch.no_grad()
    def vision(self, pixels: torch.Tensor) -> Any:
        """Return the projected features of pixel values, all of them."""
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return self.model.model.multi_modal_projector(hidden)

    @torch.no_grad()
    def logits(self, embeddings: Array) -> Array:
        """Return the logits (V,) behind embeddings (S, D)."""
        rows = torch.from_numpy(embeddings).to(self.device, self.dtype)[None]
        hidden = self.model.model.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state[:, -1:]
        scores: Array = self.model.lm_head(hidden)[0, 0].float().cpu().numpy()
        return scores

    @torch.no_grad()
    def decode(self, image: Image.Image, prompt: str, steps: int) -> Iterator[float]:
        """Yield the times of greedy decode steps with the default cache, in ms."""
        out = self.model(**self.inputs(image, prompt), logits_to_keep=1, use_cache=True)
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            self.synchronize()
            begin = perf_counter()
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            int(out.logits[0, -1].argmax())
            yield 1e3 * (perf_counter() - begin)

    @torch.no_grad()
    def static_decode(self, image: Image.Image, prompt: str, runs: int) -> list[float]:
        """Return times of a decode step in `generate` with a static cache, which compiles the forward pass, in ms."""
        inputs = self.inputs(image, prompt)

        def answer(tokens: int) -> float:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
            self.synchronize()
            begin = perf_counter()
            self.model.generate(**inputs, **options)
            self.synchronize()
            return 1e3 * (perf_counter() - begin)

        for _ in range(3):
            answer(STATIC_TOKENS)
        answer(1)
        return [(answer(STATIC_TOKENS) - answer(1)) / (STATIC_TOKENS - 1) for _ in range(runs)]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def vision_graph(model: Any, pixels: torch.Tensor) -> Callable[[], None]:
    """Capture the tower up to the feature layer, and the projector, with PyTorch's own kernels, unpruned.

    Returns:
        A function that replays the graph and waits for it.
    """
    core = model.model
    tower, projector = getattr(core.vision_tower, "vision_model", core.vision_tower), core.multi_modal_projector
    blocks = list(tower.encoder.layers)[: len(tower.encoder.layers) - 1]

    def run() -> torch.Tensor:
        states = tower.pre_layrnorm(tower.embeddings(pixels))
        for block in blocks:
            states = block(states, None)
        features: torch.Tensor = projector(states[:, 1:])
        return features

    for _ in range(3):
        run()
    if not torch.cuda.is_available():

        def once() -> None:
            run()

        return once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def copy_bandwidth(size: int = 1 << 31, runs: int = 20) -> float:
    """Return the median bandwidth of a copy within the device, bytes read and written in a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = size if device == "cuda" else 1 << 26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (np.median([_timed(lambda: target.copy_(source)) for _ in range(runs + 3)][3:]) / 1e3)


def matmul_rate(size: int = 8192, runs: int = 20) -> float:
    """Return the median rate of a product of square fp16 matrices, operations in a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (size, torch.float16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (np.median([_timed(lambda: a @ b) for _ in range(runs + 3)][3:]) / 1e3)


def _timed(run: Callable[[], Any]) -> float:
    """Return the time of device work in ms, by events where there are any."""
    if not torch.cuda.is_available():
        begin = perf_counter()
        run()
        return 1e3 * (perf_counter() - begin)
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return float(begin_event.elapsed_time(end_event))
