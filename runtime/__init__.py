"""Running a bundle, with no PyTorch: `load` it, then `generate` or `stream`."""

from leanvlm.runtime.answer import Answer, Generation, Pruning, Timings
from leanvlm.runtime.errors import LeanVLMError
from leanvlm.runtime.session import Session, load

__all__ = ["Answer", "Generation", "LeanVLMError", "Pruning", "Session", "Timings", "load"]
