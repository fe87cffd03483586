"""Running a bundle, with no PyTorch: `load` it, then `generate` or `stream`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leanvlm.runtime.answer import Answer, Generation, Pruning, Timings
    from leanvlm.runtime.errors import LeanVLMError
    from leanvlm.runtime.session import Session, load

__all__ = ["Answer", "Generation", "LeanVLMError", "Pruning", "Session", "Timings", "load"]

# Imported when first asked for, so that the command line listens to signals before its imports begin.
_MODULES = {"LeanVLMError": "errors", "Session": "session", "load": "session"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'answer')}"), name)
