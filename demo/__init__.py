"""The built-in models, and the synthetic scenes that they were trained on.

`MODEL_DIR` is a Hugging Face `LlavaForConditionalGeneration` of 7.3 million parameters with LLaVA-1.5's geometry
(336 x 336 pixels, patches of 14, 576 image tokens, features of layer -2). It answers short questions about the scenes
of `leanvlm.demo.scenes`, which `leanvlm.demo.render` draws. `SMALL_DIR` is its smaller sibling of 1.5 million, for fast tests.
`SAMPLES_DIR` holds two held-out scenes: their images, and questions and answers in `samples.json`.
"""

from pathlib import Path

__all__ = ["ERANK_REF", "MODEL_DIR", "SAMPLES_DIR", "SMALL_DIR", "SMALL_ERANK_REF"]

MODEL_DIR = Path(__file__).parent / "model"
SMALL_DIR = Path(__file__).parent / "small"
SAMPLES_DIR = Path(__file__).parent / "samples"

# Mean effective rank of the projected image tokens over 2000 scenes of the training distribution, as
# `leanvlm calibrate gate --model demo --scenes 2000` finds it.
ERANK_REF = 64.24
SMALL_ERANK_REF = 42.94
