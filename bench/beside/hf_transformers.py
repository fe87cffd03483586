"""transformers with SDPA attention and its default cache; it keeps nothing from one question to the next."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bench.beside.worker import Answered, Clock


class Peer:
    """The checkpoint as it is.

    Args:
        checkpoint: Its folder.
        dtype: `float32` or `bfloat16`.
        threads: Processor threads.
    """

    def __init__(self, checkpoint: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=kind, attn_implementation="sdpa")
        self._model: Any = model.eval()
        self._processor: Any = AutoProcessor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def answer(self, prompt: str, jpeg: bytes, tokens: int) -> Answered:
        """Answer by the forward pass itself, the highest logit each time: `generate` would add to each token."""
        clock = Clock()
        picture = Image.open(BytesIO(jpeg)).convert("RGB")
        inputs = self._processor(images=picture, text=prompt, return_tensors="pt").to(self._model.dtype)
        out = self._model(**inputs, logits_to_keep=1, use_cache=True)
        clock.add(out.logits[0, -1].argmax())
        while len(clock.tokens) < tokens:
            last = torch.tensor([[clock.tokens[-1]]])
            out = self._model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
            clock.add(out.logits[0, -1].argmax())
        return clock.answered(inputs["input_ids"].shape[1])

    def versions(self) -> dict[str, str]:
        """Return the versions of transformers and torch."""
        return {"transformers": transformers.__version__, "torch": str(torch.__version__)}
