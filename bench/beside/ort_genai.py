"""onnxruntime-genai's own loop over the graphs of `ort_genai_files.py`; it keeps nothing from one question to the next."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from bench.beside.worker import IMAGE, Answered, Clock
from leanvlm.runtime.optional import require

SIDE, IMAGE_TOKEN = 336, 3
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Peer:
    """A model of its general type for pictures.

    Args:
        folder: What `ort_genai_files.py` wrote.
        image_tokens: Of a picture.
    """

    def __init__(self, folder: str, image_tokens: int) -> None:
        self._genai = require("onnxruntime_genai", "export")
        self._model = self._genai.Model(folder)
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._image_tokens = image_tokens

    def answer(self, prompt: str, jpeg: bytes, tokens: int) -> Answered:
        """Answer with a generator of its own."""
        clock = Clock()
        ids = self._tokenizer.encode(prompt.replace(IMAGE, IMAGE * self._image_tokens)).ids
        assert ids.count(IMAGE_TOKEN) == self._image_tokens
        params = self._genai.GeneratorParams(self._model)
        length = len(ids) + tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, params)
        inputs = self._genai.NamedTensors()
        inputs["pixel_values"] = _pixels(jpeg)
        inputs["num_image_tokens"] = np.array([self._image_tokens], np.int64)
        inputs["input_ids"] = np.array([ids], np.int32)
        generator.set_inputs(inputs)
        while len(clock.tokens) < tokens:
            generator.generate_next_token()
            clock.add(generator.get_next_tokens()[0])
        return clock.answered(len(ids))

    def versions(self) -> dict[str, str]:
        """Return the versions of the loop and of what runs its graphs."""
        ort = require("onnxruntime", "export")
        return {"onnxruntime-genai": str(self._genai.__version__), "onnxruntime": str(ort.__version__)}


def _pixels(jpeg: bytes) -> np.ndarray:
    """Return what CLIP's processor makes of a picture, (1, 3, 336, 336)."""
    picture = Image.open(BytesIO(jpeg)).convert("RGB")
    scale = SIDE / min(picture.size)
    picture = picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    levels = np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    scaled = (levels - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])
