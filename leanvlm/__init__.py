"""LeanVLM: export a vision-language model with its visual-token pruning inside the graph, and run it without PyTorch.

    leanvlm.export(leanvlm.ExportConfig("llava", budgets=(64,), output="llava-64"))
    with leanvlm.load("llava-64") as vlm:
        print(vlm.generate("How many cups?", images=["photo.jpg"]).text)

Exporting needs the extra `export`. What else there is, is in the packages `runtime`, `exporter`, `demo` and `calibration`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leanvlm.exporter import export
    from leanvlm.exporter.config import ExportConfig
    from leanvlm.runtime.answer import Answer, Generation, Pruning, Timings
    from leanvlm.runtime.errors import (
        BackendError,
        BundleError,
        CheckpointError,
        ContextOverflowError,
        GraphError,
        InputError,
        LeanVLMError,
        LeanVLMWarning,
        ManifestError,
        MissingExtraError,
        QueueFullError,
        SessionClosedError,
        ShuttingDownError,
        TimeLimitError,
        UnsupportedModelError,
        UnsupportedPrunerError,
        VerificationError,
    )
    from leanvlm.runtime.session import Session, load

    __version__: str

__all__ = [
    "Answer",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "ContextOverflowError",
    "ExportConfig",
    "Generation",
    "GraphError",
    "InputError",
    "LeanVLMError",
    "LeanVLMWarning",
    "ManifestError",
    "MissingExtraError",
    "Pruning",
    "QueueFullError",
    "Session",
    "SessionClosedError",
    "ShuttingDownError",
    "TimeLimitError",
    "Timings",
    "UnsupportedModelError",
    "UnsupportedPrunerError",
    "VerificationError",
    "__version__",
    "export",
    "load",
]

# Imported when first asked for, so that a device loads nothing of the exporter, and the command hears signals at once.
_MODULES = {
    "ExportConfig": "leanvlm.exporter.config",
    "export": "leanvlm.exporter",
    "Answer": "leanvlm.runtime.answer",
    "Generation": "leanvlm.runtime.answer",
    "Pruning": "leanvlm.runtime.answer",
    "Timings": "leanvlm.runtime.answer",
    "Session": "leanvlm.runtime.session",
    "load": "leanvlm.runtime.session",
}
_ERRORS = "leanvlm.runtime.errors"

if not TYPE_CHECKING:  # A type checker that saw this would let every misspelt name pass.

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version(__name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES.get(name, _ERRORS)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
