"""Imports of packages that only some of LeanVLM's work needs."""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from leanvlm.runtime.errors import MissingExtraError

ACTIVITIES = {
    "cpu": "running a bundle",
    "gpu": "running a bundle on a GPU",
    "openvino": "running a bundle with OpenVINO",
    "serve": "serving a bundle",
    "rtx": "running or building TensorRT-RTX engines",
    "trt": "running or building TensorRT engines",
    "export": "exporting",
    "gpu-export": "exporting for a GPU",
    "scale": "answering on many machines",
}

# ONNX Runtime reports its use from 1.32 on (from files in the home's cache), the Hub's client with every request, Ray hourly.
TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
# OpenVINO reports that it was imported, and leaves files in the home; it does neither where this module cannot be imported.
REPORTER = "openvino_telemetry"


def without_telemetry() -> None:
    """Keep libraries that are imported from now on, and child processes, from reporting; who set a variable keeps it."""
    for name, value in TELEMETRY.items():
        os.environ.setdefault(name, value)
    modules: dict[str, Any] = sys.modules
    modules.setdefault(REPORTER, None)


def require(module: str, extra: str, activity: str | None = None) -> ModuleType:
    """Import an optional module, with telemetry off.

    Args:
        module: Its dotted name, such as `torch` or `onnxruntime_genai.models`.
        extra: The extra of the `leanvlm` distribution that installs it, such as `export`.
        activity: What needs it, as the message says it; None takes the extra's usual purpose.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module's distribution is not installed. An import that fails inside an installed
            package is passed on as it is, because installing the extra would not mend it.
    """
    # Whatever the module: PyTorch and others import ONNX Runtime by themselves.
    without_telemetry()
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (package, module):
            raise
        what = activity or ACTIVITIES.get(extra, "this")
        raise MissingExtraError(f"{what} needs {package}, which is not installed: pip install 'leanvlm[{extra}]'") from error
